"""The measures equal an independent implementation exactly: trec_eval's, and UniIR's definition written out again."""

import numpy as np
import pytest
import pytrec_eval

from trace_jax.retrieval.measures import (
    average_precision_at,
    hits_at,
    ndcg_at,
    rankings,
    recalls,
    reciprocal_rank,
    true_recall_at,
)

KS = (1, 5, 10, 20, 50)


def ranked(scores: np.ndarray, dids: np.ndarray) -> np.ndarray:
    """As indexes rank: by score, equal ones by did."""
    return np.take_along_axis(dids, np.lexsort((dids, -scores), axis=-1), axis=1)


@pytest.fixture(scope="module", params=range(8))
def run(request) -> tuple[np.ndarray, list[frozenset[int]]]:
    """50 results of each of 40 queries over 80 candidates: coarse scores tie; some right answers are in no pool, some
    queries have none.
    """
    rng = np.random.default_rng(request.param)
    dids = np.stack([rng.permutation(80)[:50] for _ in range(40)]).astype(np.int64)
    found = ranked(rng.integers(0, 6, dids.shape).astype(np.float32), dids)
    found[:3, 30:] = -1  # an approximate index may find fewer
    return found, [frozenset(rng.integers(0, 120, rng.integers(0, 9)).tolist()) for _ in found]


def test_measures_equal_trec_eval(run):
    found, positives = run
    names = {f"{measure}_{k}" for measure in ("success", "recall", "ndcg_cut") for k in (5, 10)} | {"recip_rank"}
    qrels = {str(q): {str(did): 1 for did in right} for q, right in enumerate(positives) if right}
    # trec_eval goes by scores alone, and not by did where they tie: it is given the ranks.
    runs = {
        str(q): {str(did): float(-rank) for rank, did in enumerate(row.tolist()) if did >= 0}
        for q, row in enumerate(found)
    }
    theirs = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(runs)
    ours = {"recip_rank": reciprocal_rank(found, positives)}
    for k in (5, 10):
        ours |= {f"success_{k}": hits_at(found, positives, k), f"recall_{k}": true_recall_at(found, positives, k)}
        ours[f"ndcg_cut_{k}"] = ndcg_at(found, positives, k)
    for q, right in enumerate(positives):
        for name, values in ours.items():
            wanted = theirs[str(q)][name] if right else 0.0
            if name.startswith("ndcg"):
                assert values[q] == pytest.approx(wanted, abs=1e-12)  # a sum in another order
            else:
                assert values[q] == wanted


def test_recall_is_any_hit_as_in_uniir():
    found = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    positives = [frozenset({3, 99}), frozenset({4}), frozenset()]
    assert hits_at(found, positives, 1).tolist() == [False, True, False]
    assert recalls(found, positives, (1, 3)) == {"R@1": 33.33, "R@3": 66.67}
    assert recalls(found[:0], [], (5,)) == {"R@5": 0.0}


def uniir_recall(qrels: dict[str, list[str]], run: dict[str, list[str]], k: int) -> float:
    """UniIR's definition: one point for a query when any of its right answers is retrieved, rounded to 4 places."""
    points = [1.0 if any(did in run[qid][:k] for did in qrels.get(qid, [])) else 0.0 for qid in run]
    return round(sum(points) / len(points), 4)


def test_recall_equals_uniirs_definition_also_with_duplicates(run):
    found, positives = run
    doubled = np.concatenate([found[:, :4], found[:, :46]], axis=1)  # the first four come twice
    for table in (found, doubled):
        qrels = {str(q): [str(did) for did in right] * 2 for q, right in enumerate(positives)}
        lists = {str(q): [str(did) for did in row.tolist()] for q, row in enumerate(table)}
        ours = recalls(table, positives, KS)
        assert ours == {f"R@{k}": round(100 * uniir_recall(qrels, lists, k), 2) for k in KS}
        assert (true_recall_at(table, positives, 50) <= 1).all() and (ndcg_at(table, positives, 50) <= 1).all()


def test_average_precision_is_circos():
    found = np.array([[1, 9, 2, 8, 3], [7, 8, 9, 6, 5], [1, 1, 2, 3, 4]])
    positives = [frozenset({1, 2, 3}), frozenset({1}), frozenset({1, 2})]
    wanted = [(1 + 2 / 3 + 3 / 5) / 3, 0.0, (1 + 2 / 3) / 2]
    assert average_precision_at(found, positives, 5).tolist() == pytest.approx(wanted)
    assert average_precision_at(found, positives, 2).tolist() == pytest.approx([1 / 2, 0, 1 / 2])


def test_rankings_have_their_depth_in_their_names(run):
    figures = rankings(*run)
    assert list(figures) == ["true R@10", "MRR@10", "nDCG@10"]
    assert figures["true R@10"] == round(100 * true_recall_at(*run, 10).mean(), 2)
    assert rankings(run[0], run[1], 5)["MRR@5"] <= figures["MRR@10"]
