"""Row: one query on its way through the stages, as a line of JSON between them."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

REASONS = (
    "unanswered",  # no attempt got an answer
    "rejected",  # the server refused the request for good
    "assessment",  # the assessment cannot be read
    "refusal",
    "format",
    "leakage",
    "reasoning_length",
    "answer_length",
    "repetition",
    "language",
    "unchanged",
    "keyword",
    "duplicate",
    "verdict",  # the verdict cannot be read
    "inconsistent",
    "confidence",
)
"""Why a row is dropped: the first of these that applies."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A query, its target, and all that the stages found out. Texts are "" where there is none, paths are relative
    to the release. `dropped` is one of `REASONS`, "" for a row that is kept; `detail` says more.
    """

    qid: str
    dataset: str
    split: str
    task: int
    instruction: str
    text: str
    image: str
    source_caption: str  # text that the pools hold for the query's picture
    target: str  # did of the first right answer
    target_text: str
    target_image: str
    target_caption: str  # text that the pools hold for the target's picture
    decoy: str = ""  # did of another query's target, where the row is a control of the verifier
    decoy_text: str = ""
    decoy_image: str = ""
    complex: bool = False
    assessed: bool | None = None  # the teacher's opinion; None where it was not asked or cannot be read
    assessment: str = ""  # its reason
    gold: bool = False  # the teacher was shown the target: the trace may leak it
    raw: str = ""  # what the teacher wrote
    reasoning: str = ""
    answer: str = ""
    consistent: bool | None = None
    confidence: float | None = None
    verdict: str = ""  # the verifier's reason
    decoy_consistent: bool | None = None
    decoy_confidence: float | None = None
    teacher: str = ""
    verifier: str = ""
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)  # stage -> hash of the prompt that was used
    dropped: str = ""
    detail: str = ""

    @property
    def stem(self) -> str:
        """Names the file of the query's data set, task and split, as M-BEIR does."""
        return f"mbeir_{self.dataset}_task{self.task}_{self.split}"

    @property
    def order(self) -> tuple[int, int]:
        """Sorts rows by the numbers of their qid."""
        return order(self.qid)

    def drop(self, reason: str, detail: str = "") -> "Row":
        """The row, dropped. Raises ValueError for a reason that is not known."""
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is no reason to drop a row")
        return dataclasses.replace(self, dropped=reason, detail=detail)


def order(qid: str) -> tuple[int, int]:
    """(data set, number) of a qid."""
    dataset, number = qid.split(":")
    return int(dataset), int(number)


def chosen(qid: str, salt: str, share: float) -> bool:
    """Whether a query is among a `share` of all, by hash: the same on every machine and in every order."""
    digest = hashlib.sha256(f"{salt} {qid}".encode()).digest()
    return int.from_bytes(digest[:8]) < share * 2**64


def dump(row: Row) -> str:
    """A line of JSON, without its end."""
    return json.dumps(vars(row), ensure_ascii=False)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a part."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Row(**json.loads(line))


def write_lines(path: Path, lines: Iterable[str]) -> int:
    """Writes a file beside its place and renames it, so that it is whole or absent; returns the number of lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    count = 0
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        for line in lines:
            file.write(line + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())  # else a machine that loses its power could leave the name without the lines
    partial.replace(path)
    return count
