"""Hugging Face safetensors <-> our tree, both ways.

One table names every parameter's tensors; loading compares all of them with the files before reading any. It goes
through the files once, tensor by tensor, straight into the devices' shards: beside these, host memory never holds
more than one tensor. The base may also be a folder in our own layout (`save_base`), of which every process reads its
own shards alone.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from etils import epath
from flax import nnx

from trace_jax.config import Lora
from trace_jax.model.architecture import Architecture
from trace_jax.model.layers import quantized, with_adapter
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

# path of one of our modules -> prefix of its tensors in the hub's checkpoints; {layer} counts along the leading axis
TABLE = (
    (r"vision/patch_embed", "visual.patch_embed.proj"),
    (r"vision/blocks/(.+)", r"visual.blocks.{layer}.\1"),
    (r"projector/ln_q", "visual.merger.ln_q"),
    (r"projector/mlp_(\d)", r"visual.merger.mlp.\1"),
    (r"language/embed_tokens", "model.embed_tokens"),
    (r"language/layers/(.+)", r"model.layers.{layer}.\1"),
    (r"language/norm", "model.norm"),
    (r"lm_head", "lm_head"),
)
LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}
NEWER = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))  # transformers >= 4.52
HEADS = ("lm_head/kernel", "language/embed_tokens/embedding")  # the output rows; the latter where they are tied
HEADER_BYTES = 10**8  # the format's own limit
SHARD_BYTES = 2 * 10**9
PARAMETERS = "parameters"  # of a base in our own layout: the Orbax checkpoint,
ORIGIN = "origin.json"  # and what it was made of


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from: its tensors (one, or one a layer) and their shape in the files."""

    keys: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]
    transposed: bool


def flat_parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters by path, joined with "/"."""
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def sources(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """The tensors of every parameter that a Hugging Face checkpoint holds; LoRA, emb_row and scales of int8 have none.

    Raises ValueError when a path matches no row of the table.
    """
    table = {}
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition("/")
        if leaf in ("lora_a", "lora_b", "emb_row", "kernel_scale"):
            continue
        matches = [match.expand(name) for rule, name in TABLE if (match := re.fullmatch(rule, module))]
        if len(matches) != 1 or leaf not in LEAVES:
            raise ValueError(f"parameter {path} matches {len(matches)} rows of the table of weights, not one")
        name = f"{matches[0].replace('/', '.')}.{LEAVES[leaf]}"
        stacked, inner = "{layer}" in name, shape
        keys: tuple[str, ...] = (name,)
        if stacked:
            inner, keys = shape[1:], tuple(name.format(layer=layer) for layer in range(shape[0]))
        transposed = leaf == "kernel"
        if module == "vision/patch_embed":
            vision = architecture.vision
            side = vision.patch_size
            inner = (inner[1], vision.in_channels, vision.temporal_patch_size, side, side)
        elif transposed:
            inner = inner[::-1]
        table[path] = Source(keys, stacked, tuple(inner), transposed)
    return table


def stored_dtype(path: str, dtype: Any, trained: Sequence[str]) -> np.dtype:
    """What a parameter of the model's own `dtype` is kept in: float32 where a regex of `trained` matches its path.

    Training takes steps that are small beside the weights, and bfloat16 would swallow most of them. Int8 stays int8.
    """
    trains = any(re.fullmatch(pattern, path) for pattern in trained)
    return np.dtype(jnp.float32 if trains and dtype != jnp.int8 else dtype)


def hub_name(key: str) -> str:
    """A tensor's name in the hub's layout, from that or from the newer one of transformers."""
    for newer, older in NEWER:
        key = re.sub(newer, older, key)
    return key


# ---- loading -----------------------------------------------------------------------------------------------------


class Checkpoint:
    """The safetensors of a folder, local or remote, sharded or not, by the hub's names.

    Only the headers are read at first. Raises FileNotFoundError, or ValueError for a damaged header.
    """

    def __init__(self, folder: str | pathlib.Path | epath.Path) -> None:
        folder = epath.Path(folder)
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif single.exists():
            names = [single.name]
        else:
            raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name} is there")
        self.files = [folder / name for name in names]
        absent = [file.name for file in self.files if not file.exists()]
        if absent:
            raise FileNotFoundError(f"{folder}: shards named by the index are missing: {', '.join(absent)}")
        self.tensors: list[dict[str, str]] = []  # of each file: the hub's name -> the file's
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            header = _header(file)
            self.tensors.append({hub_name(key): key for key in header})
            self.shapes |= {ours: tuple(header[key]["shape"]) for ours, key in self.tensors[-1].items()}


def _header(file: epath.Path) -> dict[str, dict[str, Any]]:
    """Name -> dtype and shape of the tensors of a safetensors file, which is read no further."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > HEADER_BYTES:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(stream.read(length))
    except ValueError as error:
        raise ValueError(f"{file} is no safetensors file, or damaged: {error}") from error
    header.pop("__metadata__", None)
    return header


