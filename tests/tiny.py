"""A tiny Qwen2.5-VL and hand-made inputs, shared by the tests."""

from collections.abc import Sequence

import jax
import numpy as np

from trace_jax.data.processor import Geometry, Packed, pack, patchify, rope_positions, stack_shards
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Inputs
from trace_jax.model.architecture import Architecture, LanguageArchitecture, VisionArchitecture
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.model.weights import flat_parameters
from trace_jax.retrieval.packing import Packer

IMAGE, VIDEO, START, END = 150, 151, 152, 153  # special tokens
EMB, TURN_END, PAD = 155, 156, 0
VOCABULARY = 160

GEOMETRY = Geometry(patch_size=4, window_size=16, min_pixels=64, max_pixels=64 * 64)


def architecture(tie: bool = False) -> Architecture:
    """3 decoder layers, 4 vision blocks of which 2 attend within windows of 4x4 patches."""
    return Architecture(
        vision=VisionArchitecture(
            depth=4,
            hidden_size=32,
            intermediate_size=52,
            num_heads=2,
            out_hidden_size=48,
            full_attention_blocks=(1, 3),
            patch_size=GEOMETRY.patch_size,
            window_size=GEOMETRY.window_size,
        ),
        language=LanguageArchitecture(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=80,
            num_layers=3,
            num_heads=6,
            num_kv_heads=2,
            mrope_section=(1, 1, 2),
            rope_theta=10000.0,
            max_positions=512,
            tie_embeddings=tie,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def sequence(
    seed: int,
    words: int,
    images: Sequence[tuple[int, int]] = (),
    geometry: Geometry = GEOMETRY,
    begin: Sequence[int] = (),
) -> Tokens:
    """Random words with random images of (height, width) pixels between them; `begin` are the first tokens."""
    rng = np.random.default_rng(seed)
    pieces, patches = [np.array(begin, int), rng.integers(1, 140, words)], []
    for height, width in images:
        image = patchify(rng.integers(0, 256, (height, width, 3)).astype(np.uint8), geometry)
        patches.append(image)
        pieces += [[START], [IMAGE] * len(image.slots), [END], rng.integers(1, 140, words)]
    tokens = np.concatenate(pieces).astype(np.int32)
    is_visual = tokens == IMAGE
    return Tokens(tokens, rope_positions(is_visual, [image.grid for image in patches]), tuple(patches), is_visual)


@jax.jit
def states(model: Qwen2_5_VL, inputs: Inputs) -> jax.Array:
    """What the model computes, by one program for all models that are made alike."""
    return model(inputs)


def train_adapters(model: Qwen2_5_VL) -> Qwen2_5_VL:
    """The model with adapters that change what it gives: new ones add nothing."""
    for path, leaf in flat_parameters(model).items():
        if path.endswith("lora_b"):
            leaf[...] = 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    return model


def packer(most: int, *, row_length: int = 64, share: bool = True) -> Packer:
    """Packs for one shard at most so many sequences at once."""
    return Packer(GEOMETRY, PAD, most, 1, row_length, 192, share)


SEQUENCES = (
    sequence(0, 5, [(16, 16)]),
    sequence(1, 9),
    sequence(2, 4, [(40, 24), (16, 48), (8, 8)]),
    sequence(3, 2, [(56, 40)]),
    sequence(4, 30),
)


def packed(sequences: Sequence[Tokens] = SEQUENCES, rows: int = 2, row_length: int = 128) -> Packed:
    """Sequences packed into rows, without the shard axis; every one must find room."""
    result = pack(
        sequences,
        GEOMETRY,
        rows=rows,
        row_length=row_length,
        patch_rows=3,
        patch_row_length=192,
        pad_token=PAD,
    )
    assert (result.starts >= 0).all()
    return result


def inputs(sequences: Sequence[Tokens] = SEQUENCES, rows: int = 2, row_length: int = 128) -> Inputs:
    """`packed` as a batch of one shard."""
    return stack_shards([packed(sequences, rows, row_length).inputs])


def prompts(sequences: Sequence[Tokens], row_length: int = 64) -> Inputs:
    """One sequence a row, left-aligned, in the order given."""
    shards = [packed([one], 1, row_length).inputs for one in sequences]
    joined = stack_shards(shards)
    offset = np.arange(len(shards))[:, None, None] * (joined.patches.shape[1] * joined.patches.shape[2] // 4)
    index = np.where(joined.visual_index >= 0, joined.visual_index + offset, -1).astype(np.int32)
    joined = joined._replace(visual_index=index)
    return Inputs(*(array.reshape(1, -1, *array.shape[2:]) for array in joined))
