"""What is measured of a ranking, per query: found [n, k] int64 dids, best first, -1 where nothing was found.

The benchmark's own recall is UniIR's any-hit one. The others need all right answers in the pool, and M-BEIR's local
pools of OVEN and InfoSeek hold only some: there they are lower than they should be (`POOL_CAVEAT`). A did that comes
twice takes two places and counts once.
"""

from collections.abc import Sequence

import numpy as np

Positives = Sequence[frozenset[int]]  # right answers of each query, as integers; empty where nothing is right
POOL_CAVEAT = (
    "true recall, MRR and nDCG count right answers that the local pool does not hold (OVEN and InfoSeek name each"
    " other's); compare them within one pool only"
)


def hits_at(found: np.ndarray, positives: Positives, k: int) -> np.ndarray:
    """Whether a right answer is among the first k: [n] bool."""
    return np.array([not right.isdisjoint(row[:k].tolist()) for row, right in zip(found, positives, strict=True)], bool)


def true_recall_at(found: np.ndarray, positives: Positives, k: int) -> np.ndarray:
    """The share of the right answers that are among the first k: [n] float64; 0 where nothing is right."""
    shares = [
        len(right.intersection(row[:k].tolist())) / max(len(right), 1)
        for row, right in zip(found, positives, strict=True)
    ]
    return np.array(shares, np.float64)


def reciprocal_rank(found: np.ndarray, positives: Positives) -> np.ndarray:
    """One over the rank of the first right answer: [n] float64; 0 where none is found."""
    ranks = [
        next((1 / rank for rank, did in enumerate(row.tolist(), start=1) if did in right), 0.0)
        for row, right in zip(found, positives, strict=True)
    ]
    return np.array(ranks, np.float64)


def ndcg_at(found: np.ndarray, positives: Positives, k: int) -> np.ndarray:
    """Normalised discounted gain of the first k, right or not, discount log2(rank + 1): [n] float64."""
    discounts = 1 / np.log2(np.arange(2, k + 2))
    values = np.zeros(len(found))
    for query, (row, right) in enumerate(zip(found, positives, strict=True)):
        left, gain = set(right), 0.0
        for did, discount in zip(row[:k].tolist(), discounts, strict=False):
            if did in left:
                left.remove(did)
                gain += discount
        if right:
            values[query] = gain / discounts[: len(right)].sum()
    return values


def average_precision_at(found: np.ndarray, positives: Positives, k: int) -> np.ndarray:
    """CIRCO's: the precisions at the right answers among the first k, over min(right answers, k): [n] float64."""
    values = np.zeros(len(found))
    for query, (row, right) in enumerate(zip(found, positives, strict=True)):
        left, total = set(right), 0.0
        for rank, did in enumerate(row[:k].tolist(), start=1):
            if did in left:
                left.remove(did)
                total += (len(right) - len(left)) / rank
        values[query] = total / max(min(len(right), k), 1)
    return values


def percent(values: np.ndarray) -> float:
    """The mean in percent, to two places; 0 for no values."""
    return round(100 * float(np.mean(values)), 2) if len(values) else 0.0


def recalls(found: np.ndarray, positives: Positives, ks: Sequence[int]) -> dict[str, float]:
    """The benchmark's recall in percent, {"R@1": ...}."""
    return {f"R@{k}": percent(hits_at(found, positives, k)) for k in ks}


def rankings(found: np.ndarray, positives: Positives, k: int = 10) -> dict[str, float]:
    """What else is said of the first k, in percent: true recall, mean reciprocal rank, nDCG."""
    return {
        f"true R@{k}": percent(true_recall_at(found, positives, k)),
        f"MRR@{k}": percent(reciprocal_rank(found[:, :k], positives)),
        f"nDCG@{k}": percent(ndcg_at(found, positives, k)),
    }
