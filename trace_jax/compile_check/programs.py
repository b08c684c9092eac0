"""The programs of a configuration as shapes: the training step, the prefill and the decoding, ready to be compiled."""

import dataclasses
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax import sharding
from trace_jax.config import ROOT, Config
from trace_jax.data.lengths import assumed_batches
from trace_jax.data.pipeline import MEASURED_BATCHES, Capacity, measure_capacity
from trace_jax.data.processor import Geometry
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Batch, Inputs
from trace_jax.model.architecture import Architecture
from trace_jax.model.flops import forward_flops, model_flops
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.model.weights import flat_parameters, stored_dtype
from trace_jax.retrieval import drafts, embedder, generation
from trace_jax.retrieval.packing import LEAST_LENGTH, Packer, Rows, rounded
from trace_jax.training.losses import loss_parameters
from trace_jax.training.optimizer import make_optimizer
from trace_jax.training.train import TrainState, make_train_step, split_model, state_shardings

ASSETS = ROOT / "trace_jax" / "assets"


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function with the shapes (and shardings) that it is called with."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    parameters: Any  # the part of the arguments that is the model
    optimizer: Any  # the part that is the optimizer's
    shapes: str  # for people
    model_flops: float  # what the architecture needs, over all devices
    items: int = 0  # pairs, queries or documents that one run reads, or tokens that it writes; over all devices
    read: Any = ()  # what a trip of its loop of unknown length must read from HBM, where it has one

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


def geometry_of(config: Config, architecture: Architecture) -> Geometry:
    """How images become patches, of an architecture alone."""
    data, vision = config.data, architecture.vision
    return Geometry(
        vision.patch_size,
        vision.merge_size,
        vision.window_size,
        min_pixels=data.min_pixels,
        max_pixels=data.max_pixels,
    )


def capacity_of(config: Config, architecture: Architecture, shards: int) -> Capacity:
    """The static shapes of a shard, measured as training does, on assumed lengths (data/lengths.py).

    Raises ValueError when the batch cannot be dealt evenly.
    """
    if config.data.batch_size % shards:
        raise ValueError(f"a batch of {config.data.batch_size} cannot be dealt to {shards} shards")
    batches = assumed_batches(config.data, geometry_of(config, architecture), MEASURED_BATCHES)
    return measure_capacity(batches, shards, config)


def abstract_model(
    config: Config, architecture: Architecture, mesh: jax.sharding.Mesh, *, inference: bool = False
) -> Qwen2_5_VL:
    """The model of `config`, as it trains or for `inference`, with shapes and shardings for parameters. <|emb|> stands
    at the end of the vocabulary.
    """
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

    def update(make: Callable[[str, Any], jax.ShapeDtypeStruct]) -> None:
        leaves = {tuple(path.split("/")): make(path, leaf) for path, leaf in flat_parameters(model).items()}
        nnx.update(model, nnx.from_flat_state(leaves.items()))

    def folded(model: Qwen2_5_VL) -> Qwen2_5_VL:
        model.fold_adapters()
        return model

    update(lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, stored_dtype(path, leaf.dtype, run.trainable)))
    if inference:
        model = nnx.eval_shape(folded, model)
    update(
        lambda path, leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding.sharding_of(path, leaf.shape, mesh)
        )
    )
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
    return Program(
        "train step",
        step,
        arguments,
        {},
        (trainable, frozen),
        opt_state,
        str(capacity),
        sum(model_flops(architecture, config, capacity, shards).values()),
        items=data.batch_size,
    )


