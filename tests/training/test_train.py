"""The real program, on a model of a few thousand parameters."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from trace_jax.config import Mesh
from trace_jax.training import metrics
from trace_jax.training.train import train


def replace(config, **training):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def losses(config):
    return {row["step"]: row["loss"] for row in metrics.read_metrics(config.run_dir)}


@pytest.fixture(scope="module")
def straight(tiny_config, tmp_path_factory):
    """Six steps in one go."""
    config = dataclasses.replace(tiny_config, workdir=str(tmp_path_factory.mktemp("straight")))
    train(config)
    return config


def test_losses_fall_and_every_part_is_logged(straight):
    rows = metrics.read_metrics(straight.run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["loss"] < rows[0]["loss"]
    wanted = {"loss_gen", "loss_ret", "recall_in_batch", "emb_first", "routing_accuracy", "emb_cosine"}
    wanted |= {"tokens_per_second", "examples_per_second", "learning_rate", "gradient_norm", "dropped"}
    assert wanted <= set(rows[0])
    assert all(row["dropped"] == 0 for row in rows)


def test_stopped_and_resumed_equals_straight_bit_for_bit(straight, fresh_config, monkeypatch):
    from trace_jax.training import train as module

    real = metrics.describe

    def describe(step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # a preemption notice
        return real(step, *rest)

    monkeypatch.setattr(module.metrics, "describe", describe)
    with pytest.raises(SystemExit, match="goes on from there"):
        train(fresh_config)
    monkeypatch.setattr(module.metrics, "describe", real)
    assert max(losses(fresh_config)) == 3
    train(fresh_config)
    assert losses(fresh_config) == losses(straight)


def test_a_finished_run_is_left_alone(straight):
    before = losses(straight)
    train(straight)
    assert losses(straight) == before


@pytest.mark.parametrize("mesh", [Mesh(data=8), Mesh(data=2, fsdp=2, tensor=2), Mesh(data=1, fsdp=4, tensor=2)])
def test_every_mesh_gives_the_same_losses(straight, fresh_config, mesh):
    config = replace(dataclasses.replace(fresh_config, mesh=mesh), steps=6)
    train(config)
    ours, theirs = losses(config), losses(straight)
    np.testing.assert_allclose([ours[s] for s in theirs], list(theirs.values()), rtol=1e-4)


def test_a_loss_that_is_no_number_stops_the_run(fresh_config, monkeypatch):
    from trace_jax.training import losses as module

    monkeypatch.setattr(module, "normalize", lambda states: states * jax.numpy.float32(np.nan))
    with pytest.raises(FloatingPointError, match="not a number at step 1"):
        train(fresh_config)
