"""The unseen benchmarks, from files as their authors release them: tiny ones, prepared and read back."""

import json
import pathlib

import pytest
import torch

from launch import prepare_data
from tests.data.mbeir_release import jpeg
from trace_jax.data.builders import layout, mbeir, unseen
from trace_jax.data.schema import TASKS


def files(source: pathlib.Path, texts: dict, pictures: list[str]) -> None:
    for name, content in texts.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(content if isinstance(content, str) else json.dumps(content))
    for number, name in enumerate(pictures):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(jpeg(number))


def sharegpt4v(source):
    records = [{"image_name": f"{name}.jpg", "caption": f"A long text on {name}."} for name in "ab"]
    files(source, {"datas_for_validation.json": records}, ["val_data/a.jpg", "val_data/b.jpg"])


def urban1k(source):
    captions = {f"caption/{i}.txt": f"Street {i}.\nsecond line" for i in (1, 2, 10)}
    files(source, captions, [f"image/{i}.jpg" for i in (1, 2, 10)])


def flickr30k(source):
    captions = [f"Caption {i}" for i in range(10)]
    files(source, {"flickr_text.json": captions}, ["images/0.png", "images/1.png"])


def circo(source):
    folder = "COCO2017_unlabeled"
    info = {"images": [{"id": i, "file_name": f"{i:012}.jpg"} for i in range(5)]}
    query = {"id": 0, "reference_img_id": 0, "relative_caption": "is darker", "target_img_id": 2, "gt_img_ids": [2, 3]}
    texts = {f"{folder}/annotations/image_info_unlabeled2017.json": info, "annotations/val.json": [query]}
    asked = [{"id": i, "reference_img_id": i + 1, "relative_caption": "is brighter"} for i in (0, 1)]
    texts["annotations/test.json"] = asked
    files(source, texts, [f"{folder}/unlabeled2017/{i:012}.jpg" for i in range(5)])


def genecis(source):
    texts, pictures = {}, []
    for split in ("change_object", "focus_object"):
        ids = [{"val_image_id": i} for i in range(4)]
        texts[f"{split}.json"] = [{"reference": ids[0], "target": ids[1], "gallery": ids[2:], "condition": "a dog"}]
    pictures += [f"val2017/{i:012}.jpg" for i in range(4)]
    for split in ("change_attribute", "focus_attribute"):
        ids = [{"image_id": 10 + i} for i in range(4)]
        record = {"reference": ids[0], "target": ids[1], "gallery": ids[2:], "condition": "red"}
        texts[f"{split}.json"] = [record, record]
        pictures += [f"{split}/{10 + i}_{n}_{i}.jpg" for i in range(4) for n in range(2)]
    files(source, texts, pictures)


def visdial(source):
    rounds = [{"question": 1, "answer": 0}, {"question": 0, "answer": 1}]
    data = {"questions": ["is it day?", "how many"], "answers": ["two", "yes"]}
    data["dialogs"] = [{"image_id": 7, "dialog": rounds}, {"image_id": 8, "dialog": rounds[:1]}]
    folder = "VisualDialog_val2018"
    files(source, {"visdial_1.0_val.json": {"data": data}}, [f"{folder}/{folder}_{i:012}.jpg" for i in (7, 8)])


def sugarcrepe(source):
    record = {"filename": "000000000001.jpg", "caption": "A cat on a mat.", "negative_caption": "A mat on a cat."}
    kinds = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
    files(source, {f"{kind}.json": {"0": record, "1": record} for kind in kinds}, ["val2017/000000000001.jpg"])


def vist(source):
    shown = {"1": ["11", "12", "13", "14", "15"], "2": ["21", "22", "11", "22", "25"]}
    annotations = [
        [{"story_id": story, "text": f"Tale {photo}.", "photo_flickr_id": photo, "worker_arranged_photo_order": place}]
        for story, photos in shown.items()
        for place, photo in reversed(list(enumerate(photos)))
    ]
    names = [f"images/val/{photo}.{'png' if photo == '15' else 'jpg'}" for photo in {*shown["1"], *shown["2"]}]
    files(source, {"sis/val.story-in-sequence.json": {"annotations": annotations}}, sorted(names))


def mtfiq(source):
    rounds = [["x", ["is red", ""], "A"], ["x", ["is longer", "has sleeves"], "B"]]
    records = [{"target": ["x", "C"], "reference": rounds}, {"target": ["x", "B"], "reference": rounds[:1]}]
    names = [f"fashioniq_images/{name}.jpg" for name in "ABCD"]
    files(source, {"data/all.val.json": records, "image_splits/split.all.val.json": list("ABD")}, names)


