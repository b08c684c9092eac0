"""The programs of a configuration as shapes: the training step, the prefill and the decoding, ready to be compiled."""

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax import sharding
from trace_jax.config import ROOT, Config
from trace_jax.data.pipeline import Capacity
from trace_jax.data.schema import Batch, Inputs
from trace_jax.model.architecture import Architecture
from trace_jax.model.flops import forward_flops
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.model.weights import flat_parameters, stored_dtype
from trace_jax.retrieval import generation
from trace_jax.retrieval.packing import Rows
from trace_jax.training.losses import loss_parameters
from trace_jax.training.optimizer import make_optimizer
from trace_jax.training.train import TrainState, make_train_step, split_model, state_shardings

ASSETS = ROOT / "trace_jax" / "assets"
SLACK = 1.1  # room in the rows above the average: what packing leaves empty, and what batches differ by
MARKUP = 128  # tokens of a prompt beside its image and its text
LENGTHS = 128  # the longest prompt is rounded up to a multiple


class Pair(NamedTuple):
    """The average training pair, query and document together."""

    text_tokens: float
    images: float
    targets: float


# M-BEIR-CoT. Markup and prompts 190, instruction and texts 120, and a trace of 150 for the 53 % that reason; one image
# in the simple tasks, one or two in the others. Estimated from the mixture of paper Sec. 3.2, not measured.
PAIR = Pair(text_tokens=390, images=1.4, targets=81)


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes (and shardings) that it is called with."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    parameters: Any  # the part of the arguments that is the model
    optimizer: Any  # the part that is the optimizer's

    def trace(self, mesh: jax.sharding.Mesh) -> Any:
        """Traces under the mesh; `.lower().compile()` goes on from there."""
        with jax.set_mesh(mesh), jax.default_device(mesh.devices.flat[0]):  # kernels ask for the device
            return self.function.trace(*self.arguments, **self.options)


def read_architecture(config: Config) -> Architecture:
    """The architecture of the base; while it is not there, that of the folder of its name in trace_jax/assets.

    Raises FileNotFoundError when there is neither.
    """
    base = pathlib.Path(config.model.base)
    return Architecture.from_hf(base if (base / "config.json").is_file() else ASSETS / base.name)


