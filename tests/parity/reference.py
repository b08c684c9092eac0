"""Hugging Face's Qwen2.5-VL, as the parity tests make and call it."""

import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from trace_jax.data.processor import Patches
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.model.architecture import Architecture, VisionArchitecture
from trace_jax.model.vision import normalize_pixels

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def random_hf(architecture: Architecture, seed: int = 0):
    """A reference model with random weights, biases and norms included."""
    torch.manual_seed(seed)
    config = transformers.Qwen2_5_VLConfig(**architecture.to_hf(), attn_implementation="eager")
    reference = transformers.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name or "ln_q" in name else 0.1 * noise)
    return reference.eval()


def load_hf(folder: pathlib.Path):
    """Loads with Hugging Face; every tensor must find its place."""
    reference, report = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    return reference.eval()


def in_reading_order(values: np.ndarray, image: Patches) -> np.ndarray:
    """Something for every patch [n, ...] in window order -> merge units in reading order, as Hugging Face has them."""
    unit = len(image.values) // len(image.slots)
    return values.reshape(-1, unit, *values.shape[1:])[image.slots].reshape(values.shape)


VISION = tiny.architecture().vision


def normalized(image: Patches, vision: VisionArchitecture = VISION) -> np.ndarray:
    """An image's patches as the encoder embeds them: [n, patch_dim] float32, in window order."""
    return np.asarray(normalize_pixels(jnp.asarray(image.values), vision))


def image_arguments(sequences: Sequence[Tokens], vision: VisionArchitecture = VISION) -> dict:
    """`pixel_values` and `image_grid_thw` of all images; empty without any."""
    images = [image for sequence in sequences for image in sequence.images]
    if not images:
        return {}
    values = np.concatenate([in_reading_order(normalized(image, vision), image) for image in images])
    grids = [[1, vision.merge_size * image.grid[0], vision.merge_size * image.grid[1]] for image in images]
    return {"pixel_values": torch.tensor(values), "image_grid_thw": torch.tensor(grids)}


def padded_batch(
    sequences: Sequence[Tokens], *, left: bool, vision: VisionArchitecture = VISION
) -> tuple[dict, np.ndarray]:
    """Sequences as the reference takes them, padded on one side; and which slots [batch, length] hold tokens."""
    length = max(map(len, sequences))
    tokens, mask = np.full((2, len(sequences), length), tiny.PAD, np.int64)
    for row, sequence in enumerate(sequences):
        at = slice(length - len(sequence), None) if left else slice(len(sequence))
        tokens[row, at], mask[row, at] = sequence.tokens, 1
    arguments = {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask),
        "mm_token_type_ids": torch.tensor((tokens == tiny.IMAGE).astype(np.int32)),
    }
    return arguments | image_arguments(sequences, vision), mask.astype(bool)


def run_hf(reference, sequence: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """States after the final norm [l, D] and logits [l, vocab] of one sequence, positions computed by the reference."""
    arguments, _ = padded_batch([sequence], left=False)
    with torch.no_grad():
        reference.model.rope_deltas = None
        output = reference(**arguments, output_hidden_states=True)
    return output.hidden_states[-1][0].numpy(), output.logits[0].numpy()
