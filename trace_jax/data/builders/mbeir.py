"""Any release folder in M-BEIR's layout -> two TFDS data sets in ArrayRecord, without TensorFlow.

`mbeir_queries` has a split for each query file: "train" (the union of all training queries) and
every file of query/val and query/test under its stem. `mbeir_candidates` has a split for each
local pool and for the global training pool. The global pools of val and test are unions of local
ones by did, and are not stored again. Pictures are stored as the encoded bytes of their files;
qrels and instructions are read straight from the release.

    build(release, folder)                     writes folder/records; folder/release is the release
                                               (`layout.py` reads it, `check.py` looks it over first)
    load_queries(folder, "train")[0]           a plain dict, see `QueryRecord`
    load_candidates(folder, "mbeir_emoji_task7_cand_pool")[0]
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.decode import DeserializeMethod
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from trace_jax.data.builders.layout import (
    TRAIN_POOL,
    CandidateRecord,
    Picture,
    QueryRecord,
    ReleaseError,
    Trace,
    lines,
    load_traces,
    pictures,
    pool_files,
    query_files,
    read_candidate,
    read_query,
)

VERSION = "1.3.0"
QUERIES, CANDIDATES = "mbeir_queries", "mbeir_candidates"


@dataclasses.dataclass(frozen=True)
class Drop:
    """A record that is left out of the records, because its fault was accepted."""

    file: str  # within the release
    line: int  # from 1
    id: str  # qid or did
    why: str


# Writing ArrayRecord --------------------------------------------------------------------------


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