def capacity_of(config: Config, architecture: Architecture, shards: int) -> Capacity:
    """The static shapes of a shard: training measures them on its data, here they are the configuration's or `PAIR`'s.

    Raises ValueError when the batch cannot be dealt evenly.
    """
    data, vision = config.data, architecture.vision
    if data.batch_size % shards:
        raise ValueError(f"a batch of {data.batch_size} cannot be dealt to {shards} shards")
    pairs = data.batch_size // shards
    image = data.max_pixels // vision.patch_size**2  # patches; nearly all images are larger and scaled down to it
    tokens = PAIR.text_tokens + PAIR.images * image / vision.merge_unit
    images_a_row = max(data.patch_row_length // image, 1)
    chunk = config.loss.vocabulary_chunk
    return Capacity(
        pairs=pairs,
        rows=data.rows or math.ceil(pairs * tokens * SLACK / data.row_length),
        patch_rows=data.patch_rows or math.ceil(pairs * PAIR.images * SLACK / images_a_row),
        targets=math.ceil(pairs * PAIR.targets * SLACK / chunk) * chunk,
    )


def abstract_model(config: Config, architecture: Architecture, mesh: jax.sharding.Mesh) -> Qwen2_5_VL:
    """The model of `config` with shapes and shardings for parameters. <|emb|> stands at the end of the vocabulary."""
    run = config.model
    model = nnx.eval_shape(
        lambda: Qwen2_5_VL(
            architecture,
            lora=run.lora,
            emb_token_id=architecture.language.vocab_size - 1,
            dtype=jnp.dtype(run.dtype),
            param_dtype=jnp.dtype(run.param_dtype),
            scan_layers=run.scan_layers,
            remat=run.remat,
            attention=run.attention,
            rngs=nnx.Rngs(0),
        )
    )
    placed = {
        tuple(path.split("/")): jax.ShapeDtypeStruct(
            leaf.shape,
            stored_dtype(path, leaf.dtype, run.trainable),
            sharding=sharding.sharding_of(path, leaf.shape, mesh),
        )
        for path, leaf in flat_parameters(model).items()
    }
    nnx.update(model, nnx.from_flat_state(placed.items()))
    return model


def abstract_inputs(
    architecture: Architecture,
    mesh: jax.sharding.Mesh,
    shards: int,
    *,
    rows: int,
    length: int,
    patch_rows: int,
    patches: int,
) -> Inputs:
    """What the model reads, as shapes: `rows` and `patch_rows` of each of S `shards`."""
    text, vision = (rows, length), (patch_rows, patches)
    shapes = [text, text, (*text, 3), text, (*vision, architecture.vision.patch_pixels), (*vision, 2), vision, vision]
    return Inputs(
        *(
            _split(mesh, (shards, *shape), jnp.uint8 if name == "patches" else jnp.int32)
            for name, shape in zip(Inputs._fields, shapes, strict=True)
        )
    )


def _split(mesh: jax.sharding.Mesh, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """An array of a batch, whose leading axis is split over the mesh."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(sharding.BATCH_AXES)))


def train_program(config: Config, architecture: Architecture, mesh: jax.sharding.Mesh) -> Program:
    """One step of training/train.py."""
    shards = sharding.data_shards(mesh) * config.training.chunks
    capacity, data = capacity_of(config, architecture, shards), config.data
    model = abstract_model(config, architecture, mesh)
    graph, trainable, frozen = split_model(model, config.model.trainable)
    whole = sharding.replicated(mesh)
    learned = jax.eval_shape(lambda: loss_parameters(config.loss, None))
    trainable |= {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole) for name, leaf in learned.items()}
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    shardings = state_shardings(optimizer, trainable, whole)
    opt_state = jax.tree.map(
        lambda leaf, placed: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed),
        jax.eval_shape(optimizer.init, trainable),
        shardings.opt_state,
    )
    inputs = abstract_inputs(
        architecture,
        mesh,
        shards,
        rows=capacity.rows,
        length=data.row_length,
        patch_rows=capacity.patch_rows,
        patches=data.patch_row_length,
    )
    pairs, targets = (shards, capacity.pairs), (shards, capacity.targets)
    negatives = (*pairs, data.hard_negatives)
    batch = Batch(
        inputs=inputs,
        query_index=_split(mesh, pairs, jnp.int32),
        query_key=_split(mesh, pairs, jnp.int32),
        document_index=_split(mesh, pairs, jnp.int32),
        document_key=_split(mesh, pairs, jnp.int32),
        negative_index=_split(mesh, negatives, jnp.int32),
        negative_key=_split(mesh, negatives, jnp.int32),
        positives=_split(mesh, (*pairs, data.max_positives), jnp.int32),
        task=_split(mesh, pairs, jnp.int32),
        reasoned=_split(mesh, pairs, jnp.bool_),
        first_index=_split(mesh, pairs, jnp.int32),
        target_index=_split(mesh, targets, jnp.int32),
        target_token=_split(mesh, targets, jnp.int32),
        target_weight=_split(mesh, targets, jnp.float32),
    )
    step = make_train_step(graph, optimizer, architecture.language.vocab_size - 1, config, shardings)
    arguments = TrainState(trainable, opt_state), frozen, batch
    return Program("train step", step, arguments, {}, (trainable, frozen), opt_state)


def prompt_length(config: Config, architecture: Architecture) -> int:
    """Tokens of the longest prompt that the configuration allows, rounded up."""
    visual = config.data.max_pixels // (architecture.vision.patch_size * architecture.vision.merge_size) ** 2
    return math.ceil((visual + config.data.max_text_tokens + MARKUP) / LENGTHS) * LENGTHS


def generation_programs(config: Config, architecture: Architecture, mesh: jax.sharding.Mesh) -> list[Program]:
    """Prefill and decoding of evaluation.batch_size of the longest prompts that the configuration allows, with images.

    The decoding is of all of them, for evaluation.max_trace_tokens tokens.
    """
    data, options = config.data, config.evaluation
    shards, model = sharding.data_shards(mesh), abstract_model(config, architecture, mesh)
    if options.batch_size % shards:
        raise ValueError(f"evaluation.batch_size {options.batch_size} cannot be dealt to {shards} shards")
    rows = options.batch_size // shards
    inputs = abstract_inputs(
        architecture,
        mesh,
        shards,
        rows=rows,
        length=prompt_length(config, architecture),
        patch_rows=rows,
        patches=data.patch_row_length,
    )
    places = (_split(mesh, (shards, rows), jnp.int32) for _ in range(3))
    decoding = generation.Decoding(
        (architecture.language.vocab_size - 1,), options.max_trace_tokens, drafts=options.drafts
    )
    longest = prompt_length(config, architecture)
    how = {"decoding": decoding, "mode": "adaptive", "longest": longest}
    prefill = Program("prefill", generation._prefill.jitted, (model, Rows(inputs, *places)), how, model, ())
    heads = "tensor" if architecture.language.num_kv_heads % mesh.shape["tensor"] == 0 else None
    slots = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=NamedSharding(mesh, P(sharding.BATCH_AXES, *([heads] if leaf.ndim == 4 else [])))
            if leaf.ndim
            else sharding.replicated(mesh),
        ),
        jax.eval_shape(
            lambda: generation._empty_slots(
                architecture.language,
                options.batch_size,
                longest,
                decoding,
                options.cache_dtype or config.model.dtype,
            )
        ),
    )
    least = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    decode = Program("decode", generation._decode.jitted, (model, slots, least), {"decoding": decoding}, model, ())
    return [prefill, decode]


def generation_flops(config: Config, architecture: Architecture, name: str) -> float:
    """What a prefill, or one token of every row's decoding, needs over all devices."""
    rows, prompt = config.evaluation.batch_size, prompt_length(config, architecture)
    if name == "decode":
        seen = prompt + config.evaluation.max_trace_tokens / 2
        return forward_flops(architecture, tokens=rows, seen=seen, heads=rows)
    patches = rows * config.data.patch_row_length
    return forward_flops(architecture, tokens=rows * prompt, seen=prompt / 2, heads=rows, patches=patches)
