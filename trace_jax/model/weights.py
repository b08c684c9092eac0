"""Hugging Face safetensors <-> our tree, both ways.

One table names every parameter's tensors; loading compares all of them with the files before reading any, and reads
each device's shard straight from the files.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from trace_jax.config import Lora
from trace_jax.model.architecture import Architecture
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
SHARD_BYTES = 5 * 10**9


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
    """The tensors of every parameter that a Hugging Face checkpoint holds; LoRA and emb_row have none.

    Raises ValueError when a path matches no row of the table.
    """
    table = {}
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition("/")
        if leaf in ("lora_a", "lora_b", "emb_row"):
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


def hub_name(key: str) -> str:
    """A tensor's name in the hub's layout, from that or from the newer one of transformers."""
    for newer, older in NEWER:
        key = re.sub(newer, older, key)
    return key


# ---- loading -----------------------------------------------------------------------------------------------------


class Checkpoint:
    """The safetensors of a folder, sharded or not, by the hub's names."""

    def __init__(self, folder: str | pathlib.Path) -> None:
        folder = pathlib.Path(folder)
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elif single.is_file():
            names = [single.name]
        else:
            raise FileNotFoundError(f"{folder}: neither {single.name} nor {index.name} is there")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise FileNotFoundError(f"{folder}: shards named by the index are missing: {', '.join(absent)}")
        self._tensors: dict[str, tuple[Any, str]] = {}
        for name in names:
            handle = safetensors.safe_open(folder / name, framework="np")
            for key in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                self._tensors[hub_name(key)] = (handle, key)

    def keys(self) -> set[str]:
        """Names of all tensors, in the hub's layout."""
        return set(self._tensors)

    def slice(self, key: str) -> Any:
        """A lazily read tensor: has get_shape(), and is indexed like an array."""
        handle, name = self._tensors[key]
        return handle.get_slice(name)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.slice(key).get_shape())


def check(checkpoint: Checkpoint, table: Mapping[str, Source]) -> None:
    """Raises ValueError that lists every missing, unexpected and mis-shaped tensor."""
    expected = {key: source.shape for source in table.values() for key in source.keys}
    there = checkpoint.keys()
    problems = [f"missing: {key}" for key in sorted(expected.keys() - there)]
    problems += [f"unexpected: {key}" for key in sorted(there - expected.keys())]
    problems += [
        f"shape of {key}: {checkpoint.shape(key)} in the file, {shape} by config.json"
        for key, shape in sorted(expected.items())
        if key in there and checkpoint.shape(key) != shape
    ]
    if problems:
        raise ValueError("the weights do not fit the architecture:\n  " + "\n  ".join(problems))


