"""A release in M-BEIR's layout is looked over: a clean one passes, each of many breaks is named by file and record."""

import json
import pathlib
import shutil
from collections.abc import Callable

import pytest
from etils import epath
from PIL import Image

from launch import prepare_data
from tests.data.mbeir_release import write_release
from trace_jax.data.builders import layout, mbeir
from trace_jax.data.builders.check import PUBLISHED, agrees, check

QUERIES = "query/test/mbeir_fashioniq_task7_test.jsonl"
MISNAMED = "query/test/mbeir_fashioniq_test.jsonl"
CAPTIONS = "query/test/mbeir_mscoco_task0_test.jsonl"
TRAIN = "query/union_train/mbeir_union_up_train.jsonl"
POOL = "cand_pool/local/mbeir_edis_task2_cand_pool.jsonl"
QRELS = "qrels/test/mbeir_cirr_task7_test_qrels.txt"
INSTRUCTIONS = "instructions/query_instructions.tsv"


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> pathlib.Path:
    return write_release(tmp_path_factory.mktemp("clean") / "M-BEIR", queries=2)


@pytest.fixture
def release(clean, tmp_path) -> pathlib.Path:
    shutil.copytree(clean, tmp_path / "M-BEIR")
    return tmp_path / "M-BEIR"


def test_a_clean_release_passes(clean, tmp_path):
    report = check(clean, tmp_path, complete=True)
    report.raise_for_problems()
    rows = {row.file: row for row in report.rows}
    assert len(PUBLISHED) == 16
    assert sum(file.startswith("query/test/") for file in rows) == 16
    assert rows[QUERIES].records == 2 and rows[TRAIN].records == 38
    assert rows["qrels/test/mbeir_oven_task6_test_qrels.txt"].counts == {"elsewhere": 2}  # right, but of another pool
    line = next(line for line in report.table.splitlines() if line.startswith(QUERIES))
    assert line.split()[1:3] == ["2", "≠6K"]
    assert "≠" not in check(clean, tmp_path).table  # a release of one's own has no published counts


@pytest.mark.parametrize(
    ("count", "published", "same"),
    [(24_809, "24.8K", True), (24_700, "24.8K", False), (1_047_067, "1M", True), (2_120, "2K", True), (9, "2K", False)],
)
def test_counts_agree_when_they_round_to_the_published_ones(count, published, same):
    assert agrees(count, published) is same


def change(path: str, line: int, **fields) -> Callable[[pathlib.Path], None]:
    """Changes fields of a record; a field that becomes ... is left out."""

    def apply(root: pathlib.Path) -> None:
        lines = (root / path).read_text().splitlines()
        record = json.loads(lines[line - 1]) | fields
        lines[line - 1] = json.dumps({name: value for name, value in record.items() if value is not ...})
        (root / path).write_text("\n".join(lines) + "\n")

    return apply


def replace(path: str, line: int, text: str | None) -> Callable[[pathlib.Path], None]:
    """Puts a text in the place of a line, or takes it away."""

    def apply(root: pathlib.Path) -> None:
        lines = (root / path).read_text().splitlines()
        lines[line - 1 : line] = [] if text is None else [text]
        (root / path).write_text("\n".join(lines) + "\n")

    return apply


def repeat(path: str) -> Callable[[pathlib.Path], None]:
    def apply(root: pathlib.Path) -> None:
        lines = (root / path).read_text()
        (root / path).write_text(lines + lines.splitlines()[0] + "\n")

    return apply


def remove(path: str) -> Callable[[pathlib.Path], None]:
    return lambda root: (root / path).unlink()


def empty(path: str) -> Callable[[pathlib.Path], None]:
    return lambda root: (root / path).write_text("")


def picture(data: Callable[[bytes], bytes] | None) -> Callable[[pathlib.Path], None]:
    """Gives a query a picture of its own: a good one, changed by `data`; without it, none."""

    def apply(root: pathlib.Path) -> None:
        good = next((root / "mbeir_images/fashioniq_images").iterdir()).read_bytes()
        if data is not None:
            (root / "mbeir_images/own.jpg").write_bytes(data(good))
        change(QUERIES, 2, query_img_path="mbeir_images/own.jpg")(root)

    return apply


