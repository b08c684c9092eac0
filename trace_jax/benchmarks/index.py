"""ScaNN beside exact search and FAISS."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trace_jax.benchmarks.measuring import report
from trace_jax.retrieval import program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.index import SearchIndex, exact_search, recall_against
from trace_jax.retrieval.pools import CandidateVectors
from trace_jax.training.checkpoint import read_config


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
