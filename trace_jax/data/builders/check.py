"""Looks a release in M-BEIR's layout over, before anything is built from it.

Three steps, each of which must be clean before the next: the files are there; every line is well formed and every id
stands once; every id and picture that is named exists, and every picture can be decoded. `check` reads all of it and
returns every problem that a step finds, so that one round of mending is enough. Pictures take nearly all the time: a
file's good ones are remembered by name and size, and not decoded again.

Faults that were looked at can be accepted: records without their text or picture are then left out, with the training
queries whose right answers are left out; wrong and double ids are counted only.
"""

import array
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from etils import epath
from tqdm import tqdm

from trace_jax.data.builders import layout, mbeir
from trace_jax.data.builders.layout import ReleaseError
from trace_jax.data.processor import decode_image
from trace_jax.data.schema import TASKS

# M-BEIR's data sets and tasks with their published counts (Table 1 of the UniIR paper): queries of train, val and test,
# and candidates. They are rounded there; "20K" stands for what rounds to it.
PUBLISHED = {
    ("visualnews", 0): ("99K", "20K", "20K", "542K"),
    ("mscoco", 0): ("100K", "24.8K", "24.8K", "5K"),
    ("fashion200k", 0): ("15K", "1.7K", "1.7K", "201K"),
    ("webqa", 1): ("16K", "1.7K", "2.4K", "544K"),
    ("edis", 2): ("26K", "3.2K", "3.2K", "1M"),
    ("webqa", 2): ("17K", "1.7K", "2.5K", "403K"),
    ("visualnews", 3): ("100K", "20K", "20K", "537K"),
    ("mscoco", 3): ("113K", "5K", "5K", "25K"),
    ("fashion200k", 3): ("15K", "4.8K", "4.8K", "61K"),
    ("nights", 4): ("16K", "2K", "2K", "40K"),
    ("oven", 6): ("150K", "50K", "50K", "676K"),
    ("infoseek", 6): ("141K", "11K", "11K", "611K"),
    ("fashioniq", 7): ("16K", "2K", "6K", "74K"),
    ("cirr", 7): ("26K", "2K", "4K", "21K"),
    ("oven", 8): ("157K", "14.7K", "14.7K", "335K"),
    ("infoseek", 8): ("143K", "17.6K", "17.6K", "481K"),
}
DROPPED = ("missing pictures", "undecodable", "empty")  # accepted, such records are left out
COUNTED = ("dangling ids", "duplicate ids")  # accepted, they are counted only
NOTES = ("blank", "elsewhere")  # a blank picture, a right answer that only another pool holds: counted, and no fault
COLUMNS = (*DROPPED, *COUNTED, "malformed", *NOTES)
SHOWN = 5  # problems of a kind that are written out for a file
WAITING = 4096  # pictures that are read or waited for at once

_KINDS = ("", *layout.SIDES.values())
"""Modalities by number, as in `_Read`: what is wanted of a training query's right answer, and "" where nothing is."""
_ASKED = {"train": ("union_train", "train"), "val": ("val",), "test": ("test",)}
"""Of a folder of cot/, the folders of query/ whose queries its traces are of."""

_Found = TypeVar("_Found")
_STEM = re.compile(r"mbeir_(\w+?)_task(\d)_(train|val|test)?_?(cand_pool|qrels)?")
_INSTRUCTIONS = "instructions/query_instructions.tsv"


