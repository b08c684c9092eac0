"""Our LoRA, projector and <|emb|> <-> an adapter of the PEFT library, both ways.

PEFT holds all three exactly: LoRA tensors; the projector whole, as a module to save; and the row of <|emb|> as a
trainable token of the input embedding and, where the head is not tied to it, of the head.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from trace_jax.config import Lora
from trace_jax.model import weights
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = ("model.embed_tokens", "lm_head")
ROW = "token_adapter.trainable_tokens_delta"
# What changes an adapter's meaning and what our Linear does not do.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one tensor of an adapter belongs: a parameter of ours, or one layer of it."""

    path: str
    layer: int | None
    shape: tuple[int, ...]  # in the file
    transposed: bool


def parts(model: Qwen2_5_VL) -> dict[str, Part]:
    """Every tensor of a model's adapter, by its name in the hub's layout; the row of <|emb|> by each of `ROWS`."""
    found = {}
    shapes = {path: tuple(leaf.shape) for path, leaf in weights.flat_parameters(model).items()}
    for path, shape in shapes.items():
        module, _, leaf = path.rpartition("/")
        if leaf in ("lora_a", "lora_b"):
            name = module.removeprefix("language/layers/").replace("/", ".")
            matrix = "lora_A" if leaf == "lora_a" else "lora_B"
            for layer in range(shape[0]):
                found[f"model.layers.{layer}.{name}.{matrix}.weight"] = Part(path, layer, shape[:0:-1], True)
        elif leaf == "emb_row":
            for row in ROWS[: 1 if model.lm_head is None else 2]:
                found[f"{row}.{ROW}"] = Part(path, None, (1, *shape), False)
    merger = {path: shape for path, shape in shapes.items() if path.startswith("projector/")}
    for path, source in weights.sources(model.architecture, merger).items():
        found[source.keys[0]] = Part(path, None, source.shape, source.transposed)
    return found


def save_adapter(model: Qwen2_5_VL, lora: Lora, folder: str | pathlib.Path, *, base: str, fingerprint: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, float32, for the PEFT library and for `load_adapter`.

    `base` is the name or folder that PEFT shall look for, `fingerprint` that of the base's weights.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    leaves = {path: leaf[...] for path, leaf in weights.flat_parameters(model).items()}
    tensors = {}
    for key, part in parts(model).items():
        value = np.asarray(leaves[part.path] if part.layer is None else leaves[part.path][part.layer])
        value = (value.T if part.transposed else value).reshape(part.shape)
        newer = key if key.startswith("lm_head") else re.sub(r"^model\.", "model.language_model.", key)
        name = PREFIX + re.sub(r"^visual\.", "model.visual.", newer)
        tensors[name] = np.ascontiguousarray(value.astype(np.float32))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "target_modules": rf"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(lora.targets)})",
        "modules_to_save": ["visual.merger"],
        "trainable_token_indices": {row.removeprefix("model."): [model.emb_token_id] for row in ROWS}
        if model.lm_head is not None
        else {"embed_tokens": [model.emb_token_id]},
    }
    safetensors.numpy.save_file(tensors, folder / TENSORS, metadata={"format": "pt", "base": fingerprint})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model: Qwen2_5_VL, lora: Lora, folder: str | pathlib.Path | epath.Path, *, fingerprint: str) -> None:
    """Puts a PEFT adapter, local or remote, into a model that was made with `lora` and has an <|emb|>.

    What the adapter does not hold stays the base's: the projector, the row of <|emb|>. Raises FileNotFoundError, or
    ValueError that lists all of: what PEFT does and we do not, another rank, scale, targets or base, and every
    missing, unexpected and mis-shaped tensor.
    """
    folder = epath.Path(folder)
    for name in (CONFIG, TENSORS):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder}: no {name}; is it a PEFT adapter, saved as safetensors?")
    config = json.loads((folder / CONFIG).read_text())
    with (
        weights.staged(folder / TENSORS) as local,
        safetensors.safe_open(local, framework="np") as handle,
    ):
        names = {_older(name): name for name in handle.keys()}  # noqa: SIM118 (a handle is no mapping)
        written_for = (handle.metadata() or {}).get("base", fingerprint)
        problems = _differences(config, lora, model.emb_token_id, names)
        if written_for != fingerprint:
            problems.append(f"base: the adapter was made for the weights {written_for}, these are {fingerprint}")
        if problems:
            raise ValueError(f"the adapter in {folder} does not fit:\n  " + "\n  ".join(problems))
        wanted = parts(model)
        for optional in ("visual.merger.", *(f"{row}." for row in ROWS)):
            if not any(name.startswith(optional) for name in names):
                wanted = {key: part for key, part in wanted.items() if not key.startswith(optional)}
        shapes = {key: tuple(handle.get_slice(name).get_shape()) for key, name in names.items()}
        weights.check(shapes, {key: part.shape for key, part in wanted.items()}, f"the adapter in {folder}")
        values = {key: handle.get_tensor(name).astype(np.float32) for key, name in names.items()}
    _put(model, wanted, values)


