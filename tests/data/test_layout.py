"""Lines of a release in M-BEIR's layout: what is read of each, and how each that is wrong is refused."""

import json
import pathlib

import pytest

from trace_jax.data.builders import layout

QUERY = {
    "qid": "7:1",
    "query_txt": "is blue",
    "query_img_path": "a/red.png",
    "query_modality": "image,text",
    "query_src_content": None,
    "pos_cand_list": ["7:1"],
    "neg_cand_list": None,
    "task_id": 7,
}
CANDIDATE = {"did": "7:1", "txt": "blue", "img_path": None, "modality": "text"}
TRACE = {"qid": "7:1", "complex": True, "reasoning": "It is red.", "answer": "Blue."}


def query(**changes) -> layout.QueryRecord:
    return layout.read_query("file, line 1", QUERY | changes, {}, lambda path, _: path.encode())


def candidate(**changes) -> layout.CandidateRecord:
    return layout.read_candidate("file, line 1", CANDIDATE | changes, lambda path, _: path.encode())


def trace(**changes) -> tuple[str, layout.Trace]:
    return layout.read_trace("file, line 1", TRACE | changes)


@pytest.mark.parametrize(
    ("read", "changes", "message"),
    [
        (query, {"qid": "7:500000"}, "the qid '7:500000' is not .* these below 214 and 500,000"),
        (query, {"pos_cand_list": ["214:1"]}, "'214:1' in pos_cand_list is no id"),
        (query, {"qid": "07:1"}, "the qid '07:1' is not of the form"),
        (query, {"task_id": True}, "task_id is True"),
        (query, {"query_modality": ["image", "text"]}, r"query_modality is \['image', 'text'\]; use"),
        (query, {"query_txt": 5}, "query_txt is 5; it is a text or null"),
        (query, {"query_txt": "  "}, "there is no text; mend either"),
        (query, {"query_txt": "as <image> and <image>"}, "1 pictures, 2 times <image> in the text"),
        (query, {"query_img_path": 5}, "query_img_path is 5; it is a path, a list of paths or null"),
        (query, {"query_img_path": [None]}, r"query_img_path is \[None\]"),
        (query, {"query_img_path": None}, "there is no picture; mend either"),
        (query, {"query_modality": "image", "query_txt": None, "query_img_path": None}, "there is no picture"),
        (query, {"pos_cand_list": 5}, "pos_cand_list is 5; it is a list of ids"),
        (query, {"pos_cand_list": "7:1"}, "pos_cand_list is '7:1'; it is a list of ids"),
        (query, {"neg_cand_list": ["7:10000000"]}, "'7:10000000' in neg_cand_list is no id"),
        (candidate, {"did": 7}, "the did 7 is not of the form"),
        (candidate, {"txt": ["blue"]}, r"txt is \['blue'\]; it is a text or null"),
        (candidate, {"img_path": 5}, "img_path is 5; it is a text or null"),
        (trace, {"complex": "false"}, "complex is 'false'"),
        (trace, {"reasoning": "", "answer": None}, "complex is True, reasoning '' and answer ''; it is true with"),
        (trace, {"complex": False}, "complex is False, reasoning 'It is red.'"),
        (trace, {"reasoning": 5}, "reasoning is 5; it is a text or null"),
    ],
)
def test_a_wrong_line_is_an_error_that_names_it(read, changes, message):
    with pytest.raises(layout.ReleaseError, match=f"^file, line 1: .*{message}"):
        read(**changes)


def test_both_spellings_are_read():
    assert query(query_modality="text,image")["modality"] == "image,text"
    assert query(pos_cand_list=[{"did": "7:1"}, "7:2"])["pos_dids"] == ["7:1", "7:2"]
    assert query(query_src_content={"kind": "colour"})["src_content"] == '{"kind": "colour"}'
    several = query(query_txt="<image> with <image>", query_img_path=["a", "b"])
    assert several["images"] == [b"a", b"b"]
    assert query(query_txt="as <image>")["images"] == [b"a/red.png"]
    assert trace(complex=False, reasoning="", answer=None) == ("7:1", layout.SIMPLE)


def test_a_line_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps({"txt": "😀"}).encode() + b'\n{"txt": "caf\xe9"}\n')
    found = layout.lines(path)
    assert next(found) == (f"{path}, line 1", {"txt": "😀"})
    with pytest.raises(layout.ReleaseError, match="line 2: not valid JSON"):
        next(found)
    path.write_text('{"txt": "\\uD83d"}\n')  # half of an emoji
    with pytest.raises(layout.ReleaseError, match="line 1: not valid JSON .*surrogates"):
        next(layout.lines(path))


def test_qrels_and_hashes(tmp_path):
    path = tmp_path / "qrels.txt"
    path.write_text("7:2 0 7:1 1 7\n7:2 0 7:2 1 7\n7:2 0 7:3 0 7\n7:4 0 7:5 -1\n")
    assert layout.load_qrels(path) == {"7:2": {"7:1", "7:2"}}
    assert layout.load_judged(path)["7:4"] == {"7:5": -1}
    path.write_bytes(b"7:2 0 7:1 1 7\n7:2 0 7:\xe9 1 7\n")
    with pytest.raises(layout.ReleaseError, match="line 2: expected 5 columns"):
        layout.load_qrels(path)
    assert layout.hash_qid("7:12") == 3_500_012 and layout.hash_did("7:341") == 70_000_341
    assert layout.qid_of(3_500_012) == "7:12" and layout.did_of(70_000_341) == "7:341"


def test_instructions(tmp_path):
    path: pathlib.Path = tmp_path / "instructions/query_instructions.tsv"
    with pytest.raises(layout.ReleaseError, match="is this an M-BEIR release"):
        layout.load_instructions(tmp_path)
    path.parent.mkdir()
    line = "text,image\timage\tFashionIQ\t7\tOne.\tTwo.\tThree.\tFour."
    path.write_text(f"query_modality\tcand_modality\n{line}\n")
    assert layout.load_instructions(tmp_path) == {(7, "image,text", "image"): ["One.", "Two.", "Three.", "Four."]}
    for wrong, message in (("text\timage", "expected 4 columns"), ("caf\udce9", "not UTF-8")):
        path.write_bytes(f"head\n{line}\n{wrong}\n".encode(errors="surrogateescape"))
        with pytest.raises(layout.ReleaseError, match=f"line 3: {message}"):
            layout.load_instructions(tmp_path)
