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
import json, os, pathlib, shutil, subprocess, sys, time
home, args = pathlib.Path(os.environ["STUB"]), sys.argv[1:]
with (home / "calls").open("a") as calls:
    calls.write(json.dumps(args) + "\\n")
group, action = args[2], args[3]
option = {a.partition("=")[0]: a.partition("=")[2] for a in args if a.startswith("--")}
failing = home / f"{action}_fails"  # how often the next calls of the kind fail
if failing.exists() and (left := int(failing.read_text())):
    failing.write_text(str(left - 1))
    sys.exit(255)
if action == "describe":
    time.sleep(float((home / "describe_takes").read_text() if (home / "describe_takes").exists() else 0))
    states = (home / "states").read_text().split()
    if len(states) > 1:
        (home / "states").write_text(" ".join(states[1:]))
    if states[0] in ("ABSENT", "OFFLINE"):
        sys.exit("ERROR: NOT_FOUND: no such resource" if states[0] == "ABSENT" else "ERROR: no network")
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


KEEP = ("run", "pod", "--zone", "z", "--type", "v6e-8", "--keep", "--", "bash", "-c")


def test_keep_returns_the_exit_code_of_the_command(stub):
    assert script(*KEEP, "exit 3").returncode == 3


def test_keep_starts_again_what_saved_and_stopped(stub):
    done = script(*KEEP, f"echo once >> {stub}/attempts; [ $(wc -l < {stub}/attempts) = 2 ] || exit 75")
    assert done.returncode == 0, done.stderr
    assert (stub / "attempts").read_text() == "once\nonce\n"
    assert not calls(stub, "create")


def test_keep_ends_where_stop_ended_the_command(stub):
    program = f"trap 'exit 75' TERM; echo up > {stub}/up; while true; do sleep 0.05; done"
    keeping = subprocess.Popen([SCRIPT, *KEEP, program], stdout=subprocess.PIPE, text=True)
    wait_for(stub / "up")
    assert script("stop", "pod", "--zone", "z").returncode == 0
    said, _ = keeping.communicate(timeout=60)
    assert keeping.returncode == 75 and "ended with 75" in said


def test_a_failed_call_is_no_lost_slice(stub):
    """Neither while the slice is waited for nor while the command runs: nothing is created, and it is started once."""
    (stub / "states").write_text("OFFLINE ACTIVE OFFLINE OFFLINE ACTIVE")
    done = script(*KEEP, f"echo once >> {stub}/attempts; sleep 1")
    assert done.returncode == 0, done.stderr
    assert (stub / "attempts").read_text() == "once\n"
    assert not calls(stub, "create") and "no network" in done.stderr


def test_calls_that_fail_at_first_are_tried_again(stub):
    (stub / "states").write_text("ABSENT ACTIVE")
    for action in ("create", "scp", "ssh"):
        (stub / f"{action}_fails").write_text("2")
    assert script(*KEEP, f"echo once >> {stub}/attempts").returncode == 0
    assert (stub / "attempts").read_text() == "once\n"
    assert len(calls(stub, "create")) == len(calls(stub, "scp")) == 3


def test_a_slice_that_cannot_be_reached_is_an_error(stub):
    (stub / "scp_fails").write_text("1000")
    done = script(*KEEP, "true")
    assert done.returncode == 1 and "pod: the command was not started" in done.stderr


def test_a_failure_while_the_slice_goes_is_a_preemption(stub):
    (stub / "states").write_text("ACTIVE ACTIVE SUSPENDED SUSPENDED ABSENT ACTIVE")
    (stub / "describe_takes").write_text("0.7")  # the command has ended before the state is told
    program = f"echo once >> {stub}/attempts; [ $(wc -l < {stub}/attempts) = 2 ] || exit 1"
    done = script(*KEEP, program)
    assert done.returncode == 0, done.stderr
    assert (stub / "attempts").read_text() == "once\nonce\n"


def test_a_second_start_ends_the_first(stub):
    first = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), exit(75))); "
    first += "print('up', flush=True); time.sleep(60)"
    assert script("run", "pod", "--zone", "z", "--", "python3", "-c", first).returncode == 0
    log = stub / "pod" / "trace_jax" / "run.log"
    wait_for(log)
    old = (stub / "pod" / "trace_jax" / "run.pid").read_text().strip()
    assert script("run", "pod", "--zone", "z", "--", "echo", "second").returncode == 0
    assert not pathlib.Path("/proc", old).exists()
    assert wait_for(stub / "pod" / "trace_jax" / "run.rc") == "0\n"
    assert log.read_text() == "up\nsecond\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fly", "pod"), "no action 'fly'"),
        (("create", "--zone", "z"), "NAME"),
        (("create", "pod", "--type", "v6e-8"), "--zone is missing"),
        (("create", "pod", "--zone", "z"), "--type is missing"),
        (("create", "pod", "--zone", "z", "--type", "v9-8"), "no runtime is known"),
        (("run", "pod", "--zone", "z"), "after --"),
        (("run", "pod", "--zone", "z", "--keep", "--", "true"), "--type is missing"),
        (("delete", "pod", "--zone", "z", "--force"), "unknown option --force"),
        (("create", "pod", "--zone", "z", "--slices", "many"), "no number of slices"),
    ],
)
def test_a_wrong_command_line_is_one_clear_error(stub, arguments, message):
    done = script(*arguments)
    assert done.returncode == 1 and message in done.stderr
    assert not (stub / "calls").exists()
