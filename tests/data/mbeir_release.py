"""A release in M-BEIR's exact layout, small: 10 data sets, 16 test files, every modality, every spelling in the wild.

A query and its answer show or name the same thing: number n has a colour and a shape of its own.
"""

import io
import json
import pathlib
from collections.abc import Iterable

from PIL import Image, ImageDraw

DATASETS = {
    "visualnews": (0, (0, 3)),
    "fashion200k": (1, (0, 3)),
    "webqa": (2, (1, 2)),
    "edis": (3, (2,)),
    "nights": (4, (4,)),
    "oven": (5, (6, 8)),
    "infoseek": (6, (6, 8)),
    "fashioniq": (7, (7,)),
    "cirr": (8, (7,)),
    "mscoco": (9, (0, 3)),
}
MODALITIES = {
    0: ("text", "image"),
    1: ("text", "text"),
    2: ("text", "image,text"),
    3: ("image", "text"),
    4: ("image", "image"),
    6: ("image,text", "text"),
    7: ("image,text", "image"),
    8: ("image,text", "image,text"),
}
SPLITS = ("train", "val", "test")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "brown", "black", "white")
SHAPES = ("circle", "square", "bar")


def jpeg(number: int) -> bytes:
    """A shape on a ground of another colour, and the number."""
    image = Image.new("RGB", (40, 32), COLOURS[(number + 1 + number // 10 % 8) % 10])
    draw = ImageDraw.Draw(image)
    box = (12, 8, 28, 24) if number // 10 % 3 < 2 else (4, 12, 36, 20)
    (draw.ellipse if number // 10 % 3 == 0 else draw.rectangle)(box, fill=COLOURS[number % 10])
    draw.text((0, 0), str(number), fill=COLOURS[(number + 5) % 10])
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def name(number: int) -> str:
    return f"a {COLOURS[number % 10]} {SHAPES[number // 10 % 3]}, number {number}"


def stem(dataset: str, task: int, split: str) -> str:
    return f"mbeir_{dataset}_task{task}_{split}"


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def write_records(path: pathlib.Path, records: Iterable[dict]) -> None:
    write_lines(path, map(json.dumps, records))


class _Writer:
    def __init__(self, root: pathlib.Path, queries: int) -> None:
        self.root, self.size = root, queries
        self.last = dict.fromkeys(DATASETS, 0)  # the last did and qid number of each data set
        self.asked = dict.fromkeys(DATASETS, 0)

    def picture(self, dataset: str, number: int) -> str:
        path = f"mbeir_images/{dataset}_images/{number:04d}.jpg"
        if not (self.root / path).exists():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(jpeg(number))
        return path

    def candidate(self, dataset: str, modality: str, number: int) -> dict:
        self.last[dataset] += 1
        did = f"{DATASETS[dataset][0]}:{self.last[dataset]}"
        return {
            "did": did,
            "txt": f"This is {name(number)}" if "text" in modality else None,
            "img_path": self.picture(dataset, number) if "image" in modality else None,
            "modality": "text,image" if modality == "image,text" and number % 2 else modality,
            "src_content": None,
        }

    def query(self, dataset: str, task: int, number: int, positives: list[str], negatives: list[str]) -> dict:
        self.asked[dataset] += 1
        modality = MODALITIES[task][0]
        return {
            "qid": f"{DATASETS[dataset][0]}:{self.asked[dataset]}",
            "query_txt": name(number) if "text" in modality else None,
            "query_img_path": self.picture(dataset, number) if "image" in modality else None,
            "query_modality": "text,image" if modality == "image,text" and number % 2 else modality,
            "query_src_content": json.dumps({"source": "drawn"}) if number % 3 else None,
            "pos_cand_list": [{"did": did} for did in positives] if number % 2 else positives,
            "neg_cand_list": negatives if number % 2 else None,
            "task_id": task,
        }


def write_release(root: pathlib.Path, queries: int = 4) -> pathlib.Path:
    """Writes `queries` queries to each file, over pools of twice as many candidates; MSCOCO has a pool a split."""
    writer = _Writer(root, queries)
    pools: dict[str, list[dict]] = {}
    asked: dict[str, dict[str, list[dict]]] = {split: {} for split in SPLITS}
    unions: dict[str, list[dict]] = {split: [] for split in SPLITS}
    trained: dict[str, list[dict]] = {dataset: [] for dataset in DATASETS}
    for dataset, (dataset_id, tasks) in DATASETS.items():
        for task in tasks:
            by_split: dict[str, list[dict]] = {}
            for split in SPLITS:
                own = dataset == "mscoco" or split != "test"  # val and test share a pool, but for MSCOCO
                # No two candidates of a split are alike: their order would be that of the noise of float arithmetic.
                shift = 100 * dataset_id + 7 * task + 31 * SPLITS.index(split)
                if own:
                    made = [writer.candidate(dataset, MODALITIES[task][1], shift + n) for n in range(2 * queries)]
                else:
                    made = by_split["val"]
                    shift -= 31
                by_split[split] = made
                records = [
                    writer.query(dataset, task, shift + n, [made[n]["did"]], [made[n + queries]["did"]])
                    for n in range(queries)
                ]
                asked[split][stem(dataset, task, split)] = records
                unions[split] += [one for one in made if one not in unions[split]]
                if split == "train":
                    trained[dataset] += records
                elif dataset == "mscoco":
                    pools[f"mbeir_{dataset}_task{task}_{split}_cand_pool"] = made
                elif split == "test":
                    pools[f"mbeir_{dataset}_task{task}_cand_pool"] = made
    for pool, records in pools.items():
        write_records(root / f"cand_pool/local/{pool}.jsonl", records)
    for split, records in unions.items():
        write_records(root / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl", records)
    for dataset, records in trained.items():
        write_records(root / f"query/train/mbeir_{dataset}_train.jsonl", records)
    small = trained["nights"] + trained["fashion200k"]  # the union repeats what small data sets have
    union = [record for records in trained.values() for record in records] + small
    write_records(root / "query/union_train/mbeir_union_up_train.jsonl", union)
    for split in SPLITS:
        for file, records in asked[split].items():
            if split != "train":
                write_records(root / f"query/{split}/{file}.jsonl", records)
            write_lines(root / f"qrels/{split}/{file}_qrels.txt", _qrels(records, file, unions[split]))
    union = [record for records in asked["val"].values() for record in records]
    write_records(root / "query/union_val/mbeir_union_val.jsonl", union)
    write_lines(root / "instructions/query_instructions.tsv", _instructions())
    return root


def _qrels(records: list[dict], file: str, union: list[dict]) -> Iterable[str]:
    """As M-BEIR's, those of OVEN also name right answers of InfoSeek, which their own pool does not hold."""
    other = next(one["did"] for one in union if one["did"].startswith("6:"))
    for record in records:
        dids = [one["did"] if isinstance(one, dict) else one for one in record["pos_cand_list"]]
        dids += [other] if "oven" in file else []
        yield from (f"{record['qid']} 0 {did} 1 {record['task_id']}" for did in dids)


def _instructions() -> Iterable[str]:
    header = "query_modality cand_modality dataset_name dataset_id prompt_1 prompt_2 prompt_3 prompt_4"
    yield "\t".join(header.split())
    for dataset, (number, tasks) in DATASETS.items():
        for task in tasks:
            prompts = [f"{verb} what {dataset} shows of it." for verb in ("Find", "Retrieve", "Pick", "Show")]
            yield "\t".join((*MODALITIES[task], dataset, str(number), *prompts))
