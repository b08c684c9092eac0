"""Training, top to bottom: mesh, model, data, state, step, loop.

One program serves the TRACE fine-tuning and the generative pretraining of a small base; the configuration says what is
trainable and which losses count.
"""

import dataclasses
import itertools
import logging
import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx, traverse_util
from jax.experimental import multihost_utils
from tqdm import tqdm

from trace_jax import sharding
from trace_jax.config import Config
from trace_jax.data.pipeline import Pipeline, training_batches
from trace_jax.data.schema import Batch
from trace_jax.data.tokenizer import Processor
from trace_jax.model import weights
from trace_jax.model.architecture import Architecture
from trace_jax.model.flops import model_flops
from trace_jax.model.qwen2_5_vl import VISUAL, Qwen2_5_VL
from trace_jax.training import metrics
from trace_jax.training.checkpoint import Checkpoints
from trace_jax.training.guard import Guard
from trace_jax.training.losses import SCALE, Mean, ReadOut, bounded, hybrid_loss, loss_parameters, read_out
from trace_jax.training.optimizer import make_optimizer, make_schedule, step_of

log = logging.getLogger(__name__)


class TrainState(NamedTuple):
    """Everything that training changes; the optimizer's count is the step."""

    trainable: Any  # nested dict of parameters, with those of the loss beside the model's
    opt_state: optax.OptState


def load_model(config: Config, processor: Processor, mesh: jax.sharding.Mesh) -> Qwen2_5_VL:
    """The base of a configuration with fresh adapters and a fresh <|emb|>, read straight into its shards.

    What trains is float32, whatever the base is.

    <|emb|> starts as the token that ends a turn, which the base already says when it has nothing more to say.
    """
    return weights.load(
        config.model.base,
        lora=config.model.lora,
        emb_token_id=processor.emb,
        init_emb_from=processor.end,
        seed=config.training.seed,
        trained=config.model.trainable,
        shardings=lambda path, shape: sharding.sharding_of(path, shape, mesh),
        dtype=jnp.dtype(config.model.dtype),
        param_dtype=jnp.dtype(config.model.param_dtype),
        scan_layers=config.model.scan_layers,
        remat=config.model.remat,
        attention=config.model.attention,
    )


def model_identity(config: Config) -> str:
    """Names the base (by the hash of its weights' files) and the adapters that a checkpoint belongs to."""
    base = weights.fingerprint(config.model.base)
    learned = ", temperature learned" if config.loss.learn_temperature else ""
    return f"base {base}, adapters {config.model.lora}, trainable {config.model.trainable}{learned}"


def split_model(model: Qwen2_5_VL, trainable: tuple[str, ...]) -> tuple[nnx.GraphDef, dict, dict]:
    """Splits a model into its graph, and two nested dicts: the parameters that train, and all others.

    Raises ValueError when a pattern matches no parameter, or one in int8.
    """
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    paths = {key: "/".join(map(str, key)) for key in flat}
    for pattern in trainable:
        if not any(re.fullmatch(pattern, path) for path in paths.values()):
            raise ValueError(f"model.trainable: {pattern!r} matches no parameter; there are {sorted(paths.values())}")
    chosen = {key for key, path in paths.items() if any(re.fullmatch(pattern, path) for pattern in trainable)}
    if rounded := sorted(paths[key] for key in chosen if flat[key].dtype == jnp.int8):
        raise ValueError(f"model.trainable: {rounded[0]} is int8 and cannot train; choose another --model.param-dtype")
    parts = [
        nnx.from_flat_state({k: v for k, v in flat.items() if (k in chosen) == wanted}) for wanted in (True, False)
    ]
    return graph, nnx.to_pure_dict(parts[0]), nnx.to_pure_dict(parts[1])


def state_shardings(
    optimizer: optax.GradientTransformation, trainable: dict, other: jax.sharding.Sharding
) -> TrainState:
    """How a state is split: moments as their parameters (arrays, or shapes with shardings), all else as `other`."""
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, parameter: parameter.sharding,
        jax.eval_shape(optimizer.init, trainable),
        trainable,
        transform_non_params=lambda _: other,
    )
    return TrainState(jax.tree.map(lambda parameter: parameter.sharding, trainable), opt_shardings)


