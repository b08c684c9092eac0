"""What a build counted: one counter of named tuples, which adds up over files, and a few rows to show."""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from trace_jax.cot.schema import Row

SAMPLES = 4  # rows shown: kept ones of each file, dropped ones of each reason and file
BINS = 20  # of the verifier's probability
WIDTHS = {"reasoning": 8, "answer": 2}
"""Tokens of a bar of the histograms."""


def _rank(row: dict[str, Any]) -> str:
    """Nothing shown is picked by hand: the first in the order of the SHA-256 of the qid."""
    return hashlib.sha256(row["qid"].encode()).hexdigest()


@dataclasses.dataclass
class Statistics:
    """Counts by key; the first member of a key names the table.

    ("row", data set, task, "complex" | "simple", reason or "")
    ("policy", data set, stream of the policy, "complex" | "simple" | "unread")   what the teacher thought of it
    ("gold", shown, reason or "")                                       complex rows that were written
    ("length", "reasoning" | "answer", tokens from)                     of kept traces
    ("verdict", "target" | "decoy", bin of the probability, accepted)
    ("prompt", stage, hash), ("teacher", name), ("verifier", name)
    """

    counts: Counter[tuple[Any, ...]] = dataclasses.field(default_factory=Counter)
    samples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)  # "" kept, else the reason

    def add(self, row: Row, policy: str | None, tokens: Callable[[str], int], minimum: float) -> None:
        """Counts a row. `minimum` is the confidence above which a verdict accepts."""
        count = self.counts
        count["row", row.dataset, row.task, "complex" if row.complex else "simple", row.dropped] += 1
        if "assess" in row.prompts and policy is not None:
            opinion = {True: "complex", False: "simple", None: "unread"}[row.assessed]
            count["policy", row.dataset, policy, opinion] += 1
        for stage, hashed in row.prompts.items():
            count["prompt", stage, hashed] += 1
        if row.teacher:
            count["teacher", row.teacher] += 1
            count["gold", row.gold, row.dropped] += 1
        if row.verifier:
            count["verifier", row.verifier] += 1
        verdicts = (
            ("target", row.consistent, row.confidence),
            ("decoy", row.decoy_consistent, row.decoy_confidence),
        )
        for kind, consistent, confidence in verdicts:
            if consistent is not None and confidence is not None:
                probability = confidence if consistent else 1 - confidence
                accepted = consistent and confidence > minimum
                count["verdict", kind, min(int(probability * BINS), BINS - 1), accepted] += 1
        if row.complex and not row.dropped:
            for name, width in WIDTHS.items():
                count["length", name, tokens(getattr(row, name)) // width * width] += 1
        if row.complex or row.dropped:
            self._show(row.dropped, vars(row))

    def _show(self, reason: str, row: dict[str, Any]) -> None:
        self.samples[reason] = sorted([*self.samples.get(reason, ()), row], key=_rank)[:SAMPLES]

    def table(self, name: str) -> Iterator[tuple[tuple[Any, ...], int]]:
        """(rest of the key, count) of a table, in the order of the keys."""
        for key, count in sorted(self.counts.items(), key=lambda item: tuple(map(str, item[0]))):
            if key[0] == name:
                yield key[1:], count

    def dump(self) -> str:
        """A line of JSON."""
        return (
            json.dumps([[[*key], count] for key, count in sorted(self.counts.items(), key=str)])
            + "\t"
            + json.dumps(self.samples, ensure_ascii=False, sort_keys=True)
        )


def load(lines: list[str]) -> tuple[Statistics, dict[str, list[dict[str, Any]]]]:
    """The sum of what `dump` wrote, one line a file; and the samples, of each file its own."""
    total, samples = Statistics(), {}
    for line in lines:
        counts, shown = line.split("\t")
        total.counts.update({tuple(key): count for key, count in json.loads(counts)})
        for reason, rows in json.loads(shown).items():
            samples.setdefault(reason, []).extend(rows)
    return total, samples
