"""Small random moves of a training picture, so that a model learns what is drawn and not which file it is."""

import io

import numpy as np
from PIL import Image

from trace_jax.data.processor import open_image


def jitter(image: bytes, rng: np.random.Generator, amount: float, name: str = "image") -> bytes:
    """Zooms an encoded image by up to `amount` in or out and shifts it by up to half of that, of its sides.

    What comes into view is white; the size stays. Nothing is turned or recoloured: an edit may ask for that. Returns an
    uncompressed file. Raises ValueError, naming `name`, for a file that `open_image` refuses.
    """
    picture = open_image(image, name)
    width, height = picture.size
    zoom = 1 + rng.uniform(-amount, amount)
    x, y = (0.5 - zoom / 2 + rng.uniform(-amount / 2, amount / 2, 2)) * (width, height)
    box = (x, y, x + zoom * width, y + zoom * height)
    out = io.BytesIO()
    picture.transform(
        picture.size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)
    ).save(out, "BMP")
    return out.getvalue()