def make_loss(
    graph: nnx.GraphDef, emb: int, config: Config
) -> Callable[[dict, dict, Batch, jax.Array | None], tuple[jax.Array, dict[str, Mean]]]:
    """(trainable, frozen, batch, key of the dropout or None) -> (loss, metrics), of the whole batch.

    With `training.chunks` C > 1 the batch comes in S * C shards, and each device reads C of its own one after another:
    only embeddings and visual features outlive a chunk, and the backward pass reads each chunk again. The gradient
    is that of the whole batch (gradient caching), also of L_gen, whose tokens are counted over all chunks.
    """
    chunks = config.training.chunks

    def loss_fn(
        trainable: dict, frozen: dict, batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Mean]]:
        model = merge_model(graph, trainable, frozen)
        head = model.head()

        def read(part: tuple[Batch, jax.Array | None]) -> ReadOut:
            chunk, key = part
            return read_out(model(chunk.inputs, dropout=key), head, chunk, emb, config.loss)

        if chunks == 1:
            out = read((batch, key))
        else:
            batch = jax.tree.map(lambda x: x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1), batch)
            keys = None if key is None else jax.random.split(key, chunks)
            policy = jax.checkpoint_policies.save_only_these_names(VISUAL)
            out = jax.lax.map(jax.checkpoint(read, policy=policy), (batch, keys))
        return hybrid_loss(out, batch, head.row_of(emb), config.loss, trainable.get(SCALE))

    return loss_fn


