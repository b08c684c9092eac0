"""Any release folder in M-BEIR's layout -> two TFDS data sets in ArrayRecord, without TensorFlow.

`mbeir_queries` has a split for each query file: "train" (the union of all training queries) and
every file of query/val and query/test under its stem. `mbeir_candidates` has a split for each
local pool and for the global training pool. The global pools of val and test are unions of local
ones by did, and are not stored again. Pictures are stored as the encoded bytes of their files;
qrels and instructions are read straight from the release.

    build(release, folder)                     writes folder/records; folder/release is the release
                                               (`check.py` looks a release over first)
    load_queries(folder, "train")[0]           a plain dict, see `QueryRecord`
    load_candidates(folder, "mbeir_emoji_task7_cand_pool")[0]
    load_qrels(path), load_instructions(folder)
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.decode import DeserializeMethod
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from trace_jax.data.processor import decode_image
from trace_jax.data.schema import MARK

VERSION = "1.3.0"
QUERIES, CANDIDATES = "mbeir_queries", "mbeir_candidates"
TRAIN_POOL = "mbeir_union_train_cand_pool"
"""The split of the candidates that holds the positives of all training queries."""

MODALITIES = {"text": "text", "image": "image", "image,text": "image,text", "text,image": "image,text"}
SIDES = {"t": "text", "i": "image", "it": "image,text"}
"""A side of a task's name -> its modality."""
QIDS, DIDS = 500_000, 10_000_000
"""M-BEIR's integer of an id is its data set times one of these, plus its number."""

TRACES = "*_cot.jsonl"
"""The files of cot/train, cot/val and cot/test that are read."""

_ID = re.compile(r"\d+:\d+")
_TAILS = {b"\x89PNG": b"IEND\xaeB`\x82", b"\xff\xd8\xff": b"\xff\xd9"}


class ReleaseError(ValueError):
    """A release folder that cannot be built: the message names the file, the line and the mend."""


class EmptyError(ReleaseError):
    """A record without the text or the picture that its modality tells of."""


@dataclasses.dataclass(frozen=True)
class Drop:
    """A record that is left out of the records, because its fault was accepted."""

    file: str  # within the release
    line: int  # from 1
    id: str  # qid or did
    why: str


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


Picture = Callable[[str | None, str], bytes]
"""(path in the release or None, where it is named) -> the encoded file, b"" for None."""


def lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every line of a jsonl file, with a bar that counts its bytes."""
    bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.stem, leave=False, disable=None)
    with path.open("rb") as file, bar:
        for number, line in enumerate(file, 1):
            bar.update(len(line))
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
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

    def read(relative: str | None, where: str) -> bytes:
        if not relative:
            return b""
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


def _modality(record: dict[str, Any], name: str, txt: str, image: object, where: str) -> str:
    stated = _field(record, name, where)
    if stated not in MODALITIES:
        raise ReleaseError(f'{where}: {name} is {stated!r}; use "text", "image" or "image,text"')
    modality = MODALITIES[stated]
    if ("text" in modality and not txt) or ("image" in modality and not image):
        missing = "text" if not txt else "picture"
        raise EmptyError(f"{where}: {name} is {stated!r} but there is no {missing}; mend either")
    return modality


def _dids(record: dict[str, Any], name: str, where: str) -> list[str]:
    """Candidate ids, given as strings or as {"did": ...}; null counts as none."""
    found = []
    for item in record.get(name) or []:
        did = item.get("did") if isinstance(item, dict) else item
        if not isinstance(did, str) or not _ID.fullmatch(did):
            raise ReleaseError(f'{where}: {item!r} in {name} is no id like "7:341"')
        found.append(did)
    return found


def _id(record: dict[str, Any], name: str, where: str) -> str:
    """A qid or did: "<dataset_id>:<number>"."""
    found = _field(record, name, where)
    if not isinstance(found, str) or not _ID.fullmatch(found):
        raise ReleaseError(f'{where}: the {name} {found!r} is not of the form "<dataset_id>:<number>"')
    return found


def read_query(where: str, record: dict[str, Any], traces: dict[str, Trace], picture: Picture) -> QueryRecord:
    """One line of a query file. Raises ReleaseError."""
    qid, task = _id(record, "qid", where), _field(record, "task_id", where)
    if not isinstance(task, int) or not 0 <= task <= 8:
        raise ReleaseError(f"{where}: task_id is {task!r}; M-BEIR's tasks are 0 to 8")
    txt = record.get("query_txt") or ""
    paths = record.get("query_img_path") or []
    images = [picture(path, where) for path in (paths if isinstance(paths, list) else [paths])]
    if isinstance(paths, list) and txt.count(MARK) != len(paths):
        raise ReleaseError(f"{where}: {len(paths)} pictures, {txt.count(MARK)} times {MARK} in the text; mend it")
    trace = traces.get(qid, SIMPLE)
    return {
        "qid": qid,
        "query_txt": txt,
        "images": images,
        "modality": _modality(record, "query_modality", txt, images, where),
        "src_content": str(record.get("query_src_content") or ""),
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
    txt = record.get("txt") or ""
    image = picture(record.get("img_path"), where)
    return {
        "did": _id(record, "did", where),
        "txt": txt,
        "image": image,
        "modality": _modality(record, "modality", txt, image, where),
    }


def load_traces(release: Path, split: str) -> dict[str, Trace]:
    """Qid -> trace, from every file of cot/<split>; empty if the release has none."""
    traces: dict[str, Trace] = {}
    for path in sorted((release / "cot" / split).glob(TRACES)):
        traces.update(read_trace(where, record) for where, record in lines(path))
    return traces


def read_trace(where: str, record: dict[str, Any]) -> tuple[str, Trace]:
    """One line of a file of cot/: its qid and the trace. Raises ReleaseError."""
    return _id(record, "qid", where), {
        "complex": bool(_field(record, "complex", where)),
        "reasoning": record.get("reasoning") or "",
        "answer": record.get("answer") or "",
    }


def load_qrels(path: Path | str) -> dict[str, set[str]]:
    """Qid -> dids of its right answers, from a qrels file (qid 0 did relevance task)."""
    judged = load_judged(path)
    return {qid: right for qid, dids in judged.items() if (right := {did for did in dids if dids[did] > 0})}


def load_judged(path: Path | str) -> dict[str, dict[str, int]]:
    """Qid -> did -> relevance, of all that a qrels file judges: above 0 right, 0 wrong, -1 left out of the results."""
    found: dict[str, dict[str, int]] = {}
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            parts = line.split()
            ids = [part for part in (*parts[:1], *parts[2:3]) if _ID.fullmatch(part)]
            if len(parts) not in (4, 5) or len(ids) != 2 or not re.fullmatch(r"-?\d+", parts[3]):
                raise ReleaseError(f"{path}, line {number}: expected 5 columns: qid 0 did 1 task_id")
            found.setdefault(parts[0], {})[parts[2]] = int(parts[3])
    return found


def load_instructions(folder: Path | str) -> dict[tuple[int, str, str], list[str]]:
    """(dataset id, query modality, candidate modality) -> prompts, of folder/release."""
    return read_instructions(Path(folder) / "release")


def read_instructions(release: Path) -> dict[tuple[int, str, str], list[str]]:
    """(dataset id, query modality, candidate modality) -> prompts, of a release."""
    path = release / "instructions/query_instructions.tsv"
    if not path.exists():
        raise ReleaseError(f"no {path}: is this an M-BEIR release?")
    found: dict[tuple[int, str, str], list[str]] = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines()[1:], 2):
        cells = line.split("\t")
        if not any(cell.strip() for cell in cells[4:]) or not cells[3].strip().isdigit():
            raise ReleaseError(f"{path}, line {number}: expected 4 columns, then prompts, tab-separated")
        query, candidate = (MODALITIES.get(cell.strip(), cell.strip()) for cell in cells[:2])
        found[int(cells[3]), query, candidate] = [p.strip() for p in cells[4:] if p.strip()]
    return found


def hash_qid(qid: str) -> int:
    """M-BEIR's integer for a query id."""
    dataset, number = qid.split(":")
    return int(dataset) * QIDS + int(number)


def hash_did(did: str) -> int:
    """M-BEIR's integer for a candidate id."""
    dataset, number = did.split(":")
    return int(dataset) * DIDS + int(number)


# Writing ArrayRecord --------------------------------------------------------------------------


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