def is_remote(path: str | pathlib.Path | epath.Path) -> bool:
    """Whether a path is a URL such as gs://..., not a file of this machine."""
    return "://" in str(path)


@contextlib.contextmanager
def staged(file: epath.Path) -> Iterator[pathlib.Path]:
    """The file on this machine's disk; a remote one is copied to a temporary file, which goes away again."""
    if not is_remote(file):
        yield pathlib.Path(file)
        return
    with tempfile.TemporaryDirectory(prefix="trace_jax_") as folder:
        copy = pathlib.Path(folder) / file.name
        with file.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, 16 * 2**20)
        yield copy


def check(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Compares the shapes of a file's tensors with those wanted.

    Raises ValueError "the weights do not fit `what`" that lists every missing, unexpected and mis-shaped tensor.
    """
    problems = [f"missing: {key}" for key in sorted(expected.keys() - shapes.keys())]
    problems += [f"unexpected: {key}" for key in sorted(shapes.keys() - expected.keys())]
    problems += [
        f"shape of {key}: {shapes[key]} in the file, {shape} by the architecture"
        for key, shape in sorted(expected.items())
        if key in shapes and tuple(shapes[key]) != tuple(shape)
    ]
    if problems:
        raise ValueError(f"the weights do not fit {what}:\n  " + "\n  ".join(problems))


def read(file: pathlib.Path, name: str, source: Source, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Tensor `name` of a file as an array `like` this one, in our layout; local shards' parts alone, once each.

    The devices turn what is transposed in the file: a host is slow at it. Raises ValueError for a damaged file.
    """
    if not source.transposed:
        return _read_as_stored(file, name, source, like)
    turn = jax.jit(jnp.transpose, out_shardings=like.sharding)
    return jax.block_until_ready(turn(_read_as_stored(file, name, source, _turned(like))))


def _read_as_stored(file: pathlib.Path, name: str, source: Source, like: jax.ShapeDtypeStruct) -> jax.Array:
    """As `read`, in the file's layout, a matrix of the patch convolution.

    The file is mapped for this tensor alone: pages of a mapped file count as the process's memory.
    """
    try:
        with safetensors.safe_open(file, framework="np") as handle:
            stored = handle.get_slice(name)
            parts: dict[str, np.ndarray] = {}  # replicas share a part

            def part(index: tuple[slice, ...] | None) -> np.ndarray:
                index = index or (slice(None),) * len(like.shape)
                if str(index) not in parts:
                    flat = len(source.shape) == len(like.shape)  # all but the patch convolution, which is small
                    values = stored[index] if flat else stored[...].reshape(like.shape)[index]
                    parts[str(index)] = values.astype(like.dtype, copy=False)
                return parts[str(index)]

            return jax.block_until_ready(jax.make_array_from_callback(like.shape, like.sharding, part))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or damaged: {error}") from error


def _turned(matrix: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The transpose of a matrix, split as that is."""
    sharding = matrix.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        rows, columns = (*sharding.spec, None, None)[:2]
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(columns, rows))
    return jax.ShapeDtypeStruct(matrix.shape[::-1], matrix.dtype, sharding=sharding)


def _read_safetensors(
    folder: epath.Path, table: Mapping[str, Source], abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The parameters of the table, and the scales of those in int8, file by file; errors as `load`."""
    checkpoint = Checkpoint(folder)
    check(checkpoint.shapes, {key: source.shape for source in table.values() for key in source.keys}, "config.json")
    owners = {key: (path, layer) for path, source in table.items() for layer, key in enumerate(source.keys)}
    arrays: dict[str, jax.Array] = {}
    wanted = {path: _floating(abstract[path]) for path in table}
    stacks = [path for path, source in table.items() if source.stacked]
    stacks += [f"{path}_scale" for path in stacks if abstract[path].dtype == jnp.int8]
    for path in stacks:
        like = abstract[path]
        zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=like.sharding)
        arrays[path] = zeros(like.shape, like.dtype)
    for file, tensors in zip(checkpoint.files, checkpoint.tensors, strict=True):
        with staged(file) as local:
            for key, name in tensors.items():
                path, layer = owners[key]
                if not table[path].stacked:
                    arrays[path] = read(local, name, table[path], abstract[path])
                    continue
                one = read(local, name, table[path], _of_layer(wanted[path]))
                for part, value in _stored(path, one, abstract).items():
                    put = jax.jit(_put_layer, donate_argnums=0, out_shardings=abstract[part].sharding)
                    arrays[part] = put(arrays[part], value, layer)
    return arrays


def _put_layer(stack: jax.Array, one: jax.Array, layer: int) -> jax.Array:
    """The stack with one of its layers set."""
    return jax.lax.dynamic_update_index_in_dim(stack, one, layer, 0)


def _of_layer(stack: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """One layer of a stack, split as the stack is; its leading axis is not."""
    sharding = stack.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        assert not sharding.spec or sharding.spec[0] is None, f"{sharding.spec} splits a stack of layers"
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=sharding)


def _floating(like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """What is read for a parameter: the hub's bfloat16 for one in int8."""
    dtype = jnp.bfloat16 if like.dtype == jnp.int8 else like.dtype
    return jax.ShapeDtypeStruct(like.shape, dtype, sharding=like.sharding)


def _stored(path: str, value: jax.Array, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """A parameter, or a layer of it, as the model stores it: by its path, and in int8 its scale by another."""
    if abstract[path].dtype != jnp.int8:
        return {path: value}
    parts = path, f"{path}_scale"
    likes = [abstract[part] if value.ndim == len(abstract[path].shape) else _of_layer(abstract[part]) for part in parts]
    quantize = jax.jit(quantized, out_shardings=tuple(like.sharding for like in likes))
    return dict(zip(parts, quantize(value), strict=True))


def _read_base(
    folder: epath.Path, table: Mapping[str, Source], abstract: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """As `_read_safetensors`, of a base in our own layout: every process reads its own shards, all before any is
    stored in int8.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(folder / PARAMETERS).item_metadata
        shapes = {path: tuple(leaf.shape) for path, leaf in stored.items()}
        check(shapes, {path: abstract[path].shape for path in table}, "config.json")
        arrays = checkpointer.restore(folder / PARAMETERS, {path: _floating(abstract[path]) for path in table})
    for path in table:
        arrays |= _stored(path, arrays.pop(path), abstract)
    return arrays


def load(
    folder: str | pathlib.Path | epath.Path,
    architecture: Architecture | None = None,
    *,
    lora: Lora | None = None,
    emb_token_id: int | None = None,
    init_emb_from: int | None = None,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    seed: int = 0,
    trained: Sequence[str] = (),
    **options: Any,
) -> Qwen2_5_VL:
    """Reads a Hugging Face folder, or one of `save_base`, into a model; `options` are those of Qwen2_5_VL (dtype, ...).

    `architecture` defaults to the folder's config.json. `emb_row` starts as the head's row `init_emb_from` (default:
    emb_token_id's own row, as `save` wrote it). LoRA is drawn from `seed`. What `trained` matches is kept in float32
    (`stored_dtype`). `shardings(path, shape)` places each parameter; every process reads only its own part. Raises
    FileNotFoundError, or ValueError listing every missing, unexpected and mis-shaped tensor.
    """
    folder = epath.Path(folder)
    architecture = architecture or Architecture.from_hf(folder)

    def make() -> Qwen2_5_VL:
        return Qwen2_5_VL(architecture, lora=lora, emb_token_id=emb_token_id, rngs=nnx.Rngs(seed), **options)

    model = nnx.eval_shape(make)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        path: jax.ShapeDtypeStruct(
            leaf.shape,
            stored_dtype(path, leaf.dtype, trained),
            sharding=shardings(path, leaf.shape) if shardings else default,
        )
        for path, leaf in flat_parameters(model).items()
    }
    table = sources(architecture, {path: leaf.shape for path, leaf in abstract.items()})
    if (folder / PARAMETERS).exists():
        arrays = _read_base(folder, table, abstract)
    else:
        arrays = _read_safetensors(folder, table, abstract)

    new = [path for path in abstract if path not in arrays and path != "emb_row"]

    def fresh() -> dict[str, jax.Array]:
        drawn = flat_parameters(make())
        return {path: drawn[path][...] for path in new}

    arrays |= jax.jit(fresh, out_shardings={path: abstract[path].sharding for path in new})() if new else {}
    if emb_token_id is not None:
        row = emb_token_id if init_emb_from is None else init_emb_from
        pick = jax.jit(head_row, static_argnums=1, out_shardings=abstract["emb_row"].sharding)
        arrays["emb_row"] = pick({path: arrays[path] for path in HEADS if path in arrays}, row)
    nnx.update(model, nnx.from_flat_state([(tuple(path.split("/")), array) for path, array in arrays.items()]))
    return model


def head_row(parameters: Mapping[str, jax.Array], row: int) -> jax.Array:
    """Row `row` of the base's head, [D] float32."""
    kernel = parameters.get(HEADS[0])
    values = parameters[HEADS[1]][row] if kernel is None else kernel[:, row]
    return values.astype(jnp.float32)


def fingerprint(folder: str | pathlib.Path | epath.Path) -> str:
    """Names a base by its weights: sixteen digits of the hash of its safetensors, kept by `save_base`."""
    folder = epath.Path(folder)
    if (folder / ORIGIN).exists():
        return json.loads((folder / ORIGIN).read_text())["fingerprint"]
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


# ---- saving ------------------------------------------------------------------------------------------------------


def merged_layer(
    model: Qwen2_5_VL, leaves: Mapping[str, jax.Array], path: str, layer: int | None, dtype: np.dtype
) -> jax.Array:
    """A parameter (of one layer, where layers are stacked) as a plain Qwen2.5-VL has it, in `dtype`.

    LoRA is added into its kernel in float32, emb_row put into its rows.
    """
    module, _, leaf = path.rpartition("/")
    adapter, scale, row = None, 0.0, None
    if leaf == "kernel" and f"{module}/lora_a" in leaves:
        block, name = module.split("/")[-2:]
        adapter = leaves[f"{module}/lora_a"], leaves[f"{module}/lora_b"]
        scale = getattr(getattr(model.language.layers, block), name).scale
    if model.emb_token_id is not None and path in HEADS:
        row = leaves["emb_row"]
    axis = int(path == HEADS[0])  # the head is transposed
    return _merged(leaves[path], adapter, row, layer, model.emb_token_id, scale=scale, axis=axis, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("scale", "axis", "dtype"))
def _merged(
    value: jax.Array,
    adapter: tuple[jax.Array, jax.Array] | None,
    row: jax.Array | None,
    layer: int | None,
    token: int | None,
    *,
    scale: float,
    axis: int,
    dtype: np.dtype,
) -> jax.Array:
    if layer is not None:
        value, adapter = jax.tree.map(lambda stack: stack[layer], (value, adapter))
    if adapter is not None:
        value = with_adapter(value, *adapter, scale)
    value = value.astype(dtype)
    if row is not None and token is not None:
        value = jax.lax.dynamic_update_index_in_dim(value, row.astype(dtype), token, axis)
    return value


def save(model: Qwen2_5_VL, folder: str | pathlib.Path, *, dtype: Any = None, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json and safetensors in the hub's layout, for `transformers` and for `load`.

    LoRA is merged into the kernels, emb_row written into the embedding's and the head's row, one tensor at a time.
    `dtype` is that of the files (default: each parameter's own). Files hold at most `shard_bytes` (one tensor at
    least); host memory holds one file. A model that is spread over several processes cannot be saved; one in int8
    raises ValueError.
    """
    if model.language.layers.mlp.down_proj.kernel_scale is not None:
        raise ValueError("a base in int8 is not written: it is rounded; load it in bfloat16 (--model.param-dtype)")
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {path: leaf[...] for path, leaf in flat_parameters(model).items()}
    table = sources(model.architecture, {path: leaf.shape for path, leaf in leaves.items()})
    dtypes = {path: np.dtype(dtype or leaves[path].dtype) for path in table}
    entries = [(key, path, i) for path, source in table.items() for i, key in enumerate(source.keys)]

    def size(path: str) -> int:
        return leaves[path].size // len(table[path].keys) * dtypes[path].itemsize

    files: list[list[tuple[str, str, int]]] = [[]]
    room = shard_bytes
    for entry in entries:
        if files[-1] and size(entry[1]) > room:
            files.append([])
            room = shard_bytes
        files[-1].append(entry)
        room -= size(entry[1])

    weight_map = {}
    for number, file in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for key, path, i in file:
            source = table[path]
            value = np.asarray(merged_layer(model, leaves, path, i if source.stacked else None, dtypes[path]))
            value = value.T if source.transposed else value
            tensors[key] = np.ascontiguousarray(value.reshape(source.shape))
            weight_map[key] = name
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(size(path) for _, path, _ in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {**model.architecture.to_hf(), "torch_dtype": str(dtypes["language/norm/scale"])}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_base(model: Qwen2_5_VL, folder: str | pathlib.Path | epath.Path, source: str) -> None:
    """Writes the base's parameters in our own layout (Orbax), local or remote, with the name and the fingerprint of
    the Hugging Face folder `source` that they are of.

    The model has no adapters and no emb_row. Every process writes its own shards.
    """
    folder = epath.Path(folder)
    parameters = {path: leaf[...] for path, leaf in flat_parameters(model).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / PARAMETERS, parameters)
    if jax.process_index() == 0:  # alone: a fingerprint reads every file of the source
        origin = {"source": source, "fingerprint": fingerprint(source)}
        (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")
