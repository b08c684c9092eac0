"""Near-duplicate (query, normalised answer) pairs: among rows with the same task, picture and answer, a query much like
that of an earlier one is dropped. MinHash finds the likely ones, their exact similarity decides.
"""

import collections
import functools
import hashlib
from collections.abc import Iterable, Iterator

from datasketch import MinHash, MinHashLSH

from trace_jax.cot.config import Filters
from trace_jax.cot.filters import normalise
from trace_jax.cot.schema import Row, order

SHARD = 50_000  # rows that are compared at once, and so in memory
_SHINGLE = 5  # characters
_WEIGHTS = (0.05, 0.95)  # of false and of missed candidates: a false one costs a comparison, a missed one a duplicate


def group_key(row: Row) -> str:
    """Rows of other groups are never duplicates of each other."""
    return hashlib.sha256(f"{row.task}\0{row.image}\0{normalise(row.answer)}".encode()).hexdigest()


def shard_of(group: str, shards: int) -> int:
    """Which shard a group is in: the same on every machine."""
    return int(group, 16) % shards


def shingles(text: str) -> set[str]:
    """The character 5-grams of the normalised text; a shorter text is its own."""
    plain = normalise(text)
    return {plain[i : i + _SHINGLE] for i in range(max(1, len(plain) - _SHINGLE + 1))}


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard."""
    return len(one & other) / len(one | other)


@functools.cache
def _nothing_seen(permutations: int) -> MinHash:
    """The signature of no shingles, from which all others start: to draw the permutations takes a millisecond."""
    return MinHash(num_perm=permutations, seed=1)


@functools.cache
def _bands(similarity: float, permutations: int) -> tuple[int, int]:
    """(number of bands, their rows) of an index for this similarity: to choose them takes a large part of a second."""
    index = MinHashLSH(threshold=similarity, num_perm=permutations, weights=_WEIGHTS)
    return index.b, index.r


def _minhash(parts: set[str], permutations: int) -> MinHash:
    found = _nothing_seen(permutations).copy()
    found.update_batch([part.encode() for part in sorted(parts)])
    return found


def duplicates(rows: Iterable[tuple[str, str]], options: Filters) -> Iterator[tuple[str, str]]:
    """(qid, qid of the earlier one) of every row of a group, given as (qid, text), that is much like a kept earlier
    one. The order of the rows does not matter: they are taken by the numbers of their qid.
    """
    ordered = sorted(rows, key=lambda row: order(row[0]))
    if len(ordered) < 2:
        return
    bands = _bands(options.duplicate_similarity, options.permutations)
    index = MinHashLSH(num_perm=options.permutations, params=bands)
    kept: dict[str, set[str]] = {}
    same: dict[frozenset[str], str] = {}
    for qid, text in ordered:
        parts = shingles(text)
        if (twin := same.get(frozenset(parts))) is not None:
            yield qid, twin
            continue
        signature = _minhash(parts, options.permutations)
        alike = [
            other
            for other in index.query(signature)
            if similarity(parts, kept[str(other)]) >= options.duplicate_similarity
        ]
        if alike:
            yield qid, min(map(str, alike), key=order)
            continue
        kept[qid] = parts
        same[frozenset(parts)] = qid
        index.insert(qid, signature)


def of_all(rows: Iterable[tuple[str, str, str]], options: Filters) -> dict[str, str]:
    """Qid -> qid of the earlier one, of every near-duplicate among rows of several groups: (group, qid, text)."""
    groups: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for group, qid, text in rows:
        groups[group].append((qid, text))
    return {qid: earlier for group in groups.values() for qid, earlier in duplicates(group, options)}