def make_train_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, emb: int, config: Config, shardings: TrainState
) -> Callable[[TrainState, dict, Batch], tuple[TrainState, dict[str, Mean]]]:
    """Compiles (state, frozen, batch) -> (state, metrics); the state keeps its `shardings` and its buffers.

    Dropout is a pure function of (seed, step, chunk, layer, name), so that a resumed run draws what the straight one
    drew, and the second reading of a chunk what the first one drew.
    """
    loss_fn = make_loss(graph, emb, config)
    dropout = config.model.lora is not None and config.model.lora.dropout > 0

    def train_step(state: TrainState, frozen: dict, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        key = jax.random.fold_in(jax.random.key(config.training.seed), step_of(state.opt_state)) if dropout else None
        gradients, measured = jax.grad(loss_fn, has_aux=True)(state.trainable, frozen, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its integer count with floats
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = bounded(optax.apply_updates(state.trainable, updates))
        real = batch.inputs.segments > 0
        measured["tokens"] = Mean(jnp.sum(real).astype(jnp.float32), jnp.ones(()))
        measured["filled_slots"] = Mean(jnp.sum(real).astype(jnp.float32), jnp.float32(real.size))
        measured["dropped"] = Mean(jnp.sum(batch.query_index < 0).astype(jnp.float32), jnp.ones(()))
        measured["gradient_norm"] = Mean(optax.tree.norm(gradients), jnp.ones(()))
        return TrainState(trainable, opt_state), measured

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def make_validation(
    graph: nnx.GraphDef, processor: Processor, config: Config, mesh: jax.sharding.Mesh
) -> Callable[[dict, dict, Callable[[], bool]], dict[str, float] | None]:
    """(trainable, frozen, stop) -> means over the first `validation_batches` of the validation split, named val_*.

    Always the same batches, without hard negatives, random zooms and dropout: only the model changes. `stop` is asked
    before each of them; once it says yes the result is None.
    """
    data = dataclasses.replace(config.data, hard_negatives=0, jitter=0.0)
    batches = host_batches(dataclasses.replace(config, data=data), processor, mesh, split="val").batches
    loss_fn = make_loss(graph, processor.emb, config)
    measure = jax.jit(lambda trainable, frozen, batch: loss_fn(trainable, frozen, batch, None)[1])

    def validate(trainable: dict, frozen: dict, stop: Callable[[], bool]) -> dict[str, float] | None:
        found = []
        for index in range(config.training.validation_batches):
            if stop():
                return None
            batch = sharding.to_devices(batches[index], mesh)
            with jax.set_mesh(mesh):
                found.append(jax.device_get(measure(trainable, frozen, batch)))
        means = jax.tree.map(lambda *parts: sum(parts), *found)
        return {f"val_{name}": float(mean.value()) for name, mean in means.items()}

    return validate


def host_batches(config: Config, processor: Processor, mesh: jax.sharding.Mesh, split: str = "train") -> Pipeline:
    """The batches of this host for the mesh's devices, in as many shards as they have times `training.chunks`.

    Raises ValueError where the hosts' devices do not hold even parts of a batch (`sharding.data_host`).
    """
    shards = sharding.data_shards(mesh) * config.training.chunks
    host, hosts = sharding.data_host(mesh, jax.process_index())
    return training_batches(config, processor, shards=shards, host=host, hosts=hosts, split=split)


def init_optimizer(optimizer: optax.GradientTransformation, trainable: dict, mesh: jax.sharding.Mesh) -> optax.OptState:
    """A fresh optimizer state, its moments sharded as their parameters."""
    shardings = state_shardings(optimizer, trainable, sharding.replicated(mesh)).opt_state
    return jax.jit(optimizer.init, out_shardings=shardings)(trainable)


def merge_model(graph: nnx.GraphDef, trainable: dict, frozen: dict) -> Qwen2_5_VL:
    """Puts a split model together again; what the loss learns is not of it."""
    own = {name: part for name, part in trainable.items() if name != SCALE}
    flat = {**traverse_util.flatten_dict(frozen), **traverse_util.flatten_dict(own)}
    return nnx.merge(graph, nnx.State(traverse_util.unflatten_dict(flat)))


def restore_model(
    config: Config, processor: Processor, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[int, Qwen2_5_VL] | None:
    """The newest good checkpoint of a run, or that of `step`, as (step, model) without its optimizer; None: none."""
    graph, trainable, frozen = split_model(load_model(config, processor, mesh), config.model.trainable)
    trainable |= loss_parameters(config.loss, sharding.replicated(mesh))
    checkpoints = Checkpoints(config, model_identity(config))
    restored = checkpoints.restore(only=step, trainable=trainable)
    checkpoints.close()
    return None if restored is None else (restored[0], merge_model(graph, restored[1]["trainable"], frozen))


def train(config: Config) -> bool:
    """Trains `config` to its last step, going on from the newest good checkpoint of its run directory.

    Says whether there was anything to do. Raises ValueError for a configuration that does not fit its data or its
    devices, CheckpointError, and FloatingPointError for a loss that is no number or leaps.
    """
    steps, window = config.training.steps, config.training.profile
    if window and not 1 <= window[0] <= window[1] <= steps:
        raise ValueError(f"training.profile {window}: the window must lie in steps 1 to {steps}")

    # Devices and model
    mesh = sharding.make_mesh(config.mesh)
    processor = Processor.from_hf(config.model.base, config.data)
    graph, trainable, frozen = split_model(load_model(config, processor, mesh), config.model.trainable)
    trainable |= loss_parameters(config.loss, sharding.replicated(mesh))

    # State: new, then overwritten by a checkpoint where there is one
    optimizer = make_optimizer(config.optimizer, steps)
    schedule = make_schedule(config.optimizer, steps)
    opt_state = init_optimizer(optimizer, trainable, mesh)
    checkpoints = Checkpoints(config, model_identity(config))
    restored = checkpoints.restore(trainable=trainable, optimizer=opt_state)
    start = 0
    if restored is not None:
        start, items = restored
        trainable, opt_state = items["trainable"], items["optimizer"]
        log.info("going on from checkpoint %d in %s", start, checkpoints.folder)
    state = TrainState(trainable, opt_state)
    if start >= steps:
        log.info("%s is already trained (%d steps)", config.run_dir, start)
        checkpoints.close()
        return False

    # Data
    pipeline = host_batches(config, processor, mesh)
    batches = pipeline.from_step(start, config.training.prefetch)
    log.info("%s", pipeline.capacity)
    train_step = make_train_step(
        graph, optimizer, processor.emb, config, jax.tree.map(lambda array: array.sharding, state)
    )
    every = config.training.validate_every
    validate = make_validation(graph, processor, config, mesh) if every else None

    # A preemption notice ends the loop before the next step, with a checkpoint; several processes agree on that step by
    # counting how often they look
    notices, looks = [], itertools.count(start + 1)
    alone, first = jax.process_count() == 1, jax.process_index() == 0
    previous = signal.signal(signal.SIGTERM, lambda *_: notices.append(time.monotonic())) if alone else None

    def overdue() -> bool:
        late = np.array(time.monotonic() - saved > 60 * config.training.checkpoint_minutes)
        return bool(late if alone else multihost_utils.broadcast_one_to_all(late))

    def preempted() -> bool:
        return bool(notices) if alone else multihost_utils.reached_preemption_sync_point(next(looks))

    def stop(step: int) -> NoReturn:
        guard.settle()
        checkpoints.save(step, state.trainable, state.opt_state, wait=True)
        after = f", {time.monotonic() - notices[0]:.1f} s after the notice" if notices else ""
        log.warning("stopped at step %d with a checkpoint%s; the same command goes on from there", step, after)
        raise SystemExit(os.EX_TEMPFAIL)  # neither done nor failed

    # Loop
    epath.Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    shards = sharding.data_shards(mesh) * config.training.chunks
    needed = model_flops(Architecture.from_hf(config.model.base), config, pipeline.capacity, shards)
    writer = metrics.MetricLog(config, start, sum(needed.values()))
    guard = Guard(config, pipeline)
    profile = window if window and start < window[0] else (0, 0)  # not gone on with in its midst
    saved = time.monotonic()
    bar = tqdm(
        total=steps,
        initial=start,
        desc=config.name,
        unit="step",
        dynamic_ncols=True,
        mininterval=1.0,
        disable=not first,
    )
    try:
        for step in range(start + 1, steps + 1):
            with writer.waiting():
                own = next(batches)
            if preempted():
                stop(step - 1)
            if step == profile[0]:
                jax.profiler.start_trace(f"{config.run_dir}/profile")
            with jax.set_mesh(mesh):
                state, measured = train_step(state, frozen, sharding.to_devices(own, mesh))
            writer.add(measured)
            guard.look(step, own, measured)  # waits for the step before: the device has work, a stop is never far
            bar.update()
            if step == profile[1]:
                guard.settle()
                jax.profiler.stop_trace()
            due = every > 0 and (step % every == 0 or step == steps)
            if step % config.training.log_every == 0 or step == steps or due:
                guard.settle()
                extra, seen = {"learning_rate": float(jnp.asarray(schedule(step - 1)))}, {}
                if validate is not None and due:
                    with writer.aside():
                        seen = validate(state.trainable, frozen, preempted)
                means = writer.write(step, extra | (seen or {}))
                if first:
                    tqdm.write(metrics.describe(step, steps, means))
                    _warn_of_dropped(step, means["dropped"])
                if seen is None:  # a notice came while it looked
                    stop(step)
            scheduled = step % config.training.checkpoint_every == 0 or step == steps
            if scheduled or (step % config.training.log_every == 0 and overdue()):
                guard.settle()
                checkpoints.save(step, state.trainable, state.opt_state)
                saved = time.monotonic()
    finally:
        if alone:
            signal.signal(signal.SIGTERM, previous)
        bar.close()
        writer.close()
        checkpoints.close()
    return True


def _warn_of_dropped(step: int, dropped: float) -> None:
    """Says that pairs, so many a step on average, were left out of batches for want of room."""
    if dropped:
        log.warning(
            "%.3g pairs a step found no room in their shard up to step %d and were not trained on; raise --data.rows,"
            " or --data.patch-rows if pictures want it (both may change in the midst of a run)",
            dropped,
            step,
        )