def ccneg(source):
    record = {"json": {"caption": "a dog"}, "sop_data": {"negative-prompt": "a cat, not a dog"}}
    paths = [f"/workspace/datasets/cc3m/cc3m_subset_images_extracted_final/{i}.jpg" for i in range(3)]
    files(source, {}, [f"ccneg_images/cc3m_subset_images_extracted_final/{i}.jpg" for i in (1, 2)])
    torch.save({"annotations": [record] * 3, "image_paths": paths}, source / "ccneg_preprocessed.pt")


RELEASES = {
    "sharegpt4v": (sharegpt4v, {"sharegpt4v_task0": (2, 2), "sharegpt4v_task3": (2, 2)}),
    "urban1k": (urban1k, {"urban1k_task0": (3, 3), "urban1k_task3": (3, 3)}),
    "flickr30k": (flickr30k, {"flickr30k_task0": (10, 2), "flickr30k_task3": (2, 10)}),
    "circo": (circo, {"circo_task7": (1, 5)}),
    "genecis": (
        genecis,
        {
            "genecis_change_object_task7": (1, 3),
            "genecis_focus_object_task7": (1, 3),
            "genecis_change_attribute_task7": (2, 6),
            "genecis_focus_attribute_task7": (2, 6),
        },
    ),
    "visdial": (visdial, {"visdial_task0": (2, 2)}),
    "sugarcrepe": (
        sugarcrepe,
        {
            f"sugarcrepe_{kind}_task3": (2, 2)
            for kind in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
        },
    ),
    "vist": (vist, {"vist_task7": (2, 8)}),
    "mtfiq": (mtfiq, {"mtfiq_task7": (2, 4)}),
    "ccneg": (ccneg, {"ccneg_task3": (2, 2)}),
}


@pytest.mark.parametrize("name", RELEASES)
def test_each_benchmark_is_prepared_from_its_authors_files(tmp_path, name, monkeypatch):
    monkeypatch.setattr(unseen, "CC_NEG_TEST", 2)
    make, sizes = RELEASES[name]
    split = "val" if name == "circo" else "test"
    make(tmp_path / "source")
    prepare_data.main(prepare_data.Arguments(name, str(tmp_path / "source"), data_dir=tmp_path / "data"))
    folder = tmp_path / "data" / name
    prompts = layout.load_instructions(folder / "release")
    for stem, (queries, candidates) in sizes.items():
        asked = mbeir.load_queries(folder, f"mbeir_{stem}_{split}")
        pool = mbeir.load_candidates(folder, f"mbeir_{stem}_cand_pool")
        assert (len(asked), len(pool)) == (queries, candidates)
        qrels = layout.load_qrels(folder / f"release/qrels/{split}/mbeir_{stem}_{split}_qrels.txt")
        assert set(qrels) == set(asked.keys)
        assert set().union(*qrels.values()) <= set(pool.keys)
        source, target = TASKS[asked.tasks[0]].split("2")
        assert (asked[0]["dataset_id"], layout.SIDES[source], layout.SIDES[target]) in prompts
    assert set(unseen.SETS) == set(RELEASES)


