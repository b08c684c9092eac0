import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from tests.bucket import Bucket
from trace_jax.config import ROOT
from trace_jax.data.builders.layout import did_of
from trace_jax.retrieval import index as index_module
from trace_jax.retrieval.artifacts import MARK, MissingStageError
from trace_jax.retrieval.index import (
    SearchIndex,
    exact_search,
    export_vertex,
    kind_for,
    recall_against,
    write_index,
)
from trace_jax.retrieval.pools import CandidateVectors


def vectors(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def with_ties() -> np.ndarray:
    x = vectors(50)
    x[[7, 30, 49]] = x[3]
    return x


@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_exact_search_ranks_ties_by_row(chunk):
    x = with_ties()
    queries = np.concatenate([x[3:4], vectors(9, seed=1)])
    rows, scores = exact_search(queries, x, 10, chunk=chunk, query_chunk=4)
    exact = (queries[:, None].astype(np.float64) * x).sum(-1)  # a BLAS may give equal rows unequal scores
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :10]
    assert rows[0, :4].tolist() == [3, 7, 30, 49]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, rows, axis=1), atol=1e-6)
    assert exact_search(queries, x[:4], 10, chunk=chunk)[0].shape == (10, 4)


@pytest.mark.parametrize("largest", [1000, 20, 7])
def test_searchers_of_a_large_pool_are_merged(tmp_path, largest):
    x = with_ties()
    index = SearchIndex.build(x, np.arange(50), largest=largest)
    assert len(index.about["searchers"]) == -(-50 // largest) and sum(index.about["searchers"]) == 50
    folder = epath.Path(tmp_path) / "pool"
    index.save(folder)
    for each in (index, SearchIndex.load(folder), SearchIndex.load(folder, resident=False)):
        rows, scores = each.search(x, 12)
        expected, expected_scores = exact_search(x, x, 12)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-5)


class Counted:
    """A searcher that notes down how many of its kind there are at once."""

    alive, most = 0, 0

    def __init__(self, searcher) -> None:
        self._searcher = searcher
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __getattr__(self, name: str):
        return getattr(self._searcher, name)

    def __del__(self) -> None:
        Counted.alive -= 1


@pytest.mark.parametrize("resident", [True, False])
def test_of_an_index_on_disk_one_searcher_is_in_memory(tmp_path, monkeypatch, resident):
    x, folder, read = with_ties(), epath.Path(tmp_path) / "pool", index_module._load
    SearchIndex.build(x, np.arange(50), largest=7).save(folder)
    monkeypatch.setattr(Counted, "most", 0)
    monkeypatch.setattr(index_module, "_load", lambda path: Counted(read(path)))
    index = SearchIndex.load(folder, resident=resident)
    for _ in range(2):
        np.testing.assert_array_equal(index.search(x, 12)[0], exact_search(x, x, 12)[0])
    assert Counted.most == (8 if resident else 1)


def test_what_is_added_to_an_index_on_disk_stays(tmp_path):
    x, folder = with_ties(), epath.Path(tmp_path) / "pool"
    SearchIndex.build(x[:40], np.arange(40), largest=15).save(folder)
    index = SearchIndex.load(folder, resident=False)
    index.add(x[40:], np.arange(40, 50))
    index.delete(np.array([3]))
    index.save(folder)  # over the files that it came from
    for each in (index, SearchIndex.load(folder)):
        assert each.ids[each.search(x, 5)[0][49]].tolist()[:3] == [7, 30, 49]


def test_more_ties_than_are_asked_for_are_ranked_by_row():
    x = vectors(400)
    x[::2] = x[0]
    rows, _ = SearchIndex.build(x, np.arange(400)).search(x[:1], 5)
    assert rows[0].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("kind", ["hashed", "tree"])
def test_more_than_are_rescored_by_default_can_be_asked_for(monkeypatch, kind):
    monkeypatch.setattr(index_module, "EXACT_BELOW", 100)
    monkeypatch.setattr(index_module, "FLAT_BELOW", 10**6 if kind == "hashed" else 200)
    x = vectors(1500)
    x[100:400] = x[7]  # more ties than are rescored, too
    index, every = SearchIndex.build(x, np.arange(1500)), 39 if kind == "tree" else None  # of the leaves
    rows, scores = index.search(x[:3], 600, leaves=every)
    assert rows.shape == (3, 600) and (rows >= 0).all() and np.isfinite(scores).all()
    assert all(len(set(row)) == 600 for row in rows.tolist())
    assert recall_against(index.search(x[:3], 1500, leaves=every)[0], exact_search(x[:3], x, 1500)[0]) == 1
    assert index.search(x[7:8], 5, leaves=every)[0][0].tolist() == [7, 100, 101, 102, 103]
    assert index.search(x[7:8], 301, leaves=every)[0][0].tolist() == [7, *range(100, 400)]


