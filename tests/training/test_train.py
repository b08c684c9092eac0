"""The real program, on a model of a few thousand parameters."""

import dataclasses
import os
import signal

import jax
import numpy as np
import optax
import pytest

from trace_jax import sharding
from trace_jax.config import Mesh
from trace_jax.data.pipeline import training_batches
from trace_jax.data.tokenizer import Processor
from trace_jax.model import weights
from trace_jax.training import metrics
from trace_jax.training.train import TrainState, load_model, make_train_step, split_model, train


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


@pytest.mark.parametrize(("shards", "chunks"), [(1, 4), (2, 2), (4, 1)])
def test_gradient_caching_gives_the_gradient_of_the_whole_batch(tiny_config, shards, chunks):
    def step(shards, chunks):
        """Parameters after a step of plain descent, minus the gradient; losses; supervised tokens."""
        data = dataclasses.replace(tiny_config.data, hard_negatives=1)
        config = dataclasses.replace(replace(tiny_config, chunks=chunks), data=data)
        mesh = sharding.make_mesh(Mesh(shards), jax.devices()[:shards])
        processor = Processor.from_hf(config.model.base, config.data)
        model = load_model(config, processor, mesh)
        for path, leaf in weights.flat_parameters(model).items():
            if path.endswith("lora_b"):  # zeros would hide the gradient of lora_a
                leaf[...] = jax.device_put(0.05 * np.random.default_rng(0).normal(size=leaf.shape), leaf.sharding)
        graph, trainable, frozen = split_model(model, config.model.trainable)
        pipeline = training_batches(config, processor, shards=shards * chunks)
        batch = pipeline.batches[0]
        assert (batch.query_index >= 0).sum() == config.data.batch_size
        descent = optax.sgd(1.0)
        state = TrainState(trainable, descent.init(trainable))
        shardings = jax.tree.map(lambda array: array.sharding, state)
        run = make_train_step(graph, descent, processor.emb, config, shardings)
        before = jax.tree.map(np.asarray, state.trainable)
        after, measured = run(state, frozen, sharding.to_devices(batch, mesh))
        gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, after.trainable)
        return gradients, {name: float(mean.value()) for name, mean in measured.items()}, batch

    whole, expected, batch = step(1, 1)
    counts = [(batch.target_weight > 0).sum(), batch.reasoned.sum(), (batch.negative_index >= 0).sum()]
    assert counts[0] > batch.reasoned.size > counts[1] > 0 and counts[2] > 0  # traces, none, and hard negatives
    chunked, measured, _ = step(shards, chunks)
    for name in ("loss", "loss_gen", "loss_ret", "recall_in_batch", "emb_cosine", "token_accuracy"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-5), name
    flat, same = jax.tree.leaves_with_path(whole), jax.tree.leaves(chunked)
    for (path, gradient), other in zip(flat, same, strict=True):
        assert np.abs(gradient).max() > 0, path
        np.testing.assert_allclose(other, gradient, atol=1e-5 * np.abs(gradient).max(), rtol=1e-5, err_msg=str(path))
