"""launch/tpu_vm.sh against a stand-in for gcloud, which records its calls and runs here what is sent over ssh."""

import json
import os
import pathlib
import subprocess
import time

import pytest

from trace_jax.config import ROOT

SCRIPT = ROOT / "launch" / "tpu_vm.sh"
GCLOUD = """#!/usr/bin/env python3
import json, os, pathlib, shutil, subprocess, sys
home, args = pathlib.Path(os.environ["STUB"]), sys.argv[1:]
with (home / "calls").open("a") as calls:
    calls.write(json.dumps(args) + "\\n")
group, action = args[2], args[3]
option = {a.partition("=")[0]: a.partition("=")[2] for a in args if a.startswith("--")}
if action == "describe":
    states = (home / "states").read_text().split()
    if len(states) > 1:
        (home / "states").write_text(" ".join(states[1:]))
    if states[0] == "ABSENT":
        sys.exit(1)
    print(states[0])
elif action == "scp":
    node = args[5].rstrip(":")
    (home / node).mkdir(exist_ok=True)
    shutil.copy(args[4], home / node)
elif action == "ssh":
    (home / args[4]).mkdir(exist_ok=True)
    sys.exit(subprocess.run(["bash", "-c", option["--command"]], cwd=home / args[4]).returncode)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder with `calls`, `states` (what describe answers, one after another) and a folder for each node."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcloud").write_text(GCLOUD)
    (tmp_path / "bin" / "gcloud").chmod(0o755)
    (tmp_path / "states").write_text("ACTIVE")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STUB", str(tmp_path))
    monkeypatch.setenv("TPU_VM_POLL_SECONDS", "0.1")
    for node in ("pod", "pod-0", "pod-1"):  # the requirements are there already
        (tmp_path / node / "trace_jax" / ".venv" / "bin").mkdir(parents=True)
        wanted = "".join((ROOT / name).read_text() for name in ("requirements.txt", "requirements-tpu.txt"))
        (tmp_path / node / "trace_jax" / ".venv" / "installed").write_text(wanted)
    return tmp_path


def script(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=60, check=False)


def calls(stub: pathlib.Path, action: str) -> list[list[str]]:
    lines = (stub / "calls").read_text().splitlines() if (stub / "calls").exists() else []
    return [call for call in map(json.loads, lines) if call[3] == action]


def wait_for(path: pathlib.Path) -> str:
    for _ in range(300):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} did not come")


def test_create_asks_for_a_queued_resource(stub):
    assert script("create", "pod", "--zone", "us-east5-b", "--type", "v6e-64", "--spot").returncode == 0
    (call,) = calls(stub, "create")
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", "pod"]
    options = ["--zone=us-east5-b", "--node-id=pod", "--accelerator-type=v6e-64"]
    assert call[5:] == [*options, "--runtime-version=v2-alpha-tpuv6e", "--spot"]


def test_several_slices_are_nodes_of_one_resource(stub):
    options = ("--zone", "z", "--type", "v5p-128", "--slices", "2", "--project", "mine")
    assert script("create", "pod", *options).returncode == 0
    (call,) = calls(stub, "create")
    assert {"--node-count=2", "--node-prefix=pod", "--project=mine", "--runtime-version=v2-alpha-tpuv5"} <= set(call)
    done = script("run", "pod", *options, "--", "bash", "-c", "pwd")
    assert done.returncode == 0, done.stderr
    for node in ("pod-0", "pod-1"):
        assert wait_for(stub / node / "trace_jax" / "run.rc") == "0\n"
        assert (stub / node / "trace_jax" / "run.log").read_text().strip().endswith(f"{node}/trace_jax")


def test_run_sends_the_tracked_files_and_the_exact_command(stub):
    words = ["two words", "$HOME", "quote'd"]
    done = script("run", "pod", "--zone", "z", "--", "printf", "%s\n", *words)
    assert done.returncode == 0, done.stderr
    assert wait_for(stub / "pod" / "trace_jax" / "run.rc") == "0\n"
    assert (stub / "pod" / "trace_jax" / "run.log").read_text().splitlines() == words
    assert (stub / "pod" / "trace_jax" / "launch" / "train.py").read_text() == (ROOT / "launch/train.py").read_text()
    assert not (stub / "pod" / "trace_jax" / ".git").exists()


def test_stop_is_a_preemption_notice_to_the_command_itself(stub):
    program = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(7)); print('up', flush=True); "
    program += "time.sleep(60)"
    assert script("run", "pod", "--zone", "z", "--", "python3", "-c", program).returncode == 0
    wait_for(stub / "pod" / "trace_jax" / "run.log")
    assert script("stop", "pod", "--zone", "z").returncode == 0
    assert wait_for(stub / "pod" / "trace_jax" / "run.rc") == "7\n"


def test_keep_creates_and_goes_on_after_a_preemption(stub):
    (stub / "states").write_text("ABSENT WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED SUSPENDED PROVISIONING ACTIVE")
    program = f"echo once >> {stub}/attempts; [ $(wc -l < {stub}/attempts) = 2 ] || exec sleep 5"
    done = script("run", "pod", "--zone", "z", "--type", "v6e-8", "--keep", "--", "bash", "-c", program)
    assert done.returncode == 0, done.stderr
    assert (stub / "attempts").read_text() == "once\nonce\n"
    assert "preempted" in done.stderr and "ended with 0" in done.stdout
    assert len(calls(stub, "create")) == 1 and len(calls(stub, "delete")) == 1


def test_keep_returns_the_exit_code_of_the_command(stub):
    assert script("run", "pod", "--zone", "z", "--keep", "--", "bash", "-c", "exit 3").returncode == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fly", "pod"), "no action 'fly'"),
        (("create", "--zone", "z"), "NAME"),
        (("create", "pod", "--type", "v6e-8"), "--zone is missing"),
        (("create", "pod", "--zone", "z"), "--type is missing"),
        (("create", "pod", "--zone", "z", "--type", "v9-8"), "no runtime is known"),
        (("run", "pod", "--zone", "z"), "after --"),
        (("delete", "pod", "--zone", "z", "--force"), "unknown option --force"),
        (("create", "pod", "--zone", "z", "--slices", "many"), "no number of slices"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(stub, arguments, message):
    done = script(*arguments)
    assert done.returncode == 1 and message in done.stderr
    assert not (stub / "calls").exists()