def _older(name: str) -> str:
    """A tensor's name without PEFT's prefix, in the hub's layout."""
    name = name.removeprefix(PREFIX)
    for newer, older in weights.NEWER:
        name = re.sub(newer, older, name)
    return name


def _differences(config: Mapping[str, Any], lora: Lora, emb: int | None, names: Mapping[str, str]) -> list[str]:
    """In what an adapter's configuration differs from ours, one line each."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type: {config.get('peft_type')}; only LORA is supported")
    problems += [f"{name}: {config[name]} is not supported" for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias: {config['bias']!r} is not supported, only 'none'")
    targets = {match[1] for name in names if (match := re.search(r"\.(\w+)\.lora_A\.weight$", name))}
    ours = {"rank": lora.rank, "alpha": lora.alpha, "rslora": lora.rslora, "targets": sorted(lora.targets)}
    theirs = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "rslora": bool(config.get("use_rslora")),
        "targets": sorted(targets),
    }
    problems += [
        f"{name}: {theirs[name]} in the adapter, {value} in the configuration (--model.lora.{name})"
        for name, value in ours.items()
        if theirs[name] != value
    ]
    tokens = config.get("trainable_token_indices") or {}
    trained = {token for indices in (tokens.values() if isinstance(tokens, dict) else [tokens]) for token in indices}
    if trained - {emb}:
        problems.append(f"trainable_token_indices: {sorted(trained)}; only that of <|emb|>, {emb}, is supported")
    return problems


def _put(model: Qwen2_5_VL, wanted: Mapping[str, Part], values: Mapping[str, np.ndarray]) -> None:
    """Sets the parameters, sharded as they are. Raises ValueError when the two rows of <|emb|> cannot be one."""
    leaves = weights.flat_parameters(model)
    stacks: dict[str, list[np.ndarray]] = {}
    for key, part in wanted.items():  # layers come in order
        value = values[key].T if part.transposed else values[key]
        stacks.setdefault(part.path, []).append(value)
    rows = stacks.pop("emb_row", [])
    for path, stack in stacks.items():
        value = np.stack(stack) if len(leaves[path].shape) > stack[0].ndim else stack[0]
        leaves[path][...] = jax.device_put(value, leaves[path][...].sharding)
    assert model.emb_row is not None and model.emb_token_id is not None, "the model has no <|emb|>"
    if not rows:
        row = weights.head_row(
            {path: leaves[path][...] for path in weights.HEADS if path in leaves}, model.emb_token_id
        )
    elif model.lm_head is not None and (len(rows) == 1 or (rows[0] != rows[1]).any()):
        raise ValueError("the adapter gives <|emb|> different rows in the input embedding and the head; ours is one")
    else:
        row = rows[0][0]
    model.emb_row[...] = jax.device_put(row, model.emb_row[...].sharding)
