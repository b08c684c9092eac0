"""Parity with Hugging Face's Qwen2.5-VL in float32: component by component, end to end, and files both ways."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.parity.reference import image_arguments, load_hf, random_hf, run_hf, torch, transformers
from trace_jax.config import Lora
from trace_jax.model import weights
from trace_jax.model.architecture import Architecture
from trace_jax.model.layers import text_rotary, vision_rotary
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("hf")
    random_hf(tiny.architecture(request.param)).save_pretrained(path)
    return path


def compare(model, reference, tolerance: float = 1e-4) -> float:
    """Largest difference of states and logits over the packed sequences."""
    packed = tiny.packed()
    inputs = tiny.stack_shards([packed.inputs])
    hidden = np.asarray(tiny.states(model, inputs)).reshape(-1, 48)
    logits = np.asarray(model.logits(jnp.asarray(hidden)))
    worst = 0.0
    for start, sequence in zip(packed.starts, tiny.SEQUENCES, strict=True):
        expected_hidden, expected_logits = run_hf(reference, sequence)
        at = slice(start, start + len(sequence))
        np.testing.assert_allclose(hidden[at], expected_hidden, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(logits[at], expected_logits, atol=tolerance, rtol=tolerance)
        worst = max(worst, np.abs(hidden[at] - expected_hidden).max(), np.abs(logits[at] - expected_logits).max())
    return worst


@pytest.mark.parametrize("scan", [True, False])
def test_packed_rows_equal_single_sequences(folder, scan):
    worst = compare(weights.load(folder, scan_layers=scan), load_hf(folder), 2e-5)
    print(f"largest difference {worst:.2e}")


def test_vision_encoder_and_projector(folder):
    model, reference = weights.load(folder), load_hf(folder)
    packed = tiny.packed()
    visual = np.asarray(jax.jit(Qwen2_5_VL.visual)(model, tiny.stack_shards([packed.inputs])))[0]
    for start, sequence in zip(packed.starts, tiny.SEQUENCES, strict=True):
        at = slice(start, start + len(sequence))
        index = packed.inputs.visual_index.reshape(-1)[at]
        if not sequence.images:
            assert (index == -1).all()
            continue
        images = image_arguments([sequence])
        with torch.no_grad():
            expected = reference.model.visual(images["pixel_values"], grid_thw=images["image_grid_thw"]).pooler_output
        np.testing.assert_allclose(visual[index[index >= 0]], expected.numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("theta", "section"), [(1e6, (16, 24, 24)), (1e4, (4, 6, 6))], ids=["published", "embedded"])
def test_angles_far_into_a_text_and_an_image(theta, section):
    """What the published models and the embedded base turn by; an error of a frequency grows with the position."""
    positions = np.random.default_rng(0).integers(0, 32_768, (1, 500, 3)).astype(np.int32)
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=4 * sum(section),
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "mrope_section": list(section)},
    )
    reference = modeling.Qwen2_5_VLRotaryEmbedding(config)
    expected = reference(torch.zeros(1), torch.tensor(positions.transpose(2, 0, 1)))
    for ours, theirs in zip(text_rotary(positions, section, theta), expected, strict=True):
        np.testing.assert_allclose(ours, theirs[..., : sum(section)].numpy(), rtol=0, atol=1e-6)

    positions = positions[0, :, :2] % 2_000
    config = transformers.Qwen2_5_VLConfig(vision_config={"hidden_size": 80, "num_heads": 1}).vision_config
    expected = modeling.Qwen2_5_VLVisionRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
    for ours, theirs in zip(vision_rotary(positions, 80, 1e4), expected, strict=True):
        np.testing.assert_allclose(ours, theirs[..., :40].numpy(), rtol=0, atol=1e-6)


def test_saved_model_with_lora_and_emb_row_loads_in_hf(folder, tmp_path):
    model = weights.load(folder, lora=Lora(rank=4, alpha=8.0), emb_token_id=tiny.EMB, init_emb_from=7)
    np.testing.assert_array_equal(model.emb_row[...], model.head().base[7])
    key = jax.random.key(0)
    for path, leaf in weights.flat_parameters(model).items():
        if path.endswith(("lora_b", "emb_row")):
            key, use = jax.random.split(key)
            leaf[...] = 0.1 * jax.random.normal(use, leaf.shape)
    weights.save(model, tmp_path, shard_bytes=50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    compare(model, load_hf(tmp_path), 2e-5)
    again = weights.load(tmp_path, emb_token_id=tiny.EMB)
    np.testing.assert_array_equal(again.emb_row[...], model.emb_row[...])


def test_save_and_load_is_the_identity(folder, tmp_path):
    model = weights.load(folder)
    weights.save(model, tmp_path)
    assert Architecture.from_hf(tmp_path) == model.architecture
    again = weights.flat_parameters(weights.load(tmp_path))
    for path, leaf in weights.flat_parameters(model).items():
        np.testing.assert_array_equal(leaf[...], again[path][...])


def test_config_of_both_layouts(folder, tmp_path):
    nested = Architecture.from_hf(folder)  # written by transformers
    flat = transformers.Qwen2_5_VLConfig(**nested.to_hf())
    assert Architecture.from_dict(json.loads(json.dumps(flat.to_dict()))) == nested
    expected = dataclasses.asdict(tiny.architecture(nested.language.tie_embeddings))
    assert dataclasses.asdict(nested) == expected


def test_newer_key_names_are_read(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    renamed = {}
    for key, value in load_file(folder / "model.safetensors").items():
        newer = re.sub(r"^model\.", "model.language_model.", key)
        renamed[re.sub(r"^visual\.", "model.visual.", newer)] = value
    save_file(renamed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = weights.flat_parameters(weights.load(folder))
    for path, leaf in weights.flat_parameters(weights.load(tmp_path)).items():
        np.testing.assert_array_equal(leaf[...], expected[path][...])
