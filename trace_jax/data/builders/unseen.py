"""The paper's unseen benchmarks (Table 3), from the files that their authors release to a release in M-BEIR's layout.

Pictures stay where they are: paths are relative to the source. A benchmark that ranks a few candidates for each query
(GeneCIS, SugarCrepe, CC-Neg) names them all in its qrels, the wrong ones with relevance 0, and is measured among those
alone. What is to be left out of a query's results has relevance -1 (Visual Storytelling: the pictures of the query).

    write(name, source, release)               then check and build it like any other, with images=source

Prompts are LamRA's; for text → image, where it embeds the bare caption, M-BEIR's first prompt for MSCOCO.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_jax.data.builders.layout import SIDES, ReleaseError, lines
from trace_jax.data.schema import MARK, TASKS

CIRCO = "circo"
CC_NEG_TEST = 40_000  # its last so many records
_TO_TEXT = "Find an image caption describing the following everyday image."
_TO_IMAGE = "Find me an everyday image that matches the given caption."
_CHANGE = "I'm looking for a similar everyday image with the described changes."
_FOCUS = "I'm looking for an image with the same attributes as described."
_DIALOG = "Find me an everyday image that matches the given dialog."
_STORY = (
    "I will provide you with a series of images and captions from a story, and I need you to retrieve the image"
    " corresponding to the last caption."
)
_ROUNDS = "Find me a similar fashion image based on the following multi-round modifications."

Content = tuple[str | None, str | tuple[str, ...] | None]
"""A text and a picture's path; one of them may be None. A query may have several paths, at marks in its text."""


@dataclass(frozen=True)
class Asked:
    """A query: its content, its right answers, and for some benchmarks the wrong ones that it is measured among, what
    is left out of its results, or what a server knows it by.
    """

    content: Content
    right: list[Content]
    wrong: list[Content] = field(default_factory=list)
    left_out: list[Content] = field(default_factory=list)
    number: int | None = None


@dataclass(frozen=True)
class File:
    """A query file and its pool."""

    dataset: str  # letters, digits and _
    task: int  # of TASKS
    prompt: str
    queries: list[Asked]
    pool: list[Content]
    split: str = "test"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ReleaseError(f"{path} is missing; docs/data.md says what is expected where") from error
    except ValueError as error:
        raise ReleaseError(f"{path}: not valid JSON ({error}); fetch it again") from error


def _item(record: Any, name: str, where: str) -> Any:
    if not isinstance(record, dict) or name not in record:
        raise ReleaseError(f"{where}: the field {name!r} is missing; is this the authors' file?")
    return record[name]


def _both_ways(dataset: str, pairs: list[tuple[str, str]]) -> list[File]:
    """(caption, picture) pairs as text → image and image → text; a picture may have several captions."""
    captions: dict[str, list[Content]] = {}
    for caption, picture in pairs:
        captions.setdefault(picture, []).append((caption, None))
    to_image = [Asked((caption, None), [(None, picture)]) for caption, picture in pairs]
    to_text = [Asked((None, picture), texts) for picture, texts in captions.items()]
    return [
        File(dataset, 0, _TO_IMAGE, to_image, [(None, picture) for picture in captions]),
        File(dataset, 3, _TO_TEXT, to_text, [(caption, None) for caption, _ in pairs]),
    ]


def _sharegpt4v(source: Path) -> list[File]:
    path = source / "datas_for_validation.json"
    records = enumerate(_read(path), start=1)
    pairs = [
        (_item(r, "caption", f"{path}, record {i}"), "val_data/" + _item(r, "image_name", f"{path}, record {i}"))
        for i, r in records
    ]
    return _both_ways("sharegpt4v", pairs)


def _urban1k(source: Path) -> list[File]:
    paths = sorted((source / "caption").glob("*.txt"), key=lambda path: int(path.stem))
    if not paths:
        raise ReleaseError(f"{source / 'caption'}: no captions 1.txt, 2.txt, ...; unpack Urban1k there")
    pairs = [(path.read_text("utf-8").partition("\n")[0], f"image/{path.stem}.jpg") for path in paths]
    return _both_ways("urban1k", pairs)


