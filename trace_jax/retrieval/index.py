"""Nearest neighbours by inner product: a ScaNN index for each pool, and exact search in JAX as its
reference.

How an index is made follows ScaNN's own guidance (google-research/scann/docs/algorithms.md): brute force
below 20,000 candidates, asymmetric hashing and rescoring below 100,000, and a tree with about sqrt(n)
leaves in front of them above. Equal scores are ranked by did everywhere.
"""

import functools
import hashlib
import math
import pathlib
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from scann.scann_ops.py import scann_ops_pybind
from tqdm import tqdm

from trace_jax.config import Config
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.pools import CandidateVectors

EXACT_BELOW = 20_000
FLAT_BELOW = 100_000
MARGIN = 16  # neighbours fetched beyond k, so that ties at the edge are broken by did


class SearchIndex:
    """The ScaNN index of one pool: n candidates, D features. Made by `build` or `load`."""

    def __init__(self, searcher: Any, ids: np.ndarray, about: dict[str, Any]) -> None:
        self._searcher = searcher
        self.ids = ids  # [n] int64: dids as integers, ascending
        self.about = about

    @classmethod
    def build(cls, vectors: np.ndarray, ids: np.ndarray, *, key: str = "") -> "SearchIndex":
        """Indexes vectors [n, D] float32 of dids `ids` [n] int64, ascending. Raises ValueError for none."""
        if not len(ids):
            raise ValueError("a pool without candidates cannot be searched")
        started, kind = time.perf_counter(), kind_for(len(ids))
        builder: Any = scann_ops_pybind.builder(np.ascontiguousarray(vectors, np.float32), 10, "dot_product")
        if kind == "tree":
            leaves = round(math.sqrt(len(ids)))
            builder = builder.tree(
                num_leaves=leaves,
                num_leaves_to_search=max(8, leaves // 10),
                training_sample_size=min(len(ids), 250_000),
                random_init=False,  # k-means++ has a fixed seed, a random start has none
            )
        if kind == "exact":
            builder = builder.score_brute_force()
        else:
            builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(256)
        searcher = builder.build()
        seconds = round(time.perf_counter() - started, 2)
        about = {"key": key, "kind": kind, "candidates": len(ids), "seconds": seconds, "dids": _digest(ids)}
        return cls(searcher, ids, about)

    def save(self, folder: epath.Path) -> None:
        """Writes the index to an empty place; its mark comes last, so that a torn one is never loaded."""
        if folder.exists():
            (folder / artifacts.MARK).unlink(missing_ok=True)
            folder.rmtree()
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as temporary:
            self._searcher.serialize(temporary, relative_path=True)
            for path in sorted(pathlib.Path(temporary).iterdir()):
                (folder / path.name).write_bytes(path.read_bytes())
        artifacts.write_arrays(folder / "ids.npz", ids=self.ids)
        artifacts.write_json(folder / artifacts.MARK, self.about)

    @classmethod
    def load(cls, folder: epath.Path, *, key: str | None = None) -> "SearchIndex":
        """Reads an index. Raises MissingStageError for none, or one of a checkpoint other than `key`."""
        about = artifacts.read_json(folder / artifacts.MARK)
        if about is None:
            raise artifacts.MissingStageError(
                f"no index in {folder}: run `make quickstart` (or launch/build_index.py) first"
            )
        if key is not None and about["key"] != key:
            raise artifacts.MissingStageError(
                f"the index in {folder} is of another checkpoint: run launch/embed.py and build_index.py"
            )
        ids = artifacts.read_arrays(folder / "ids.npz")["ids"]
        if "://" not in str(folder):
            return cls(scann_ops_pybind.load_searcher(str(folder)), ids, about)
        with tempfile.TemporaryDirectory() as temporary:
            for path in folder.iterdir():
                (pathlib.Path(temporary) / path.name).write_bytes(path.read_bytes())
            return cls(scann_ops_pybind.load_searcher(temporary), ids, about)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The min(k, n) best rows for queries [q, D] float32: rows [q, k] int64 and scores [q, k] float32.

        Best first, equal scores by row. Where an approximate index finds fewer, the row is -1 and the score
        -inf.
        """
        k = min(k, len(self.ids))
        wanted = min(k + MARGIN, len(self.ids))
        rows, scores = self._searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32), final_num_neighbors=wanted
        )
        found = np.isfinite(scores)
        rows, scores = np.where(found, rows.astype(np.int64), -1), np.where(found, scores, -np.inf)
        order = np.lexsort((rows, -scores), axis=-1)[:, :k]
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


def kind_for(candidates: int) -> str:
    """How a pool of this size is searched: "exact", "hashed" or "tree"."""
    if candidates < EXACT_BELOW:
        return "exact"
    return "hashed" if candidates < FLAT_BELOW else "tree"


@functools.partial(jax.jit, static_argnames="k")
def _merge_best(  # noqa: PLR0917
    queries: jax.Array,
    part: jax.Array,
    first: jax.Array,
    count: jax.Array,
    best: tuple[jax.Array, jax.Array],
    k: int,
) -> tuple[jax.Array, jax.Array]:
    """Merges the best so far (scores, rows [q, k]) with `count` real rows of a part, from row `first` on."""
    scores = jnp.einsum("qd,nd->qn", queries, part, precision=jax.lax.Precision.HIGHEST)
    here = jnp.arange(part.shape[0], dtype=jnp.int32)
    scores = jnp.where((here < count)[None], scores, -jnp.inf)
    rows = jnp.broadcast_to((first + here)[None], scores.shape)
    scores, rows = jnp.concatenate([best[0], scores], axis=1), jnp.concatenate([best[1], rows], axis=1)
    scores, order = jax.lax.top_k(scores, k)  # of equal scores, the earlier stays first: rows ascend
    return scores, jnp.take_along_axis(rows, order, axis=1)


def exact_search(
    queries: np.ndarray, candidates: np.ndarray, k: int, *, chunk: int = 65_536, query_chunk: int = 2_048
) -> tuple[np.ndarray, np.ndarray]:
    """The reference: the min(k, n) best of candidates [n, D] for queries [q, D], float32, in chunks of
    both.

    Returns rows [q, k] int64 and scores [q, k] float32, best first, equal scores by row.
    """
    if len(queries) > query_chunk:
        starts = range(0, len(queries), query_chunk)
        parts = [exact_search(queries[at : at + query_chunk], candidates, k, chunk=chunk) for at in starts]
        rows, scores = zip(*parts, strict=True)
        return np.concatenate(rows), np.concatenate(scores)
    k, chunk = min(k, len(candidates)), min(chunk, len(candidates))
    best = (jnp.full((len(queries), k), -jnp.inf, jnp.float32), jnp.full((len(queries), k), -1, jnp.int32))
    asked = jnp.asarray(queries, jnp.float32)
    for first in range(0, len(candidates), chunk):
        part = np.asarray(candidates[first : first + chunk], np.float32)
        count = len(part)
        part = np.pad(part, ((0, chunk - count), (0, 0)))
        best = _merge_best(asked, part, jnp.int32(first), jnp.int32(count), best, k)
    return np.asarray(best[1]).astype(np.int64), np.asarray(best[0])


def recall_against(found: np.ndarray, reference: np.ndarray) -> float:
    """The share of the reference's rows [q, k] that an index found [q, k]."""
    hits = [len(np.intersect1d(one, other)) for one, other in zip(found, reference, strict=True)]
    return float(np.sum(hits) / max(reference.size, 1))


def index_folder(config: Config, benchmark: Benchmark, pool: str) -> epath.Path:
    """Where the index of a pool lies."""
    return epath.Path(config.run_dir) / "indexes" / benchmark.name / pool


def build_indexes(config: Config, benchmark: Benchmark) -> int:
    """Indexes all pools whose vectors are new; returns how many. Raises MissingStageError without vectors."""
    store, built = CandidateVectors(config, benchmark), 0
    for pool in tqdm(benchmark.all_pools, desc="indexing", unit="pool", dynamic_ncols=True):
        ids = benchmark.ids(pool)
        folder = index_folder(config, benchmark, pool)
        about = artifacts.read_json(folder / artifacts.MARK) or {}
        if store.key is not None and (about.get("key"), about.get("dids")) == (store.key, _digest(ids)):
            continue
        vectors = store.read(store.candidates.rows(ids))
        SearchIndex.build(vectors, ids, key=store.key or "").save(folder)
        built += 1
    return built


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.tobytes()).hexdigest()[:16]