_Examples = Iterator[tuple[int, dict[str, Any]]]
_Index = dict[str, list[Any]]
_TEXT = tfds.features.Text
_BYTES = functools.partial(tfds.features.Tensor, shape=(), dtype=np.object_)
_QUERY_FEATURES = {
    "qid": _TEXT(),
    "query_txt": _TEXT(),
    "images": tfds.features.Sequence(_BYTES()),
    "modality": _TEXT(),
    "src_content": _TEXT(),
    "task_id": np.int64,
    "dataset_id": np.int64,
    "pos_dids": tfds.features.Sequence(_TEXT()),
    "neg_dids": tfds.features.Sequence(_TEXT()),
    "complex": np.bool_,
    "reasoning": _TEXT(),
    "answer": _TEXT(),
}
_CANDIDATE_FEATURES = {"did": _TEXT(), "txt": _TEXT(), "image": _BYTES(), "modality": _TEXT()}


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes one file of a release as the one split of a data set. `index` fills with its ids (and tasks) meanwhile."""

    VERSION = tfds.core.Version(VERSION)
    features: dict[str, Any]

    def __init__(
        self,
        split: str,
        path: Path,
        data_dir: Path,
        picture: Picture,
        traces: dict[str, Trace],
        *,
        left_out: frozenset[int] = frozenset(),  # lines
        gone: frozenset[str] = frozenset(),  # dids that queries name no longer
    ) -> None:
        self._split, self._path, self._picture, self._traces = split, path, picture, traces
        self._left_out, self._gone = left_out, gone
        self.index: _Index = {}
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="A release in M-BEIR's layout: " + self.name,
            features=tfds.features.FeaturesDict(self.features),
            disable_shuffling=True,  # records keep the order of their file
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, _Examples]:
        del dl_manager
        return {self._split: self._generate_examples()}

    def _lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Those that are kept."""
        return (line for number, line in enumerate(lines(self._path), 1) if number not in self._left_out)


class MbeirQueries(_Builder, skip_registration=True):
    """A query file, each query with its picture and, if it has one, its trace."""

    name = QUERIES
    features = _QUERY_FEATURES

    def _generate_examples(self) -> _Examples:
        self.index = {"keys": [], "tasks": []}
        for number, (where, record) in enumerate(self._lines()):
            query = read_query(where, record, self._traces, self._picture)
            query["pos_dids"] = [did for did in query["pos_dids"] if did not in self._gone]
            query["neg_dids"] = [did for did in query["neg_dids"] if did not in self._gone]
            self.index["keys"].append(query["qid"])
            self.index["tasks"].append(query["task_id"])
            yield number, dict(query)


class MbeirCandidates(_Builder, skip_registration=True):
    """A pool of candidates."""

    name = CANDIDATES
    features = _CANDIDATE_FEATURES

    def _generate_examples(self) -> _Examples:
        self.index = {"keys": []}
        for number, (where, record) in enumerate(self._lines()):
            candidate = read_candidate(where, record, self._picture)
            self.index["keys"].append(candidate["did"])
            yield number, dict(candidate)


def fingerprint(release: Path, dropped: Sequence[Drop] = ()) -> str:
    """A digest of what the records are made from: names, sizes and ends of all the text files, and what is left out."""
    digest = hashlib.sha256(VERSION.encode())
    for folder in ("query", "cand_pool", "cot"):
        for path in sorted((release / folder).glob("*/*.jsonl")):  # also in folders that are links
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, size - 65536))
                digest.update(f"{path.relative_to(release)} {size}".encode() + file.read())
    for drop in dropped:
        digest.update(f"{drop.file} {drop.line}".encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Part:
    """One file of a release that becomes one split; parts are made apart from each other."""

    split: str
    path: Path
    traces: str = ""  # of a query file: the folder of cot/ that its traces are in

    def index(self, records: Path) -> Path:
        """The file that says that the part is finished."""
        return records / (QUERIES if self.traces else CANDIDATES) / f"{self.split}.index.json"

    def write(self, release: Path, records: Path, images: str, dropped: Sequence[Drop] = ()) -> None:
        """Writes the split, then its index. `images` is where the pictures' paths start, local or gs://. `dropped` are
        left out; training queries no longer name those of their pool.
        """
        tfds.disable_progress_bar()
        picture = pictures(epath.Path(images))
        traces = load_traces(release, self.traces) if self.traces else {}
        kind = MbeirQueries if self.traces else MbeirCandidates
        folder = records / kind.name / self.split
        shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was stopped: TFDS would reuse it, with no index
        file, home = str(self.path.relative_to(release)), f"cand_pool/global/{TRAIN_POOL}.jsonl"
        left_out = frozenset(drop.line for drop in dropped if drop.file == file)
        gone = frozenset(drop.id for drop in dropped if drop.file == home and self.traces == "train")
        builder = kind(self.split, self.path, folder, picture, traces, left_out=left_out, gone=gone)
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of downloads that there are none
            builder.download_and_prepare()
        path = self.index(records)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(builder.index), "utf-8")
        beside.rename(path)


