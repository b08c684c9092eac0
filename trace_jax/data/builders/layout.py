"""M-BEIR's layout: the files of a release folder, and how their lines are read.

    query/union_train, query/{val,test}        queries; also query/train, which cot/ reads
    cand_pool/local, cand_pool/global          candidates
    qrels/{val,test}                           right answers
    instructions/query_instructions.tsv        prompts
    cot/{train,val,test}                       traces; not of M-BEIR, but joined to it by qid

Whatever is not in this layout raises ReleaseError, which names the file, the line and the mend.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

from etils import epath
from tqdm import tqdm

from trace_jax.data.processor import decode_image
from trace_jax.data.schema import MARK

TRAIN_POOL = "mbeir_union_train_cand_pool"
"""The file of cand_pool/global that holds the positives of all training queries."""
MODALITIES = {"text": "text", "image": "image", "image,text": "image,text", "text,image": "image,text"}
SIDES = {"t": "text", "i": "image", "it": "image,text"}
"""A side of a task's name -> its modality."""
_QIDS, _DIDS = 500_000, 10_000_000
"""M-BEIR's integer of an id is its data set times one of these, plus its number, which is below it. It has 31 bits."""

QUERY_FILE = re.compile(r"mbeir_(?P<dataset>\w+)_task(?P<task>\d)_(?P<split>val|test)")
"""The stems of the files of query/val and query/test."""
TRACES = "*_cot.jsonl"
"""The files of cot/train, cot/val and cot/test that are read."""

_ID = re.compile(r"(0|[1-9][0-9]*):(0|[1-9][0-9]*)")
_TAILS = {b"\x89PNG": b"IEND\xaeB`\x82", b"\xff\xd8\xff": b"\xff\xd9"}


class ReleaseError(ValueError):
    """A release folder that cannot be built: the message names the file, the line and the mend."""


class EmptyError(ReleaseError):
    """A record without the text or the picture that its modality tells of."""


class QueryRecord(TypedDict):
    """One query. `images` are encoded files: none, one, or as many as `query_txt` ("" if none) marks. `complex` says
    that a trace (`reasoning`, then `answer`) belongs to it. `src_content` is what its data set kept of it.
    """

    qid: str
    query_txt: str
    images: list[bytes]
    modality: str
    src_content: str
    task_id: int
    dataset_id: int
    pos_dids: list[str]
    neg_dids: list[str]
    complex: bool
    reasoning: str
    answer: str


class CandidateRecord(TypedDict):
    """One candidate: text, encoded picture or both (the missing one empty)."""

    did: str
    txt: str
    image: bytes
    modality: str


class Trace(TypedDict):
    """A line of cot/: empty strings where the query is simple."""

    complex: bool
    reasoning: str
    answer: str


SIMPLE: Trace = {"complex": False, "reasoning": "", "answer": ""}
"""That of a query which has no line in cot/."""


# Reading the release --------------------------------------------------------------------------


