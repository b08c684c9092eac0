"""The real program, on a model of a few thousand parameters."""

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import sys
import types

import jax
import numpy as np
import optax
import pytest

from tests.programs import start
from trace_jax import sharding
from trace_jax.chips import CHIPS
from trace_jax.config import Mesh, load_config, to_json
from trace_jax.data.builders import mbeir
from trace_jax.data.pipeline import training_batches
from trace_jax.data.tokenizer import Processor
from trace_jax.model import weights
from trace_jax.training import metrics
from trace_jax.training import train as module
from trace_jax.training.checkpoint import Checkpoints
from trace_jax.training.losses import SCALE, Mean, loss_parameters
from trace_jax.training.optimizer import make_optimizer
from trace_jax.training.train import (
    TrainState,
    host_batches,
    init_optimizer,
    load_model,
    make_train_step,
    make_validation,
    model_identity,
    restore_model,
    split_model,
    train,
)


def replace(config, **training):
    return dataclasses.replace(config, training=dataclasses.replace(config.training, **training))


def losses(config):
    return {row["step"]: row["loss"] for row in metrics.read_metrics(config.run_dir)}


@pytest.fixture(scope="module")
def tiny_config(tiny_config):
    """The experiment in miniature with every part of the loss."""
    return dataclasses.replace(
        tiny_config, loss=dataclasses.replace(tiny_config.loss, learn_temperature=True, both_directions=True)
    )


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
    wanted |= {"temperature", "step_seconds", "data_wait"}
    assert wanted <= set(rows[0])
    assert all(row["dropped"] == 0 for row in rows)
    learned = [row["temperature"] for row in rows]
    assert learned[0] == pytest.approx(straight.loss.temperature) and len(set(learned)) > 1


def saved_state(config):
    """(step, every array of the newest checkpoint: parameters, what the loss learns, and the optimizer's state)."""
    mesh = sharding.make_mesh(config.mesh)
    processor = Processor.from_hf(config.model.base, config.data)
    _, trainable, _ = split_model(load_model(config, processor, mesh), config.model.trainable)
    trainable |= loss_parameters(config.loss, sharding.replicated(mesh))
    state = init_optimizer(make_optimizer(config.optimizer, config.training.steps), trainable, mesh)
    checkpoints = Checkpoints(config, model_identity(config))
    step, items = checkpoints.restore(trainable=trainable, optimizer=state)
    checkpoints.close()
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(items)}


def notice_at(monkeypatch, wanted):
    """A preemption notice (SIGTERM) while step `wanted` runs."""
    real, moved = sharding.to_devices, []

    def to_devices(batch, mesh):
        moved.append(batch)
        if len(moved) == wanted:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(batch, mesh)

    monkeypatch.setattr(module.sharding, "to_devices", to_devices)
    return moved


@pytest.fixture(scope="module")
def straight_state(straight):
    return saved_state(straight)


@pytest.fixture(scope="module")
def halted(tiny_config, tmp_path_factory):
    """Three steps of the same, ended by a preemption notice."""
    config = dataclasses.replace(tiny_config, workdir=str(tmp_path_factory.mktemp("halted")))
    with pytest.MonkeyPatch.context() as patch:
        moved, said = notice_at(patch, 3), []
        patch.setattr(module.log, "warning", lambda text, *values: said.append(text % values))
        with pytest.raises(SystemExit) as stopped:
            train(config)
    assert stopped.value.code == os.EX_TEMPFAIL == 75  # launch/tpu_vm.sh and launch/jobset.yaml know it
    assert len(moved) == 3  # the notice is seen before another step starts
    assert re.fullmatch(r"stopped at step 3 with a checkpoint, \d+\.\d s after the notice; the same .*", said[-1]), said
    assert max(losses(config)) == 3 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return config


@pytest.mark.parametrize(
    ("mesh", "rtol"), [(None, 0), (Mesh(data=2, fsdp=2, tensor=2), 1e-4)], ids=["same mesh", "another mesh"]
)
def test_stopped_and_resumed_equals_straight(straight, straight_state, halted, tmp_path, mesh, rtol):
    """Bit for bit on the same mesh: parameters, both moments and what was logged; on another within rounding."""
    shutil.copytree(halted.run_dir, tmp_path / "run")
    config = dataclasses.replace(halted, workdir=str(tmp_path / "run"), mesh=mesh or halted.mesh)
    train(config)
    (step, arrays), (last, expected) = saved_state(config), straight_state
    assert step == last == 6 and arrays.keys() == expected.keys()
    for name, array in arrays.items():
        reference = expected[name]
        if mesh is None:
            np.testing.assert_array_equal(array, reference, err_msg=name)
        else:  # of the whole array: one element's rounding has a longer tail
            assert np.linalg.norm(array - reference) <= rtol * np.linalg.norm(reference), name
    ours, theirs = losses(config), losses(straight)
    np.testing.assert_allclose([ours[s] for s in theirs], list(theirs.values()), rtol=rtol)


