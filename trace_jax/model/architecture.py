"""The shape of a Qwen2.5-VL, read from and written to a Hugging Face config.json."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath

from trace_jax.data.processor import image_settings


@dataclasses.dataclass(frozen=True)
class VisionArchitecture:
    """The vision encoder and its patch merger. Sizes in pixels where named so, else in features."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    full_attention_blocks: tuple[int, ...]  # the other blocks attend within windows
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    merge_size: int = 2
    window_size: int = 112  # pixels
    in_channels: int = 3
    rope_theta: float = 10000.0
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)  # per RGB channel of values in [0, 1]
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_pixels(self) -> int:
        """Bytes of a patch as it comes in: channels x height x width."""
        return self.in_channels * self.patch_size**2

    @property
    def patch_dim(self) -> int:
        """Length of a patch as it is embedded: channels x temporal x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.merge_size**2


@dataclasses.dataclass(frozen=True)
class LanguageArchitecture:
    """The decoder. `mrope_section` counts rotary frequencies given to time, height and width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float = 1000000.0
    norm_eps: float = 1e-6
    max_positions: int = 128000
    tie_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        """Features of an attention head."""
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A whole Qwen2.5-VL: its two towers and the ids of its special tokens."""

    vision: VisionArchitecture
    language: LanguageArchitecture
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        vision, language = self.vision, self.language
        problems = []
        if language.hidden_size % language.num_heads or language.num_heads % language.num_kv_heads:
            problems.append("the decoder's heads do not divide its hidden size, or its kv heads not its heads")
        elif 2 * sum(language.mrope_section) != language.head_dim or len(language.mrope_section) != 3:
            problems.append(
                f"mrope_section {language.mrope_section} must be three counts that sum to half of head_dim "
                f"{language.head_dim}"
            )
        if vision.hidden_size % (4 * vision.num_heads):
            problems.append("the vision encoder's head_dim must be a whole multiple of 4")
        if vision.out_hidden_size != language.hidden_size:
            problems.append(f"out_hidden_size {vision.out_hidden_size} != hidden_size {language.hidden_size}")
        if any(not 0 <= block < vision.depth for block in vision.full_attention_blocks):
            problems.append(f"full attention blocks {vision.full_attention_blocks} outside depth {vision.depth}")
        if problems:
            raise ValueError("not a valid Qwen2.5-VL: " + "; ".join(problems))

    @classmethod
    def from_hf(cls, folder: str | pathlib.Path | epath.Path) -> "Architecture":
        """Reads `folder`/config.json: transformers 5's nested text_config, or the hub's flat layout.

        How pixels are normalised is in the `image_settings`; where they say nothing, as all published checkpoints do.
        Raises FileNotFoundError when there is none, ValueError for another model type, a feature that Qwen2.5-VL's
        published checkpoints do not use, or a missing field.
        """
        path = epath.Path(folder) / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; give the folder of a Hugging Face Qwen2.5-VL")
        try:
            architecture = cls.from_dict(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        known = image_settings(folder)
        pixels = {name: tuple(known[name]) for name in ("image_mean", "image_std") if name in known}
        return dataclasses.replace(architecture, vision=dataclasses.replace(architecture.vision, **pixels))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "Architecture":
        """Reads the contents of a config.json; errors as `from_hf`."""
        if config.get("model_type") != "qwen2_5_vl":
            raise ValueError(f"model_type is {config.get('model_type')!r}; only 'qwen2_5_vl' is supported")
        text = config.get("text_config") or config
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        try:
            vision = config["vision_config"]
            for name, part in (("text", text), ("vision", vision)):
                if part.get("hidden_act", "silu") != "silu":
                    raise ValueError(f"{name} hidden_act {part['hidden_act']!r} is not supported, only 'silu'")
            if text.get("use_sliding_window"):
                raise ValueError("use_sliding_window is not supported")
            turn = vision.get("rope_parameters") or {}
            for one, known in ((rope, ("default", "mrope")), (turn, ("default", "axial"))):
                kind = one.get("rope_type", one.get("type", "default"))
                if kind not in known:
                    raise ValueError(f"rope_type {kind!r} is not supported")
            heads, eos = text["num_attention_heads"], text.get("eos_token_id")
            return cls(
                vision=VisionArchitecture(
                    depth=vision["depth"],
                    hidden_size=vision["hidden_size"],
                    intermediate_size=vision["intermediate_size"],
                    num_heads=vision["num_heads"],
                    out_hidden_size=vision["out_hidden_size"],
                    full_attention_blocks=tuple(vision["fullatt_block_indexes"]),
                    patch_size=vision["patch_size"],
                    temporal_patch_size=vision["temporal_patch_size"],
                    merge_size=vision["spatial_merge_size"],
                    window_size=vision["window_size"],
                    in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                    rope_theta=float(turn.get("rope_theta", 10000.0)),
                ),
                language=LanguageArchitecture(
                    vocab_size=text["vocab_size"],
                    hidden_size=text["hidden_size"],
                    intermediate_size=text["intermediate_size"],
                    num_layers=text["num_hidden_layers"],
                    num_heads=heads,
                    num_kv_heads=text.get("num_key_value_heads") or heads,
                    mrope_section=tuple(rope["mrope_section"]),
                    rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1000000.0))),
                    norm_eps=text["rms_norm_eps"],
                    max_positions=text.get("max_position_embeddings", 128000),
                    tie_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)),
                ),
                image_token_id=config["image_token_id"],
                video_token_id=config["video_token_id"],
                vision_start_token_id=config["vision_start_token_id"],
                vision_end_token_id=config["vision_end_token_id"],
                bos_token_id=text.get("bos_token_id"),
                eos_token_id=eos[0] if isinstance(eos, list) else eos,
            )
        except KeyError as error:
            raise ValueError(f"field {error} is missing") from error

    def to_hf(self) -> dict[str, Any]:
        """The contents of a config.json in the flat layout of the hub, which every transformers version reads."""
        vision, language = self.vision, self.language
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "vocab_size": language.vocab_size,
            "hidden_size": language.hidden_size,
            "intermediate_size": language.intermediate_size,
            "num_hidden_layers": language.num_layers,
            "num_attention_heads": language.num_heads,
            "num_key_value_heads": language.num_kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": language.max_positions,
            "rms_norm_eps": language.norm_eps,
            "rope_theta": language.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(language.mrope_section)},
            "tie_word_embeddings": language.tie_embeddings,
            "use_sliding_window": False,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": vision.depth,
                "hidden_size": vision.hidden_size,
                "intermediate_size": vision.intermediate_size,
                "num_heads": vision.num_heads,
                "out_hidden_size": vision.out_hidden_size,
                "fullatt_block_indexes": list(vision.full_attention_blocks),
                "patch_size": vision.patch_size,
                "temporal_patch_size": vision.temporal_patch_size,
                "spatial_merge_size": vision.merge_size,
                "window_size": vision.window_size,
                "in_channels": vision.in_channels,
                "hidden_act": "silu",
                "rope_parameters": {"rope_type": "axial", "rope_theta": vision.rope_theta},
            },
        }
