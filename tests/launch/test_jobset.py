"""launch/jobset.yaml: what it runs exists, and what it does at an end is what training means by it."""

import math
import os

import yaml

from trace_jax.config import ROOT, load_config


def job() -> tuple[dict, dict]:
    """The JobSet's and its one Job's specification."""
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())["spec"]
    (replicated,) = jobset["replicatedJobs"]
    return jobset, replicated["template"]["spec"]


def test_its_command_is_a_program_with_a_configuration():
    _, spec = job()
    python, program, name, *overrides = spec["template"]["spec"]["containers"][0]["command"]
    assert python == "python" and (ROOT / program).is_file()
    assert load_config(name, overrides).run_dir.startswith("gs://")


def test_each_host_of_the_topology_has_a_pod():
    _, spec = job()
    pod = spec["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    assert spec["parallelism"] == spec["completions"]
    assert chips == spec["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]


def test_an_error_ends_it_and_a_saved_stop_starts_it_again():
    jobset, spec = job()
    (rule,) = spec["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"], codes["values"]) == ("FailJob", "In", [1])
    assert os.EX_TEMPFAIL not in codes["values"]
    assert codes["containerName"] == spec["template"]["spec"]["containers"][0]["name"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # Kubernetes asks for it with a podFailurePolicy
    assert spec["backoffLimit"] == 0 and jobset["failurePolicy"]["maxRestarts"] > 0
    assert jobset["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
