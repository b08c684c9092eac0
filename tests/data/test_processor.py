import io

import numpy as np
import pytest
from PIL import Image

from trace_jax.data.processor import (
    Geometry,
    Sequence,
    decode_image,
    first_fit,
    fit_size,
    pack,
    patchify,
    rope_positions,
)

GEOMETRY = Geometry(patch_size=7, window_size=28, min_pixels=14 * 14, max_pixels=56 * 56)


def encoded(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def test_transparency_turns_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (decode_image(encoded(image)) == 255).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (5, 3))
    assert decode_image(encoded(image, "TIFF")).shape == (3, 5, 3)


def test_orientation_of_the_camera_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).shape == (8, 4, 3)


def test_truncated_and_foreign_files_are_named():
    data = encoded(picture(64, 64))
    for bad in (data[: len(data) // 2], b"no image", b""):
        with pytest.raises(ValueError, match="photo.png: not a readable image"):
            decode_image(bad, "photo.png")


def test_sizes_keep_to_the_limits():
    geometry = Geometry()
    for height, width in [(1000, 1000), (5, 9), (3000, 20), (28, 28)]:
        rows, columns = fit_size(height, width, geometry)
        assert rows % 28 == columns % 28 == 0
        assert rows * columns <= geometry.max_pixels
    with pytest.raises(ValueError, match="200:1"):
        fit_size(1, 201, geometry)


def test_positions_count_text_and_hold_images():
    visual = np.array([0, 0, 1, 1, 1, 1, 1, 1, 0, 0], bool)
    positions = rope_positions(visual, [(2, 3)])
    assert positions[:2].tolist() == [[0] * 3, [1] * 3]
    assert positions[2:8].tolist() == [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]
    assert positions[8:].tolist() == [[5] * 3, [6] * 3]


def test_first_fit_packs_longest_first_and_leaves_out_what_finds_no_row():
    assert first_fit([3, 5, 2, 6], 8) == [1, 1, 0, 0]
    assert first_fit([8, 8, 8], 8, rows=2).count(-1) == 1
    with pytest.raises(ValueError, match="do not fit"):
        first_fit([9], 8)


def sequence(length, images, seed=0):
    patches = [patchify(np.asarray(picture(*size, seed)), GEOMETRY) for size in images]
    visual = np.concatenate([np.zeros(length, bool)] + [np.ones(len(p.slots), bool) for p in patches])
    tokens = np.where(visual, 1, np.arange(len(visual)) + 10).astype(np.int32)
    return Sequence(tokens, rope_positions(visual, [p.grid for p in patches]), tuple(patches), visual)


def test_packing_keeps_every_token_and_patch_where_its_index_says():
    sequences = [sequence(9, [(56, 56)]), sequence(30, []), sequence(4, [(28, 42), (14, 14)]), sequence(20, [])]
    packed = pack(sequences, GEOMETRY, rows=2, row_length=64, patch_rows=2, patch_row_length=96, pad_token=0)
    inputs = packed.inputs
    merged = inputs.patches.reshape(-1, 4, GEOMETRY.patch_dim)
    for sequence_, start in zip(sequences, packed.starts, strict=True):
        at = slice(start, start + len(sequence_))
        assert (inputs.tokens.reshape(-1)[at] == sequence_.tokens).all()
        assert (inputs.positions.reshape(-1, 3)[at] == sequence_.positions).all()
        assert len(set(inputs.segments.reshape(-1)[at])) == 1
        index = inputs.visual_index.reshape(-1)[at]
        assert ((index >= 0) == sequence_.is_visual).all()
        values = [image.values.reshape(-1, 4, GEOMETRY.patch_dim)[image.slots] for image in sequence_.images]
        if values:
            assert (merged[index[index >= 0]] == np.concatenate(values)).all()
    assert (inputs.segments > 0).sum() == sum(map(len, sequences))
    assert (inputs.image_segments > 0).sum() == sum(len(i.values) for s in sequences for i in s.images)
    assert (inputs.tokens[inputs.segments == 0] == 0).all()


def test_a_sequence_whose_image_finds_no_room_is_left_out_whole():
    sequences = [sequence(9, [(56, 56)]), sequence(9, [(56, 56)])]
    packed = pack(sequences, GEOMETRY, rows=1, row_length=64, patch_rows=1, patch_row_length=64, pad_token=0)
    assert packed.starts.tolist() == [0, -1]
    assert (packed.inputs.segments > 0).sum() == len(sequences[0])