def parts_of(release: Path) -> list[Part]:
    """The parts of a release: its query files, then its pools."""
    queries = [Part(split, path, traces) for split, (path, traces) in query_files(release).items()]
    return queries + [Part(split, path) for split, path in pool_files(release).items()]


def _refuse_another(release: Path, place: Path) -> None:
    """Raises ReleaseError where a real folder, and no link, holds other qrels or prompts than those of the release."""
    if place.is_symlink() or not place.exists():
        return
    for name in ("qrels", "instructions"):
        if (place / name).resolve() != (release / name).resolve():
            raise ReleaseError(
                f"{place} holds {name} other than those of {release}, beside whose records they would be read: move"
                " that folder away, or give the data another name"
            )


def link_release(release: Path, folder: Path) -> None:
    """Makes folder/release a link to a release that lies elsewhere, whatever it linked to before."""
    link, beside = folder / "release", folder / "release.partial"
    if link.resolve() == release or (link.is_dir() and not link.is_symlink()):
        return
    beside.unlink(missing_ok=True)
    beside.symlink_to(release)
    beside.replace(link)


def one_by_one(write: Callable[[Part], None], parts: Sequence[Part]) -> None:
    """Writes the parts on this machine, one after another."""
    for part in tqdm(parts, desc="records", unit="file", leave=False, disable=None):
        write(part)


def build(
    release: Path | str,
    folder: Path | str,
    *,
    images: str = "",
    dropped: Sequence[Drop] = (),
    run: Callable[[Callable[[Part], None], Sequence[Part]], None] = one_by_one,
) -> bool:
    """Writes folder/records from a release, unless they are there; says whether it had to.

    The pictures are under `images`, local or gs://; without it, in the release. What is `dropped` is left out, and
    listed in records/dropped.jsonl. `run` writes the parts, here or on many machines that all see `folder`. Everything
    is written beside its place and renamed at the very end; a build that was stopped goes on with the parts that are
    not finished. Raises ReleaseError for a release that is not in M-BEIR's layout, with the file, the line and the
    mend, and where another release is in the place of its link.
    """
    release, folder = Path(release).resolve(), Path(folder)
    if not query_files(release) or not pool_files(release):
        raise ReleaseError(f"{release}: no query/ or cand_pool/local/ files; is this an M-BEIR release?")
    _refuse_another(release, folder / "release")
    folder.mkdir(parents=True, exist_ok=True)
    records, stamp = folder / "records", {"version": VERSION, "fingerprint": fingerprint(release, dropped)}
    if _read_json(records / "stamp.json") == stamp:
        link_release(release, folder)
        return False
    partial = folder / "records.partial"
    if _read_json(partial / "stamp.json") != stamp:
        shutil.rmtree(partial, ignore_errors=True)
        for kind in (QUERIES, CANDIDATES):
            (partial / kind).mkdir(parents=True)
        if dropped:
            listed = "".join(json.dumps(dataclasses.asdict(drop)) + "\n" for drop in dropped)
            (partial / "dropped.jsonl").write_text(listed, "utf-8")
        (partial / "stamp.json").write_text(json.dumps(stamp), "utf-8")
    left = [part for part in parts_of(release) if not part.index(partial).exists()]
    images = images or str(release)
    run(functools.partial(Part.write, release=release, records=partial, images=images, dropped=dropped), left)
    shutil.rmtree(records, ignore_errors=True)
    link_release(release, folder)  # while there are no records: those of one release never lie beside another
    partial.rename(records)
    return True


