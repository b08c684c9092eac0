"""A release in M-BEIR's layout -> parts: files of rows, each query with its first target, sorted by qid."""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

from trace_jax.cot.config import CotConfig
from trace_jax.cot.schema import Row, chosen, dump, order, write_lines
from trace_jax.data.builders import layout
from trace_jax.data.builders.layout import QueryRecord, ReleaseError
from trace_jax.data.schema import TASKS


@dataclasses.dataclass(frozen=True)
class _Candidate:
    text: str
    image: str
    modality: str


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


def _present(release: Path) -> layout.Picture:
    """Asks for a picture to be there, and reads nothing of it: the stages that show it will."""

    @functools.cache
    def there(relative: str) -> bool:
        return (release / relative).is_file()

    def look(relative: str, where: str) -> bytes:
        if not there(relative):
            raise ReleaseError(f"{where}: no picture {relative!r} under {release}; unpack mbeir_images there")
        return b""

    return look


def _queries(release: Path, limit: int, picture: layout.Picture) -> Iterator[tuple[str, str, QueryRecord, str]]:
    """(data set, where, query, path of its picture) of every training query, once; of each file the first `limit`, 0
    for all.
    """
    seen: set[str] = set()
    for path in query_files(release):
        taken = 0
        for where, record in layout.lines(path):
            query = layout.read_query(where, record, {}, picture)
            if query["task_id"] not in TASKS:
                raise ReleaseError(f"{where}: task_id is {query['task_id']}; there are {', '.join(map(str, TASKS))}")
            if isinstance(record.get("query_img_path"), list):
                raise ReleaseError(f"{where}: query_img_path is a list, and traces are for queries of one picture")
            if not query["pos_dids"]:
                raise ReleaseError(f"{where}: pos_cand_list holds no id of a right answer")
            if query["qid"] in seen:
                continue
            if limit and taken >= limit:
                break
            seen.add(query["qid"])
            taken += 1
            yield dataset_name(path), where, query, record.get("query_img_path") or ""


def _pools(release: Path) -> list[Path]:
    union = release / f"cand_pool/global/{layout.TRAIN_POOL}.jsonl"
    return [*([union] if union.exists() else []), *sorted((release / "cand_pool/local").glob("*.jsonl"))]


def _candidates(pools: list[Path], dids: set[str], picture: layout.Picture) -> dict[str, _Candidate]:
    found: dict[str, _Candidate] = {}
    for path in pools:
        if len(found) == len(dids):
            break
        for where, record in layout.lines(path):
            if record.get("did") in dids:
                read = layout.read_candidate(where, record, picture)
                found[read["did"]] = _Candidate(read["txt"], record.get("img_path") or "", read["modality"])
    return found


def _captions(pools: list[Path], images: set[str]) -> dict[str, str]:
    """Picture -> the first text that a pool holds beside it."""
    found: dict[str, str] = {}
    for path in pools:
        for _, record in layout.lines(path):
            image, text = record.get("img_path"), record.get("txt")
            if text and image in images:
                found.setdefault(image, text)
    return found


def _with_decoys(rows: list[Row], controls: dict[str, list[str]]) -> Iterator[Row]:
    """Gives the controls (qid -> all right answers) the target of a far row of the same file, if that one is wrong."""
    for index, row in enumerate(rows):
        other = rows[(index + len(rows) // 2) % len(rows)]
        if row.qid in controls and other.target not in controls[row.qid]:
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
    dids, pictures, picture = set(), set(), _present(release)
    for _, _, query, image in _queries(release, config.limit, picture):
        dids.add(query["pos_dids"][0])
        pictures.add(image)
    pools = _pools(release)
    candidates = _candidates(pools, dids, picture)
    pictures |= {candidate.image for candidate in candidates.values()}
    captions = _captions(pools, pictures - {""})
    instructions = layout.load_instructions(release)
    stems: dict[str, list[Row]] = {}
    controls: dict[str, list[str]] = {}
    for dataset, where, query, image in _queries(release, config.limit, picture):
        did = query["pos_dids"][0]
        if did not in candidates:
            raise ReleaseError(f"{where}: the right answer {did} is in no file of cand_pool/; fetch the pools again")
        target = candidates[did]
        prompts = instructions.get((query["dataset_id"], query["modality"], target.modality))
        row = Row(
            qid=query["qid"],
            dataset=dataset,
            split="train",
            task=query["task_id"],
            instruction=prompts[0] if prompts else "",
            text=query["query_txt"],
            image=image,
            source_caption=captions.get(image, ""),
            target=did,
            target_text=target.text,
            target_image=target.image,
            target_caption="" if target.text else captions.get(target.image, ""),
        )
        stems.setdefault(row.stem, []).append(row)
        if chosen(row.qid, "control", config.verify.controls):
            controls[row.qid] = query["pos_dids"]
    parts = []
    for stem, rows in sorted(stems.items()):
        ordered = list(_with_decoys(sorted(rows, key=lambda row: order(row.qid)), controls))
        for number, start in enumerate(range(0, len(rows), config.part_rows)):
            parts.append(f"{stem}-{number:05}.jsonl")
            write_lines(folder / parts[-1], (dump(row) for row in ordered[start : start + config.part_rows]))
    return parts