Picture = Callable[[str, str], bytes]
"""(path in the release, where it is named) -> the encoded file."""


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every line of a jsonl file, with a bar that counts its bytes."""
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.stem, leave=False, disable=None)
    with path.open("rb") as file, bar:
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
                if rb"\ud" in line or rb"\uD" in line:  # half of a surrogate pair is valid JSON, and no text
                    json.dumps(record, ensure_ascii=False).encode()
            except ValueError as error:
                raise ReleaseError(
                    f"{where}: not valid JSON ({error}); the file may be cut short: fetch it again"
                ) from error
            if not isinstance(record, dict):
                raise ReleaseError(f"{where}: expected a JSON object, found {type(record).__name__}")
            yield where, record


def _field(record: dict[str, Any], name: str, where: str) -> Any:
    if name not in record:
        raise ReleaseError(f"{where}: the field {name!r} is missing; add it as M-BEIR's card tells")
    return record[name]


def pictures(folder: Path | epath.Path) -> Picture:
    """Reads the pictures of a release, local or gs://; each must be there and whole: it ends as its format does, or can
    be decoded all the same.
    """

    def read(relative: str, where: str) -> bytes:
        try:
            data = (folder / relative).read_bytes()
        except OSError as error:
            raise ReleaseError(f"{where}: no picture {relative!r} under {folder}; unpack mbeir_images there") from error
        for head, tail in _TAILS.items():
            if data.startswith(head) and tail not in data[-64:]:
                try:
                    decode_image(data, "")
                except ValueError as error:
                    message = f"{where}: the picture {relative!r} is cut short; unpack it again"
                    raise ReleaseError(message) from error
        if len(data) < 16:
            raise ReleaseError(f"{where}: the picture {relative!r} is empty; unpack it again")
        return data

    return read


def _text(record: dict[str, Any], name: str, where: str) -> str:
    """A text, or "" for null and for none."""
    found = record.get(name)
    if found is not None and not isinstance(found, str):
        raise ReleaseError(f"{where}: {name} is {found!r}; it is a text or null")
    return found or ""


def _modality(record: dict[str, Any], name: str, txt: str, shown: str | list[str], where: str) -> str:
    stated = _field(record, name, where)
    if not isinstance(stated, str) or stated not in MODALITIES:
        raise ReleaseError(f'{where}: {name} is {stated!r}; use "text", "image" or "image,text"')
    modality = MODALITIES[stated]
    if ("text" in modality and not txt.strip()) or ("image" in modality and not shown):
        missing = "picture" if "image" in modality and not shown else "text"
        raise EmptyError(f"{where}: {name} is {stated!r} but there is no {missing}; mend either")
    return modality


def _dids(record: dict[str, Any], name: str, where: str) -> list[str]:
    """Candidate ids, given as strings or as {"did": ...}; null counts as none."""
    given = record.get(name) or []
    if not isinstance(given, list):
        raise ReleaseError(f"{where}: {name} is {given!r}; it is a list of ids")
    found = []
    for item in given:
        did = item["did"] if isinstance(item, dict) and "did" in item else item
        if not _is_id(did, _DIDS):
            raise ReleaseError(f'{where}: {item!r} in {name} is no id like "7:341"')
        found.append(did)
    return found


def _is_id(found: object, numbers: int) -> bool:
    """Whether something is "<data set>:<number>", both of which its integer has room for."""
    parts = _ID.fullmatch(found) if isinstance(found, str) else None
    return parts is not None and int(parts[1]) < 2**31 // _DIDS and int(parts[2]) < numbers


def _id(record: dict[str, Any], name: Literal["qid", "did"], where: str) -> str:
    found, numbers = _field(record, name, where), {"qid": _QIDS, "did": _DIDS}[name]
    if not _is_id(found, numbers):
        raise ReleaseError(
            f'{where}: the {name} {found!r} is not of the form "<dataset_id>:<number>",'
            f" these below {2**31 // _DIDS} and {numbers:,}"
        )
    return found


def read_query(where: str, record: dict[str, Any], traces: dict[str, Trace], picture: Picture) -> QueryRecord:
    """One line of a query file. Raises ReleaseError."""
    qid, task = _id(record, "qid", where), _field(record, "task_id", where)
    if type(task) is not int or not 0 <= task <= 8:
        raise ReleaseError(f"{where}: task_id is {task!r}; M-BEIR's tasks are 0 to 8")
    txt, shown = _text(record, "query_txt", where), record.get("query_img_path") or []
    paths = shown if isinstance(shown, list) else [shown]
    if not all(path and isinstance(path, str) for path in paths):
        raise ReleaseError(f"{where}: query_img_path is {shown!r}; it is a path, a list of paths or null")
    if txt.count(MARK) not in ((len(paths),) if isinstance(shown, list) else (0, len(paths))):
        raise ReleaseError(f"{where}: {len(paths)} pictures, {txt.count(MARK)} times {MARK} in the text; mend it")
    trace, content = traces.get(qid, SIMPLE), record.get("query_src_content") or ""
    return {
        "qid": qid,
        "query_txt": txt,
        "images": [picture(path, where) for path in paths],
        "modality": _modality(record, "query_modality", txt, paths, where),
        "src_content": content if isinstance(content, str) else json.dumps(content),
        "task_id": task,
        "dataset_id": int(qid.split(":")[0]),
        "pos_dids": _dids(record, "pos_cand_list", where),
        "neg_dids": _dids(record, "neg_cand_list", where),
        "complex": trace["complex"],
        "reasoning": trace["reasoning"],
        "answer": trace["answer"],
    }


def read_candidate(where: str, record: dict[str, Any], picture: Picture) -> CandidateRecord:
    """One line of a pool. Raises ReleaseError."""
    txt, path = _text(record, "txt", where), _text(record, "img_path", where)
    return {
        "did": _id(record, "did", where),
        "txt": txt,
        "image": picture(path, where) if path else b"",
        "modality": _modality(record, "modality", txt, path, where),
    }


def load_traces(release: Path, split: str) -> dict[str, Trace]:
    """Qid -> trace, from every file of cot/<split>; empty if the release has none."""
    traces: dict[str, Trace] = {}
    for path in sorted((release / "cot" / split).glob(TRACES)):
        traces.update(read_trace(where, record) for where, record in lines(path))
    return traces


def read_trace(where: str, record: dict[str, Any]) -> tuple[str, Trace]:
    """One line of a file of cot/: its qid and the trace. Raises ReleaseError."""
    qid, reasons = _id(record, "qid", where), _field(record, "complex", where)
    reasoning, answer = _text(record, "reasoning", where), _text(record, "answer", where)
    if not isinstance(reasons, bool) or reasons != bool(reasoning or answer):
        raise ReleaseError(
            f"{where}: complex is {reasons!r}, reasoning {reasoning!r} and answer {answer!r}; it is true with a trace"
            " and false without one"
        )
    return qid, {"complex": reasons, "reasoning": reasoning, "answer": answer}


def load_qrels(path: Path | str) -> dict[str, set[str]]:
    """Qid -> dids of its right answers, from a qrels file (qid 0 did relevance task)."""
    judged = load_judged(path)
    return {qid: right for qid, dids in judged.items() if (right := {did for did in dids if dids[did] > 0})}


def load_judged(path: Path | str) -> dict[str, dict[str, int]]:
    """Qid -> did -> relevance, of all that a qrels file judges: above 0 right, 0 wrong, -1 left out of the results."""
    found: dict[str, dict[str, int]] = {}
    with Path(path).open(encoding="utf-8", errors="replace") as file:  # a byte that is no text is no id either
        for number, line in enumerate(file, 1):
            parts = line.split()
            ids = [part for part in (*parts[:1], *parts[2:3]) if _ID.fullmatch(part)]
            if len(parts) not in (4, 5) or len(ids) != 2 or not re.fullmatch(r"-?\d+", parts[3]):
                raise ReleaseError(f"{path}, line {number}: expected 5 columns: qid 0 did 1 task_id")
            found.setdefault(parts[0], {})[parts[2]] = int(parts[3])
    return found


def load_instructions(release: Path) -> dict[tuple[int, str, str], list[str]]:
    """(dataset id, query modality, candidate modality) -> prompts, of a release."""
    path = release / "instructions/query_instructions.tsv"
    if not path.exists():
        raise ReleaseError(f"no {path}: is this an M-BEIR release?")
    found: dict[tuple[int, str, str], list[str]] = {}
    for number, line in enumerate(path.read_bytes().splitlines()[1:], 2):
        try:
            cells = line.decode().split("\t")
        except UnicodeDecodeError as error:
            raise ReleaseError(f"{path}, line {number}: not UTF-8 ({error}); fetch it again") from error
        if not any(cell.strip() for cell in cells[4:]) or not cells[3].strip().isdigit():
            raise ReleaseError(f"{path}, line {number}: expected 4 columns, then prompts, tab-separated")
        query, candidate = (MODALITIES.get(cell.strip(), cell.strip()) for cell in cells[:2])
        found[int(cells[3]), query, candidate] = [p.strip() for p in cells[4:] if p.strip()]
    return found


def hash_qid(qid: str) -> int:
    """M-BEIR's integer for a query id; `qid_of` is its inverse."""
    dataset, number = qid.split(":")
    return int(dataset) * _QIDS + int(number)