def _read_json(path: Path) -> Any:
    """The file's JSON; None where there is no such file, or none that is whole."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


# Reading ArrayRecord --------------------------------------------------------------------------

_parse = tf_example_pb2.Example.FromString  # pyright: ignore[reportAttributeAccessIssue]

_Record = TypeVar("_Record")


class Source(Generic[_Record]):
    """Random access to the records of a split, for `grain.MapDataset.source`; can be pickled."""

    def __init__(self, folder: Path, name: str, split: str, plain: Callable[[Any], _Record]) -> None:
        self._directory, self._name, self._split, self._plain = folder / "records" / name, name, split, plain
        if (_read_json(folder / "records/stamp.json") or {}).get("version") != VERSION:
            raise FileNotFoundError(
                f"{folder} holds no finished records of version {VERSION}: run launch/build_data.py or prepare_data.py"
            )
        known = sorted(path.name.removesuffix(".index.json") for path in self._directory.glob("*.json"))
        if split not in known:
            near = difflib.get_close_matches(split, known, 3, 0.4) or known
            raise ValueError(f"no split {split!r} in {self._directory}: did you mean {', '.join(near)}?")

    @functools.cached_property
    def _source(self) -> Any:
        builder: Any = tfds.builder_from_directory(str(self._directory / self._split / self._name / VERSION))
        # TFDS's own decoding of a record costs a third of a millisecond; parsing it here a tenth.
        return builder.as_data_source(split=self._split, deserialize_method=DeserializeMethod.RAW_BYTES)

    @functools.cached_property
    def _index(self) -> dict[str, list[Any]]:
        index = json.loads((self._directory / f"{self._split}.index.json").read_text("utf-8"))
        return dict(index)

    @property
    def keys(self) -> list[str]:
        """The qid or did of every record, in order, without reading the records."""
        return self._index["keys"]

    @property
    def tasks(self) -> list[int]:
        """The task id of every query, in order, without reading the records."""
        return self._index["tasks"]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> _Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self._name}/{self._split}")
        example = _parse(self._source[int(index)])
        return self._plain(example.features.feature)

    def __getitems__(self, indices: list[int]) -> list[_Record]:
        raw = self._source.__getitems__([int(index) for index in indices])
        return [self._plain(_parse(r).features.feature) for r in raw]

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_source", "_index")}

    def __repr__(self) -> str:
        return f"Source({self._name}/{self._split}, {len(self)} records)"


def _bytes(record: Any, name: str) -> bytes:
    return bytes(record[name].bytes_list.value[0])


def _text(record: Any, name: str) -> str:
    return _bytes(record, name).decode()


def _number(record: Any, name: str) -> int:
    return int(record[name].int64_list.value[0])


def _texts(record: Any, name: str) -> list[str]:
    return [value.decode() for value in record[name].bytes_list.value]


def _plain_query(record: Any) -> QueryRecord:
    return {
        "qid": _text(record, "qid"),
        "query_txt": _text(record, "query_txt"),
        "images": list(record["images"].bytes_list.value),
        "modality": _text(record, "modality"),
        "src_content": _text(record, "src_content"),
        "task_id": _number(record, "task_id"),
        "dataset_id": _number(record, "dataset_id"),
        "pos_dids": _texts(record, "pos_dids"),
        "neg_dids": _texts(record, "neg_dids"),
        "complex": bool(_number(record, "complex")),
        "reasoning": _text(record, "reasoning"),
        "answer": _text(record, "answer"),
    }


def _plain_candidate(record: Any) -> CandidateRecord:
    return {
        "did": _text(record, "did"),
        "txt": _text(record, "txt"),
        "image": _bytes(record, "image"),
        "modality": _text(record, "modality"),
    }


def load_queries(folder: Path | str, split: str) -> Source[QueryRecord]:
    """The queries of a split: "train", or a file's stem such as "mbeir_emoji_task7_test"."""
    return Source(Path(folder), QUERIES, split, _plain_query)


def load_candidates(folder: Path | str, pool: str) -> Source[CandidateRecord]:
    """The candidates of a pool: "train" (what training queries name), or a file's stem such as
    "mbeir_emoji_task7_cand_pool".
    """
    return Source(Path(folder), CANDIDATES, TRAIN_POOL if pool == "train" else pool, _plain_candidate)
