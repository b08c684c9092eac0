import io

import numpy as np
import pytest
from PIL import Image

from trace_jax.config import Config, Data
from trace_jax.data import pipeline
from trace_jax.data.augmentation import jitter
from trace_jax.data.processor import decode_image

SIDE = 40


def square() -> bytes:
    """A red square of half the side in the middle of a white picture."""
    pixels = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels[10:30, 10:30] = (255, 0, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_picture_moves_within_the_amount_and_keeps_its_colours():
    seen = set()
    for seed in range(50):
        moved = decode_image(jitter(square(), np.random.default_rng(seed), 0.2))
        assert moved.shape == (SIDE, SIDE, 3)
        red = (moved[..., 0] > 200) & (moved[..., 1] < 100)
        rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
        for at in (rows, columns):
            assert 20 / 1.25 - 1 <= len(at) <= 20 / 0.8 + 1
            assert abs(at.mean() - (SIDE - 1) / 2) <= 0.1 * SIDE / 0.8 + 1
        assert (moved[0, 0] == 255).all() and (moved[-1, -1] == 255).all()  # what comes into view is white
        seen.add((len(rows), round(rows.mean()), round(columns.mean())))
    assert len(seen) > 20


def test_no_amount_changes_nothing():
    assert (decode_image(jitter(square(), np.random.default_rng(0), 0.0)) == decode_image(square())).all()


def test_a_bad_picture_is_named():
    with pytest.raises(ValueError, match=r"q7: not a readable image"):
        jitter(b"nothing", np.random.default_rng(0), 0.1, "q7")


def test_a_draw_shows_one_picture_alike_and_two_differently():
    config = Config("", data=Data(jitter=0.2))
    one, other = square(), square() + b"\0"  # the same pixels in another file
    first = pipeline._picture(one, 3, config, "")
    assert first == pipeline._picture(one, 3, config, "") != pipeline._picture(one, 4, config, "")
    assert first != pipeline._picture(other, 3, config, "")
    assert pipeline._picture(one, 3, Config(""), "") is one