def _flickr30k(source: Path) -> list[File]:
    captions = _read(source / "flickr_text.json")
    if len(captions) % 5:
        raise ReleaseError(f"{source / 'flickr_text.json'}: {len(captions)} captions; five to a picture are expected")
    return _both_ways("flickr30k", [(caption, f"images/{i // 5}.png") for i, caption in enumerate(captions)])


def _circo(source: Path) -> list[File]:
    folder = "COCO2017_unlabeled"
    images = source / folder / "annotations/image_info_unlabeled2017.json"
    names = {
        _item(image, "id", str(images)): f"{folder}/unlabeled2017/{_item(image, 'file_name', str(images))}"
        for image in _item(_read(images), "images", str(images))
    }
    files = []
    for split in ("val", "test"):
        path, queries = source / f"annotations/{split}.json", []
        for record in _read(path):
            where = f"{path}, query {record.get('id')}"
            wanted = [_item(record, "reference_img_id", where)]
            wanted += _item(record, "gt_img_ids", where) if split == "val" else []  # the server's secret
            if unknown := [number for number in wanted if number not in names]:
                raise ReleaseError(f"{where}: the picture {unknown[0]} is not in {images.name}; fetch both again")
            reference, *right = (names[number] for number in wanted)
            content = (_item(record, "relative_caption", where), reference)
            queries.append(Asked(content, [(None, one) for one in right], number=_item(record, "id", where)))
        files.append(File(CIRCO, 7, _CHANGE, queries, [(None, name) for name in names.values()], split))
    return files


def circo_submission(release: Path, found: dict[str, list[str]]) -> dict[str, list[int]]:
    """What CIRCO's server takes: {query: numbers of its first 50 pictures}, from {qid: dids}, best first."""
    queries = lines(release / f"query/test/mbeir_{CIRCO}_task7_test.jsonl")
    numbers = {record["qid"]: json.loads(record["query_src_content"])["id"] for _, record in queries}
    pool = lines(release / f"cand_pool/local/mbeir_{CIRCO}_task7_cand_pool.jsonl")
    pictures = {record["did"]: int(Path(record["img_path"]).stem) for _, record in pool}
    return {str(numbers[qid]): [pictures[did] for did in dids[:50]] for qid, dids in found.items()}


def _genecis(source: Path) -> list[File]:
    files = []
    for split in ("change_object", "focus_object", "change_attribute", "focus_attribute"):
        path, queries = source / f"{split}.json", []
        for number, record in enumerate(_read(path)):
            where = f"{path}, record {number}"
            shown = [_item(record, name, where) for name in ("reference", "target")] + _item(record, "gallery", where)
            if split.endswith("object"):
                names = [f"val2017/{_item(one, 'val_image_id', where):012d}.jpg" for one in shown]
            else:  # a crop for each place: 0 the reference, 1 the target, then the gallery
                ids = [_item(one, "image_id", where) for one in shown]
                names = [f"{split}/{image}_{number}_{place}.jpg" for place, image in enumerate(ids)]
            reference, target, *gallery = names
            wrong: list[Content] = [(None, name) for name in dict.fromkeys(gallery) if name != target]
            queries.append(Asked((_item(record, "condition", where), reference), [(None, target)], wrong))
        prompt = _FOCUS if split == "focus_attribute" else _CHANGE
        files.append(File(f"genecis_{split}", 7, prompt, queries, []))
    return files


def _visdial(source: Path) -> list[File]:
    path = source / "visdial_1.0_val.json"
    data = _item(_read(path), "data", str(path))
    questions, answers = (_item(data, name, str(path)) for name in ("questions", "answers"))
    queries = []
    for dialog in _item(data, "dialogs", str(path)):
        number = _item(dialog, "image_id", str(path))
        rounds = (
            f"Q: {questions[turn['question']].rstrip('?')}? A: {answers[turn['answer']]}" for turn in dialog["dialog"]
        )
        picture = f"VisualDialog_val2018/VisualDialog_val2018_{number:012d}.jpg"
        queries.append(Asked((" ".join(rounds), None), [(None, picture)]))
    return [File("visdial", 0, _DIALOG, queries, [])]