def test_what_is_asked_and_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(unseen, "CC_NEG_TEST", 2)

    def prepared(name: str) -> pathlib.Path:
        RELEASES[name][0](tmp_path / name)
        prepare_data.main(prepare_data.Arguments(name, str(tmp_path / name), data_dir=tmp_path / "data"))
        return tmp_path / "data" / name

    dialog = mbeir.load_queries(prepared("visdial"), "mbeir_visdial_task0_test")[0]
    assert dialog["query_txt"] == "Q: how many? A: two Q: is it day? A: yes"
    folder = prepared("flickr30k")
    right = layout.load_qrels(folder / "release/qrels/test/mbeir_flickr30k_task3_test_qrels.txt")
    assert [len(dids) for dids in right.values()] == [5, 5]
    folder = prepared("genecis")
    judged = layout.load_judged(folder / "release/qrels/test/mbeir_genecis_focus_attribute_task7_test_qrels.txt")
    assert [sorted(dids.values()) for dids in judged.values()] == [[False, False, True]] * 2
    prompts = {prompt for found in layout.load_instructions(folder / "release").values() for prompt in found}
    assert len(prompts) == 2  # focus_attribute has one of its own
    assert (tmp_path / "urban1k").exists() is False
    folder = prepared("vist")
    story, other = (mbeir.load_queries(folder, "mbeir_vist_task7_test")[i] for i in (0, 1))
    assert story["query_txt"] == "Tale 11. <image> Tale 12. <image> Tale 13. <image> Tale 14. <image> Tale 15."
    assert story["images"] == [(tmp_path / f"vist/images/val/{i}.jpg").read_bytes() for i in (11, 12, 13, 14)]
    judged = layout.load_judged(folder / "release/qrels/test/mbeir_vist_task7_test_qrels.txt")
    assert sorted(judged[story["qid"]].values()) == [-1, -1, -1, -1, 1]
    assert sorted(judged[other["qid"]].values()) == [-1, -1, -1, 1]  # a picture that comes twice
    folder = prepared("mtfiq")
    asked = mbeir.load_queries(folder, "mbeir_mtfiq_task7_test")
    assert asked[0]["query_txt"] == "<image> is red <image> is longer and has sleeves"
    assert [len(asked[i]["images"]) for i in (0, 1)] == [2, 1]
    folder = prepared("ccneg")
    pool = mbeir.load_candidates(folder, "mbeir_ccneg_task3_cand_pool")
    assert [pool[i]["txt"] for i in (0, 1)] == ["a dog", "a cat not a dog"]
    folder = prepared("circo")
    assert not (folder / "release/qrels/test").exists()  # the server has the answers
    asked = mbeir.load_queries(folder, "mbeir_circo_task7_test").keys
    pool = mbeir.load_candidates(folder, "mbeir_circo_task7_cand_pool").keys
    sent = unseen.circo_submission(folder / "release", {asked[1]: pool[:2], asked[0]: pool[:3]})
    assert sent == {"1": [0, 1], "0": [0, 1, 2]}
    folder = prepared("urban1k")
    assert mbeir.load_queries(folder, "mbeir_urban1k_task0_test")[2]["query_txt"] == "Street 10."


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("circo", "annotations/val.json", None, "val.json is missing; docs/data.md"),
        ("circo", "annotations/val.json", '[{"id": 4}]', "query 4: the field 'reference_img_id' is missing"),
        (
            "circo",
            "annotations/val.json",
            '[{"id": 4, "reference_img_id": 99, "gt_img_ids": [], "relative_caption": ""}]',
            "query 4: the picture 99 is not in",
        ),
        ("circo", "annotations/test.json", None, "test.json is missing"),
        ("vist", "sis/val.story-in-sequence.json", '{"annotations": [[]]}', "annotation 0: the field 'story_id'"),
        ("vist", "images/val/15.png", None, r"the picture 'images/val/15\.jpg' is not under"),
        ("mtfiq", "data/all.val.json", '[{"target": ["C"], "reference": []}]', r"record 0: expected target \[_, pic"),
        ("ccneg", "ccneg_preprocessed.pt", "no file of torch", "torch cannot read it"),
        ("ccneg", "ccneg_preprocessed.pt", None, "ccneg_preprocessed.pt is missing"),
        ("flickr30k", "flickr_text.json", '["one"]', "1 captions; five to a picture"),
        ("sugarcrepe", "add_obj.json", "{", "add_obj.json: not valid JSON"),
        ("sharegpt4v", "datas_for_validation.json", '[{"caption": "x"}]', "record 1: the field 'image_name'"),
        ("visdial", "visdial_1.0_val.json", "{}", "the field 'data' is missing"),
        (
            "visdial",
            "visdial_1.0_val.json",
            '{"data": {"questions": [], "answers": [], "dialogs": [{"image_id": 1, "dialog": [{"question": 3}]}]}}',
            "not as the authors of visdial release it .IndexError",
        ),
        ("sugarcrepe", "add_obj.json", "[]", "not as the authors of sugarcrepe release it .AttributeError"),
        ("urban1k", "caption/x.txt", "a caption", "not as the authors of urban1k release it .ValueError: .*'x'"),
        ("urban1k", "image/2.jpg", "no picture", r"line 2: the picture 'image/2\.jpg' cannot be decoded"),
    ],
)
def test_a_broken_benchmark_is_refused(tmp_path, name, file, text, message):
    RELEASES[name][0](tmp_path / "source")
    path = tmp_path / "source" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        prepare_data.main(prepare_data.Arguments(name, str(tmp_path / "source"), data_dir=tmp_path / "data"))
