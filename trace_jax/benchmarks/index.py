"""ScaNN beside exact search and FAISS."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from trace_jax.benchmarks.measuring import CLOCKS, Clock, report, timed
from trace_jax.retrieval import program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.index import SearchIndex, exact_search, recall_against
from trace_jax.retrieval.pools import CandidateVectors
from trace_jax.training.checkpoint import read_config

NEIGHBOURS, RECALL = 10, 0.99  # what is asked for, and what an index has to find of it
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)  # of all leaves or lists, that are looked into


@dataclasses.dataclass(frozen=True)
class _Index:
    """One that is built, with what makes its search better and slower."""

    built: float  # seconds that this took
    size: int  # bytes that it takes on disk, and about as many in memory
    settings: Sequence[int]
    search: Callable[[np.ndarray, int], np.ndarray]  # queries [q, D], setting -> rows [q, NEIGHBOURS]


def _scann(vectors: np.ndarray, clock: Clock) -> _Index:
    """As pools are indexed; the setting is the number of leaves that are looked into, 0 where there is no tree."""
    started = CLOCKS[clock]()
    index = SearchIndex.build(vectors, np.arange(len(vectors)))
    built = CLOCKS[clock]() - started
    with tempfile.TemporaryDirectory() as folder:
        index.save(epath.Path(folder) / "index")
        size = sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*"))
    settings = _shares(len(vectors)) if index.about["kind"] == "tree" else [0]

    def search(queries: np.ndarray, leaves: int) -> np.ndarray:
        return index.search(queries, NEIGHBOURS, leaves=leaves or None)[0]

    return _Index(built, size, settings, search)


def _hnsw(vectors: np.ndarray, clock: Clock) -> _Index:
    """FAISS's graph; the setting is efSearch."""
    return _faiss(vectors, clock, "HNSW32", [16, 32, 64, 128, 256, 512], "efSearch={}")


def _ivfpq(vectors: np.ndarray, clock: Clock) -> _Index:
    """FAISS's lists of product codes, as many as ScaNN has leaves, rescored as ScaNN does; the setting is nprobe."""
    lists, codes = round(np.sqrt(len(vectors))), vectors.shape[1] // 2
    options = f"nprobe={{}},k_factor_rf={256 / NEIGHBOURS}"
    return _faiss(vectors, clock, f"IVF{lists},PQ{codes}x4fs,RFlat", _shares(len(vectors)), options)


def _faiss(vectors: np.ndarray, clock: Clock, factory: str, settings: Sequence[int], options: str) -> _Index:
    import faiss  # of requirements-dev.txt

    started = CLOCKS[clock]()
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    built = CLOCKS[clock]() - started

    with tempfile.NamedTemporaryFile() as file:
        faiss.write_index(index, file.name)
        size = pathlib.Path(file.name).stat().st_size

    def search(queries: np.ndarray, setting: int) -> np.ndarray:
        faiss.ParameterSpace().set_index_parameters(index, options.format(setting))
        return index.search(queries, NEIGHBOURS)[1]

    return _Index(built, size, settings, search)


def _shares(count: int) -> list[int]:
    return [max(1, round(share * np.sqrt(count))) for share in SHARES]


BUILDERS = {"ScaNN": _scann, "FAISS IVF-PQ": _ivfpq, "FAISS HNSW": _hnsw}


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
    turns: int = 3,
    clock: Clock = "wall",
    faiss: bool = False,
    json: pathlib.Path | None = None,
) -> None:
    """ScaNN beside exact search, and FAISS (HNSW, IVF-PQ) if asked for, on real embeddings with noise.

    Every index is searched with several settings; the fastest with a recall@10 of 0.99 is the one to compare.

    Args:
        run: the folder of a run that is embedded.
        root: where its release is.
        count: vectors.
        width: of a vector; real ones are turned into so many dimensions.
        noise: length of the noise; that of a real embedding is 1.
        asked: queries, searched at once, which are likewise real embeddings with noise.
        turns: of each search; the median counts.
        clock: wall seconds or, where other programs run, those of this process on all its cores.
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
    print(f"{'':24}{'build s':>9}{'GB':>7}{'queries/s':>11}{'of exact':>10}{'recall@10':>11}")
    truth, _ = exact_search(queries, vectors, NEIGHBOURS)
    figures: list[dict[str, Any]] = []

    def measure(name: str, built: float, size: int, search: Callable[[np.ndarray], np.ndarray]) -> None:
        rate = asked / timed({name: lambda: search(queries)}, turns, clock)[name]
        ratio = rate / figures[0]["queries_per_second"] if figures else 1.0
        recall = recall_against(search(queries), truth)
        figures.append({"name": name, "build_seconds": built, "bytes": size})
        figures[-1] |= {"queries_per_second": rate, "of_exact": ratio, "recall": recall}
        print(f"{name:24}{built:9.1f}{size / 1e9:7.2f}{rate:11.1f}{ratio:10.1f}{recall:11.4f}", flush=True)

    measure("exact (JAX)", 0.0, vectors.nbytes, lambda q: exact_search(q, vectors, NEIGHBOURS)[0])
    for name, build in BUILDERS.items() if faiss else [("ScaNN", _scann)]:
        other = build(vectors, clock)
        for setting in other.settings:
            measure(f"{name}, {setting}", other.built, other.size, lambda q, s=setting, o=other: o.search(q, s))
        own = [each for each in figures if each["name"].startswith(name) and each["recall"] >= RECALL]
        if own:
            fastest = max(own, key=lambda each: each["queries_per_second"])
            print(f"  with recall {RECALL}, the fastest: {fastest['name']}, {fastest['of_exact']:.1f} times exact")
        del other  # the next one needs the memory
    report({"count": count, "width": width, "noise": noise, "indexes": figures}, json)