def _sugarcrepe(source: Path) -> list[File]:
    files = []
    for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        path, queries = source / f"{kind}.json", []
        for number, record in _read(path).items():
            right, wrong, name = (
                _item(record, key, f"{path}, record {number}") for key in ("caption", "negative_caption", "filename")
            )
            queries.append(Asked((None, f"val2017/{name}"), [(right, None)], [(wrong, None)]))
        files.append(File(f"sugarcrepe_{kind}", 3, _TO_TEXT, queries, []))
    return files


def _vist(source: Path) -> list[File]:
    path, folder = source / "sis/val.story-in-sequence.json", source / "images/val"
    files = {file.stem: file.name for file in folder.iterdir()} if folder.is_dir() else {}
    stories: dict[str, list[tuple[int, str, str]]] = {}
    for number, annotation in enumerate(_item(_read(path), "annotations", str(path))):
        record = annotation[0] if annotation else None
        where = f"{path}, annotation {number}"
        story, text, shown, place = (
            _item(record, name, where)
            for name in ("story_id", "text", "photo_flickr_id", "worker_arranged_photo_order")
        )
        picture = f"images/val/{files.get(str(shown), f'{shown}.jpg')}"
        stories.setdefault(str(story), []).append((int(place), text, picture))
    queries, pool = [], []
    for told in map(sorted, stories.values()):
        texts, pictures = [text for _, text, _ in told], [picture for *_, picture in told]
        pool += [(None, picture) for picture in pictures]
        before, answer = tuple(pictures[:-1]), pictures[-1]
        left_out: list[Content] = [(None, picture) for picture in before if picture != answer]
        queries.append(Asked((f" {MARK} ".join(texts), before), [(None, answer)], left_out=left_out))
    return [File("vist", 7, _STORY, queries, pool)]


def _mtfiq(source: Path) -> list[File]:
    def picture(name: str) -> str:
        return f"fashioniq_images/{name}.jpg"

    path, queries = source / "data/all.val.json", []
    for number, record in enumerate(_read(path)):
        where = f"{path}, record {number}"
        target, rounds = _item(record, "target", where), _item(record, "reference", where)
        try:
            target = target[1]
            texts = [" and ".join(filter(None, words)) for _, words, _ in rounds]
            content = " ".join(f"{MARK} {text}" for text in texts), tuple(picture(name) for *_, name in rounds)
        except (IndexError, TypeError, ValueError) as error:
            raise ReleaseError(
                f"{where}: expected target [_, picture] and reference [[_, texts, picture], ...]; is it theirs?"
            ) from error
        queries.append(Asked(content, [(None, picture(target))]))
    names = _read(source / "image_splits/split.all.val.json")
    return [File("mtfiq", 7, _ROUNDS, queries, [(None, picture(name)) for name in names])]


def _ccneg(source: Path) -> list[File]:
    path = source / "ccneg_preprocessed.pt"
    try:
        import torch  # only this file is torch's
    except ModuleNotFoundError as error:
        raise ReleaseError(f"{path} is a file of torch: install torch, for the CPU will do") from error
    try:
        data = torch.load(path, weights_only=True)
    except FileNotFoundError as error:
        raise ReleaseError(f"{path} is missing; docs/data.md says what is expected where") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ReleaseError(f"{path}: torch cannot read it ({error}); fetch it again") from error
    pictures, records = (_item(data, name, str(path))[-CC_NEG_TEST:] for name in ("image_paths", "annotations"))
    queries = []
    for number, (picture, record) in enumerate(zip(pictures, records, strict=True)):
        where = f"{path}, record {number} of the last {CC_NEG_TEST:,}"
        right = _item(_item(record, "json", where), "caption", where)
        wrong = _item(_item(record, "sop_data", where), "negative-prompt", where).replace(",", "")
        queries.append(
            Asked((None, "ccneg_images/" + picture.rpartition("/cc3m/")[2]), [(right, None)], [(wrong, None)])
        )
    return [File("ccneg", 3, _TO_TEXT, queries, [])]


