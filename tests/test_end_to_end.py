"""The whole way as a user goes it: train, embed, index, evaluate, report; and the same after kill -9."""

import dataclasses
import json
import pathlib
import signal
import time

import pytest

from tests.programs import flags, start
from trace_jax.config import Config, load_config

STAGES = ("train", "embed", "build_index", "evaluate", "report")
SPEEDS = ("queries_per_second", "seconds")


@pytest.fixture(scope="module")
def config(tiny_config) -> Config:
    training = dataclasses.replace(tiny_config.training, steps=24, checkpoint_every=3)
    data = dataclasses.replace(tiny_config.data, weights=load_config("emoji_tiny").data.weights)
    return dataclasses.replace(tiny_config, training=training, data=data)


def finish(stage: str, config: Config) -> None:
    process = start(stage, config)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]


def kill_when(stage: str, config: Config, there) -> None:
    """Starts a stage and sends SIGKILL as soon as `there()` is true, while it still works."""
    process = start(stage, config)
    while not there():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def figures(value):
    """Metrics without what depends on the clock."""
    if isinstance(value, dict):
        return {name: figures(inner) for name, inner in value.items() if name not in SPEEDS}
    return value


def test_options_say_the_whole_configuration(config):
    assert load_config("emoji_tiny", flags(config)) == dataclasses.replace(config, name="emoji_tiny")


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_metrics(config, tmp_path):
    metrics = {}
    for name in ("straight", "killed"):
        run = dataclasses.replace(config, workdir=str(tmp_path / name))
        folder = pathlib.Path(run.workdir)
        if name == "killed":
            kill_when("train", run, lambda folder=folder: any((folder / "checkpoints").glob("[0-9]*[0-9]")))
        finish("train", run)
        if name == "killed":
            kill_when("embed", run, lambda folder=folder: any((folder / "embeddings").rglob("00000.npy")))
            assert not any((folder / "embeddings").rglob("00001.npy"))
        for stage in STAGES[1:]:
            finish(stage, run)
        metrics[name] = json.loads((folder / "metrics.json").read_text())
        assert (folder / "report.html").stat().st_size > 10_000
    assert set(metrics["straight"]["seconds"]) >= {"train", "embed", "index", "evaluate"}
    assert metrics["straight"]["tasks"]["it2i"]["local"].keys() == {"R@1", "R@5", "R@10"}
    assert figures(metrics["straight"]) == figures(metrics["killed"])
