"""A release for the tests: composed retrieval (fashioniq), questions (infoseek), captions (mscoco), with pictures."""

import io
import json
import pathlib

from PIL import Image

THINGS = ("dress", "shoe", "bag", "hat", "coat", "scarf", "glove", "belt")
COLOURS = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "brown")
_RGB = (
    (200, 0, 0),
    (0, 0, 200),
    (0, 160, 0),
    (220, 220, 0),
    (128, 0, 128),
    (255, 165, 0),
    (255, 192, 203),
    (139, 69, 19),
)
INSTRUCTIONS = (
    "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\n"
    "image,text\timage\tfashioniq\t7\tFind a similar garment with the described changes.\tSecond.\n"
    "image,text\ttext\tinfoseek\t6\tFind the text that answers the question.\tSecond.\n"
    "text\timage\tmscoco\t9\tFind the everyday picture of this caption.\tSecond.\n"
)


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(out, "PNG")
    return out.getvalue()


def kind(number: int) -> int:
    """Which data set the query with this number is of: one in four is a simple caption."""
    return (7, 6, 7, 9)[number % 4]


def names(number: int) -> tuple[str, str, str]:
    """(source colour, thing, target colour) of a query."""
    colour = number % 8
    return COLOURS[colour], THINGS[number // 8 % 8], COLOURS[(colour + 1 + number // 64 % 7) % 8]


def good_trace(number: int) -> tuple[str, str]:
    """The reasoning and answer that the teacher should write for a query."""
    source, thing, target = names(number)
    if kind(number) == 7:
        return (
            f"The picture shows a {source} {thing} of the shop, item {number}. The change asks for the colour {target}"
            " instead. The cut, the fabric and everything else stay as they are.",
            f"A {target} {thing}, item {number}, with the same cut.",
        )
    return (
        f"The picture shows a {source} {thing}, which carries the mark of house number {number}. That house was founded"
        f" in the town of {target.capitalize()}ville, long ago, by a tailor.",
        f"House {number} comes from {target.capitalize()}ville.",
    )


def write_release(root: pathlib.Path, size: int) -> pathlib.Path:
    """Writes `size` queries, numbered from 1 over all data sets."""
    files = {
        path: []
        for path in (
            "query/train/mbeir_fashioniq_train.jsonl",
            "query/train/mbeir_infoseek_train.jsonl",
            "query/train/mbeir_mscoco_train.jsonl",
            "cand_pool/global/mbeir_union_train_cand_pool.jsonl",
            "cand_pool/local/mbeir_fashioniq_task7_cand_pool.jsonl",
        )
    }
    folder = root / "mbeir_images/shop"
    folder.mkdir(parents=True)
    for name, rgb in zip(COLOURS, _RGB, strict=True):
        (folder / f"{name}.png").write_bytes(png(rgb))
    pool = files["cand_pool/global/mbeir_union_train_cand_pool.jsonl"]
    for number in range(1, size + 1):
        source, thing, target = names(number)
        dataset, path = kind(number), f"mbeir_images/shop/{source}.png"
        did = f"{dataset}:{number}"
        query = {"qid": did, "query_img_path": path, "query_modality": "image,text", "query_src_content": None}
        query |= {"pos_cand_list": [did], "neg_cand_list": []}
        candidate = {"did": did, "txt": None, "img_path": f"mbeir_images/shop/{target}.png", "modality": "image"}
        if dataset == 7:
            query |= {"query_txt": f"the same {thing} in {target}, item {number}", "task_id": 7}
            name = "fashioniq"
        elif dataset == 6:
            query |= {"query_txt": f"Where does house {number} of this {thing} come from?", "task_id": 6}
            candidate |= {"txt": f"House {number} of {target.capitalize()}ville", "img_path": None, "modality": "text"}
            name = "infoseek"
        else:
            query |= {"query_txt": f"a {source} {thing}, photo {number}", "query_img_path": None, "task_id": 0}
            query |= {"query_modality": "text"}
            name = "mscoco"
        files[f"query/train/mbeir_{name}_train.jsonl"].append(query)
        pool.append(candidate | {"src_content": None})
    files["cand_pool/local/mbeir_fashioniq_task7_cand_pool.jsonl"] = [c for c in pool if c["did"].startswith("7:")]
    for path, records in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(INSTRUCTIONS)
    return root
