"""The host's part of a step: decoding images, and packing."""

import dataclasses
import io
import pathlib
import time

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trace_jax.benchmarks.measuring import interleaved, report
from trace_jax.config import load_config
from trace_jax.data.pipeline import MEASURED_BATCHES, Tokenized, deal, measure_capacity
from trace_jax.data.processor import Geometry, Patches, first_fit, fit_size, open_image, pack, patchify
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import TASKS, Example, Query


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


def images(
    count: int = 16, repeats: int = 15, width: int = 341, height: int = 256, json: pathlib.Path | None = None
) -> None:
    """Images a second of one core, from JPEG bytes to a batch: ours, packed, beside PyTorch's DataLoader with
    transformers' processor (that of Pillow: its other one needs torchvision). Both decode and resize with Pillow, to
    the same pixels; ours are packed as bytes, which the model normalises; theirs are normalised floats, the frame
    twice.

    Args:
        count: different images, a batch.
        repeats: batches of each contestant.
        width: of the files; the default is what M-BEIR's images mostly are.
        height: of the files.
        json: where to write the figures.
    """
    import torch  # of requirements-dev.txt

    torch.set_num_threads(1)
    geometry = Geometry()
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": geometry.min_pixels, "longest_edge": geometry.max_pixels})
    files = [_photo(width, height, seed) for seed in range(count)]

    def shared(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        rows, columns = fit_size(image.height, image.width, geometry)
        return image.resize((columns, rows), Image.Resampling.BICUBIC)

    def packed() -> object:
        shown = [patchify(open_image(data), geometry) for data in files]
        tokens = [np.zeros(len(image.slots), np.int32) for image in shown]
        return pack(
            [
                Tokens(each, np.zeros((len(each), 3), np.int32), (image,), np.ones(len(each), bool))
                for each, image in zip(tokens, shown, strict=True)
            ],
            geometry,
            rows=1,
            row_length=sum(map(len, tokens)),
            patch_rows=count,
            patch_row_length=max(len(image.values) for image in shown),
            pad_token=0,
        )

    loader = torch.utils.data.DataLoader(
        files,  # pyright: ignore[reportArgumentType] (a list will do)
        batch_size=count,
        collate_fn=lambda batch: theirs(images=[Image.open(io.BytesIO(data)) for data in batch], return_tensors="pt"),
    )
    contestants = {
        "trace_jax": packed,
        "DataLoader, transformers": lambda: next(iter(loader)),
        "decode and resize alone": lambda: list(map(shared, files)),
    }
    # CPU time of the one thread that works: wall time, but for what other programs take.
    seconds = interleaved(
        {name: lambda _, run=run: run() for name, run in contestants.items()}, range(repeats), time.thread_time
    )
    rates = {name: count / each for name, each in seconds.items()}
    ratio = rates["trace_jax"] / rates["DataLoader, transformers"]
    print(f"batches of {count} JPEGs of {width}x{height}, {repeats} each, medians, one thread\n")
    print(f"{'':26}{'images/s':>9}{'ms':>8}")
    for name, rate in rates.items():
        print(f"{name:26}{rate:9.0f}{1000 / rate:8.2f}")
    print(f"\n{ratio:.2f} times the DataLoader; 'decode and resize alone' is Pillow's part of both")
    report({"images_per_second": rates, "ratio": ratio, "count": count, "size": [width, height]}, json)


def packing(
    shards: int = 16, row_length: int = 2048, batches: int = 16, seed: int = 0, json: pathlib.Path | None = None
) -> None:
    """Shares of token and patch slots that are real, and pairs left out, on lengths like M-BEIR-CoT's.

    The shapes are measured on the first eight batches, as in training, and kept for the others; all else is as in
    mbeir_qwen2_5_vl_7b. Lengths are assumed, not measured: tasks in equal shares, pictures of 256 pixels across (so
    M-BEIR ships them) and an aspect of 1 to 2, texts of 20 tokens on average (articles 150, cut at 480), 95 tokens of
    prompt, and traces of any length that the paper's filter lets through (18 to 320) for the tasks that reason.

    Args:
        shards: devices times chunks.
        row_length: tokens of a packed row.
        batches: how many to pack.
        seed: of the lengths.
        json: where to write the figures.
    """
    config = load_config("mbeir_qwen2_5_vl_7b")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, row_length=row_length))
    data, geometry, rng = config.data, Geometry(max_pixels=config.data.max_pixels), np.random.default_rng(seed)
    tasks = list(TASKS.values())

    def side(kind: str, article: bool, trace: int = 0) -> Tokens:
        length, images, none = 95 + trace, (), np.zeros(0)
        if "i" in kind:
            long = int(256 * rng.uniform(1, 2))
            height, width = rng.permutation([256, long]).tolist()
            rows, columns = fit_size(height, width, geometry)
            patches = rows * columns // geometry.patch_size**2
            images = (Patches(np.zeros((patches, 0)), none, none, none, (0, 0)),)
            length += patches // geometry.merge_unit
        if "t" in kind:
            length += min(data.max_text_tokens, 1 + int(rng.exponential(150 if article else 20)))
        return Tokens(np.zeros(length, np.int32), none, images, none)

    def pair(task: str) -> Tokenized:
        query, document = task.split("2")
        trace = int(rng.integers(16, 257) + rng.integers(2, 65)) if query == "it" else 0
        articles = task in ("t2t", "t2it", "it2t", "it2it")
        sequences = side(query, False, trace), side(document, articles)
        example = Example(Query("any"), None, "", task=0)
        return Tokenized(example, sequences[0], len(sequences[0]) - trace, [0] * (trace + 1), [sequences[1]])

    packed = [[pair(tasks[i % len(tasks)]) for i in range(data.batch_size)] for _ in range(batches)]
    capacity = measure_capacity(packed[:MEASURED_BATCHES], shards, config)
    tokens = patches = left_out = 0
    for batch in packed:
        for hand in deal(batch, shards):
            sequences = [sequence for item in hand for sequence in item.sequences]
            lengths = [len(sequence) for sequence in sequences]
            images = [len(image.values) for sequence in sequences for image in sequence.images]
            for sizes, length, rows in (
                (lengths, data.row_length, capacity.rows),
                (images, data.patch_row_length, capacity.patch_rows),
            ):
                left_out += first_fit(sizes, length, rows).count(-1)
            tokens, patches = tokens + sum(lengths), patches + sum(images)
    slots = batches * shards * capacity.rows * data.row_length
    patch_slots = batches * shards * capacity.patch_rows * data.patch_row_length
    mean = tokens / (batches * data.batch_size)
    print(f"{batches} batches of {data.batch_size} pairs, {mean:.0f} tokens a pair, {shards} shards: {capacity}")
    print(f"token slots {tokens / slots:.1%}, patch slots {patches / patch_slots:.1%}; left out: {left_out}")
    shares = {"tokens": tokens / slots, "patches": patches / patch_slots, "left_out": left_out}
    report(shares | {"shards": shards, "row_length": row_length}, json)
