import dataclasses
import io
import json
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from trace_jax.config import ROOT
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
from trace_jax.data.schema import Document, Query

GEOMETRY = Geometry(patch_size=7, window_size=28, min_pixels=14 * 14, max_pixels=56 * 56)
SRGB, LAB = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")


def encoded(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def ramp(mode="L"):
    """40x20: dark on the left, light on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 250, 40).astype(np.uint8), (20, 1))).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "PA", "CMYK", "YCbCr", "LAB"])
def test_every_mode_keeps_its_picture(mode):
    image = ImageCms.profileToProfile(ramp("RGB"), SRGB, LAB, outputMode="LAB") if mode == "LAB" else ramp(mode)
    got = decode_image(encoded(image, "JPEG" if mode == "YCbCr" else "TIFF"))  # Pillow 12 cannot read its YCbCr TIFF
    assert got.shape == (20, 40, 3)
    assert np.abs(got.astype(int).mean(axis=(0, 2)) - np.linspace(0, 250, 40)).max() < (130 if mode == "1" else 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_turns_white(mode):
    image = Image.new(mode, (4, 4), 0)
    assert (decode_image(encoded(image)) == 255).all()


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_a_transparent_colour_of_a_palette_turns_white(file_format):
    image = Image.new("P", (2, 1))
    image.putpalette([200, 30, 40, 10, 200, 10])
    image.putdata([0, 1])
    assert decode_image(encoded(image, file_format)).tolist() == [[[200, 30, 40], [10, 200, 10]]]
    assert decode_image(encoded(image, file_format, transparency=1)).tolist() == [[[200, 30, 40], [255] * 3]]


@pytest.mark.parametrize(("mode", "file_format"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_sixteen_bits_are_scaled_and_not_clipped(mode, file_format):
    samples = np.arange(65536, dtype=">u2" if mode == "I;16B" else "<u2").reshape(256, 256)
    image = Image.frombytes(mode, (256, 256), samples.tobytes())
    assert (decode_image(encoded(image, file_format)) == np.arange(256)[:, None, None]).all()


@pytest.mark.parametrize("most", [65535, 4095])
def test_a_portable_graymap_of_more_than_eight_bits_is_scaled_too(most):
    samples = np.linspace(0, most, 256).astype(">u2")
    shown = decode_image(f"P5\n16 16\n{most}\n".encode() + samples.tobytes())
    assert np.abs(shown.reshape(256, 3).astype(int) - np.arange(256)[:, None]).max() <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_are_refused(mode):
    with pytest.raises(ValueError, match=r"photo.tif: .*32-bit.*save it with 8 or 16 bits"):
        decode_image(encoded(Image.new(mode, (5, 3)), "TIFF"), "photo.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_the_camera_is_undone(orientation):
    upright = picture(16, 8)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions that the camera's file needs undone
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turn[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(encoded(stored, "PNG", exif=exif)), np.asarray(upright))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "AVIF", "MPO"])
def test_the_first_frame_stands_for_an_animation(file_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.abs(decode_image(data).astype(int) - (255, 0, 0)).max() < 4


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF"])
def test_truncated_files_are_named(file_format):
    data = encoded(picture(64, 64), file_format)
    assert decode_image(data).shape == (64, 64, 3)
    for length in (len(data) // 2, 40, 9):
        with pytest.raises(ValueError, match="photo: not a readable image .*replace the file"):
            decode_image(data[:length], "photo")


@pytest.mark.parametrize("data", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"])
def test_foreign_files_are_named(data):
    with pytest.raises(ValueError, match=r"photo: not a readable image \(none of JPEG, PNG, .*\); replace the file"):
        decode_image(data, "photo")


def test_broken_bytes_raise_nothing_but_value_error():
    rng = np.random.default_rng(0)
    outcomes = []
    for file_format in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000"):
        data = np.frombuffer(encoded(picture(24, 24), file_format), np.uint8)
        for _ in range(40):
            broken = data.copy()
            broken[rng.integers(0, len(data), 6)] = rng.integers(0, 256, 6)
            broken[rng.integers(0, 60)] = rng.integers(0, 256)
            try:
                outcomes.append(decode_image(broken.tobytes()).ndim == 3)
            except ValueError as error:
                assert str(error).startswith("image: ")
                outcomes.append(False)
    assert 0 < sum(outcomes) < len(outcomes)


def test_single_pixels_and_long_strips_are_refused_by_name():
    with pytest.raises(ValueError, match="dot.png: 1x1, a single pixel"):
        decode_image(encoded(Image.new("RGB", (1, 1))), "dot.png")
    for size in [(1, 5000), (5000, 1), (201, 1)]:
        with pytest.raises(ValueError, match="strip.png: .* longer than 200:1; crop it"):
            decode_image(encoded(Image.new("RGB", size)), "strip.png")
    assert decode_image(encoded(Image.new("RGB", (200, 1)))).shape == (1, 200, 3)


@pytest.mark.parametrize("side", [9_000, 11_000, 60_000])  # over our limit, over Pillow's warning, over its error
def test_decompression_bombs_are_refused_before_a_pixel_is_decoded(side):
    header = encoded(Image.new("1", (8, 8)))[:16] + side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    data = header + zlib.crc32(header[12:29]).to_bytes(4, "big") + bytes(4) + b"IDAT" + bytes(4)
    with pytest.raises(ValueError, match=r"bomb.png: .*over the limit of 80,000,000 pixels; scale it down"):
        decode_image(data, "bomb.png")


def test_a_bomb_leaks_no_warning_in_a_program():
    script = (
        "import io, sys; from PIL import Image; from trace_jax.data.processor import decode_image\n"
        "file = io.BytesIO(); Image.new('1', (10_000, 10_000)).save(file, 'PNG')\n"
        "try: decode_image(file.getvalue(), 'bomb.png')\n"
        "except ValueError as error: sys.exit('refused: ' + str(error))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.stderr == "refused: bomb.png: 10000x10000 is over the limit of 80,000,000 pixels; scale it down\n"


VIDEOS = {
    "mp4": b"\0\0\0\x20ftypisom\0\0\2\0",
    "mov": b"\0\0\0\x14ftypqt  \0\0\2\0",
    "webm": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\1",
    "avi": b"RIFF\x10\0\0\0AVI LIST",
    "mpeg": b"\0\0\1\xba\x44\0\4",
}


@pytest.mark.parametrize("kind", VIDEOS)
def test_video_is_refused_as_such(kind):
    for made in (Query(image=VIDEOS[kind]), Document(image=VIDEOS[kind])):
        with pytest.raises(ValueError, match="clip: a video; video is not supported, give one frame"):
            decode_image(made.image, "clip")


@pytest.mark.parametrize("image", ["photo.jpg", [b"frame", b"frame"], np.zeros((2, 8, 8, 3), np.uint8)])
def test_an_image_is_the_bytes_of_one_file(image):
    for make in (Query, Document):
        with pytest.raises(TypeError, match=r"give the bytes of one image file \(video is not supported\)"):
            make(image=image)


@pytest.mark.parametrize("limits", [(0, 100_000), (100_000, 50_000), (100, 27 * 28)])
def test_limits_that_no_size_keeps_to_are_refused(limits):
    with pytest.raises(ValueError, match="0 < min_pixels <= max_pixels"):
        Geometry(min_pixels=limits[0], max_pixels=limits[1])


@pytest.mark.parametrize(
    "change", [{"resample": 2}, {"rescale_factor": 1 / 127.5}, {"patch_size": 28}, {"do_resize": False}], ids=str
)
@pytest.mark.parametrize("layout", ["preprocessor_config.json", "processor_config.json"])
def test_settings_of_another_processor_are_refused(tmp_path, layout, change):
    base = ROOT / "trace_jax" / "assets" / "emoji_base"
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    settings = json.loads((base / "preprocessor_config.json").read_text())
    limits = {"min_pixels": 784, "max_pixels": 7840}

    def write(settings):
        nested = {"image_processor": settings} if layout == "processor_config.json" else settings
        (tmp_path / layout).write_text(json.dumps(nested))

    write(settings)
    assert Geometry.from_hf(tmp_path, **limits) == Geometry.from_hf(base, **limits)
    write(settings | change)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{next(iter(change))}.* is not supported"):
        Geometry.from_hf(tmp_path, **limits)


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
    merged = inputs.patches.reshape(-1, 4, GEOMETRY.patch_pixels)
    for sequence_, start in zip(sequences, packed.starts, strict=True):
        at = slice(start, start + len(sequence_))
        assert (inputs.tokens.reshape(-1)[at] == sequence_.tokens).all()
        assert (inputs.positions.reshape(-1, 3)[at] == sequence_.positions).all()
        assert len(set(inputs.segments.reshape(-1)[at])) == 1
        index = inputs.visual_index.reshape(-1)[at]
        assert ((index >= 0) == sequence_.is_visual).all()
        values = [image.values.reshape(-1, 4, GEOMETRY.patch_pixels)[image.slots] for image in sequence_.images]
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


def test_an_image_of_two_sequences_is_packed_once():
    first, second = sequence(6, [(56, 28)], 1), sequence(4, [(56, 28)], 2)
    again = dataclasses.replace(second, images=first.images)
    apart = pack([first, second], GEOMETRY, rows=1, row_length=64, patch_rows=2, patch_row_length=64, pad_token=0)
    shared = pack([first, again], GEOMETRY, rows=1, row_length=64, patch_rows=1, patch_row_length=32, pad_token=0)
    assert (shared.starts == apart.starts).all() and shared.starts.min() >= 0
    assert (apart.inputs.image_segments > 0).sum() == 2 * (shared.inputs.image_segments > 0).sum() == 64
    index = shared.inputs.visual_index[0]
    for start, one in zip(shared.starts, (first, again), strict=True):
        placed = index[start : start + len(one)]
        assert placed[one.is_visual].tolist() == first.images[0].slots.tolist()
