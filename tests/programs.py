"""The programs of launch/ as processes of their own, run with a test's configuration."""

import os
import socket
import subprocess
import sys

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


def start(stage: str, config: Config, **environment: str) -> subprocess.Popen:
    """Starts a program; its errors can be read, its output is dropped."""
    command = [sys.executable, str(ROOT / "launch" / f"{stage}.py"), "emoji_tiny", *flags(config)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


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
