"""Measures one part of the program: `python launch/benchmark.py images [options]`; `--help` lists the parts.

Every part prints a table, and writes its figures as JSON with `--json FILE`.
"""

import collections
import dataclasses
import io
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trace_jax.data.processor import Geometry, decode_image, fit_size, patchify
from trace_jax.data.processor import Sequence as Tokens
from trace_jax.data.schema import Query
from trace_jax.model.vision import normalize_pixels
from trace_jax.retrieval import program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.index import SearchIndex, exact_search, recall_against
from trace_jax.retrieval.pools import CandidateVectors
from trace_jax.training import convert
from trace_jax.training.checkpoint import read_config

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


# ---- the reasoning engine ----------------------------------------------------------------------------------------


def _test_queries(retriever: Retriever, count: int) -> tuple[list[Query], np.ndarray]:
    """So many test queries, evenly from all query files that have training data, and which of them are complex."""
    benchmark = Benchmark(retriever.config)
    files = [benchmark.load(q) for q in benchmark.query_sets if q.split == "test" and q.trained]
    queries = list(itertools.chain(*(file.queries for file in files)))
    is_complex = np.concatenate([file.complex for file in files])
    chosen = np.linspace(0, len(queries) - 1, min(count, len(queries))).round().astype(int)
    return [queries[i] for i in chosen], is_complex[chosen]


def _variant(retriever: Retriever, **options: Any) -> Retriever:
    """The same model with other options of `evaluation`."""
    changed = dataclasses.replace(retriever.config.evaluation, **options)
    return retriever.configured(dataclasses.replace(retriever.config, evaluation=changed))


