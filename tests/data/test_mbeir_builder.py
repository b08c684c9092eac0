"""A release in M-BEIR's layout becomes ArrayRecord: every field, every quirk, every mend."""

import io
import json
import pathlib
import pickle
import shutil

import grain
import pytest
from PIL import Image

from trace_jax.data.builders import layout, mbeir


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


RED, BLUE = png("red"), png("blue")
QUERY = {
    "qid": "7:1",
    "query_txt": "is blue",
    "query_img_path": "mbeir_images/a/red.png",
    "query_modality": "image,text",
    "query_src_content": None,
    "pos_cand_list": ["7:1"],
    "neg_cand_list": [],
    "task_id": 7,
}
CANDIDATE = {
    "did": "7:1",
    "txt": None,
    "img_path": "mbeir_images/a/blue.png",
    "modality": "image",
    "src_content": None,
}
TEXT_QUERY = {**QUERY, "qid": "2:5", "query_img_path": None, "query_modality": "text", "task_id": 2}


def write(path: pathlib.Path, *records: dict | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture
def release(tmp_path) -> pathlib.Path:
    """The smallest release, with M-BEIR's quirks: dicts as positives, "text,image", null lists."""
    root = tmp_path / "release"
    for name, data in (("red", RED), ("blue", BLUE)):
        path = root / f"mbeir_images/a/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    quirky = {**TEXT_QUERY, "pos_cand_list": [{"did": "7:1"}, {"did": "7:2"}], "neg_cand_list": None}
    write(root / "query/union_train/mbeir_union_up_train.jsonl", QUERY, quirky, QUERY)
    write(root / "query/val/mbeir_fashioniq_task7_val.jsonl", {**QUERY, "query_modality": "text,image"})
    write(root / "query/test/mbeir_fashioniq_task7_test.jsonl", {**QUERY, "qid": "7:2"})
    captioned = {**CANDIDATE, "did": "7:2", "txt": "blue – très", "modality": "text,image"}
    write(root / "cand_pool/local/mbeir_fashioniq_task7_cand_pool.jsonl", CANDIDATE, captioned)
    write(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", CANDIDATE)
    write(root / "cand_pool/global/mbeir_union_test_cand_pool.jsonl", CANDIDATE)
    thought = {"qid": "7:1", "complex": True, "reasoning": "It is red.", "answer": "Blue."}
    write(root / "cot/train/mbeir_fashioniq_task7_train_cot.jsonl", thought)
    write(root / "qrels/test/mbeir_fashioniq_task7_test_qrels.txt", "7:2 0 7:1 1 7", "7:2 0 7:2 1 7")
    write(
        root / "instructions/query_instructions.tsv",
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4",
        "image,text\timage\tFashionIQ\t7\tOne.\tTwo.\tThree.\tFour.",
    )
    return root


def test_queries(release, tmp_path):
    assert mbeir.build(release, tmp_path)
    source = mbeir.load_queries(tmp_path, "train")
    assert len(source) == 3
    assert source[0] == {
        "qid": "7:1",
        "query_txt": "is blue",
        "images": [RED],
        "modality": "image,text",
        "src_content": "",
        "task_id": 7,
        "dataset_id": 7,
        "pos_dids": ["7:1"],
        "neg_dids": [],
        "complex": True,
        "reasoning": "It is red.",
        "answer": "Blue.",
    }
    assert source[1] == {
        **source[0],
        "qid": "2:5",
        "images": [],
        "modality": "text",
        "task_id": 2,
        "dataset_id": 2,
        "pos_dids": ["7:1", "7:2"],
        "complex": False,
        "reasoning": "",
        "answer": "",
    }
    assert source[2] == source[0]  # an upsampled query may come twice
    assert (source.keys, source.tasks) == (["7:1", "2:5", "7:1"], [7, 2, 7])
    assert source.__getitems__([2, 1]) == [source[2], source[1]]
    val = mbeir.load_queries(tmp_path, "mbeir_fashioniq_task7_val")[0]
    assert val["modality"] == "image,text" and not val["complex"]


def test_candidates(release, tmp_path):
    mbeir.build(release, tmp_path)
    pool = mbeir.load_candidates(tmp_path, "mbeir_fashioniq_task7_cand_pool")
    assert pool[0] == {"did": "7:1", "txt": "", "image": BLUE, "modality": "image"}
    assert pool[1] == {"did": "7:2", "txt": "blue – très", "image": BLUE, "modality": "image,text"}
    assert mbeir.load_candidates(tmp_path, "train").keys == ["7:1"]
    with pytest.raises(ValueError, match="did you mean mbeir_union_train_cand_pool"):
        mbeir.load_candidates(tmp_path, "mbeir_union_test_cand_pool")  # a union is not stored again


def test_sources_pickle_and_feed_grain(release, tmp_path):
    mbeir.build(release, tmp_path)
    source = pickle.loads(pickle.dumps(mbeir.load_queries(tmp_path, "train")))
    data = grain.MapDataset.source(source).seed(1).shuffle().map(lambda record: record["qid"])
    assert sorted(data[i] for i in range(len(data))) == ["2:5", "7:1", "7:1"]


def test_a_complete_build_is_skipped_and_a_changed_release_is_not(release, tmp_path):
    assert mbeir.build(release, tmp_path)
    assert not mbeir.build(release, tmp_path)
    write(release / "query/test/mbeir_fashioniq_task7_test.jsonl", QUERY, {**QUERY, "qid": "7:3"})
    assert mbeir.build(release, tmp_path)
    assert mbeir.load_queries(tmp_path, "mbeir_fashioniq_task7_test").keys == ["7:1", "7:3"]


def test_a_release_elsewhere_is_linked(release, tmp_path):
    folder = tmp_path / "data/mine"
    mbeir.build(release, folder)
    assert (folder / "release").resolve() == release
    assert layout.load_instructions(folder / "release")
    assert mbeir.load_queries(folder, "train")[0]["images"] == [RED]


def test_a_release_that_moved_or_another_one_is_linked_anew(release, tmp_path):
    folder, moved = tmp_path / "data/mine", tmp_path / "moved"
    mbeir.build(release, folder)
    shutil.copytree(release, moved)
    (moved / "qrels/test/mbeir_fashioniq_task7_test_qrels.txt").write_text("7:2 0 7:1 1 7\n")
    assert not mbeir.build(moved, folder)  # the records are the same, the qrels are not
    assert (folder / "release").resolve() == moved
    write(moved / "query/test/mbeir_fashioniq_task7_test.jsonl", "{")
    with pytest.raises(layout.ReleaseError, match="line 1: not valid JSON"):
        mbeir.build(moved, folder)
    shutil.rmtree(moved)  # a link to nowhere
    assert not mbeir.build(release, folder) and (folder / "release").resolve() == release


def test_a_release_stays_linked_until_the_records_of_another_are_finished(release, tmp_path):
    folder, other = tmp_path / "data/mine", tmp_path / "other"
    mbeir.build(release, folder)
    shutil.copytree(release, other)
    write(other / "query/test/mbeir_fashioniq_task7_test.jsonl", QUERY, "{")
    with pytest.raises(layout.ReleaseError, match="line 2: not valid JSON"):
        mbeir.build(other, folder)
    assert (folder / "release").resolve() == release and mbeir.load_queries(folder, "train")


def test_a_release_in_the_place_of_the_link_is_not_mixed_with_another(release, tmp_path):
    folder = tmp_path / "data/mine"
    shutil.copytree(release, folder / "release")
    with pytest.raises(layout.ReleaseError, match=r"mine/release holds qrels other than .*: move that folder away"):
        mbeir.build(release, folder)
    assert mbeir.build(folder / "release", folder)


@pytest.mark.parametrize("kind", [mbeir.MbeirQueries, mbeir.MbeirCandidates])
def test_a_split_whose_index_was_not_written_is_written_again(release, tmp_path, monkeypatch, kind):
    whole = kind.download_and_prepare

    def killed(builder) -> None:
        whole(builder)  # TFDS has renamed its folder; the index is missing
        raise KeyboardInterrupt

    monkeypatch.setattr(kind, "download_and_prepare", killed)
    with pytest.raises(KeyboardInterrupt):
        mbeir.build(release, tmp_path)
    monkeypatch.setattr(kind, "download_and_prepare", whole)
    assert mbeir.build(release, tmp_path)
    assert mbeir.load_queries(tmp_path, "train").keys == ["7:1", "2:5", "7:1"]
    assert mbeir.load_candidates(tmp_path, "mbeir_fashioniq_task7_cand_pool").keys == ["7:1", "7:2"]


def test_a_failed_build_leaves_the_old_records(release, tmp_path):
    mbeir.build(release, tmp_path)
    union = release / "query/union_train/mbeir_union_up_train.jsonl"
    union.write_text(union.read_text() + '{"qid": "7:9", "query_txt"')
    with pytest.raises(layout.ReleaseError, match=r"line 4: not valid JSON .* fetch it again"):
        mbeir.build(release, tmp_path)
    assert len(mbeir.load_queries(tmp_path, "train")) == 3


BROKEN_QUERIES = [
    ({"qid": "seven"}, r"line 1: the qid 'seven' is not of the form"),
    ({"qid": None}, r"line 1: the qid None"),
    ({"task_id": 9}, r"line 1: task_id is 9; M-BEIR's tasks are 0 to 8"),
    ({"task_id": "7"}, r"line 1: task_id is '7'"),
    ({"query_modality": "video"}, r"line 1: query_modality is 'video'; use"),
    ({"query_modality": "text", "query_txt": None}, r"line 1: .* there is no text; mend either"),
    ({"query_img_path": None}, r"line 1: .* there is no picture; mend either"),
    ({"query_img_path": "mbeir_images/a/gone.png"}, r"line 1: no picture .*gone.png.* unpack"),
    ({"pos_cand_list": [12]}, r"line 1: 12 in pos_cand_list is no id"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN_QUERIES)
def test_broken_queries_name_file_line_and_mend(release, tmp_path, change, message):
    path = release / "query/test/mbeir_fashioniq_task7_test.jsonl"
    write(path, {**QUERY, **change})
    with pytest.raises(layout.ReleaseError, match=message) as caught:
        mbeir.build(release, tmp_path)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "records").exists()


def test_missing_field_and_wrong_line(release, tmp_path):
    pool = release / "cand_pool/local/mbeir_fashioniq_task7_cand_pool.jsonl"
    write(pool, CANDIDATE, {k: v for k, v in CANDIDATE.items() if k != "modality"})
    with pytest.raises(layout.ReleaseError, match="line 2: the field 'modality' is missing"):
        mbeir.build(release, tmp_path)
    write(pool, CANDIDATE, "[1, 2]")
    with pytest.raises(layout.ReleaseError, match="line 2: expected a JSON object, found list"):
        mbeir.build(release, tmp_path)


@pytest.mark.parametrize(("data", "message"), [(RED[:-30], "cut short"), (b"", "is empty")])
def test_truncated_picture(release, tmp_path, data, message):
    (release / "mbeir_images/a/red.png").write_bytes(data)
    with pytest.raises(layout.ReleaseError, match=message):
        mbeir.build(release, tmp_path)


def test_a_whole_picture_with_something_behind_its_end_is_taken(release, tmp_path):
    longer = RED + bytes(100)
    (release / "mbeir_images/a/red.png").write_bytes(longer)
    mbeir.build(release, tmp_path)
    assert mbeir.load_queries(tmp_path, "train")[0]["images"] == [longer]


def test_not_a_release(tmp_path):
    with pytest.raises(layout.ReleaseError, match="is this an M-BEIR release"):
        mbeir.build(tmp_path, tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"run launch/build_data\.py"):
        mbeir.load_queries(tmp_path / "data", "train")


def test_the_embedded_release_goes_through_the_same_door(tiny_config):
    folder = pathlib.Path(tiny_config.data.root) / tiny_config.data.release
    for path in (folder / "release/query/test").glob("*.jsonl"):
        asked = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        source = mbeir.load_queries(folder, path.stem)
        assert source.keys == [q["qid"] for q in asked]
        for query, record in zip(asked, source, strict=True):
            assert record["pos_dids"] == query["pos_cand_list"]
            assert record["query_txt"] == (query["query_txt"] or "")
            name = query["query_img_path"]
            assert record["images"] == ([(folder / "release" / name).read_bytes()] if name else [])
    train = mbeir.load_candidates(folder, "train")
    queries = mbeir.load_queries(folder, "train")
    assert set(train.keys) == {did for record in queries for did in record["pos_dids"] + record["neg_dids"]}
