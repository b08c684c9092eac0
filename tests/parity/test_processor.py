"""Image processing against transformers' own: pixels, windows, positions."""

import io

import numpy as np
import pytest
from PIL import Image

from trace_jax.data.processor import Geometry, decode_image, patchify

torch = pytest.importorskip("torch")
vision_utils = pytest.importorskip("transformers.vision_utils")
reference = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")

SIZES = [(56, 56), (300, 200), (37, 411), (29, 28), (1000, 640), (15, 14), (97, 256)]


def picture(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return decode_image(file.getvalue())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("patch", "window"), [(14, 112), (7, 28)])
def test_patches_windows_and_positions_equal_the_reference(size, patch, window):
    limits = {"min_pixels": 4 * (2 * patch) ** 2, "max_pixels": 300 * (2 * patch) ** 2}
    geometry = Geometry(patch_size=patch, window_size=window, **limits)
    image = picture(*size)
    ours = patchify(image, geometry)
    processor = reference.Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        size={"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]},
    )
    expected = processor(images=[Image.fromarray(image)], return_tensors="pt")
    grid = expected["image_grid_thw"]
    assert ours.grid == tuple(int(side) // 2 for side in grid[0, 1:])

    order, bounds = vision_utils.get_vision_window_index(grid, 2, window, patch)
    in_windows = expected["pixel_values"].reshape(-1, 4, geometry.patch_dim)[order]
    np.testing.assert_allclose(ours.values, in_windows.reshape(ours.values.shape), atol=1e-5)
    positions = vision_utils.get_vision_position_ids(grid, 2).reshape(-1, 4, 2)[order]
    np.testing.assert_array_equal(ours.positions, positions.reshape(-1, 2))
    lengths = np.diff(np.unique(bounds.numpy()))
    np.testing.assert_array_equal(np.unique(ours.windows, return_counts=True)[1], lengths)
    assert (np.diff(ours.windows) >= 0).all()
