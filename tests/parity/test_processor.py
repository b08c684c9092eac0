"""Image processing and positions against transformers' own."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trace_jax.data.processor import Geometry, decode_image, patchify

SIZES = [(56, 56), (300, 200), (37, 411), (29, 28), (1000, 640), (15, 14), (97, 256)]


def png(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("patch", "window"), [(14, 112), (7, 28)])
def test_patches_equal_the_reference(size, patch, window):
    limits = {"min_pixels": 4 * (2 * patch) ** 2, "max_pixels": 300 * (2 * patch) ** 2}
    geometry = Geometry(patch_size=patch, window_size=window, **limits)
    reference = Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": limits["min_pixels"], "longest_edge": limits["max_pixels"]}
    )
    image = decode_image(png(*size))
    expected = reference(images=[Image.fromarray(image)], return_tensors="np")
    ours = patchify(image, geometry)
    _, rows, columns = (int(n) for n in expected["image_grid_thw"][0])
    assert ours.grid == (rows // 2, columns // 2)
    in_reading_order = ours.values.reshape(-1, 4, geometry.patch_dim)[ours.slots].reshape(-1, geometry.patch_dim)
    np.testing.assert_allclose(in_reading_order, expected["pixel_values"], atol=1e-5)
