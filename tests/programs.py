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


def launch(config: Config, processes: int, stage: str = "train", devices: int = 8) -> list[subprocess.Popen]:
    """Starts a program in so many processes that share so many CPU devices."""
    if processes == 1:
        return [start(stage, config, JAX_NUM_CPU_DEVICES=str(devices))]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {
        "JAX_NUM_CPU_DEVICES": str(devices // processes),
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    }
    return [start(stage, config, JAX_PROCESS_ID=str(i), **shared) for i in range(processes)]
