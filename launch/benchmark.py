"""Measures one part of the program: `python launch/benchmark.py images [options]`; `--help` lists the parts.

Every part prints a table, and writes its figures as JSON with `--json FILE`.
"""

import collections
import dataclasses
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

import jax
import numpy as np
import tyro
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trace_jax import sharding
from trace_jax.config import Config, load_config
from trace_jax.data.pipeline import MEASURED_BATCHES, Pipeline, Tokenized, deal, measure_capacity
from trace_jax.data.processor import Geometry, Patches, decode_image, first_fit, fit_size, patchify
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import TASKS, Example, Query
from trace_jax.data.tokenizer import Processor
from trace_jax.model.architecture import Architecture
from trace_jax.model.vision import normalize_pixels
from trace_jax.training.optimizer import make_optimizer
from trace_jax.training.train import (
    TrainState,
    host_batches,
    init_optimizer,
    load_model,
    make_train_step,
    split_model,
)

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


@app.command(name="train-step")
def train_step(config: str = "emoji_tiny", steps: int = 8, json: pathlib.Path | None = None) -> None:
    """Seconds of a training step on one device: ours beside transformers with PEFT, same pairs, loss and precision.

    Theirs as it is commonly written: one padded batch of queries, one of documents, the head on supervised tokens
    alone, AdamW. The two losses of the first batch are printed: they must agree.

    Args:
        config: of configs/; its base must be there, its release built.
        steps: batches, each read by both; the first, which compiles, is left out.
        json: where to write the figures.
    """
    chosen = load_config(config)
    processor = Processor.from_hf(chosen.model.base, chosen.data)
    mesh = sharding.make_mesh(chosen.mesh, jax.devices()[:1])
    pipeline = host_batches(chosen, processor, mesh)
    contestants = {
        "trace_jax": _our_step(chosen, processor, mesh, pipeline),
        "transformers, PEFT": _torch_step(chosen, processor, pipeline),
    }
    losses = {name: run(0) for name, run in contestants.items()}
    seconds = interleaved(contestants, range(1, steps))
    ratio = seconds["transformers, PEFT"] / seconds["trace_jax"]
    print(f"{config}, {chosen.data.batch_size} pairs a step, {steps - 1} steps of each in turns, medians\n")
    print(f"{'':26}{'s/step':>9}{'first loss':>12}")
    for name, each in seconds.items():
        print(f"{name:26}{each:9.2f}{losses[name]:12.4f}")
    print(f"\n{ratio:.2f} times transformers' speed")
    report({"seconds": seconds, "first_loss": losses, "ratio": ratio, "threads": os.cpu_count()}, json)


def _our_step(
    config: Config, processor: Processor, mesh: jax.sharding.Mesh, pipeline: Pipeline
) -> Callable[[int], float]:
    """Batch number -> its loss, after a step of training on it."""
    graph, trainable, frozen = split_model(load_model(config, processor, mesh), config.model.trainable)
    optimizer = make_optimizer(config.optimizer, config.training.steps)
    state = TrainState(trainable, init_optimizer(optimizer, trainable, mesh))
    shardings = jax.tree.map(lambda array: array.sharding, state)
    compiled = make_train_step(graph, optimizer, processor.emb, config, shardings)
    batches = [sharding.to_devices(pipeline.batches[i], mesh) for i in range(2)]

    def run(index: int) -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, measured = compiled(state, frozen, batches[index % 2])
        return float(measured["loss"].value())

    return run


def _torch_step(config: Config, processor: Processor, pipeline: Pipeline) -> Callable[[int], float]:
    """The same with transformers and PEFT (requirements-dev.txt)."""
    import peft
    import torch
    import transformers

    vision = Architecture.from_hf(config.model.base).vision
    lora = config.model.lora
    assert lora is not None, f"{config.name} has no adapters to compare"
    base = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(config.model.base, dtype=torch.float32)
    adapted = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=rf".*language_model.*\.({'|'.join(lora.targets)})",
    )
    model: Any = peft.get_peft_model(base, adapted).get_base_model()
    for parameter in model.model.visual.merger.parameters():
        parameter.requires_grad_(True)
    head = model.lm_head.weight
    row = torch.nn.Parameter(head[processor.end].detach().clone())  # of <|emb|>
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad] + [row]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.learning_rate, weight_decay=0.0)

    def states(sequences: Sequence[Tokens]) -> Any:
        """[n, longest, D], right-padded."""
        tokens, mask = np.full((2, len(sequences), max(map(len, sequences))), processor.pad, np.int64)
        for at, sequence in enumerate(sequences):
            tokens[at, : len(sequence)], mask[at] = sequence.tokens, np.arange(tokens.shape[1]) < len(sequence)
        given = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": 1 * (tokens == processor.image_pad)}
        images = [image for sequence in sequences for image in sequence.images]
        if images:  # ours are in window order, theirs in reading order
            values = [
                image.values.reshape(len(image.slots), -1)[image.slots].reshape(-1, vision.patch_pixels)
                for image in images
            ]
            given["pixel_values"] = np.array(normalize_pixels(np.concatenate(values), vision))
            given["image_grid_thw"] = np.array([[1, 2 * image.grid[0], 2 * image.grid[1]] for image in images])
        return model.model(**{name: torch.tensor(value) for name, value in given.items()}).last_hidden_state

    def run(index: int) -> float:
        items: list[Tokenized] = pipeline.examples[index % 2]
        queries = [item.query for item in items]
        hidden = states(queries)
        documents = [item.documents[0] for item in items] + [d for item in items for d in item.documents[1:]]
        found = states(documents)
        ends = torch.tensor([len(query) - 1 for query in queries])
        rows = torch.arange(len(items))
        supervised = [(at, item.prompt - 1 + i, t) for at, item in enumerate(items) for i, t in enumerate(item.targets)]
        at, place, token = torch.tensor(supervised).T
        picked = hidden[at, place]
        logits = (picked @ head.T).index_copy(1, torch.tensor([processor.emb]), (picked @ row)[:, None])
        generation = torch.nn.functional.cross_entropy(logits, token)

        last = torch.tensor([len(document) - 1 for document in documents])
        vectors = torch.nn.functional.normalize(found[torch.arange(len(documents)), last], dim=-1)
        scores = torch.nn.functional.normalize(hidden[rows, ends], dim=-1) @ vectors.T / config.loss.temperature
        keys = [item.example.document_key for item in items]
        keys += [key for item in items for _, key in item.example.negatives]
        known = np.array([np.isin(keys, item.example.positives) for item in items])
        known[:, : len(items)] &= ~np.eye(len(items), dtype=bool)
        retrieval = torch.nn.functional.cross_entropy(scores.masked_fill(torch.tensor(known), -torch.inf), rows)

        loss = config.loss.generation * generation + config.loss.retrieval * retrieval
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.clip_norm)
        optimizer.step()
        return loss.item()

    return run


@app.command
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
        length, images = 95 + trace, ()
        if "i" in kind:
            long = int(256 * rng.uniform(1, 2))
            rows, columns = fit_size(*rng.permutation([256, long]).tolist(), geometry)
            patches = rows * columns // geometry.patch_size**2
            images = (Patches(np.zeros((patches, 0)), *[np.zeros(0)] * 3, (0, 0)),)
            length += patches // geometry.merge_unit
        if "t" in kind:
            length += min(data.max_text_tokens, 1 + int(rng.exponential(150 if article else 20)))
        return Tokens(np.zeros(length, np.int32), np.zeros(0), images, np.zeros(0))

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


if __name__ == "__main__":
    app.cli(description=__doc__)