BREAKS = {
    "query file missing": (remove(QUERIES), QUERIES, "is missing; it is part of M-BEIR"),
    "pool missing": (remove(POOL), POOL, "is missing"),
    "instructions missing": (remove(INSTRUCTIONS), INSTRUCTIONS, "is missing; queries are asked with its prompts"),
    "qrels empty": (empty(QRELS), QRELS, "is empty"),
    "line cut short": (replace(QUERIES, 2, '{"qid": "7:9", "query_t'), QUERIES, "line 2: not valid JSON"),
    "line no object": (replace(QUERIES, 1, "[1, 2]"), QUERIES, "line 1: expected a JSON object, found list"),
    "qid missing": (change(QUERIES, 2, qid=...), QUERIES, "line 2: the field 'qid' is missing"),
    "qid malformed": (change(QUERIES, 1, qid="7-1"), QUERIES, "line 1: the qid '7-1' is not of the form"),
    "qid twice": (repeat(QUERIES), QUERIES, "line 3: 7:5 stands in line 1 already"),
    "task unknown": (change(QUERIES, 1, task_id=11), QUERIES, "line 1: task_id is 11"),
    "task of another file": (change(QUERIES, 1, task_id=6), QUERIES, "line 1: task_id is 6, in a file of task 7"),
    "modality unknown": (change(QUERIES, 1, query_modality="audio"), QUERIES, "line 1: query_modality is 'audio'"),
    "modality of another task": (
        change(QUERIES, 1, query_modality="text"),
        QUERIES,
        "line 1: query_modality is 'text', but task 7 asks with 'image,text'",
    ),
    "text missing": (change(CAPTIONS, 2, query_txt=None), CAPTIONS, "line 2: .* there is no text"),
    "pictures without places": (
        change(QUERIES, 2, query_img_path=["mbeir_images/own.jpg"] * 2),
        QUERIES,
        "line 2: 2 pictures, 0 times <image> in the text",
    ),
    "answer no id": (change(QUERIES, 1, pos_cand_list=[12]), QUERIES, "line 1: 12 in pos_cand_list is no id"),
    "answer dangling": (
        change(QUERIES, 2, pos_cand_list=["7:99"]),
        QUERIES,
        "line 2: the candidate 7:99 is not in any",
    ),
    "training answer of test": (
        change(TRAIN, 1, pos_cand_list=["0:5"]),
        TRAIN,
        "line 1: the candidate 0:5 is not in mbeir_union_train_cand_pool",
    ),
    "training query unanswered": (change(TRAIN, 3, pos_cand_list=[]), TRAIN, "line 3: pos_cand_list is empty"),
    "training answer of another modality": (
        change(TRAIN, 3, pos_cand_list=["0:1"]),
        TRAIN,
        "line 3: the right answer 0:1 is 'image', and the task asks for 'text'; mend either",
    ),
    "did malformed": (change(POOL, 2, did="edis"), POOL, "line 2: the did 'edis' is not of the form"),
    "did twice": (repeat(POOL), POOL, "line 5: 3:5 stands in line 1 already"),
    "modality missing": (change(POOL, 3, modality=...), POOL, "line 3: the field 'modality' is missing"),
    "candidate without picture": (change(POOL, 1, img_path=None), POOL, "line 1: .* there is no picture"),
    "picture missing": (picture(None), QUERIES, "line 2: the picture 'mbeir_images/own.jpg' is not under"),
    "picture a folder": (
        lambda root: [picture(None)(root), (root / "mbeir_images/own.jpg").mkdir()],
        QUERIES,
        "line 2: the picture 'mbeir_images/own.jpg' is not under",
    ),
    "picture cut short": (picture(lambda data: data[:-200]), QUERIES, "line 2: .*own.jpg' cannot be decoded"),
    "picture a web page": (picture(lambda _: b"<html>404</html>"), QUERIES, "line 2: .*own.jpg' cannot be decoded"),
    "picture empty": (picture(lambda _: b""), QUERIES, "line 2: .*own.jpg' cannot be decoded"),
    "qrels column missing": (replace(QRELS, 2, "8:6 0 8:6"), QRELS, "line 2: expected 5 columns"),
    "qrels of no query": (replace(QRELS, 2, "8:6 0 8:6 1 7\n8:77 0 8:6 1 7"), QRELS, "the query 8:77 is not in"),
    "qrels of no candidate": (replace(QRELS, 2, "8:6 0 8:77 1 7"), QRELS, "8:77, judged for 8:6, is in no pool"),
    "query without qrels": (replace(QRELS, 2, None), QRELS, "no right answer for the query 8:6"),
    "query file misnamed": (
        lambda root: shutil.copy(root / QUERIES, root / MISNAMED),
        MISNAMED,
        "is not read; rename it to mbeir_<data set>_task<number>_test.jsonl",
    ),
    "prompts missing": (
        replace(INSTRUCTIONS, 2, "text\timage\tvisualnews\t0\t\t\t\t"),
        INSTRUCTIONS,
        "line 2: expected 4 columns, then prompts",
    ),
    "prompts of a data set missing": (
        lambda root: [replace(INSTRUCTIONS, 15, None)(root), change(TRAIN, 1)(root)],
        "query/",
        "no prompt for data set 8, image,text to image",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_each_break_is_one_error_that_names_file_and_record(release, tmp_path, name):
    damage, file, message = BREAKS[name]
    damage(release)
    report = check(release, tmp_path / "kept", complete=True)
    if name == "prompts of a data set missing":  # all its query files say so
        assert {problem.split(", line")[0].split("/")[-1].split("_")[1] for problem in report.problems} <= {
            "cirr",
            "union",
        }
    else:
        assert len(report.problems) == 1, report.problems
    assert str(release / file) in report.problems[0]
    with pytest.raises(layout.ReleaseError, match=message):
        report.raise_for_problems()


def test_a_file_whose_answers_a_server_keeps_names_none(release, tmp_path):
    qrels = f"qrels/test/{pathlib.Path(QUERIES).stem}_qrels.txt"
    remove(qrels)(release)
    change(QUERIES, 1, pos_cand_list=[], neg_cand_list=[])(release)
    with pytest.raises(layout.ReleaseError, match=f"line 2: names candidates, but there is no .*{qrels}; fetch it"):
        check(release, tmp_path).raise_for_problems()
    change(QUERIES, 2, pos_cand_list=[], neg_cand_list=[])(release)
    check(release, tmp_path).raise_for_problems()


def test_all_problems_are_listed_and_counted(release, tmp_path):
    change(QUERIES, 1, qid="x")(release)
    change(POOL, 2, did="x")(release)
    report = check(release, tmp_path, complete=True)
    with pytest.raises(layout.ReleaseError, match=r"2 problems in .*"):
        report.raise_for_problems()
    assert len(report.problems) == 2


def test_a_fault_that_was_looked_at_is_counted_only(release, tmp_path):
    repeat(POOL)(release)
    change(QUERIES, 2, pos_cand_list=["7:99"])(release)
    with pytest.raises(layout.ReleaseError, match="1 problems"):  # ids are looked for once all records are clean
        check(release, tmp_path, complete=True).raise_for_problems()
    accepted = ("duplicate ids", "dangling ids")
    report = check(release, tmp_path, complete=True, accepted=accepted)
    report.raise_for_problems()
    counts = {row.file: row.counts for row in report.rows if row.counts}
    assert counts[POOL] == {"duplicate ids": 1} and counts[QUERIES] == {"dangling ids": 1}
    prepare_data.main(prepare_data.Arguments("mbeir", str(release), data_dir=tmp_path / "data", accept=accepted))
    assert len(mbeir.load_candidates(tmp_path / "data/mbeir", pathlib.Path(POOL).stem)) == 5


def test_blank_pictures_are_counted_and_good_ones_are_not_decoded_again(release, tmp_path, monkeypatch):
    Image.new("RGB", (30, 30), "white").save(release / "mbeir_images/own.jpg")
    change(QUERIES, 2, query_img_path="mbeir_images/own.jpg")(release)
    first = check(release, tmp_path / "kept", complete=True)
    monkeypatch.setattr("trace_jax.data.builders.check.decode_image", lambda *_: pytest.fail("decoded again"))
    for report in (first, check(release, tmp_path / "kept", complete=True)):
        report.raise_for_problems()
        assert [row.file for row in report.rows if row.counts.get("blank")] == [QUERIES]


def test_a_picture_that_changed_is_decoded_again(release, tmp_path):
    check(release, tmp_path / "kept", complete=True).raise_for_problems()
    shown = json.loads((release / QUERIES).read_text().splitlines()[0])["query_img_path"]
    good = (release / shown).read_bytes()
    (release / shown).write_bytes(good[:-200])
    with pytest.raises(layout.ReleaseError, match="line 1: .*cannot be decoded"):
        check(release, tmp_path / "kept", complete=True).raise_for_problems()
    (release / shown).write_bytes(good)
    check(release, tmp_path / "kept", complete=True).raise_for_problems()


def test_a_bad_picture_is_never_remembered_as_good(release, tmp_path):
    picture(lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2))(release)
    for _ in range(2):
        with pytest.raises(layout.ReleaseError, match="line 2: .*cannot be decoded"):
            check(release, tmp_path / "kept", complete=True).raise_for_problems()
    picture(lambda data: data)(release)  # of the same size
    check(release, tmp_path / "kept", complete=True).raise_for_problems()


def test_records_whose_fault_was_accepted_are_left_out_and_listed(release, tmp_path):
    home = f"cand_pool/global/{layout.TRAIN_POOL}.jsonl"
    asked = [json.loads(line) for line in (release / TRAIN).read_text().splitlines()]
    pool = [json.loads(line) for line in (release / home).read_text().splitlines()]
    answered = next(i for i, record in enumerate(pool) if record["modality"] == "image")  # the answer of a query
    gone = pool[answered]["did"]
    lost = [i for i, query in enumerate(asked) if query["pos_cand_list"] in ([gone], [{"did": gone}])]
    assert lost
    (release / "mbeir_images/own.jpg").write_bytes(b"<html>404</html>")
    change(home, answered + 1, img_path="mbeir_images/own.jpg")(release)
    change(QUERIES, 1, query_img_path="mbeir_images/own.jpg")(release)
    change(CAPTIONS, 2, query_txt=None)(release)
    change(POOL, 3, img_path="mbeir_images/nowhere.jpg")(release)
    accepted = ("empty", "undecodable", "missing pictures")
    with pytest.raises(layout.ReleaseError, match="there is no text"):
        check(release, tmp_path / "kept", complete=True, accepted=accepted[1:]).raise_for_problems()
    with pytest.raises(layout.ReleaseError, match="1 problems .*\n.*nowhere"):
        check(release, tmp_path / "kept", complete=True, accepted=accepted[:2]).raise_for_problems()
    arguments = prepare_data.Arguments("mbeir", str(release), data_dir=tmp_path / "data", accept=accepted)
    prepare_data.main(arguments)
    folder = tmp_path / "data/mbeir"
    listed = [json.loads(line) for line in (folder / "records/dropped.jsonl").read_text().splitlines()]
    why = {(drop["file"], drop["line"]): drop["why"] for drop in listed}
    bad = {(home, answered + 1), (QUERIES, 1), (CAPTIONS, 2), (POOL, 3)}
    assert set(why) == bad | {(TRAIN, i + 1) for i in lost}
    assert why[CAPTIONS, 2] == "has no text or no picture" and "own.jpg' cannot be decoded" in why[QUERIES, 1]
    assert why[TRAIN, lost[0] + 1] == "its right answers are left out" and "is not under" in why[POOL, 3]
    train = mbeir.load_queries(folder, "train")
    assert train.keys == [q["qid"] for i, q in enumerate(asked) if i not in lost]
    assert all(gone not in query["pos_dids"] + query["neg_dids"] for query in train)
    assert gone not in mbeir.load_candidates(folder, "train").keys
    assert len(mbeir.load_queries(folder, pathlib.Path(QUERIES).stem)) == 1
    assert not mbeir.build(release, folder, dropped=check(release, tmp_path, accepted=accepted).dropped)
    assert mbeir.load_candidates(folder, pathlib.Path(POOL).stem).keys == ["3:5", "3:6", "3:8"]


# Traces -------------------------------------------------------------------------------------------


def trace(qid: str, **fields) -> str:
    return json.dumps({"qid": qid, "complex": True, "reasoning": "It is red.", "answer": "Blue."} | fields)


def write_traces(release: pathlib.Path, name: str, *traces: str) -> None:
    (release / name).parent.mkdir(parents=True, exist_ok=True)
    (release / name).write_text("".join(line + "\n" for line in traces))


def test_traces_are_counted(release, tmp_path):
    write_traces(release, "cot/test/mbeir_fashioniq_task7_test_cot.jsonl", trace("7:5"), trace("7:6"))
    write_traces(release, "cot/train/mbeir_cirr_task7_train_cot.jsonl", trace("8:1"))
    write_traces(release, "cot/val/mbeir_cirr_task7_val_cot.jsonl")  # all of them may have been dropped
    report = check(release, tmp_path, complete=True)
    report.raise_for_problems()
    assert {row.file.split("/")[1]: row.records for row in report.rows if row.file.startswith("cot/")} == {
        "test": 2,
        "train": 1,
        "val": 0,
    }


COT = "cot/test/mbeir_fashioniq_task7_test_cot.jsonl"
BROKEN_TRACES = {
    "misnamed": (("cot/test/traces.jsonl", trace("7:5")), r"traces.jsonl: is not read; .*_cot\.jsonl: rename it"),
    "misplaced": (("cot/union_train/a_cot.jsonl", trace("7:5")), "a_cot.jsonl: is not read"),
    "foreign": ((COT, trace("7:5"), trace("7:77")), f"{COT}, line 2: the query 7:77 is not in query/test"),
    "twice": ((COT, trace("7:5"), trace("7:5")), f"{COT}, line 2: 7:5 has a trace already, in .*line 1"),
    "qid malformed": ((COT, trace("seven")), f"{COT}, line 1: the qid 'seven' is not of the form"),
    "unlabelled": ((COT, '{"qid": "7:5"}'), f"{COT}, line 1: the field 'complex' is missing"),
}


@pytest.mark.parametrize("name", BROKEN_TRACES)
def test_broken_traces_are_one_error(release, tmp_path, name):
    (file, *traces), message = BROKEN_TRACES[name]
    write_traces(release, file, *traces)
    report = check(release, tmp_path, complete=True)
    assert len(report.problems) == 1, report.problems
    with pytest.raises(layout.ReleaseError, match=message):
        report.raise_for_problems()


def test_traces_of_another_release_are_no_traces(release, tmp_path):
    write_traces(release, "cot/train/mbeir_cirr_task7_train_cot.jsonl", trace("8:5"), trace("8:6"))  # of test
    with pytest.raises(layout.ReleaseError, match="cot/train: none of its traces is of a query of this release"):
        check(release, tmp_path, complete=True, accepted=("dangling ids",)).raise_for_problems()


# The program --------------------------------------------------------------------------------------


def test_prepare_builds_a_clean_release_and_goes_on_where_it_stopped(release, tmp_path, capsys, monkeypatch):
    arguments = prepare_data.Arguments("mbeir", str(release), data_dir=tmp_path / "data")
    written, write = [], mbeir.Part.write

    def stopping(part: mbeir.Part, **given) -> None:
        if len(written) == 5:
            raise OSError("no space left")
        written.append(part.split)
        write(part, **given)

    monkeypatch.setattr(mbeir.Part, "write", stopping)
    with pytest.raises(SystemExit, match="the same command goes on"):
        prepare_data.main(arguments)
    assert not (tmp_path / "data/mbeir/records").exists()
    monkeypatch.setattr(mbeir.Part, "write", lambda part, **given: (written.append(part.split), write(part, **given)))
    prepare_data.main(arguments)
    assert len(written) == len(set(written)) == len(mbeir.parts_of(release))  # each once, over both runs
    assert "written" in capsys.readouterr().out
    prepare_data.main(arguments)
    assert "complete" in capsys.readouterr().out
    assert len(mbeir.load_queries(tmp_path / "data/mbeir", "train")) == 38


def test_prepare_refuses_a_broken_release(release, tmp_path):
    change(QUERIES, 1, qid="x")(release)
    with pytest.raises(SystemExit, match=r"line 1: the qid 'x'"):
        prepare_data.main(prepare_data.Arguments("mbeir", str(release), data_dir=tmp_path / "data"))
    assert not (tmp_path / "data/mbeir/records.partial").exists()
    with pytest.raises(SystemExit, match="is no folder"):
        prepare_data.main(prepare_data.Arguments("mbeir", str(tmp_path / "gone"), data_dir=tmp_path / "data"))


def test_the_texts_of_a_bucket_are_copied_once(release, tmp_path):
    target = tmp_path / "copy"
    prepare_data.copy_texts(epath.Path(release), target)
    assert (target / QUERIES).read_text() == (release / QUERIES).read_text()
    assert not (target / "mbeir_images").exists()
    before = (target / QUERIES).stat().st_mtime_ns
    (target / POOL).write_text("")
    prepare_data.copy_texts(epath.Path(release), target)
    assert (target / QUERIES).stat().st_mtime_ns == before
    assert (target / POOL).read_text() == (release / POOL).read_text()
    assert mbeir.build(target, tmp_path / "data", images=str(release))  # pictures from where they are


def test_a_beam_runner_builds_the_same(release, tmp_path):
    single, beam = tmp_path / "single", tmp_path / "beam"
    for folder, runner in ((single, ""), (beam, "DirectRunner")):
        arguments = prepare_data.Arguments(
            "mbeir", str(release), data_dir=folder, runner=runner, beam_options=("--direct_num_workers=1",)
        )
        prepare_data.main(arguments)
    for split in ("train", "mbeir_mscoco_task3_test"):
        one, other = (mbeir.load_queries(folder / "mbeir", split) for folder in (single, beam))
        assert [one[i] for i in range(len(one))] == [other[i] for i in range(len(other))]
