"""Several hosts embed and index a release together: the same bytes as one, also after kill -9."""

import dataclasses
import pathlib
import signal
import subprocess
import time

import pytest

from tests.programs import environments, start
from trace_jax.config import Config


def launch(stage: str, config: Config, processes: int) -> list[subprocess.Popen]:
    """Starts a program in so many processes, each with one CPU device."""
    return [start(stage, config, **own) for own in environments(processes, devices=processes)]


def finish(running: list[subprocess.Popen]) -> None:
    said = [process.communicate()[1][-3000:] for process in running]
    assert [process.returncode for process in running] == [0] * len(running), said


def stored(config: Config, what: str) -> dict[str, bytes]:
    folder = pathlib.Path(config.run_dir) / what
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_embed_and_index_as_one(tiny_config, tmp_path):
    training = dataclasses.replace(tiny_config.training, steps=1)
    one = dataclasses.replace(tiny_config, training=training, workdir=str(tmp_path / "one"))
    two = dataclasses.replace(one, workdir=str(tmp_path / "two"))
    finish(launch("train", one, 1))
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "checkpoints").symlink_to(tmp_path / "one" / "checkpoints")
    running = launch("embed", two, 2)
    while not any((tmp_path / "two").glob("embeddings/tiny/*/*.npy")):
        assert all(process.poll() is None for process in running), [each.communicate()[1][-3000:] for each in running]
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    for stage in ("embed", "build_index"):
        finish(launch(stage, one, 1))
        finish(launch(stage, two, 2))
    for what in ("embeddings", "indexes"):
        assert stored(one, what) and stored(one, what) == stored(two, what)
    assert len(stored(one, "embeddings")) > 4  # both had something to do
