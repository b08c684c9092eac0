"""config.json of the published checkpoints, in every layout, and the number of their parameters."""

import dataclasses
import json
import math

import jax
import pytest
from flax import nnx

from trace_jax.model.architecture import Architecture
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.model.weights import flat_parameters, sources

# text: hidden, intermediate, layers, heads, kv heads, vocabulary, tied; vision intermediate; parameters
PUBLISHED = {
    "3B": (2048, 11008, 36, 16, 2, 151936, True, 3420, 3_754_622_976),
    "7B": (3584, 18944, 28, 28, 4, 152064, False, 3420, 8_292_166_656),
    "32B": (5120, 27648, 64, 40, 8, 152064, False, 3456, 33_452_718_336),
    "72B": (8192, 29568, 80, 64, 8, 152064, False, 3456, 73_410_777_344),
}


def flat_config(size: str) -> dict:
    """As on the hub."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, vision_intermediate, _ = PUBLISHED[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": vision_intermediate,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocabulary,
    }


def nested_config(size: str) -> dict:
    """As transformers 5 writes it."""
    transformers = pytest.importorskip("transformers")
    return transformers.Qwen2_5_VLConfig(**flat_config(size)).to_dict()


def mixed_config(size: str) -> dict:
    """As transformers 4.52 to 4.57 write it: a text_config, what it holds at the root too, another type of rope."""
    flat = flat_config(size) | {"rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default"}}
    return flat | {"text_config": {key: value for key, value in flat.items() if key != "vision_config"}}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configs_are_read_in_every_layout(size):
    hidden, _, layers, heads, kv_heads, _, tied, *_ = PUBLISHED[size]
    architecture = Architecture.from_dict(flat_config(size))
    nested = nested_config(size)
    assert "text_config" in nested and "hidden_size" not in nested
    assert Architecture.from_dict(nested) == architecture
    assert Architecture.from_dict(mixed_config(size)) == architecture
    assert Architecture.from_dict(architecture.to_hf()) == architecture
    language, vision = architecture.language, architecture.vision
    assert (language.num_layers, language.num_heads, language.num_kv_heads) == (layers, heads, kv_heads)
    assert language.head_dim == 128 and language.tie_embeddings == tied
    assert (vision.head_dim, vision.out_hidden_size) == (80, hidden)
    assert vision.full_attention_blocks == (7, 15, 23, 31)


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_model_has_the_parameters_of_the_published_checkpoint(size):
    architecture = Architecture.from_dict(flat_config(size))
    abstract = flat_parameters(nnx.eval_shape(lambda: Qwen2_5_VL(architecture, rngs=nnx.Rngs(0))))
    assert all(isinstance(leaf.get_value(), jax.ShapeDtypeStruct) for leaf in abstract.values())
    assert sum(math.prod(leaf.shape) for leaf in abstract.values()) == PUBLISHED[size][-1]
    table = sources(architecture, {path: leaf.shape for path, leaf in abstract.items()})
    assert sum(math.prod(s.shape) * len(s.keys) for s in table.values()) == PUBLISHED[size][-1]


def test_a_rotary_base_of_the_vision_encoder_s_own_is_kept():
    architecture = Architecture.from_dict(flat_config("3B"))
    other = dataclasses.replace(architecture, vision=dataclasses.replace(architecture.vision, rope_theta=500.0))
    assert Architecture.from_dict(other.to_hf()) == other
    transformers = pytest.importorskip("transformers")
    assert Architecture.from_dict(transformers.Qwen2_5_VLConfig(**other.to_hf()).to_dict()) == other


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_how_pixels_are_normalised_is_read_in_both_layouts(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(flat_config("3B")))
    assert Architecture.from_hf(tmp_path) == Architecture.from_dict(flat_config("3B"))
    pixels = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    settings = {"image_processor": pixels} if name == "processor_config.json" else pixels
    (tmp_path / name).write_text(json.dumps(settings))
    vision = Architecture.from_hf(tmp_path).vision
    assert (vision.image_mean, vision.image_std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_other_models_are_refused():
    config = flat_config("3B")
    for change, message in [
        ({"model_type": "qwen3_vl"}, "only 'qwen2_5_vl'"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"hidden_size": 2050}, "heads do not divide"),
        ({"vision_config": {**config["vision_config"], "out_hidden_size": 1}}, "out_hidden_size 1 != hidden_size"),
        ({"vision_config": {**config["vision_config"], "rope_parameters": {"rope_type": "yarn"}}}, "rope_type 'yarn'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Architecture.from_dict({**config, **change})