@dataclasses.dataclass
class Row:
    """What was found in one file."""

    file: str  # within the release
    records: int = 0
    published: str = ""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)  # of COLUMNS
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: tuple[str, ...] = NOTES  # columns that are counted, and no fault

    @property
    def faults(self) -> int:
        """How much is wrong."""
        return sum(count for column, count in self.counts.items() if column not in self.notes)

    def add(self, column: str, message: str = "", times: int = 1) -> None:
        """Counts something; the first few of each kind are written out, unless it is a mere note."""
        self.counts[column] = self.counts.get(column, 0) + times
        if column not in self.notes and self.counts[column] <= SHOWN:
            self.problems.append(message)


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found in a release."""

    release: Path
    rows: list[Row]
    dropped: list[mbeir.Drop] = dataclasses.field(default_factory=list)  # records whose fault was accepted

    @property
    def problems(self) -> list[str]:
        """Each names its file, its record and the mend; at most five of a kind and file."""
        return [problem for row in self.rows for problem in row.problems]

    @property
    def table(self) -> str:
        """One line a file: records beside the published count, then how many of what went wrong."""
        width = max(len(row.file) for row in self.rows)
        lines = [f"{'file':{width}} {'records':>10} {'published':>10} " + " ".join(COLUMNS)]
        for row in self.rows:
            differs = "≠" if row.published and not agrees(row.records, row.published) else " "
            cells = " ".join(f"{row.counts.get(column, 0) or '·':>{len(column)}}" for column in COLUMNS)
            lines.append(f"{row.file:{width}} {row.records:>10,} {differs + row.published:>10} {cells}")
        return "\n".join(lines)

    def raise_for_problems(self) -> None:
        """Raises ReleaseError with all problems that are written out."""
        if faults := sum(row.faults for row in self.rows):
            raise ReleaseError(f"{faults} problems in {self.release}:\n" + "\n".join(self.problems))


def agrees(count: int, published: str) -> bool:
    """Whether a count rounds to a published one such as "24.8K" or "1M"."""
    digits, unit = published[:-1], {"K": 1_000, "M": 1_000_000}[published[-1]]
    step = unit / 10 ** len(digits.partition(".")[2])
    return abs(count - float(digits) * unit) <= step / 2


def check(
    release: Path, kept: Path, *, images: str = "", complete: bool = False, accepted: Sequence[str] = ()
) -> Report:
    """Looks a release over; `complete` also asks for all the files of M-BEIR, and compares with its published counts.

    `accepted` are columns that are no fault, among DROPPED and COUNTED. `images` is where the pictures' paths start,
    local or gs://; without it, the release. `kept` is the folder that remembers which pictures are good.
    """
    report = Report(release, [])
    _check_files(report, complete)
    if not report.problems:
        _Check(report, kept, epath.Path(images or release), complete, (*NOTES, *accepted)).run()
    return report


# The files ------------------------------------------------------------------------------------


def _check_files(report: Report, complete: bool) -> None:
    """Adds a row for each file that is missing, or that nothing would read."""
    release = report.release

    def fault(path: Path, message: str) -> None:
        row = Row(str(path.relative_to(release)))
        row.add("malformed", f"{path}: {message}")
        report.rows.append(row)

    def require(name: str, why: str) -> None:
        path = release / name
        if not path.exists() or not path.stat().st_size:
            fault(path, f"{'is empty' if path.exists() else 'is missing'}; {why}: fetch it again")

    require(_INSTRUCTIONS, "queries are asked with its prompts")
    if complete:
        for file in _published_files():
            require(file, "it is part of M-BEIR")
    elif not layout.query_files(release) or not layout.pool_files(release):
        require("query/test or query/union_train", "a release has queries, in .jsonl files")
        require("cand_pool/local", "a release has pools, in .jsonl files")
    for path, split in layout.query_files(release).values():
        named = layout.QUERY_FILE.fullmatch(path.stem)
        if split != "train" and (named is None or named["split"] != split):
            fault(path, f"is not read; rename it to mbeir_<data set>_task<number>_{split}.jsonl")
        elif complete:
            continue
        elif split == "train":
            require(f"cand_pool/global/{layout.TRAIN_POOL}.jsonl", f"the right answers of {path.name} are in it")
        else:
            qrels = f"qrels/{split}/{path.stem}_qrels.txt"
            if (release / qrels).exists() or not _hides_answers(path):
                require(qrels, f"the right answers of {path.name} are there")
            pool = layout.local_pool(release, path.stem)
            if not pool.exists():
                require(str(pool.relative_to(release)), f"{path.name} is searched in it")


def _hides_answers(path: Path) -> bool:
    """Whether a query file leaves its right answers to a server: its first query names none."""
    return not any(record.get("pos_cand_list") for _, record in itertools.islice(layout.lines(path), 1))


def _published_files() -> Iterator[str]:
    yield "query/union_train/mbeir_union_up_train.jsonl"
    yield f"cand_pool/global/{layout.TRAIN_POOL}.jsonl"
    yield from (f"query/train/mbeir_{dataset}_train.jsonl" for dataset in dict.fromkeys(d for d, _ in PUBLISHED))
    for dataset, task in PUBLISHED:
        stem = f"mbeir_{dataset}_task{task}"
        for split in ("val", "test"):
            yield f"query/{split}/{stem}_{split}.jsonl"
            yield f"qrels/{split}/{stem}_{split}_qrels.txt"
        middles = ("_val", "_test") if dataset == "mscoco" else ("",)
        yield from (f"cand_pool/local/{stem}{middle}_cand_pool.jsonl" for middle in middles)


def _published(path: Path) -> str:
    """The published count of a file of M-BEIR; "" where there is none."""
    match = _STEM.fullmatch(path.stem)
    if match is None or match[4] == "qrels" or (match[1], int(match[2])) not in PUBLISHED:
        return ""
    train, val, test, pool = PUBLISHED[match[1], int(match[2])]
    if match[4] == "cand_pool":
        return "" if match[3] == "val" else pool
    return {"train": train, "val": val, "test": test}[match[3]]


# The records ----------------------------------------------------------------------------------


@dataclasses.dataclass
class _Read:
    """What later steps need of a file that was read; ids are M-BEIR's integers, lines count from 1."""

    row: Row
    path: Path
    ids: np.ndarray  # [n] int64: dids of a pool, qids of a query file
    pictures: dict[str, int]  # path -> the line that names it first
    named: np.ndarray  # [m, 3] int64: (did, line, wanted) of every candidate that a query file names
    kinds: np.ndarray  # [n] int8: of each candidate of a pool, the place of its modality among _KINDS