def qid_of(number: int) -> str:
    """The query id of M-BEIR's integer."""
    return f"{number // _QIDS}:{number % _QIDS}"


def hash_did(did: str) -> int:
    """M-BEIR's integer for a candidate id; `did_of` is its inverse."""
    dataset, number = did.split(":")
    return int(dataset) * _DIDS + int(number)


def did_of(number: int) -> str:
    """The candidate id of M-BEIR's integer."""
    return f"{number // _DIDS}:{number % _DIDS}"


def split_name(stem: str) -> str:
    """A file's stem as a split name that TFDS accepts."""
    return re.sub(r"\W", "_", stem)


def query_files(release: Path) -> dict[str, tuple[Path, str]]:
    """Split name -> (query file, the split that its traces are under)."""
    union = release / "query/union_train/mbeir_union_up_train.jsonl"
    found = {"train": (union, "train")} if union.exists() else {}
    for split in ("val", "test"):
        for path in sorted((release / "query" / split).glob("*.jsonl")):
            found[split_name(path.stem)] = (path, split)
    return found


def pool_files(release: Path) -> dict[str, Path]:
    """Split name -> candidate file: every local pool, and the global pool of training."""
    paths = sorted((release / "cand_pool/local").glob("*.jsonl"))
    if (union := release / f"cand_pool/global/{TRAIN_POOL}.jsonl").exists():
        paths.append(union)
    return {split_name(path.stem): path for path in paths}


def local_pool(release: Path, stem: str) -> Path:
    """The local pool of a query file of validation or test: one of its own split (MSCOCO has such) or one for all."""
    folder = release / "cand_pool/local"
    own = folder / f"{stem}_cand_pool.jsonl"
    return own if own.exists() else folder / f"{stem.rpartition('_')[0]}_cand_pool.jsonl"