def _timed(contestants: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each, after one run to compile."""
    for run in contestants.values():
        run()
    return interleaved({name: lambda _, run=run: run() for name, run in contestants.items()}, range(turns))


@app.command
def engine(
    run: str = "runs/quickstart",
    root: str = "data",
    count: int = 256,
    turns: int = 3,
    json: pathlib.Path | None = None,
) -> None:
    """What reasoning costs: adaptive beside direct, and a mixed batch beside the ideal.

    The ideal for a mixed batch is the time of direct for the queries that do not reason, and of decoding the others
    alone, in the best of several batch sizes.

    Args:
        run: the folder of a trained run.
        root: where its release is.
        count: test queries, simple and complex.
        turns: of each measurement; the median counts.
        json: where to write the figures.
    """
    retriever = _load(run, root)
    queries, is_complex = _test_queries(retriever, count)
    simple = [query for query, hard in zip(queries, is_complex, strict=True) if not hard]
    thinks = retriever.encode_query(queries, "adaptive").reasoned
    quick, hard = ([q for q, long in zip(queries, thinks, strict=True) if long == kind] for kind in (False, True))
    contestants: dict[str, Callable[[], object]] = {
        "direct, simple queries": lambda: retriever.encode_query(simple, "direct"),
        "adaptive, simple queries": lambda: retriever.encode_query(simple, "adaptive"),
        "adaptive, mixed": lambda: retriever.encode_query(queries, "adaptive"),
        "direct, those that do not reason": lambda: retriever.encode_query(quick, "direct"),
        "adaptive, those that do not reason": lambda: retriever.encode_query(quick, "adaptive"),
    }
    for size in (32, 64, 128):
        alone = _variant(retriever, batch_size=size)
        contestants[f"the others, {size} at once"] = lambda alone=alone: alone.encode_query(hard, "adaptive")
    seconds = _timed(contestants, turns)
    decoding = min(each for name, each in seconds.items() if name.startswith("the others"))
    ideal = seconds["direct, those that do not reason"] + decoding
    print(f"{len(queries)} test queries, {len(simple)} simple; {len(hard)} reason. {turns} turns, medians\n")
    for name, each in seconds.items():
        print(f"{name:36}{each:8.2f} s")
    ratios = {
        "adaptive / direct, simple queries": seconds["direct, simple queries"] / seconds["adaptive, simple queries"],
        "the same, where none reasons": seconds["direct, those that do not reason"]
        / seconds["adaptive, those that do not reason"],
        "ideal / adaptive, mixed": ideal / seconds["adaptive, mixed"],
    }
    print()
    for name, ratio in ratios.items():
        print(f"{name:36}{ratio:8.3f}")
    report({"seconds": seconds, "ratios": ratios, "queries": len(queries), "reason": len(hard)}, json)


@app.command
def drafts(
    run: str = "runs/quickstart",
    root: str = "data",
    count: int = 256,
    turns: int = 3,
    json: pathlib.Path | None = None,
) -> None:
    """What guessing tokens is worth, for one query at a time, a few, and many.

    Args:
        run: the folder of a trained run.
        root: where its release is.
        count: test queries, simple and complex; those that reason are taken.
        turns: of each measurement; the median counts.
        json: where to write the figures.
    """
    retriever = _load(run, root)
    queries, _ = _test_queries(retriever, count)
    thinks = retriever.encode_query(queries, "adaptive").reasoned
    hard = [query for query, long in zip(queries, thinks, strict=True) if long]
    some = {1: hard[:16], 8: hard[:64], 128: hard}  # by how many are decoded at once
    figures = []
    for size, taken in some.items():
        guessing = {number: _variant(retriever, batch_size=size, drafts=number) for number in (0, 2, 4)}

        def encode(guess: Retriever, size: int = size, taken: Sequence[Query] = taken) -> None:
            for first in range(0, len(taken), size):
                guess.encode_query(taken[first : first + size], "adaptive")

        runs = {str(number): lambda guess=guess, encode=encode: encode(guess) for number, guess in guessing.items()}
        seconds = _timed(runs, turns)
        for number, guess in guessing.items():
            rate, work = len(taken) / seconds[str(number)], guess.work
            accepted = (work.tokens / work.useful - 1) / number if number else 0.0
            gain = seconds["0"] / seconds[str(number)]
            figures.append({"at_once": size, "drafts": number, "queries_per_second": rate, "accepted": accepted})
            print(f"{size:4} at once, {number} drafts:{rate:8.1f} queries/s{accepted:6.0%} accepted, {gain:.2f} times")
    report({"drafts": figures, "reason": len(hard)}, json)


def _load(run: str, root: str) -> Retriever:
    """The retriever of a run, with its release in `root`."""
    program.prepare_logging()
    loaded = Retriever.load(run)
    data = dataclasses.replace(loaded.config.data, root=root)
    return loaded.configured(dataclasses.replace(loaded.config, data=data))


@app.command
def transformers(
    run: str = "runs/quickstart",
    root: str = "data",
    count: int = 128,
    turns: int = 3,
    json: pathlib.Path | None = None,
) -> None:
    """The engine beside transformers: same weights, prompts and processors, and the same tokens out.

    Ours is timed from text and image files; transformers is given prepared tensors, sorted by length, in the best of
    several batch sizes.

    Args:
        run: the folder of a trained run, exported for the purpose.
        root: where its release is.
        count: test queries; those that the release calls complex must always reason, all are embedded directly.
        turns: of each measurement; the median counts.
        json: where to write the figures.
    """
    retriever = _load(run, root)
    queries, is_complex = _test_queries(retriever, count)
    hard = [query for query, deep in zip(queries, is_complex, strict=True) if deep]
    with tempfile.TemporaryDirectory() as folder:
        convert.export_merged(retriever.config, f"{folder}/model", dtype="float32")
        theirs = _Transformers(f"{folder}/model", retriever)
    sizes = (16, 64)
    contestants: dict[str, Callable[[], Any]] = {
        "direct, trace_jax": lambda: retriever.encode_query(queries, "direct").embeddings,
        "always, trace_jax": lambda: retriever.encode_query(hard, "always").traces,
    }
    for size in sizes:
        direct, always = theirs.batches(queries, size), theirs.batches(hard, size)
        contestants[f"direct, transformers, {size} at once"] = lambda batches=direct: theirs.embed(batches)
        contestants[f"always, transformers, {size} at once"] = lambda batches=always: theirs.write(batches)
    outputs = {name: contestant() for name, contestant in contestants.items()}
    seconds = _timed(contestants, turns)
    for name, each in seconds.items():
        print(f"{name:36}{each:8.2f} s")
    written = outputs["always, trace_jax"]
    off = np.abs(outputs["direct, trace_jax"] - outputs[f"direct, transformers, {sizes[0]} at once"]).max()
    same = np.mean([a == b for a, b in zip(written, outputs[f"always, transformers, {sizes[0]} at once"], strict=True)])
    ratios = {
        kind: min(seconds[f"{kind}, transformers, {size} at once"] for size in sizes) / seconds[f"{kind}, trace_jax"]
        for kind in ("direct", "always")
    }
    print(
        f"\n{len(hard)} traces, {same:.1%} the same; embeddings of {len(queries)} queries differ by at most {off:.1e}"
    )
    print("; ".join(f"{kind}: {ratio:.2f} times transformers" for kind, ratio in ratios.items()))
    report({"seconds": seconds, "ratios": ratios, "same_traces": same, "largest_difference": float(off)}, json)


class _Transformers:
    """Hugging Face's own model, with batches as it takes them: padded on the left."""

    def __init__(self, folder: str, retriever: Retriever) -> None:
        import torch  # of requirements-dev.txt
        from transformers import Qwen2_5_VLForConditionalGeneration

        self.torch, self.retriever = torch, retriever
        self.model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.limit = retriever.config.evaluation.max_trace_tokens

    def batches(self, queries: Sequence[Query], size: int) -> list[tuple[list[int], dict]]:
        """Indices and arguments of each batch, by length."""
        sequences = [self.retriever.processor.query(query) for query in queries]
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        chosen = [order[first : first + size] for first in range(0, len(order), size)]
        return [(members, self._arguments([sequences[i] for i in members])) for members in chosen]

    def _arguments(self, sequences: Sequence[Tokens]) -> dict:
        processor, vision = self.retriever.processor, self.retriever.model.architecture.vision
        length, images = max(map(len, sequences)), [image for each in sequences for image in each.images]
        tokens, mask = np.full((2, len(sequences), length), processor.pad, np.int64)
        mask[:] = 0
        for row, sequence in enumerate(sequences):
            tokens[row, length - len(sequence) :], mask[row, length - len(sequence) :] = sequence.tokens, 1
        arguments: dict[str, np.ndarray] = {
            "input_ids": tokens,
            "attention_mask": mask,
            "mm_token_type_ids": (tokens == processor.image_pad).astype(np.int32),
        }
        if images:
            values = [np.asarray(normalize_pixels(jnp.asarray(image.values), vision)) for image in images]
            unit = vision.merge_unit  # units in reading order
            values = [v.reshape(-1, unit, v.shape[1])[i.slots] for v, i in zip(values, images, strict=True)]
            arguments["pixel_values"] = np.concatenate(values).reshape(-1, vision.patch_dim)
            grids = [[1, *(vision.merge_size * side for side in image.grid)] for image in images]
            arguments["image_grid_thw"] = np.array(grids)
        return {name: self.torch.tensor(value) for name, value in arguments.items()}

    def embed(self, batches: Sequence[tuple[list[int], dict]]) -> np.ndarray:
        """The state at the end of each prompt, of unit length, in the order of the queries."""
        found: dict[int, np.ndarray] = {}
        with self.torch.inference_mode():
            for members, arguments in batches:
                states = self.model.model(**arguments, use_cache=False).last_hidden_state[:, -1].numpy()
                found |= dict(zip(members, states / np.linalg.norm(states, axis=1, keepdims=True), strict=True))
        return np.stack([found[i] for i in range(len(found))])

    def write(self, batches: Sequence[tuple[list[int], dict]]) -> list[str]:
        """Greedy traces in the order of the queries; the first token may not end one."""
        processor, found = self.retriever.processor, {}
        ends = [processor.emb, processor.end]
        options = {"do_sample": False, "min_new_tokens": 1, "max_new_tokens": self.limit, "eos_token_id": ends}
        with self.torch.inference_mode():
            for members, arguments in batches:
                out = self.model.generate(**arguments, **options, pad_token_id=processor.pad).numpy()
                for i, row in zip(members, out[:, arguments["input_ids"].shape[1] :], strict=True):
                    over = np.flatnonzero(np.isin(row, [*ends, processor.pad]))
                    found[i] = processor.decode(row[: over[0]] if len(over) else row).strip()
        return [found[i] for i in range(len(found))]


# ---- indexes -----------------------------------------------------------------------------------------------------


def _noisy(vectors: np.ndarray, count: int, width: int, noise: float, seed: int) -> np.ndarray:
    """So many vectors [count, width]: real ones [n, D], turned into the wider space, each with noise of its own."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(width, vectors.shape[1])))[0].T.astype(np.float32)
    out = np.empty((count, width), np.float32)
    for first in range(0, count, 50_000):
        part = out[first : first + 50_000]
        rng.standard_normal(part.shape, np.float32, out=part)
        part *= noise / np.sqrt(width)
        part += vectors[rng.integers(len(vectors), size=len(part))] @ turn
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return out


@app.command
def index(  # noqa: PLR0917
    run: str = "runs/quickstart",
    root: str = "data",
    count: int = 1_000_000,
    width: int = 1024,
    noise: float = 0.5,
    asked: int = 256,
    faiss: bool = False,
    json: pathlib.Path | None = None,
) -> None:
    """ScaNN beside exact search, and FAISS (HNSW, IVF-PQ) if asked for, on real embeddings with noise.

    Args:
        run: the folder of a run that is embedded.
        root: where its release is.
        count: vectors.
        width: of a vector; real ones are turned into so many dimensions.
        noise: length of the noise; that of a real embedding is 1.
        asked: queries, which are likewise real embeddings with noise.
        faiss: build FAISS's indexes, too (requirements-dev.txt); HNSW takes long.
        json: where to write the figures.
    """
    program.prepare_logging()
    loaded = dataclasses.replace(read_config(run), workdir=run)
    loaded = dataclasses.replace(loaded, data=dataclasses.replace(loaded.data, root=root))
    store = CandidateVectors(loaded, Benchmark(loaded))
    real = store.read(np.arange(len(store.candidates)))
    vectors, queries = (_noisy(real, n, width, noise, seed) for n, seed in ((count, 1), (asked, 2)))
    print(f"{count:,} vectors of {width}, {asked} queries; from {len(real):,} embeddings, noise {noise}\n")
    print(f"{'':30}{'build s':>9}{'queries/s':>11}{'of exact':>10}{'recall@10':>11}")
    figures: list[dict[str, Any]] = []

    def measure(name: str, built: float, search: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        search(queries)
        started = time.perf_counter()
        found = search(queries)
        rate = asked / (time.perf_counter() - started)
        recall = recall_against(found, truth if figures else found)
        exact = figures[0]["queries_per_second"] if figures else rate
        figures.append({"name": name, "build_seconds": built, "queries_per_second": rate, "recall": recall})
        print(f"{name:30}{built:9.1f}{rate:11.1f}{rate / exact:10.1f}{recall:11.4f}", flush=True)
        return found

    truth = measure("exact (JAX)", 0.0, lambda q: exact_search(q, vectors, 10)[0])
    started = time.perf_counter()
    ours = SearchIndex.build(vectors, np.arange(count))
    built = time.perf_counter() - started
    leaves = round(np.sqrt(count))
    for share in (0.02, 0.05, 0.1, 0.2) if ours.about["kind"] == "tree" else (None,):
        looked = None if share is None else max(1, round(share * leaves))
        name = "ScaNN" if looked is None else f"ScaNN, {looked} of {leaves} leaves"
        measure(name, built, lambda q, looked=looked: ours.search(q, 10, leaves=looked)[0])
    for name, other in _faiss_indexes(count, width) if faiss else ():
        started = time.perf_counter()
        other.train(vectors)
        other.add(vectors)
        measure(f"FAISS {name}", time.perf_counter() - started, lambda q, other=other: other.search(q, 10)[1])
    report({"count": count, "width": width, "noise": noise, "indexes": figures}, json)


def _faiss_indexes(count: int, width: int) -> Iterator[tuple[str, Any]]:
    """HNSW, and IVF-PQ with the same number of lists as ScaNN has leaves, as FAISS's own guidelines have them."""
    import faiss  # of requirements-dev.txt

    lists = round(np.sqrt(count))
    for name, factory, options in (
        ("HNSW32, efSearch 128", "HNSW32", "efSearch=128"),
        (f"IVF{lists},PQ, refined", f"IVF{lists},PQ{width // 8}x4fs,RFlat", f"nprobe={lists // 10},k_factor_rf=16"),
    ):
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
        faiss.ParameterSpace().set_index_parameters(index, options)
        yield name, index


if __name__ == "__main__":
    app.cli(description=__doc__)
