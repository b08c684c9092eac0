"""Image processing against transformers' own: sizes, pixels, windows, positions."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.parity.reference import VISION, normalized
from trace_jax.data.processor import Geometry, decode_image, fit_size, patchify

torch = pytest.importorskip("torch")
vision_utils = pytest.importorskip("transformers.vision_utils")
reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

SIZES = [  # width, height
    (56, 56),
    (300, 200),
    (37, 411),
    (29, 28),
    (1000, 640),
    (15, 14),
    (97, 256),
    (341, 256),
    (1, 2),
    (1, 200),  # the longest that is allowed
    (5600, 28),
    (28, 5000),
    (2, 300),
    (4000, 3000),
    (113, 111),  # one pixel over and under a window
    (42, 70),  # halves: Python rounds to even
]


def processor(patch: int, min_pixels: int, max_pixels: int):
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return reference.Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=size)


def picture(width, height):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def pixels_of(values: np.ndarray) -> np.ndarray:
    """The bytes that the reference normalised: [n, channels * temporal * height * width] -> those of one frame."""
    frames = values.reshape(len(values), 3, VISION.temporal_patch_size, -1)
    np.testing.assert_array_equal(frames[:, :, 0], frames[:, :, 1])
    mean, std = (np.float32(x)[None, :, None] for x in (VISION.image_mean, VISION.image_std))
    pixels = (frames[:, :, 0] * std + mean) * 255
    assert np.abs(pixels - np.rint(pixels)).max() < 1e-3
    return np.rint(pixels).astype(np.uint8).reshape(len(values), -1)


@pytest.mark.parametrize(("patch", "window", "most"), [(14, 112, 300), (7, 28, 300), (14, 112, 1280), (16, 128, 9)])
def test_patches_windows_and_positions_equal_the_reference(patch, window, most):
    limits = {"min_pixels": 4 * (2 * patch) ** 2, "max_pixels": most * (2 * patch) ** 2}
    geometry = Geometry(patch_size=patch, window_size=window, **limits)
    for width, height in SIZES:
        image = picture(width, height)
        ours = patchify(image, geometry)
        expected = processor(patch, **limits)(images=[Image.fromarray(image)], return_tensors="pt")
        grid = expected["image_grid_thw"]
        assert ours.grid == tuple(int(side) // 2 for side in grid[0, 1:]), (width, height)

        order, bounds = vision_utils.get_vision_window_index(grid, 2, window, patch)
        values = normalized(ours)
        in_windows = expected["pixel_values"].reshape(-1, 4, values.shape[1])[order].reshape(values.shape)
        np.testing.assert_array_equal(ours.values, pixels_of(in_windows.numpy()))
        np.testing.assert_allclose(values, in_windows, rtol=0, atol=5e-7)  # two units in the last place of 2.6
        positions = vision_utils.get_vision_position_ids(grid, 2).reshape(-1, 4, 2)[order]
        np.testing.assert_array_equal(ours.positions, positions.reshape(-1, 2))
        lengths = np.diff(np.unique(bounds.numpy()))
        np.testing.assert_array_equal(np.unique(ours.windows, return_counts=True)[1], lengths)
        assert (np.diff(ours.windows) >= 0).all()


def test_sizes_equal_the_reference_whatever_the_image_and_the_limits():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(20_000):
        patch = int(rng.choice([4, 7, 14, 16]))
        unit = (2 * patch) ** 2
        least = int(rng.integers(1, 30 * unit))
        most = int(rng.integers(max(least, unit), 1500 * unit))
        height, width = (int(side) for side in np.exp(rng.uniform(0, 9, 2)))
        geometry = Geometry(patch_size=patch, min_pixels=least, max_pixels=most)
        if max(height, width) > 200 * min(height, width):
            seen.add("refused")
            with pytest.raises(ValueError, match="smaller than 200"):
                reference.smart_resize(height, width, 2 * patch, least, most)
            with pytest.raises(ValueError, match="longer than 200:1"):
                fit_size(height, width, geometry)
            continue
        rows, columns = fit_size(height, width, geometry)
        assert (rows, columns) == reference.smart_resize(height, width, 2 * patch, least, most)
        seen.add("smaller" if rows * columns < height * width else "larger")
        if min(rows, columns) == 2 * patch:
            seen.add("one row")
    assert seen == {"refused", "smaller", "larger", "one row"}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"])
def test_files_of_any_mode_equal_the_reference(mode):
    pixels = picture(60, 40)
    image = Image.fromarray(np.dstack([pixels, pixels[..., 1]])).convert(mode)
    file = io.BytesIO()
    image.save(file, "JPEG" if mode == "YCbCr" else "TIFF")  # Pillow 12 cannot read its YCbCr TIFF
    expected = processor(14, 3136, 100_000)(images=[Image.open(file)], return_tensors="np")["pixel_values"]
    patches = patchify(decode_image(file.getvalue()), Geometry(min_pixels=3136, max_pixels=100_000))
    ours = patches.values.reshape(-1, 4, patches.values.shape[1])[patches.slots]
    np.testing.assert_array_equal(ours.reshape(len(expected), -1), pixels_of(expected))
