"""Nearest neighbours by inner product: a ScaNN index for each pool, and exact search in JAX as its
reference.

How an index is made follows ScaNN's own guidance (google-research/scann/docs/algorithms.md): brute force
below 20,000 candidates, asymmetric hashing and rescoring below 100,000, and a tree with about sqrt(n)
leaves in front of them above. Equal scores are ranked by did everywhere.
"""

import functools
import hashlib
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scann.scann_ops.py import scann_ops_pybind
from tqdm import tqdm

from trace_jax import sharding
from trace_jax.config import Config
from trace_jax.data.builders.layout import did_of
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.pools import CandidateVectors, Vectors

EXACT_BELOW = 20_000
FLAT_BELOW = 100_000
MARGIN = 16  # neighbours fetched beyond k, to break ties at the edge by did
LARGEST = 4_000_000  # candidates of one ScaNN searcher
RESCORED = 256  # neighbours that hashing hands to exact scores, or as many as are asked for if more
SEARCHED = 20  # one in so many leaves is looked into; what that finds of a million: docs/engine.md
ADDED = 256  # candidates that ScaNN adds at once
COPIED = 1 << 24  # bytes that are copied at once
EXPORTED = 10_000  # candidates of a file for Vertex AI


class SearchIndex:
    """The ScaNN index of one pool: n candidates, D features. Made by `build` or `load`.

    A large pool is several searchers, whose results are merged at query time.
    """

    def __init__(self, searchers: Sequence[Any], members: list[np.ndarray], kind: str, key: str) -> None:
        """`members` are the dids of each searcher, int64, in its own order."""
        self._searchers, self._members = searchers, members
        self._kind, self._key = kind, key
        self._number()

    def _number(self) -> None:
        """Gives candidates their rows; says what is there."""
        self.ids = np.sort(np.concatenate(self._members))  # [n] int64: dids as integers, ascending
        self._rows = [np.searchsorted(self.ids, members) for members in self._members]
        self.about = _about(self._members, self._kind, self._key)

    @classmethod
    def build(cls, vectors: np.ndarray, ids: np.ndarray, *, key: str = "", largest: int = LARGEST) -> "SearchIndex":
        """Indexes vectors [n, D] float32 of dids `ids` [n] int64, ascending; at most `largest` in a searcher.

        Raises ValueError for none.
        """
        parts = _parts(len(ids), largest)
        members = [ids[part] for part in parts]
        return cls([_build(vectors[part]) for part in parts], members, kind_for(len(members[0])), key)

    def add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        """Adds vectors [m, D] float32 of new dids [m] int64.

        What was trained (centres, codebooks) stays as it is: build anew when much has been added. Raises ValueError for
        a did that is there, or twice.
        """
        if len(np.unique(ids)) < len(ids) or np.isin(ids, self.ids).any():
            twice = next(did for number, did in enumerate(ids) if did in self.ids or did in ids[:number])
            raise ValueError(f"candidate {did_of(int(twice))} is in the index already; delete it first")
        self._searchers = list(self._searchers)  # what is on disk stays as it is until it is saved
        smallest = min(range(len(self._searchers)), key=lambda part: len(self._members[part]))
        inner = self._searchers[smallest].searcher
        inner.upsert([None] * len(ids), np.ascontiguousarray(vectors, np.float32), ADDED)
        self._members[smallest] = np.concatenate([self._members[smallest], ids])
        self._number()

    def delete(self, ids: np.ndarray) -> None:
        """Takes the candidates of dids [m] int64 out; rows of others move up. Raises ValueError for one that is not
        there, or when none would be left.
        """
        gone = np.unique(ids)
        if len(missing := gone[~np.isin(gone, self.ids)]):
            raise ValueError(f"candidate {did_of(int(missing[0]))} is not in the index")
        if len(gone) == len(self.ids) or any(np.isin(members, gone).all() for members in self._members):
            raise ValueError("a searcher without candidates cannot be searched; build the index anew")
        self._searchers = list(self._searchers)
        for part, searcher in enumerate(self._searchers):
            members = self._members[part].copy()
            for place in np.flatnonzero(np.isin(members, gone))[::-1].tolist():
                searcher.searcher.delete([place])  # the last candidate takes the place
                members[place] = members[-1]
                members = members[:-1]
            self._members[part] = members
        self._number()

    def save(self, folder: epath.Path) -> None:
        """Writes the index, in place of another."""
        searchers = list(self._searchers)
        _write(folder, searchers.__getitem__, np.concatenate(self._members), self.about)

    @classmethod
    def load(cls, folder: epath.Path, *, resident: bool = True) -> "SearchIndex":
        """Reads an index. Raises MissingStageError for none.

        One that is not `resident` has its searchers on disk, and reads one after another at every search: only that one
        is in memory.
        """
        about = artifacts.read_json(folder / artifacts.MARK)
        if about is None or not isinstance(about.get("searchers"), list):
            raise artifacts.MissingStageError(
                f"no index in {folder}: run `make quickstart` (or launch/build_index.py) first"
            )
        ends = np.cumsum(about["searchers"])
        members = np.split(artifacts.read_arrays(folder / "ids.npz")["ids"], ends[:-1])
        stored = _Stored(folder, len(members))
        return cls(list(stored) if resident else stored, members, about["kind"], about["key"])

    def search(self, queries: np.ndarray, k: int, *, leaves: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The min(k, n) best rows for queries [q, D] float32: rows [q, k] int64 and scores [q, k] float32.

        Best first, equal scores by row. Where an approximate index finds fewer, the row is -1 and the score
        -inf. `leaves` of a tree are looked into instead of those that it was built for.
        """
        k = min(k, len(self.ids))
        # Asked for one at a time: a loop would hold the last one while it reads the next.
        parts = [_search(self._searchers[part], queries, k, rows, leaves) for part, rows in enumerate(self._rows)]
        rows, scores = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
        order = np.lexsort((rows, -scores), axis=-1)[:, :k]
        return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)


class _Stored(Sequence[Any]):
    """The searchers of an index on disk, each read when it is asked for."""

    def __init__(self, folder: epath.Path, count: int) -> None:
        self._folder, self._count = folder, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return _load(self._folder / f"{number:05d}")


class ExactIndex:
    """All vectors of a pool, searched as a `SearchIndex` is, without an index: no candidate is overlooked."""

    def __init__(self, vectors: Vectors, ids: np.ndarray, key: str) -> None:
        self._vectors, self.ids = vectors, ids
        self.about = _about([ids], "none", key)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `exact_search`."""
        return exact_search(queries, self._vectors, k)


def write_index(
    folder: epath.Path, vectors: np.ndarray | Vectors, ids: np.ndarray, *, key: str = "", largest: int = LARGEST
) -> None:
    """`SearchIndex.build` and `save`, but for one searcher at a time: no more vectors than its own are in memory."""
    parts = _parts(len(ids), largest)
    _write(folder, lambda number: _build(vectors[parts[number]]), ids, _about_new(ids, key, largest))


def _write(folder: epath.Path, searcher: Callable[[int], Any], ids: np.ndarray, about: dict[str, Any]) -> None:
    """Writes an index, whose searchers are asked for one at a time; its mark comes last, so that a torn one is never
    loaded. `ids` are in the searchers' order.
    """
    if folder.exists():
        (folder / artifacts.MARK).unlink(missing_ok=True)
        folder.rmtree()
    for number in range(len(about["searchers"])):
        _save(searcher(number), folder / f"{number:05d}")
    artifacts.write_arrays(folder / "ids.npz", ids=ids)
    artifacts.write_json(folder / artifacts.MARK, about)


def _parts(count: int, largest: int) -> list[slice]:
    """Nearly equal parts of at most so many candidates. Raises ValueError for no candidates."""
    if not count:
        raise ValueError("a pool without candidates cannot be searched")
    bounds = np.linspace(0, count, math.ceil(count / largest) + 1).round().astype(int).tolist()
    return [slice(first, last) for first, last in itertools.pairwise(bounds)]


def _about(members: list[np.ndarray], kind: str, key: str) -> dict[str, Any]:
    """What an index is, with the candidates of each searcher; nothing that differs from build to build."""
    ids = np.sort(np.concatenate(members))
    digest = hashlib.sha256(ids.tobytes()).hexdigest()[:16]
    return {"key": key, "kind": kind, "candidates": len(ids), "dids": digest, "searchers": [*map(len, members)]}


def _about_new(ids: np.ndarray, key: str, largest: int = LARGEST) -> dict[str, Any]:
    """What the index of these candidates is when it has just been built."""
    members = [ids[part] for part in _parts(len(ids), largest)]
    return _about(members, kind_for(len(members[0])), key)


def _build(vectors: np.ndarray) -> Any:
    """One ScaNN searcher."""
    count, kind = len(vectors), kind_for(len(vectors))
    builder: Any = scann_ops_pybind.builder(np.ascontiguousarray(vectors, np.float32), 10, "dot_product")
    if kind == "tree":
        leaves = round(math.sqrt(count))
        builder = builder.tree(
            num_leaves=leaves,
            num_leaves_to_search=max(8, leaves // SEARCHED),
            training_sample_size=min(count, 250_000),
            random_init=False,  # k-means++ has a fixed seed, a random start has none
        )
    if kind == "exact":
        return builder.score_brute_force().build()
    return builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(RESCORED).build()


def _save(searcher: Any, folder: epath.Path) -> None:
    """Writes a searcher into a new folder, local or gs://."""
    folder.mkdir(parents=True)
    if "://" not in str(folder):
        searcher.serialize(str(folder), relative_path=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        searcher.serialize(temporary, relative_path=True)
        _copy_files(epath.Path(temporary), folder)


def _load(folder: epath.Path) -> Any:
    if "://" not in str(folder):
        return scann_ops_pybind.load_searcher(str(folder))
    with tempfile.TemporaryDirectory() as temporary:
        _copy_files(folder, epath.Path(temporary))
        return scann_ops_pybind.load_searcher(temporary)


def _copy_files(source: epath.Path, target: epath.Path) -> None:
    """Copies the files of a folder, which may be larger than memory."""
    for path in source.iterdir():
        with path.open("rb") as old, (target / path.name).open("wb") as new:
            shutil.copyfileobj(old, new, COPIED)


def _search(
    searcher: Any, queries: np.ndarray, k: int, rows_of: np.ndarray, leaves: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of a searcher, and all that equal the last of them; `rows_of` [count] are its candidates' rows.

    Which of equal candidates ScaNN gives is its own affair; so more are asked for until the k-th is beaten or met by
    none that was left out.
    """
    count = len(rows_of)
    wanted = min(k + MARGIN, count)
    while True:
        rows, scores = searcher.search_batched_parallel(
            np.ascontiguousarray(queries, np.float32),
            final_num_neighbors=wanted,
            pre_reorder_num_neighbors=max(RESCORED, wanted),
            leaves_to_search=leaves,
        )
        found = np.isfinite(scores)
        rows = np.where(found, rows_of[np.where(found, rows, 0)], -1)
        scores = np.where(found, scores, -np.inf)
        tied = np.isfinite(scores[:, -1]) & (scores[:, -1] == scores[:, min(k, wanted) - 1])
        if wanted == count or not tied.any():
            return rows, scores
        wanted = min(4 * wanted, count)


def kind_for(candidates: int) -> str:
    """How a pool of this size is searched: "exact", "hashed" or "tree"."""
    if candidates < EXACT_BELOW:
        return "exact"
    return "hashed" if candidates < FLAT_BELOW else "tree"


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def _merge_best(  # noqa: PLR0917
    queries: jax.Array,
    part: jax.Array,
    first: jax.Array,
    count: jax.Array,
    best: tuple[jax.Array, jax.Array],
    k: int,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Merges the best so far (scores, rows [q, k]) with the first `count` rows of a part, which begins at row `first`.

    The part is dealt to the devices in order; each finds its own best.
    """

    def best_here(
        queries: jax.Array, part: jax.Array, first: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        scores = jnp.einsum("qd,nd->qn", queries, part, precision=jax.lax.Precision.HIGHEST)
        here = jax.lax.axis_index("rows") * part.shape[0] + jnp.arange(part.shape[0], dtype=jnp.int32)
        scores, order = jax.lax.top_k(jnp.where((here < count)[None], scores, -jnp.inf), min(k, part.shape[0]))
        return scores, first + here[order]

    whole, dealt = P(), P("rows")
    specs = {"in_specs": (whole, dealt, whole, whole), "out_specs": P(None, "rows"), "check_vma": False}
    found = jax.shard_map(best_here, mesh=mesh, **specs)(queries, part, first, count)
    scores, rows = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
    scores, order = jax.lax.top_k(scores, k)  # of equal scores, the earlier stays first: rows ascend
    return scores, jnp.take_along_axis(rows, order, axis=1)


def exact_search(
    queries: np.ndarray, candidates: np.ndarray | Vectors, k: int, *, chunk: int = 65_536, query_chunk: int = 2_048
) -> tuple[np.ndarray, np.ndarray]:
    """The reference: the min(k, n) best of candidates [n, D] for queries [q, D], float32.

    Candidates are sliced once each, and go to this host's devices in chunks of so many on each; queries are taken in
    chunks, too. Returns rows [q, k] int64 and scores [q, k] float32, best first, equal scores by row.
    """
    devices = jax.local_devices()
    mesh = jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)
    k, chunk = min(k, len(candidates)), len(devices) * min(chunk, math.ceil(len(candidates) / len(devices)))
    whole, dealt = NamedSharding(mesh, P()), NamedSharding(mesh, P("rows"))
    starts = range(0, max(len(queries), 1), query_chunk)
    asked = [jax.device_put(np.asarray(queries[at : at + query_chunk], np.float32), whole) for at in starts]
    nothing = [(np.full((len(some), k), -np.inf, np.float32), np.full((len(some), k), -1, np.int32)) for some in asked]
    best = jax.device_put(nothing, whole)
    for first in range(0, len(candidates), chunk):
        part = np.asarray(candidates[first : first + chunk], np.float32)
        count = len(part)
        part = jax.device_put(np.pad(part, ((0, chunk - count), (0, 0))), dealt)
        best = [
            _merge_best(some, part, np.int32(first), np.int32(count), found, k, mesh)
            for some, found in zip(asked, best, strict=True)
        ]
    scores, rows = (np.concatenate([np.asarray(part) for part in each]) for each in zip(*best, strict=True))
    return rows.astype(np.int64), scores


def recall_against(found: np.ndarray, reference: np.ndarray) -> float:
    """The share of the reference's rows [q, k] that an index found [q, k]."""
    hits = [len(np.intersect1d(one, other)) for one, other in zip(found, reference, strict=True)]
    return float(np.sum(hits) / max(reference.size, 1))


def index_folder(config: Config, benchmark: Benchmark, pool: str) -> epath.Path:
    """Where the index of a pool lies."""
    return epath.Path(config.run_dir) / "indexes" / benchmark.name / pool


def open_index(config: Config, benchmark: Benchmark, pool: str, key: str | None = None) -> SearchIndex | ExactIndex:
    """What a pool is searched with (`evaluation.search`). Raises MissingStageError when it is not there, or of vectors
    other than those of `key` (`CandidateVectors.index_key`).
    """
    if config.evaluation.search == "exact":
        store, ids = CandidateVectors(config, benchmark), benchmark.ids(pool)
        index = ExactIndex(store.of(ids), ids, store.index_key)
    else:
        index = SearchIndex.load(index_folder(config, benchmark, pool), resident=False)
    if key not in (None, index.about["key"]):
        raise artifacts.MissingStageError(
            f"what {pool} is searched with is of another checkpoint or release: run launch/embed.py and build_index.py"
        )
    return index


def build_indexes(config: Config, benchmark: Benchmark) -> int:
    """Indexes all pools whose vectors are new; returns how many. Raises MissingStageError without vectors.

    Of several processes each builds its share, and waits for the others.
    """
    store, built = CandidateVectors(config, benchmark), 0
    for pool in tqdm(sharding.dealt(benchmark.all_pools), desc="indexing", unit="pool", dynamic_ncols=True):
        ids = benchmark.ids(pool)
        folder = index_folder(config, benchmark, pool)
        if artifacts.read_json(folder / artifacts.MARK) != _about_new(ids, store.index_key):
            write_index(folder, store.of(ids), ids, key=store.index_key)
            built += 1
    multihost_utils.sync_global_devices("indexed")
    return built


def export_vertex(config: Config, benchmark: Benchmark, pool: str, folder: epath.Path) -> int:
    """Writes a pool's vectors in the input format of Vertex AI Vector Search; returns how many.

    `folder`, local or gs://, gets JSON Lines files, a candidate a line: its did as "id" and its vector as "embedding".
    Raises MissingStageError without vectors.
    """
    ids = benchmark.ids(pool)
    vectors = CandidateVectors(config, benchmark).of(ids)
    for number, first in enumerate(range(0, len(ids), EXPORTED)):
        part = slice(first, first + EXPORTED)
        pairs = zip(ids[part].tolist(), vectors[part].tolist(), strict=True)
        lines = [json.dumps({"id": did_of(did), "embedding": vector}) + "\n" for did, vector in pairs]
        artifacts.write_bytes(folder / f"part_{number:05d}.json", "".join(lines).encode())
    return len(ids)