def test_a_notice_during_a_validation_ends_it(straight, fresh_config, monkeypatch, caplog):
    config = replace(fresh_config, validate_every=2, validation_batches=50)
    with monkeypatch.context() as patch:
        moved = notice_at(patch, 5)  # two steps, and three batches of the first validation
        with pytest.raises(SystemExit):
            train(config)
    assert len(moved) == 5 and "stopped at step 2 with a checkpoint" in caplog.text
    rows = metrics.read_metrics(config.run_dir)
    assert [row["step"] for row in rows] == [1, 2] and "val_loss" not in rows[-1]
    assert losses(config) == {step: losses(straight)[step] for step in (1, 2)}


def test_a_checkpoint_is_written_when_its_minutes_are_over_and_pairs_without_room_are_told(
    fresh_config, monkeypatch, caplog
):
    clock = [0.0]
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    real, saved = Checkpoints.save, []

    def save(self, step, *rest, **options):
        saved.append(step)
        return real(self, step, *rest, **options)

    def describe(step, *_):
        clock[0] += 60.0
        return ""

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(module.metrics, "describe", describe)
    processor = Processor.from_hf(fresh_config.model.base, fresh_config.data)
    rows = host_batches(fresh_config, processor, sharding.make_mesh(fresh_config.mesh)).capacity.rows // 2
    config = dataclasses.replace(fresh_config, data=dataclasses.replace(fresh_config.data, rows=rows))
    train(replace(config, steps=8, checkpoint_minutes=2.5))  # a step takes a minute
    assert saved == [3, 6, 8]
    for row in metrics.read_metrics(config.run_dir):
        told = f"{row['dropped']:.3g} pairs a step found no room in their shard up to step {row['step']} "
        assert row["dropped"] > 0 and told in caplog.text


def test_a_kill_while_metrics_are_written_loses_no_row(fresh_config, monkeypatch):
    log = metrics.MetricLog(fresh_config, 0, 1.0)
    log.add(a_step())
    log.write(1, {})
    log.add(a_step())

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(log._file), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log.write(2, {})
    log.close()
    assert [row["step"] for row in metrics.read_metrics(fresh_config.run_dir)] == [1]


