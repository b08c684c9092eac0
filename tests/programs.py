"""The programs of launch/ as processes of their own, run with a test's configuration."""

import os
import socket
import subprocess
import sys
import tempfile

from trace_jax.config import ROOT, Config, load_config, to_json


def flags(config: Config) -> list[str]:
    """The options that turn emoji_tiny into `config`."""
    found = []

    def compare(ours, theirs, path: str) -> None:
        for name, value in ours.items():
            if isinstance(value, dict) and isinstance(theirs[name], dict):
                compare(value, theirs[name], f"{path}{name}.")
            elif value != theirs[name]:
                option = f"{path}{name}".replace("_", "-")
                negated = ".".join([*option.split(".")[:-1], f"no-{option.split('.')[-1]}"])
                found.extend(
                    [f"--{option if value else negated}"] if isinstance(value, bool) else [f"--{option}", str(value)]
                )

    compare(to_json(config) | {"name": "emoji_tiny"}, to_json(load_config("emoji_tiny")), "")
    return found


class Program(subprocess.Popen):
    """A running program, whose output is dropped. Its errors go to a file: a pipe that nobody reads would stop it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._file, self._said = tempfile.TemporaryFile("w+"), ""  # noqa: SIM115 (`communicate` closes it)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": self._file, "text": True}
        super().__init__(command, cwd=ROOT, env=os.environ | environment, **quiet)

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[None, str]:
        """Waits for the end: nothing, and its errors."""
        self.wait(timeout)
        if not self._file.closed:
            with self._file:
                self._file.seek(0)
                self._said = self._file.read()
        return None, self._said


def start(stage: str, config: Config, **environment: str) -> Program:
    """Starts a program of launch/."""
    command = [sys.executable, str(ROOT / "launch" / f"{stage}.py"), "emoji_tiny", *flags(config)]
    return Program(command, environment)


def environments(processes: int, devices: int = 8) -> list[dict[str, str]]:
    """What tells so many processes that they are one program and share so many CPU devices; one is told nothing more
    than how many devices there are.
    """
    own = {"JAX_NUM_CPU_DEVICES": str(devices // processes)}
    if processes == 1:
        return [own]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = own | {"JAX_NUM_PROCESSES": str(processes), "JAX_COORDINATOR_ADDRESS": f"localhost:{port}"}
    return [shared | {"JAX_PROCESS_ID": str(i)} for i in range(processes)]
