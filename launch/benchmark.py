"""Measures one part of the program: `python launch/benchmark.py images [options]`; `--help` lists the parts.

Every part prints a table, and writes its figures as JSON with `--json FILE`.
"""

import collections
import io
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np
import tyro
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trace_jax.data.processor import Geometry, decode_image, fit_size, patchify

app = tyro.extras.SubcommandApp()


def interleaved(
    contestants: dict[str, Callable[[Any], object]],
    inputs: Sequence[Any],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each contestant; they take turns at every input, so that a busy machine hurts all alike."""
    seconds = collections.defaultdict(list)
    for one in inputs:
        for name, run in contestants.items():
            started = clock()
            run(one)
            seconds[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def report(figures: dict, file: pathlib.Path | None) -> None:
    """Writes the figures as JSON, if asked to."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def _photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG with the detail of a photograph: noise at every scale."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for scale in (2, 8, 32):
        coarse = Image.fromarray(rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8))
        pixels += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), float) * scale / 42
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@app.command
def images(
    count: int = 16, repeats: int = 15, width: int = 341, height: int = 256, json: pathlib.Path | None = None
) -> None:
    """Images a second, from JPEG bytes to patches on one thread: ours beside transformers' slow (Pillow) processor.

    Args:
        count: different images; each turn processes all of them.
        repeats: turns of each contestant.
        width: of the files; the default is what M-BEIR's images mostly are.
        height: of the files.
        json: where to write the figures.
    """
    geometry = Geometry()
    slow = Qwen2VLImageProcessorPil(size={"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels})
    files = [_photo(width, height, seed) for seed in range(count)]

    def ours(data: bytes) -> object:
        return patchify(decode_image(data), geometry)

    def theirs(data: bytes) -> object:
        return slow(images=[Image.open(io.BytesIO(data))], return_tensors="np")

    def shared(data: bytes) -> object:
        image = Image.open(io.BytesIO(data))
        rows, columns = fit_size(image.height, image.width, geometry)
        return image.resize((columns, rows), Image.Resampling.BICUBIC)

    contestants = {"trace_jax": ours, "transformers (slow)": theirs, "decode and resize alone": shared}
    # CPU time of the one thread that works: wall time, but for what other programs take.
    seconds = interleaved(contestants, files * repeats, time.thread_time)
    rates = {name: 1 / each for name, each in seconds.items()}
    ratio = rates["trace_jax"] / rates["transformers (slow)"]
    print(f"{count} JPEGs of {width}x{height}, {repeats} turns, medians\n")
    print(f"{'':26}{'images/s':>9}{'ms':>8}")
    for name, rate in rates.items():
        print(f"{name:26}{rate:9.0f}{1000 / rate:8.2f}")
    print(f"\n{ratio:.2f} times transformers; 'decode and resize alone' is Pillow's part of both")
    report({"images_per_second": rates, "ratio": ratio, "count": count, "size": [width, height]}, json)


if __name__ == "__main__":
    app.cli(description=__doc__)