def test_a_finished_run_is_left_alone(straight):
    before = losses(straight)
    train(straight)
    assert losses(straight) == before


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=2, fsdp=2, tensor=2),
        pytest.param(Mesh(data=8), marks=pytest.mark.slow),
        pytest.param(Mesh(data=1, fsdp=4, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_losses(straight, fresh_config, mesh):
    config = replace(dataclasses.replace(fresh_config, mesh=mesh), steps=6)
    train(config)
    ours, theirs = losses(config), losses(straight)
    np.testing.assert_allclose([ours[s] for s in theirs], list(theirs.values()), rtol=1e-4)


def test_a_loss_that_is_no_number_stops_the_run_before_a_checkpoint_and_keeps_its_batch(fresh_config, monkeypatch):
    real, moved = sharding.to_devices, []

    def to_devices(batch, mesh):
        moved.append(batch)
        if len(moved) == 3:
            batch.target_weight[:] = np.nan
        return real(batch, mesh)

    monkeypatch.setattr(module.sharding, "to_devices", to_devices)
    config = replace(fresh_config, checkpoint_every=1, log_every=2, keep=9)
    with pytest.raises(FloatingPointError, match=r"not a number at step 3\..*bad_batch_3\.npz.*'names'"):
        train(config)
    run = pathlib.Path(config.run_dir)
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()) == [1, 2]
    saved = np.load(run / "bad_batch_3.npz")
    assert np.isnan(saved["target_weight"]).all() and (saved["tokens"] == moved[2].inputs.tokens).all()
    source = mbeir.load_queries(pathlib.Path(config.data.root) / config.data.release, "train")
    tasks = dict(zip(source.keys, source.tasks, strict=True))
    assert saved["names"].shape == saved["task"].shape
    assert [tasks[name] for name in saved["names"].flat] == saved["task"].reshape(-1).tolist()


def test_validation_and_profile_change_nothing(straight, fresh_config, monkeypatch):
    traced = []
    monkeypatch.setattr(jax.profiler, "start_trace", traced.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: traced.append("stop"))
    config = replace(fresh_config, log_every=2, validate_every=3, validation_batches=2, profile=(2, 4))
    train(config)
    assert traced == [f"{config.run_dir}/profile", "stop"]
    rows = {row["step"]: row for row in metrics.read_metrics(config.run_dir)}
    assert {step for step, row in rows.items() if "val_loss" in row} == {3, 6} and set(rows) == {2, 3, 4, 6}
    wanted = {"val_loss_gen", "val_loss_ret", "val_recall_in_batch", "val_routing_accuracy"}
    assert wanted <= set(rows[6]) and rows[6]["val_loss"] < rows[3]["val_loss"]
    assert losses(config)[3] == losses(straight)[3]  # the mean over step 3 alone
    processor, mesh = Processor.from_hf(config.model.base, config.data), sharding.make_mesh(config.mesh)
    restored = restore_model(config, processor, mesh)
    graph, trainable, frozen = split_model(restored[1], config.model.trainable)
    scale = {SCALE: np.float32(-np.log(rows[6]["val_temperature"]))}
    validate = make_validation(graph, processor, config, mesh)
    again = validate(trainable | scale, frozen, lambda: False)
    for name in wanted:
        assert again[name] == pytest.approx(rows[6][name], abs=1e-5)
    answers = iter([False, True])
    assert validate(trainable | scale, frozen, lambda: next(answers)) is None  # after one batch of two
    pipeline = host_batches(config, processor, mesh, split="val")
    assert not set(pipeline.names(0).flat) & set(host_batches(config, processor, mesh).names(0).flat)


def a_step():
    return {"loss": Mean(np.float32(3.0), np.float32(2.0)), "tokens": Mean(np.float32(8.0), np.float32(1.0))}


def test_speeds_are_of_the_steps_alone(fresh_config, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    device = types.SimpleNamespace(device_kind="TPU v5 lite", memory_stats=lambda: {"peak_bytes_in_use": 2**29})
    monkeypatch.setattr(jax, "local_devices", lambda: [device, device])
    log = metrics.MetricLog(fresh_config, 0, 8 * CHIPS["v5e"].bf16_flops)  # a second at the peak of eight chips
    for _ in range(2):
        with log.waiting():
            clock[0] += 0.5
        clock[0] += 1.5
        log.add(a_step())
    with log.aside():
        clock[0] += 10
    row = log.write(2, {})
    log.close()
    assert (row["loss"], row["step_seconds"], row["data_wait"], row["memory_gib"]) == (1.5, 2.0, 0.25, 0.5)
    assert (row["tokens_per_second"], row["examples_per_second"], row["mfu"]) == (4.0, 8.0, 0.5)


def test_a_profile_outside_the_run_is_refused(fresh_config):
    with pytest.raises(ValueError, match=r"profile \(2, 9\): the window must lie in steps 1 to 3"):
        train(replace(fresh_config, steps=3, profile=(2, 9)))


def test_weights_and_biases_by_switch(fresh_config, monkeypatch):
    said = []
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: (
        said.append(options)
        or types.SimpleNamespace(log=lambda row, step: said.append((step, row)), finish=lambda: said.append("finish"))
    )
    config = replace(fresh_config, wandb="trace")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        metrics.MetricLog(config, 0, 1.0)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = metrics.MetricLog(config, 0, 1.0)
    log.add(a_step())
    log.write(1, {"learning_rate": 0.5})
    log.close()
    assert said[0]["project"] == "trace" and said[0]["config"] == to_json(config) and said[0]["resume"] == "allow"
    step, row = said[1]
    assert step == 1 and row["loss"] == 1.5 and row["learning_rate"] == 0.5 and said[2] == "finish"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the wandb package")
def test_the_real_weights_and_biases_gets_every_step(fresh_config, tmp_path):
    """Offline, as on a machine without an account; a run that goes on is the same run of theirs."""
    data = dataclasses.replace(fresh_config.data, weights=load_config("emoji_tiny").data.weights)
    for steps in (2, 3):
        config = replace(dataclasses.replace(fresh_config, data=data), steps=steps, wandb="trace")
        process = start("train", config, WANDB_MODE="offline", WANDB_DIR=str(tmp_path), JAX_NUM_CPU_DEVICES="2")
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2 and files[0].name == files[1].name  # named by the run directory
    for file in files:
        stored = file.read_bytes()
        for name in (b"loss_ret", b"recall_in_batch", b"tokens_per_second", b"row_length"):
            assert name in stored, name


@pytest.mark.parametrize(
    ("shards", "chunks", "detached"),
    [
        (2, 2, True),
        pytest.param(1, 4, False, marks=pytest.mark.slow),
        pytest.param(4, 1, False, marks=pytest.mark.slow),
    ],
)
def test_gradient_caching_gives_the_gradient_of_the_whole_batch(tiny_config, shards, chunks, detached):
    loss = dataclasses.replace(tiny_config.loss, detach_emission=detached)
    tiny_config = dataclasses.replace(tiny_config, loss=loss)

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
        trainable |= loss_parameters(config.loss, sharding.replicated(mesh))
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
