"""Training, top to bottom: mesh, model, data, state, step, loop.

One program serves the TRACE fine-tuning and the generative pretraining of a small base; the configuration says what is
trainable and which losses count.
"""

import logging
import re
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

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
from trace_jax.data.pipeline import training_batches
from trace_jax.data.schema import Batch
from trace_jax.data.tokenizer import Processor
from trace_jax.model import weights
from trace_jax.model.qwen2_5_vl import VISUAL, Qwen2_5_VL
from trace_jax.training import metrics
from trace_jax.training.checkpoint import Checkpoints
from trace_jax.training.losses import Mean, ReadOut, hybrid_loss, read_out
from trace_jax.training.optimizer import make_optimizer, make_schedule, step_of

log = logging.getLogger(__name__)


class TrainState(NamedTuple):
    """Everything that training changes; the optimizer's count is the step."""

    trainable: Any  # nested dict of parameters
    opt_state: optax.OptState


def load_model(config: Config, processor: Processor, mesh: jax.sharding.Mesh) -> Qwen2_5_VL:
    """The base of a configuration with fresh adapters and a fresh <|emb|>, read straight into its shards.

    <|emb|> starts as the token that ends a turn, which the base already says when it has nothing more to say.
    """
    return weights.load(
        config.model.base,
        lora=config.model.lora,
        emb_token_id=processor.emb,
        init_emb_from=processor.end,
        seed=config.training.seed,
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
    return f"base {base}, adapters {config.model.lora}, trainable {config.model.trainable}"


def split_model(model: Qwen2_5_VL, trainable: tuple[str, ...]) -> tuple[nnx.GraphDef, dict, dict]:
    """Splits a model into its graph, and two nested dicts: the parameters that train, and all others.

    Raises ValueError when a pattern matches no parameter.
    """
    graph, state = nnx.split(model)
    flat = dict(nnx.to_flat_state(state))
    paths = {key: "/".join(map(str, key)) for key in flat}
    for pattern in trainable:
        if not any(re.fullmatch(pattern, path) for path in paths.values()):
            raise ValueError(f"model.trainable: {pattern!r} matches no parameter; there are {sorted(paths.values())}")
    chosen = {key for key, path in paths.items() if any(re.fullmatch(pattern, path) for pattern in trainable)}
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


def make_train_step(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, emb: int, config: Config, shardings: TrainState
) -> Callable[[TrainState, dict, Batch], tuple[TrainState, dict[str, Mean]]]:
    """Compiles (state, frozen, batch) -> (state, metrics); the state keeps its `shardings` and its buffers.

    With `training.chunks` C > 1 the batch comes in S * C shards, and each device reads C of its own one after another:
    only embeddings and visual features outlive a chunk, and the backward pass reads each chunk again. The gradient
    is that of the whole batch (gradient caching), also of L_gen, whose tokens are counted over all chunks.

    Dropout is a pure function of (seed, step, chunk, layer, name), so that a resumed run draws what the straight one
    drew, and the second reading of a chunk what the first one drew.
    """
    chunks = config.training.chunks
    dropout = config.model.lora is not None and config.model.lora.dropout > 0

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
        return hybrid_loss(out, batch, head.row_of(emb), config.loss)

    def train_step(state: TrainState, frozen: dict, batch: Batch) -> tuple[TrainState, dict[str, Mean]]:
        key = jax.random.fold_in(jax.random.key(config.training.seed), step_of(state.opt_state)) if dropout else None
        gradients, measured = jax.grad(loss_fn, has_aux=True)(state.trainable, frozen, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its integer count with floats
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        real = batch.inputs.segments > 0
        measured["tokens"] = Mean(jnp.sum(real).astype(jnp.float32), jnp.ones(()))
        measured["filled_slots"] = Mean(jnp.sum(real).astype(jnp.float32), jnp.float32(real.size))
        measured["dropped"] = Mean(jnp.sum(batch.query_index < 0).astype(jnp.float32), jnp.ones(()))
        measured["gradient_norm"] = Mean(optax.tree.norm(gradients), jnp.ones(()))
        return TrainState(trainable, opt_state), measured

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def init_optimizer(optimizer: optax.GradientTransformation, trainable: dict, mesh: jax.sharding.Mesh) -> optax.OptState:
    """A fresh optimizer state, its moments sharded as their parameters."""
    shardings = state_shardings(optimizer, trainable, sharding.replicated(mesh)).opt_state
    return jax.jit(optimizer.init, out_shardings=shardings)(trainable)


def merge_model(graph: nnx.GraphDef, trainable: dict, frozen: dict) -> Qwen2_5_VL:
    """Puts a split model together again."""
    flat = {**traverse_util.flatten_dict(frozen), **traverse_util.flatten_dict(trainable)}
    return nnx.merge(graph, nnx.State(traverse_util.unflatten_dict(flat)))


def restore_model(
    config: Config, processor: Processor, mesh: jax.sharding.Mesh, step: int | None = None
) -> tuple[int, Qwen2_5_VL] | None:
    """The newest good checkpoint of a run, or that of `step`, as (step, model) without its optimizer; None: none."""
    graph, trainable, frozen = split_model(load_model(config, processor, mesh), config.model.trainable)
    checkpoints = Checkpoints(config, model_identity(config))
    restored = checkpoints.restore(only=step, trainable=trainable)
    checkpoints.close()
    return None if restored is None else (restored[0], merge_model(graph, restored[1]["trainable"], frozen))


def train(config: Config) -> bool:
    """Trains `config` to its last step, going on from the newest good checkpoint of its run directory.

    Says whether there was anything to do. Raises ValueError for a configuration that does not fit its data or its
    devices, CheckpointError, and FloatingPointError for a loss that is no number.
    """
    # Devices and model
    mesh = sharding.make_mesh(config.mesh)
    shards = sharding.data_shards(mesh) * config.training.chunks
    processor = Processor.from_hf(config.model.base, config.data)
    graph, trainable, frozen = split_model(load_model(config, processor, mesh), config.model.trainable)

    # State: new, then overwritten by a checkpoint where there is one
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    schedule = make_schedule(config.optimizer, config.training.steps)
    opt_state = init_optimizer(optimizer, trainable, mesh)
    checkpoints = Checkpoints(config, model_identity(config))
    restored = checkpoints.restore(trainable=trainable, optimizer=opt_state)
    start, steps = 0, config.training.steps
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
    pipeline = training_batches(config, processor, shards=shards, host=jax.process_index(), hosts=jax.process_count())
    batches = pipeline.from_step(start, config.training.prefetch)
    log.info("%s", pipeline.capacity)
    train_step = make_train_step(
        graph, optimizer, processor.emb, config, jax.tree.map(lambda array: array.sharding, state)
    )

    # A preemption notice ends the loop after the running step, with a checkpoint; several processes agree on the step
    notices = []
    alone, first = jax.process_count() == 1, jax.process_index() == 0
    previous = signal.signal(signal.SIGTERM, lambda *_: notices.append(True)) if alone else None

    def overdue() -> bool:
        late = np.array(time.monotonic() - saved > 60 * config.training.checkpoint_minutes)
        return bool(late if alone else multihost_utils.broadcast_one_to_all(late))

    def preempted(step: int) -> bool:
        return bool(notices) if alone else multihost_utils.reached_preemption_sync_point(step)

    # Loop
    epath.Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    writer = metrics.MetricLog(config.run_dir, start)
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
            batch = sharding.to_devices(next(batches), mesh)
            with jax.set_mesh(mesh):
                state, measured = train_step(state, frozen, batch)
            writer.add(measured)  # waits for the step before: the device has work, a stop is never far
            bar.update()
            if step % config.training.log_every == 0 or step == steps:
                extra = {"learning_rate": float(jnp.asarray(schedule(step - 1)))}
                means = writer.write(step, extra, config.data.batch_size)
                if first:
                    tqdm.write(metrics.describe(step, steps, means))
            stop = preempted(step)
            scheduled = step % config.training.checkpoint_every == 0 or step == steps
            if scheduled or stop or (step % config.training.log_every == 0 and overdue()):
                checkpoints.save(step, state.trainable, state.opt_state, wait=stop)
                saved = time.monotonic()
            if stop:
                raise SystemExit(f"stopped at step {step} with a checkpoint; the same command goes on from there")
    finally:
        if alone:
            signal.signal(signal.SIGTERM, previous)
        bar.close()
        writer.close()
        checkpoints.close()
    return True