class Sliced:
    """Vectors that note down how many were read at once."""

    def __init__(self, x: np.ndarray) -> None:
        self._x, self.most = x, 0

    def __len__(self) -> int:
        return len(self._x)

    def __getitem__(self, part: slice) -> np.ndarray:
        self.most = max(self.most, len(self._x[part]))
        return self._x[part]


def test_a_pool_larger_than_memory_is_read_in_parts(tmp_path):
    x, ids = with_ties(), np.arange(50)
    pool, folder = Sliced(x), epath.Path(tmp_path)
    write_index(folder / "parts", pool, ids, key="a", largest=20)
    assert pool.most == 17
    SearchIndex.build(x, ids, key="a", largest=20).save(folder / "whole")
    assert stored(folder / "parts") == stored(folder / "whole")
    rows, scores = exact_search(x, pool, 10, chunk=2, query_chunk=20)
    assert pool.most == 17
    expected, expected_scores = exact_search(x, x, 10)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def stored(folder: epath.Path) -> dict[str, bytes]:
    """All files below a folder."""
    paths = pathlib.Path(folder).rglob("*")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


THRESHOLDS = {"exact": (10**6, 10**6), "hashed": (10, 10**6), "tree": (10, 20)}
BUILD_HALF = """
import sys, threading
import numpy as np
from etils import epath
from tests.retrieval.test_index import THRESHOLDS, vectors
from trace_jax.retrieval import index

class Half:
    def __len__(self):
        return 6000
    def __getitem__(self, part):
        if part.start >= 3000:
            stuck.set()
            threading.Event().wait()
        return vectors(6000)[part]

for kind, (index.EXACT_BELOW, index.FLAT_BELOW) in THRESHOLDS.items():
    stuck = threading.Event()
    given = {"ids": np.arange(6000), "key": "a", "largest": 1500}
    threading.Thread(target=index.write_index, args=(epath.Path(sys.argv[1]) / kind, Half()), kwargs=given).start()
    stuck.wait()
print("half", flush=True)
"""


def test_a_build_after_kill_9_ends_with_the_same_bytes(tmp_path, monkeypatch):
    command = [sys.executable, "-c", BUILD_HALF, str(tmp_path / "killed")]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert running.stdout is not None and running.stdout.readline() == "half\n"
    running.send_signal(signal.SIGKILL)
    running.communicate()
    for kind, (exact_below, flat_below) in THRESHOLDS.items():
        monkeypatch.setattr(index_module, "EXACT_BELOW", exact_below)
        monkeypatch.setattr(index_module, "FLAT_BELOW", flat_below)
        killed, straight = (epath.Path(tmp_path) / name / kind for name in ("killed", "straight"))
        assert sorted(path.name for path in killed.iterdir()) == ["00000", "00001"]
        with pytest.raises(MissingStageError, match="no index"):
            SearchIndex.load(killed)
        for folder in (killed, straight):
            write_index(folder, vectors(6000), np.arange(6000), key="a", largest=1500)
        assert len(stored(straight)) > 12 and stored(straight) == stored(killed)
        assert SearchIndex.load(killed).about["kind"] == kind