def read(checkpoint: Checkpoint, source: Source, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
    """The part `index` of a parameter, in our layout."""

    def one(key: str, part: tuple[slice, ...]) -> np.ndarray:
        if len(source.shape) > 2:  # the patch convolution: small, and flattened
            whole = checkpoint.slice(key)[...]
            return whole.reshape(whole.shape[0], -1).T[part].astype(dtype)
        if source.transposed:
            return checkpoint.slice(key)[part[1], part[0]].T.astype(dtype)
        return checkpoint.slice(key)[part].astype(dtype)

    if not source.stacked:
        return one(source.keys[0], index)
    return np.stack([one(key, index[1:]) for key in source.keys[index[0]]])


def load(
    folder: str | pathlib.Path,
    architecture: Architecture | None = None,
    *,
    lora: Lora | None = None,
    emb_token_id: int | None = None,
    init_emb_from: int | None = None,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
    seed: int = 0,
    **options: Any,
) -> Qwen2_5_VL:
    """Reads a Hugging Face folder into a model; `options` are those of Qwen2_5_VL (dtype, scan_layers, ...).

    `architecture` defaults to the folder's config.json. `emb_row` starts as the head's row `init_emb_from` (default:
    emb_token_id's own row, as `save` wrote it). LoRA is drawn from `seed`. `shardings(path, shape)` places each
    parameter; every process reads only its own part. Raises FileNotFoundError, or ValueError listing every missing,
    unexpected and mis-shaped tensor.
    """
    architecture = architecture or Architecture.from_hf(folder)

    def make() -> Qwen2_5_VL:
        return Qwen2_5_VL(architecture, lora=lora, emb_token_id=emb_token_id, rngs=nnx.Rngs(seed), **options)

    model = nnx.eval_shape(make)
    abstract = flat_parameters(model)
    table = sources(architecture, {path: leaf.shape for path, leaf in abstract.items()})
    checkpoint = Checkpoint(folder)
    check(checkpoint, table)

    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = {path: shardings(path, leaf.shape) if shardings else default for path, leaf in abstract.items()}
    new = [path for path in abstract if path not in table]

    def fresh() -> dict[str, jax.Array]:
        drawn = flat_parameters(make())
        return {path: drawn[path][...] for path in new}

    arrays = jax.jit(fresh, out_shardings={path: placed[path] for path in new})() if new else {}
    for path, source in table.items():
        leaf = abstract[path]
        arrays[path] = jax.make_array_from_callback(
            leaf.shape,
            placed[path],
            lambda index, source=source, dtype=leaf.dtype: read(checkpoint, source, index or (), dtype),
        )
    if emb_token_id is not None:
        row = emb_token_id if init_emb_from is None else init_emb_from
        source = table.get("lm_head/kernel", table["language/embed_tokens/embedding"])
        values = np.asarray(checkpoint.slice(source.keys[0])[row : row + 1])[0].astype(np.float32)
        arrays["emb_row"] = jax.device_put(values, placed["emb_row"])
    nnx.update(model, nnx.from_flat_state([(tuple(path.split("/")), array) for path, array in arrays.items()]))
    return model


# ---- saving ------------------------------------------------------------------------------------------------------


def merged_parameters(model: Qwen2_5_VL) -> dict[str, jax.Array]:
    """The parameters as a plain Qwen2.5-VL has them: LoRA added into its kernels, emb_row put into its rows."""
    leaves = {path: leaf[...] for path, leaf in flat_parameters(model).items()}
    merged = {path: leaf for path, leaf in leaves.items() if not path.endswith(("lora_a", "lora_b", "emb_row"))}
    for path, lora_a in leaves.items():
        module, _, leaf = path.rpartition("/")
        if leaf != "lora_a":
            continue
        block, name = module.split("/")[-2:]
        scale = getattr(getattr(model.language.layers, block), name).scale
        lora_b, kernel = leaves[f"{module}/lora_b"], leaves[f"{module}/kernel"]
        delta = jnp.einsum("lir,lro->lio", lora_a, lora_b, precision=jax.lax.Precision.HIGHEST)
        merged[f"{module}/kernel"] = (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
    if model.emb_token_id is not None:
        embedding = merged["language/embed_tokens/embedding"]
        row = leaves["emb_row"].astype(embedding.dtype)
        merged["language/embed_tokens/embedding"] = embedding.at[model.emb_token_id].set(row)
        if "lm_head/kernel" in merged:
            merged["lm_head/kernel"] = merged["lm_head/kernel"].at[:, model.emb_token_id].set(row)
    return merged


def save(model: Qwen2_5_VL, folder: str | pathlib.Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json and safetensors in the hub's layout, for `transformers` and for `load`.

    LoRA is merged into the kernels, emb_row written into the embedding's and the head's row; files of at most
    `shard_bytes` (one tensor at least).
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = merged_parameters(model)
    table = sources(model.architecture, {path: leaf.shape for path, leaf in parameters.items()})
    entries = [(key, path, i) for path, source in table.items() for i, key in enumerate(source.keys)]

    def size(path: str) -> int:
        return parameters[path].nbytes // len(table[path].keys)

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
            value = np.asarray(parameters[path][i] if source.stacked else parameters[path])
            value = value.T if source.transposed else value
            tensors[key] = np.ascontiguousarray(value.reshape(source.shape))
            weight_map[key] = name
        safetensors.numpy.save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(files) > 1:
        total = sum(size(path) for _, path, _ in entries)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {**model.architecture.to_hf(), "torch_dtype": str(parameters["language/norm/scale"].dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