SETS: dict[str, tuple[int, Callable[[Path], list[File]]]] = {
    "sharegpt4v": (20, _sharegpt4v),
    "urban1k": (30, _urban1k),
    "flickr30k": (40, _flickr30k),
    CIRCO: (50, _circo),
    "genecis": (60, _genecis),
    "visdial": (70, _visdial),
    "sugarcrepe": (80, _sugarcrepe),
    "vist": (90, _vist),
    "mtfiq": (100, _mtfiq),
    "ccneg": (110, _ccneg),
}
"""Name -> (first data set id in qids and dids, reader of the authors' files)."""


def _modality(content: Content) -> str:
    text, picture = content
    return "image,text" if text and picture else "text" if text else "image"


def _lines(path: Path, content: Iterator[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in content), "utf-8")


def write(name: str, source: Path, release: Path) -> None:
    """Writes the texts of a release in M-BEIR's layout from the authors' files of a benchmark.

    Raises ReleaseError for a file that is missing or not as released, with the record and the mend.
    """
    first, read = SETS[name]
    try:
        files = read(source)
    except ReleaseError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # of a place that nothing above looks at
        raise ReleaseError(
            f"{source}: not as the authors of {name} release it ({type(error).__name__}: {error}); docs/data.md says"
            " what is expected where"
        ) from error
    numbers = {dataset: first + i for i, dataset in enumerate(dict.fromkeys(file.dataset for file in files))}
    dids: dict[tuple[int, Content], str] = {}
    asked, prompts = dict.fromkeys(numbers.values(), 0), []
    for file in files:
        number, stem = numbers[file.dataset], f"mbeir_{file.dataset}_task{file.task}"
        answers = (content for query in file.queries for content in (*query.right, *query.wrong))
        pool = list(dict.fromkeys((*file.pool, *answers)))
        for content in pool:
            dids.setdefault((number, content), f"{number}:{len(dids) + 1}")
        qids = [f"{number}:{asked[number] + i}" for i in range(1, len(file.queries) + 1)]
        asked[number] += len(qids)
        _lines(
            release / f"cand_pool/local/{stem}_cand_pool.jsonl",
            (
                json.dumps(
                    {"did": dids[number, c], "txt": c[0], "img_path": c[1], "modality": _modality(c)},
                    ensure_ascii=False,
                )
                for c in pool
            ),
        )
        _lines(
            release / f"query/{file.split}/{stem}_{file.split}.jsonl",
            (
                json.dumps(
                    {
                        "qid": qid,
                        "query_txt": query.content[0],
                        "query_img_path": query.content[1],
                        "query_modality": _modality(query.content),
                        "query_src_content": None if query.number is None else json.dumps({"id": query.number}),
                        "pos_cand_list": [dids[number, content] for content in query.right],
                        "neg_cand_list": [dids[number, content] for content in query.wrong],
                        "task_id": file.task,
                    },
                    ensure_ascii=False,
                )
                for qid, query in zip(qids, file.queries, strict=True)
            ),
        )
        judged = [
            f"{qid} 0 {dids[number, content]} {relevance} {file.task}"
            for qid, query in zip(qids, file.queries, strict=True)
            for relevance, contents in ((1, query.right), (0, query.wrong), (-1, query.left_out))
            for content in dict.fromkeys(contents)
        ]
        if judged:
            _lines(release / f"qrels/{file.split}/{stem}_{file.split}_qrels.txt", iter(judged))
        sides = (SIDES[side] for side in TASKS[file.task].split("2"))
        prompts.append("\t".join((*sides, file.dataset, str(number), file.prompt)))
    header = "query_modality cand_modality dataset_name dataset_id prompt_1"
    _lines(release / "instructions/query_instructions.tsv", iter(["\t".join(header.split()), *dict.fromkeys(prompts)]))