def test_vertex_gets_every_vector(evaluated, benchmark_, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "EXPORTED", 100)
    pool, store = benchmark_.all_pools[0], CandidateVectors(evaluated[0], benchmark_)
    ids = benchmark_.ids(pool)
    assert export_vertex(evaluated[0], benchmark_, pool, epath.Path(tmp_path)) == len(ids)
    files = sorted(tmp_path.iterdir())
    assert len(files) == -(-len(ids) // 100)
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [line["id"] for line in lines] == [did_of(int(did)) for did in ids]
    np.testing.assert_array_equal(np.array([line["embedding"] for line in lines], np.float32), store.of(ids)[:])


def test_an_index_comes_back_from_disk(tmp_path):
    x, folder = with_ties(), epath.Path(tmp_path) / "pool"
    ids = np.arange(50, dtype=np.int64) * 3
    SearchIndex.build(x, ids, key="a").save(folder)
    loaded = SearchIndex.load(folder)
    rows, scores = loaded.search(x, 5)
    expected, expected_scores = exact_search(x, x, 5)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    np.testing.assert_array_equal(loaded.ids, ids)
    assert loaded.search(x, 99)[0].shape == (50, 50)
    assert loaded.about["kind"] == "exact"


@pytest.mark.parametrize("kind", ["exact", "hashed", "tree", "several"])
def test_candidates_are_added_and_deleted(tmp_path, monkeypatch, kind):
    if kind in ("hashed", "tree"):
        monkeypatch.setattr(index_module, "EXACT_BELOW", 100)
        monkeypatch.setattr(index_module, "FLAT_BELOW", 10**6 if kind == "hashed" else 200)
    x = vectors(400)
    x[350] = x[10]  # what is added later ties with what was there
    ids = np.random.default_rng(1).permutation(4000)[:400].astype(np.int64)
    old, new, gone = np.arange(300), np.arange(300, 400), np.array([0, 7, 299, 310, 399])
    index = SearchIndex.build(
        x[old[np.argsort(ids[old])]], np.sort(ids[old]), largest=150 if kind == "several" else 300
    )
    index.add(x[new], ids[new])
    index.delete(ids[gone])
    left = np.setdiff1d(np.arange(400), gone)
    left = left[np.argsort(ids[left])]
    folder = epath.Path(tmp_path) / "pool"
    index.save(folder)
    for each in (index, SearchIndex.load(folder)):
        np.testing.assert_array_equal(each.ids, ids[left])
        rows, scores = each.search(x, 5, leaves=20 if kind == "tree" else None)
        expected, expected_scores = exact_search(x, x[left], 5)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
        assert each.about["candidates"] == len(left)
    loaded = SearchIndex.load(folder)
    loaded.add(x[gone], ids[gone])
    again = SearchIndex.build(x[np.argsort(ids)], np.sort(ids))
    np.testing.assert_array_equal(loaded.ids, again.ids)
    assert loaded.about["dids"] == again.about["dids"]


def test_an_impossible_change_of_an_index_names_the_candidate():
    index = SearchIndex.build(vectors(4), np.arange(4, dtype=np.int64))
    with pytest.raises(ValueError, match="candidate 0:2 is in the index already"):
        index.add(vectors(2), np.array([9, 2]))
    with pytest.raises(ValueError, match="candidate 0:8 is in the index already"):
        index.add(vectors(2), np.array([8, 8]))
    with pytest.raises(ValueError, match="candidate 0:9 is not in the index"):
        index.delete(np.array([1, 9]))
    with pytest.raises(ValueError, match="without candidates"):
        index.delete(np.arange(4))
    assert index.ids.tolist() == [0, 1, 2, 3]


def test_a_missing_or_torn_index_is_refused(tmp_path):
    folder = epath.Path(tmp_path) / "pool"
    with pytest.raises(MissingStageError, match="make quickstart"):
        SearchIndex.load(folder)
    SearchIndex.build(vectors(5), np.arange(5), key="a").save(folder)
    (folder / MARK).unlink()
    with pytest.raises(MissingStageError, match="no index"):
        SearchIndex.load(folder)


def test_an_empty_pool_is_refused():
    with pytest.raises(ValueError, match="without candidates"):
        SearchIndex.build(np.zeros((0, 4), np.float32), np.zeros(0, np.int64))


@pytest.mark.parametrize(("exact_below", "flat_below", "kind"), [(100, 10**6, "hashed"), (100, 200, "tree")])
def test_larger_pools_are_searched_approximately(monkeypatch, exact_below, flat_below, kind):
    monkeypatch.setattr(index_module, "EXACT_BELOW", exact_below)
    monkeypatch.setattr(index_module, "FLAT_BELOW", flat_below)
    centres = vectors(40, 32)
    x = np.repeat(centres, 50, axis=0) + 0.3 * vectors(2000, 32, seed=2)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert kind_for(len(x)) == kind
    rows, scores = SearchIndex.build(x, np.arange(2000)).search(centres, 10)
    np.testing.assert_array_equal(SearchIndex.build(x, np.arange(2000)).search(centres, 10)[0], rows)
    assert recall_against(rows, exact_search(centres, x, 10)[0]) > 0.9
    assert (np.diff(scores, axis=1) <= 0).all()


def test_kinds_follow_the_guidance_of_scann():
    assert [kind_for(n) for n in (1, 19_999, 20_000, 99_999, 100_000)] == ["exact"] * 2 + ["hashed"] * 2 + ["tree"]


def test_recall_against_a_reference():
    assert recall_against(np.array([[1, 2], [3, 4]]), np.array([[2, 9], [4, 3]])) == 0.75


def test_an_index_in_a_bucket(tmp_path, monkeypatch):
    bucket, x, folder = Bucket(tmp_path), with_ties(), epath.Path("gs://runs/pool")
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    try:
        SearchIndex.build(x, np.arange(50), key="a", largest=20).save(folder)
        assert len(bucket.objects()) > 6
        for resident in (True, False):
            index = SearchIndex.load(folder, resident=resident)
            np.testing.assert_array_equal(index.search(x, 5)[0], exact_search(x, x, 5)[0])
        index.delete(np.array([3]))
        index.save(folder)
        assert SearchIndex.load(folder).ids.tolist() == [*range(3), *range(4, 50)]
    finally:
        bucket.kill()
