"""A release in M-BEIR's layout -> parts: files of rows, each query with its first target, sorted by qid."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_jax.cot.config import CotConfig
from trace_jax.cot.schema import Row, chosen, dump, order, write_lines
from trace_jax.data.builders import mbeir
from trace_jax.data.builders.mbeir import ReleaseError


@dataclasses.dataclass(frozen=True)
class _Candidate:
    text: str
    image: str

    @property
    def modality(self) -> str:
        return ",".join(kind for kind, value in (("image", self.image), ("text", self.text)) if value)


def query_files(release: Path) -> list[Path]:
    """The files of the training queries, each query once: M-BEIR's files by data set, or else the union of them."""
    found = sorted((release / "query/train").glob("*.jsonl")) or sorted((release / "query/union_train").glob("*.jsonl"))
    if not found:
        raise ReleaseError(f"{release}: no files in query/train or query/union_train; is this an M-BEIR release?")
    return found


def dataset_name(path: Path) -> str:
    """`fashioniq` of mbeir_fashioniq_train.jsonl or mbeir_fashioniq_task7_val.jsonl."""
    found = re.fullmatch(r"mbeir_(.+?)(_task\d+)?(_up)?_(train|val|test)", path.stem)
    if found is None:
        raise ReleaseError(f"{path}: the name is not of the form mbeir_<data set>_train.jsonl; rename it")
    return found[1]


def _queries(release: Path, limit: int) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(data set, where, record) of every training query, once; of each file the first `limit`, 0 for all."""
    seen: set[str] = set()
    for path in query_files(release):
        taken = 0
        for where, record in mbeir.lines(path):
            qid = record.get("qid")
            if not isinstance(qid, str) or not re.fullmatch(r"\d+:\d+", qid):
                raise ReleaseError(f'{where}: the qid {qid!r} is not of the form "<dataset_id>:<number>"')
            if qid in seen:
                continue
            if limit and taken >= limit:
                break
            seen.add(qid)
            taken += 1
            yield dataset_name(path), where, record


def _target(record: dict[str, Any], where: str) -> str:
    """The did of the first right answer."""
    positives = record.get("pos_cand_list") or []
    first = positives[0] if positives else None
    did = first.get("did") if isinstance(first, dict) else first
    if not isinstance(did, str):
        raise ReleaseError(f"{where}: pos_cand_list holds no id of a right answer")
    return did


def _pools(release: Path) -> list[Path]:
    union = release / f"cand_pool/global/{mbeir.TRAIN_POOL}.jsonl"
    return [*([union] if union.exists() else []), *sorted((release / "cand_pool/local").glob("*.jsonl"))]


def _candidates(pools: list[Path], dids: set[str]) -> dict[str, _Candidate]:
    found: dict[str, _Candidate] = {}
    for path in pools:
        if len(found) == len(dids):
            break
        for _, record in mbeir.lines(path):
            if record.get("did") in dids:
                found[record["did"]] = _Candidate(record.get("txt") or "", record.get("img_path") or "")
    return found


def _captions(pools: list[Path], images: set[str]) -> dict[str, str]:
    """Picture -> the first text that a pool holds beside it."""
    found: dict[str, str] = {}
    for path in pools:
        for _, record in mbeir.lines(path):
            image, text = record.get("img_path"), record.get("txt")
            if text and image in images:
                found.setdefault(image, text)
    return found


def _modality(text: str, image: str) -> str:
    return _Candidate(text, image).modality


def _with_decoys(rows: list[Row], config: CotConfig) -> Iterator[Row]:
    """Gives the rows chosen as controls the target of a far row of the same file."""
    for index, row in enumerate(rows):
        other = rows[(index + len(rows) // 2) % len(rows)]
        if chosen(row.qid, "control", config.verify.controls) and other.target != row.target:
            yield dataclasses.replace(
                row,
                decoy=other.target,
                decoy_text=other.target_text or other.target_caption,
                decoy_image=other.target_image,
            )
        else:
            yield row


def read(release: Path, config: CotConfig, folder: Path) -> list[str]:
    """Writes every training query as a row into parts of `folder`; returns the parts' names.

    Raises ReleaseError, with the file, the line and the mend, for what is missing or is not in M-BEIR's layout.
    """
    dids, pictures = set(), set()
    for _, where, record in _queries(release, config.limit):
        dids.add(_target(record, where))
        pictures.add(record.get("query_img_path"))
    pools = _pools(release)
    candidates = _candidates(pools, dids)
    pictures |= {candidate.image for candidate in candidates.values()}
    for picture in pictures - {None, ""}:
        if not (release / picture).is_file():
            raise ReleaseError(f"no picture {picture!r} under {release}; unpack mbeir_images there")
    captions = _captions(pools, pictures - {None, ""})
    instructions = mbeir.read_instructions(release)
    stems: dict[str, list[Row]] = {}
    for dataset, where, record in _queries(release, config.limit):
        did = _target(record, where)
        if did not in candidates:
            raise ReleaseError(f"{where}: the right answer {did} is in no file of cand_pool/")
        target, text, image = candidates[did], record.get("query_txt") or "", record.get("query_img_path") or ""
        key = (int(record["qid"].split(":")[0]), _modality(text, image), target.modality)
        row = Row(
            qid=record["qid"],
            dataset=dataset,
            split="train",
            task=record["task_id"],
            instruction=(instructions.get(key) or [""])[0],
            text=text,
            image=image,
            source_caption=captions.get(image, ""),
            target=did,
            target_text=target.text,
            target_image=target.image,
            target_caption="" if target.text else captions.get(target.image, ""),
        )
        stems.setdefault(row.stem, []).append(row)
    parts = []
    for stem, rows in sorted(stems.items()):
        ordered = list(_with_decoys(sorted(rows, key=lambda row: order(row.qid)), config))
        for number, start in enumerate(range(0, len(rows), config.part_rows)):
            parts.append(f"{stem}-{number:05}.jsonl")
            write_lines(folder / parts[-1], (dump(row) for row in ordered[start : start + config.part_rows]))
    return parts