class _Check:
    def __init__(self, report: Report, kept: Path, images: epath.Path, complete: bool, notes: tuple[str, ...]) -> None:
        self.report, self.kept, self.images, self.complete, self.notes = report, kept, images, complete, notes
        self.release = report.release
        self.prompts: dict[tuple[int, str, str], list[str]] = {}
        self.home = self.release / f"cand_pool/global/{layout.TRAIN_POOL}.jsonl"  # of what training queries name

    def run(self) -> None:
        row = self._row(self.release / _INSTRUCTIONS)
        try:
            self.prompts = layout.load_instructions(self.release)
        except ReleaseError as error:
            row.add("malformed", str(error))
            return
        row.records = len(self.prompts)
        pools = {path: self._read(path) for path in layout.pool_files(self.release).values()}
        queries = {path: self._read(path, split) for path, split in layout.query_files(self.release).values()}
        queries |= {path: self._read(path, "train") for path in sorted((self.release / "query/train").glob("*.jsonl"))}
        traces = self._read_traces()
        if self.report.problems:
            return
        self._check_references(pools, queries)
        self._check_traces(traces, queries)
        for read in (*pools.values(), *queries.values()):
            self._check_pictures(read)
        self._drop_unanswered()

    def _drop(self, read: Path, line: int, record: dict[str, Any], why: str) -> None:
        file = str(read.relative_to(self.release))
        self.report.dropped.append(mbeir.Drop(file, line, record.get("qid") or record["did"], why))

    def _row(self, path: Path) -> Row:
        published = _published(path) if self.complete else ""
        row = Row(str(path.relative_to(self.release)), published=published, notes=self.notes)
        self.report.rows.append(row)
        return row

    def _read(self, path: Path, split: str = "") -> _Read:
        """Reads a pool, or the query file of a split."""
        row, pictures, seen = self._row(path), {}, {}
        ids, named, kinds = array.array("q"), array.array("q"), array.array("b")  # a file may name millions
        at = 0

        def note(relative: str, _: str) -> bytes:
            pictures.setdefault(relative, at)
            return b""

        def take(where: str, record: dict[str, Any]) -> str:
            if not split:
                candidate = layout.read_candidate(where, record, note)
                ids.append(layout.hash_did(candidate["did"]))
                kinds.append(_KINDS.index(candidate["modality"]))
                return candidate["did"]
            query = layout.read_query(where, record, {}, note)
            target = self._check_query(where, query, path, split)
            ids.append(layout.hash_qid(query["qid"]))
            for wanted, dids in ((target if split == "train" else "", query["pos_dids"]), ("", query["neg_dids"])):
                for did in dids:
                    named.extend((layout.hash_did(did), at, _KINDS.index(wanted)))
            return query["qid"]

        try:
            for at, (where, record) in enumerate(layout.lines(path), start=1):
                row.records += 1
                try:
                    shown = take(where, record)
                except layout.EmptyError as error:
                    row.add("empty", str(error))
                    # Left out or not, what names it is right to do so.
                    ids.append(layout.hash_qid(record["qid"]) if split else layout.hash_did(record["did"]))
                    kinds.append(0)
                    if "empty" in self.notes:
                        self._drop(path, at, record, "has no text or no picture")
                    continue
                except ReleaseError as error:
                    row.add("malformed", str(error))
                    continue
                first = seen.setdefault(ids[-1], at)
                if first != at and split != "train":  # the union of training repeats the queries of small data sets
                    row.add("duplicate ids", f"{where}: {shown} stands in line {first} already; remove one of them")
        except ReleaseError as error:  # nothing can be said of what follows a line that is no JSON
            row.add("malformed", str(error))
        if not row.records and not row.problems:
            row.add("malformed", f"{path}: holds no records; fetch it again")
        triples = np.array(named, np.int64).reshape(-1, 3)
        return _Read(row, path, np.array(ids, np.int64), pictures, triples, np.array(kinds, np.int8))

    def _check_query(self, where: str, query: layout.QueryRecord, path: Path, split: str) -> str:
        """What a query file's name and the instructions say of each of its queries; returns what its task asks for."""
        match, task = _STEM.fullmatch(path.stem), query["task_id"]
        if match and int(match[2]) != task:
            raise ReleaseError(f"{where}: task_id is {task}, in a file of task {match[2]}; move the query or mend it")
        if task not in TASKS:
            raise ReleaseError(f"{where}: task_id is {task}, which no data set of M-BEIR has; mend it")
        source, target = (layout.SIDES[side] for side in TASKS[task].split("2"))
        if query["modality"] != source:
            raise ReleaseError(
                f"{where}: query_modality is {query['modality']!r}, but task {task} asks with {source!r}"
            )
        if (query["dataset_id"], source, target) not in self.prompts:
            raise ReleaseError(
                f"{where}: no prompt for data set {query['dataset_id']}, {source} to {target}; add it to"
                f" {_INSTRUCTIONS}"
            )
        if split == "train" and not query["pos_dids"]:
            raise ReleaseError(f"{where}: pos_cand_list is empty; a training query needs a right answer")
        return target

    def _read_traces(self) -> list[_Read]:
        """Reads the files of cot/; each qid stands once in a split."""
        found: list[_Read] = []
        seen: dict[tuple[str, str], str] = {}
        for path in sorted([*(self.release / "cot").glob("*.jsonl"), *(self.release / "cot").glob("*/*.jsonl")]):
            row, qids, split = self._row(path), array.array("q"), path.parent.name
            if split not in _ASKED or not path.match(layout.TRACES):
                expected = f"cot/{{train,val,test}}/{layout.TRACES}"
                row.add("malformed", f"{path}: is not read; traces are in {expected}: rename it")
                continue
            try:
                for where, record in layout.lines(path):
                    row.records += 1
                    try:
                        qid, _ = layout.read_trace(where, record)
                    except ReleaseError as error:
                        row.add("malformed", str(error))
                        continue
                    qids.append(layout.hash_qid(qid))
                    if (first := seen.setdefault((split, qid), where)) != where:
                        row.add("duplicate ids", f"{where}: {qid} has a trace already, in {first}; remove one of them")
            except ReleaseError as error:
                row.add("malformed", str(error))
            found.append(
                _Read(row, path, np.array(qids, np.int64), {}, np.zeros((0, 3), np.int64), np.zeros(0, np.int8))
            )
        return found

    # References and pictures ------------------------------------------------------------------

    def _check_references(self, pools: dict[Path, _Read], queries: dict[Path, _Read]) -> None:
        everything = np.unique(np.concatenate([read.ids for read in pools.values()]))
        anywhere = set(everything.tolist())
        for path, read in queries.items():
            trains = path.parent.name in ("train", "union_train")
            known = np.unique(pools[self.home].ids) if trains and self.home in pools else everything
            for did, line, _ in read.named[~np.isin(read.named[:, 0], known)]:
                where = f"in {self.home.name}" if trains else "in any pool"
                shown = layout.did_of(int(did))
                read.row.add("dangling ids", f"{path}, line {line}: the candidate {shown} is not {where}; add it there")
            if trains and self.home in pools:
                self._check_answers(read, pools[self.home])
            pool = layout.local_pool(self.release, path.stem)
            if not trains and pool in pools:
                self._check_qrels(path, read, pools[pool].ids, anywhere)

    def _check_answers(self, read: _Read, home: _Read) -> None:
        """A training query is asked with the prompt of its task, so that its right answers are what that asks for."""
        ids, first = np.unique(home.ids, return_index=True)
        asked = read.named[(read.named[:, 2] > 0) & np.isin(read.named[:, 0], ids)]
        kinds = home.kinds[first[np.searchsorted(ids, asked[:, 0])]]
        for (did, line, wanted), kind in zip(asked, kinds, strict=True):
            if kind not in (0, wanted):
                read.row.add(
                    "malformed",
                    f"{read.path}, line {line}: the right answer {layout.did_of(int(did))} is {_KINDS[kind]!r}, and the"
                    f" task asks for {_KINDS[wanted]!r}; mend either",
                )

    def _check_traces(self, traces: list[_Read], queries: dict[Path, _Read]) -> None:
        for split, folders in _ASKED.items():
            own = [read for read in traces if read.path.parent.name == split]
            asked = [read.ids for path, read in queries.items() if path.parent.name in folders]
            known, joined = np.unique(np.concatenate([*asked, np.zeros(0, np.int64)])), 0
            for read in own:
                lost = ~np.isin(read.ids, known)
                joined += int((~lost).sum())
                for at in np.flatnonzero(lost):
                    qid = layout.qid_of(int(read.ids[at]))
                    where = f"{read.path}, line {at + 1}"
                    read.row.add("dangling ids", f"{where}: the query {qid} is not in query/{split}; is it of another?")
            if any(len(read.ids) for read in own) and not joined:
                folder = self.release / "cot" / split
                own[0].row.add(
                    "malformed", f"{folder}: none of its traces is of a query of this release; fetch its own"
                )

    def _check_qrels(self, path: Path, read: _Read, local: np.ndarray, anywhere: set[int]) -> None:
        qrels = self.release / "qrels" / path.parent.name / f"{path.stem}_qrels.txt"
        if not qrels.exists():
            if len(read.named):
                message = f"{path}, line {read.named[0, 1]}: names candidates, but there is no {qrels}; fetch it again"
                read.row.add("malformed", message)
            return
        row = self._row(qrels)
        try:
            found = layout.load_judged(qrels)
        except ReleaseError as error:
            row.add("malformed", str(error))
            return
        row.records = sum(map(len, found.values()))
        asked, here = set(read.ids.tolist()), set(local.tolist())
        for qid, dids in found.items():
            if layout.hash_qid(qid) not in asked:
                row.add("dangling ids", f"{qrels}: the query {qid} is not in {path}; fetch both again")
            for did in sorted(dids):
                number = layout.hash_did(did)
                if number not in anywhere:
                    row.add("dangling ids", f"{qrels}: {did}, judged for {qid}, is in no pool; add it to its pool")
                elif number not in here:
                    row.add("elsewhere")
        answered = {layout.hash_qid(qid) for qid, dids in found.items() if max(dids.values()) > 0}
        for number in sorted(asked - answered):
            qid = layout.qid_of(number)
            row.add("dangling ids", f"{qrels}: no right answer for the query {qid} of {path.name}; add one")

    def _check_pictures(self, read: _Read) -> None:
        """Decodes every picture that a file names, once. Those that are good are remembered with their sizes."""
        named = list(read.pictures)
        sizes = self._each(self._size, named, "sizes of", read.path)
        listed = [str(self.images), *(f"{name} {size}" for name, size in zip(named, sizes, strict=True))]
        digest = hashlib.sha256("\n".join(listed).encode()).hexdigest()
        note = self.kept / f"{read.row.file.replace('/', '.')}.json"
        before = json.loads(note.read_text("utf-8")) if note.exists() else {}
        known = before.get("digest") == digest
        looked_at = before["bad"] if known else named
        if known and before["blank"]:
            read.row.add("blank", times=before["blank"])
        bad: dict[str, str] = {}
        verdicts = self._each(self._verdict, looked_at, "pictures of", read.path)
        for relative, (column, why) in zip(looked_at, verdicts, strict=True):
            if column:
                where = f"{read.path}, line {read.pictures[relative]}"
                read.row.add(column, f"{where}: the picture {relative!r} {why}; unpack it again")
            if column in DROPPED:
                bad[relative] = f"the picture {relative!r} {why}"
        blank = read.row.counts.get("blank", 0)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"digest": digest, "blank": blank, "bad": list(bad)}), "utf-8")
        if bad:
            self._drop_shown(read, bad)

    def _each(self, look: Callable[[str], _Found], names: Sequence[str], what: str, path: Path) -> list[_Found]:
        """What `look` finds of each picture, in threads."""
        found: list[_Found] = []
        bar = tqdm(total=len(names), unit="picture", desc=f"{what} {path.stem}", leave=False, disable=None)
        with ThreadPoolExecutor() as pool, bar:
            for first in range(0, len(names), WAITING):
                found += pool.map(look, names[first : first + WAITING])
                bar.update(len(found) - first)
        return found

    def _size(self, relative: str) -> int:
        """Bytes; -1 for none."""
        try:
            return (self.images / relative).stat().length
        except OSError:
            return -1

    def _drop_shown(self, read: _Read, bad: dict[str, str]) -> None:
        """Leaves out all that show a bad picture; where that is still a fault, nothing is built at all."""
        before = {drop.line for drop in self.report.dropped if drop.file == read.row.file}
        for at, (_, record) in enumerate(layout.lines(read.path), start=1):
            paths = record.get("query_img_path") or record.get("img_path") or []
            shown = [path for path in (paths if isinstance(paths, list) else [paths]) if path in bad]
            if shown and at not in before:
                self._drop(read.path, at, record, bad[shown[0]])

    def _drop_unanswered(self) -> None:
        """Leaves out the training queries all of whose right answers are left out."""
        gone = {drop.id for drop in self.report.dropped if self.release / drop.file == self.home}
        path = self.release / "query/union_train/mbeir_union_up_train.jsonl"
        if not gone or not path.exists():
            return
        before = {drop.line for drop in self.report.dropped if self.release / drop.file == path}
        for at, (where, record) in enumerate(layout.lines(path), start=1):
            if at not in before:
                query = layout.read_query(where, record, {}, lambda *_: b"")
                if gone.issuperset(query["pos_dids"]):
                    self._drop(path, at, record, "its right answers are left out")

    def _verdict(self, relative: str) -> tuple[str, str]:
        """("", "") for a good picture, else its column of the table and what to say of it."""
        try:
            pixels = decode_image((self.images / relative).read_bytes(), "")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return "missing pictures", f"is not under {self.images}"
        except ValueError as error:
            return "undecodable", f"cannot be decoded ({str(error).removeprefix(': ')})"
        return ("blank", "is blank") if (pixels == pixels[0, 0]).all() else ("", "")
