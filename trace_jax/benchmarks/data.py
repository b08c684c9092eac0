"""The host's part of a step: decoding images, and packing."""

import dataclasses
import io
import itertools
import pathlib
import time

import numpy as np
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trace_jax.benchmarks.measuring import interleaved, report
from trace_jax.config import load_config
from trace_jax.data.lengths import PROMPT, SIDE, assumed_batches, assumed_documents
from trace_jax.data.pipeline import MEASURED_BATCHES, Tokenized, deal, measure_capacity, pack_batch, tokenize
from trace_jax.data.processor import Geometry, Patches, first_fit, fit_size, open_image, pack, patchify
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Document, Example, Query
from trace_jax.data.tokenizer import Processor
from trace_jax.retrieval import pools
from trace_jax.retrieval.packing import Packer
from trace_jax.training.base import EMBEDDED

WORD = "woman"  # a token


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


def pairs(
    config: str = "mbeir_qwen2_5_vl_7b",
    count: int = 64,
    batches: int = 8,
    row_length: int = 2048,
    json: pathlib.Path | None = None,
) -> None:
    """Pairs a second of one core, from texts and JPEG bytes to a packed batch of a host's four devices.

    Lengths and pictures are like M-BEIR-CoT's (data/lengths.py); the tokenizer is the embedded base's, since no other
    is in this repository: its tokens are shorter than Qwen2.5-VL's, the texts have as many. Compare with the pairs a
    second of launch/compile_check.py, dealt to the slice's hosts.

    Args:
        config: of configs/.
        count: pairs of a host's part of a batch.
        batches: how many to make.
        row_length: tokens of a packed row.
        json: where to write the figures.
    """
    chosen = load_config(config)
    data = dataclasses.replace(chosen.data, batch_size=count, row_length=row_length)
    chosen = dataclasses.replace(chosen, data=data)
    geometry = Geometry(min_pixels=data.min_pixels, max_pixels=data.max_pixels)
    base = Processor.from_hf(EMBEDDED, load_config().data)
    processor = dataclasses.replace(base, geometry=geometry, prompts=data.prompts, max_text_tokens=data.max_text_tokens)
    rng = np.random.default_rng(0)
    photos = [_photo(int(SIDE * rng.uniform(1, 2)), SIDE, seed) for seed in range(16)]
    drawn = itertools.count()

    def side(sequence: Tokens, prompt: int) -> tuple[str, bytes | None]:
        """Text and picture of one side of a pair, whose prompt has so many tokens; no picture comes twice."""
        visual = sum(len(image.values) for image in sequence.images) // geometry.merge_unit
        number = next(drawn)
        photo = photos[number % len(photos)] + number.to_bytes(8, "little")  # behind a JPEG's end stands what likes
        return " ".join([WORD] * (prompt - PROMPT - visual)), photo if sequence.images else None

    def example(lengths: Tokenized) -> Example:
        (answer,) = lengths.documents
        query = Query(*side(lengths.query, lengths.prompt))
        target = " ".join([WORD] * (len(lengths.query) - lengths.prompt))
        return Example(query, Document(*side(answer, len(answer))), target, task=0)

    assumed = assumed_batches(data, geometry, batches + MEASURED_BATCHES)
    examples = [[example(lengths) for lengths in batch] for batch in assumed[:batches]]
    capacity = measure_capacity(assumed[batches:], 4, chosen)

    def made(batch: list[Example]) -> object:
        return pack_batch([tokenize(each, processor, chosen) for each in batch], 4, capacity, processor, chosen)

    made(examples[0])
    seconds = interleaved({"pairs": made}, examples[1:], time.thread_time)["pairs"]
    print(f"{batches - 1} batches of {count} pairs, median: {count / seconds:.0f} pairs/s of one core")
    report({"pairs_per_second": count / seconds, "count": count, "row_length": row_length}, json)


def packing(
    shards: int = 16, row_length: int = 2048, batches: int = 16, seed: int = 0, json: pathlib.Path | None = None
) -> None:
    """Shares of token and patch slots that are real, and pairs left out, on lengths like M-BEIR-CoT's.

    The shapes are measured on the first eight batches, as in training, and kept for the others; all else is as in
    mbeir_qwen2_5_vl_7b. The lengths are assumed (data/lengths.py says how), not measured.

    Args:
        shards: devices times chunks.
        row_length: tokens of a packed row.
        batches: how many to pack.
        seed: of the lengths.
        json: where to write the figures.
    """
    config = load_config("mbeir_qwen2_5_vl_7b")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, row_length=row_length))
    data, geometry = config.data, Geometry(max_pixels=config.data.max_pixels)
    packed = assumed_batches(data, geometry, batches, seed)
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


def pool_packing(
    shards: int = 4, batch_size: int = 512, count: int = 8192, seed: int = 0, json: pathlib.Path | None = None
) -> None:
    """Shares of token and patch slots that are real when a pool is embedded, by the size of its files.

    As many documents of each of four kinds, one kind after the other as data sets follow each other in a pool; a file
    is packed by itself, into shapes that were chosen from a sample of all. Lengths are assumed, as in `packing`, and
    all else is as in mbeir_qwen2_5_vl_7b.

    Args:
        shards: devices that a batch is dealt to.
        batch_size: documents read at once.
        count: documents of each kind.
        seed: of the lengths.
        json: where to write the figures.
    """
    data = load_config("mbeir_qwen2_5_vl_7b").data
    geometry = Geometry(max_pixels=data.max_pixels)
    packer = Packer(
        geometry=geometry,
        pad_token=0,
        most=batch_size // shards,
        shards=shards,
        row_length=data.row_length,
        patch_row_length=data.patch_row_length,
        share=False,
    )
    documents = [
        _filled(document, geometry)
        for kind, article in (("t", False), ("t", True), ("i", False), ("it", False))
        for document in assumed_documents(kind, count, data, geometry, article=article, seed=seed)
    ]
    rooms = packer.rooms([documents[row] for row in pools.sampled(len(documents), batch_size)], sample=True)
    figures = []
    for size in (pools.SHARD, pools.LARGE_SHARD):
        real, slots, batches = np.zeros(2), np.zeros(2), 0
        for first in range(0, len(documents), size):
            for _, rows in packer.deal(documents[first : first + size], rooms):
                ours = rows.inputs.segments, rows.inputs.image_segments
                real += [np.count_nonzero(each) for each in ours]
                slots += [each.size for each in ours]
                batches += 1
        tokens, patches = (real / slots).tolist()
        figures.append({"file": size, "batches": batches, "tokens": tokens, "patches": patches})
        print(f"files of {size:5}: {batches:4} batches, token slots {tokens:.1%}, patch slots {patches:.1%}")
    report({"pool_packing": figures, "shards": shards, "batch_size": batch_size}, json)


def _filled(sequence: Tokens, geometry: Geometry) -> Tokens:
    """A sequence that has lengths alone, with zeros for all that packing reads."""
    images = tuple(
        Patches(
            np.zeros((len(image.values), geometry.patch_pixels), np.uint8),
            np.zeros((len(image.values), 2), np.int32),
            np.zeros(len(image.values), np.int32),
            np.zeros(len(image.values) // geometry.merge_unit, np.int32),
            image.grid,
        )
        for image in sequence.images
    )
    visual = sum(len(image.slots) for image in images)
    is_visual = np.arange(len(sequence)) < visual
    return Tokens(sequence.tokens, np.zeros((len(sequence), 3), np.int32), images, is_visual)