def generation_programs(
    config: Config, architecture: Architecture, mesh: jax.sharding.Mesh, kinds: Collection[str]
) -> Iterator[Program]:
    """What the engine runs, of `kinds`, on evaluation.batch_size sequences of assumed lengths (data/lengths.py).

    "prefill" reads queries, "embed" documents, packed as the engine packs them: those with an image and those without
    are a program each. "decode" is a step of as many queries with traces of evaluation.max_trace_tokens at most.
    """
    data, options, language = config.data, config.evaluation, architecture.language
    shards, model = sharding.data_shards(mesh), abstract_model(config, architecture, mesh, inference=True)
    if options.batch_size % shards:
        raise ValueError(f"evaluation.batch_size {options.batch_size} cannot be dealt to {shards} shards")
    geometry = geometry_of(config, architecture)
    pairs = [item for batch in assumed_batches(data, geometry, MEASURED_BATCHES) for item in batch]
    prompts = [dataclasses.replace(item.query, tokens=item.query.tokens[: item.prompt]) for item in pairs]
    documents = [item.documents[0] for item in pairs]
    packer = Packer(
        geometry=geometry,
        pad_token=0,
        most=options.batch_size // shards,
        shards=shards,
        row_length=data.row_length,
        patch_row_length=data.patch_row_length,
        share=False,  # these sequences have no words that they could have in common
    )
    longest = rounded(max(map(len, prompts)), LEAST_LENGTH)
    decoding = generation.Decoding((language.vocab_size - 1,), options.max_trace_tokens, drafts=options.drafts)

    def reads(kind: str, sequences: Sequence[Tokens], function: Any, how: dict[str, Any]) -> Iterator[Program]:
        for visual, room in packer.rooms(sequences, sample=True).items():
            rows = Rows(
                abstract_inputs(
                    architecture,
                    mesh,
                    shards,
                    rows=room.rows,
                    length=room.row_length,
                    patch_rows=room.patch_rows,
                    patches=room.patch_row_length,
                ),
                *(_split(mesh, (shards, room.sequences), jnp.int32) for _ in range(3)),
            )
            needed = forward_flops(
                architecture,
                tokens=shards * room.rows * room.row_length,
                seen=room.row_length / 2,
                heads=options.batch_size if kind == "prefill" else 0,
                patches=shards * room.patch_rows * room.patch_row_length,
                ends=options.batch_size,
            )
            name = f"{kind}, {'with images' if visual else 'texts'}"
            arguments = model, rows
            yield Program(name, function, arguments, how, model, (), str(room), needed, items=options.batch_size)

    if "prefill" in kinds:
        how = {"decoding": decoding, "mode": "adaptive", "longest": longest}
        yield from reads("prefill", prompts, generation._prefill.jitted, how)
    if "embed" in kinds:
        yield from reads("embed", documents, embedder._read.jitted, {})
    if "decode" in kinds:
        dtype = options.cache_dtype or config.model.dtype
        with jax.set_mesh(mesh):
            empty = jax.eval_shape(
                lambda: generation._empty_slots(language, options.batch_size, longest, decoding, dtype)
            )
        slots = _placed(empty, "tensor" if language.num_kv_heads % mesh.shape["tensor"] == 0 else None, mesh)
        follows, least = (
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.replicated(mesh))
            for shape in ((drafts.PAIRS,), ())
        )
        seen = longest + decoding.max_new_tokens / 2
        needed = forward_flops(architecture, tokens=options.batch_size, seen=seen, heads=options.batch_size)
        head = model.language.embed_tokens if model.lm_head is None else model.lm_head
        yield Program(
            "decode",
            generation._decode.jitted,
            (model, slots, follows, least),
            {"decoding": decoding},
            model,
            (),
            f"{options.batch_size} rows, caches of {slots.seen.shape[1]} slots",
            needed,
            items=options.batch_size,
            read=(model.language.layers, head, slots.cache),
        )


def _placed(slots: generation.Slots, heads: str | None, mesh: jax.sharding.Mesh) -> generation.Slots:
    """Slots as `generation.place_rows` splits them; the key heads of the cache over the mesh axis `heads`."""

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        spec = P(sharding.BATCH_AXES, *([heads] if leaf.ndim == 4 else [])) if leaf.ndim else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, slots)
