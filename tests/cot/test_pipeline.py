"""The stages over whole releases: the emoji's own metadata, policies, batches, what has been done and what has not."""

import dataclasses
import json
import pathlib

import pyarrow.parquet as pq
import pytest

from launch import build_cot, build_data
from tests.cot.release import good_trace, write_release
from tests.cot.test_server import config as scripted_config
from tests.cot.test_server import digests, traces
from trace_jax.config import load_config
from trace_jax.cot import batch, card, duplicates, pipeline, source, stages, teacher, write
from trace_jax.cot.build import run
from trace_jax.cot.cache import Answer
from trace_jax.cot.config import Budget, CotConfig, Filters, Teacher, Verify
from trace_jax.cot.prompts import Prompts
from trace_jax.cot.schema import Row, chosen, dump, read_rows, write_lines
from trace_jax.cot.statistics import BINS, Statistics
from trace_jax.data.builders import layout, mbeir
from trace_jax.data.schema import TASKS


def emoji_config(**changes) -> CotConfig:
    return dataclasses.replace(load_config("emoji", [], CotConfig, "configs/cot"), **changes)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory, tiny_config) -> pipeline.Build:
    """The tiny emoji release through all stages, its metadata as teacher and verifier."""
    release = pathlib.Path(tiny_config.data.root) / "tiny/release"
    options = emoji_config(verify=Verify(controls=0.1), part_rows=150, show_gold=0.5)
    build = pipeline.Build(options, release, tmp_path_factory.mktemp("cot") / "emoji")
    run(build)
    return build


def test_the_emoji_traces_come_out_as_they_are(emoji):
    """Right by construction, they pass every filter: the same bytes, so training on them is the quickstart's."""
    for folder in ("cot/train", "query/train", "query/union_train"):
        names = sorted(path.name for path in (emoji.release / folder).iterdir())
        assert names == sorted(path.name for path in (emoji.output / "release" / folder).iterdir())
        for name in names:
            made, own = emoji.output / "release" / folder / name, emoji.release / folder / name
            assert made.read_bytes() == own.read_bytes(), f"{folder}/{name}"
    assert mbeir.fingerprint(emoji.output / "release") == mbeir.fingerprint(emoji.release)


def spoiled(release: pathlib.Path, target: pathlib.Path) -> set[str]:
    """A release whose every hundredth trace is not as it should be; their qids."""
    qids = set()
    for path in sorted(release.rglob("*.jsonl")):
        made = target / path.relative_to(release)
        made.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name == "train" and path.parent.parent.name == "cot":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            for record in [record for record in records if record["complex"]][::100]:
                record["reasoning"] += " I'm sorry, I cannot help with the rest."
                qids.add(record["qid"])
            made.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        else:
            made.symlink_to(path)
    for name in ("instructions", "qrels", "mbeir_images"):
        (target / name).symlink_to(release / name)
    return qids


def test_the_embedded_data_is_built_by_the_stages(tmp_path, emoji, monkeypatch):
    """launch/build_data.py: what the filters drop is no query of training; every other record is as it was."""
    own = mbeir.load_queries(emoji.release.parent, "train")
    dropped = spoiled(emoji.release, tmp_path / "tiny/release")
    (tmp_path / "tiny/release/info.json").write_bytes((emoji.release / "info.json").read_bytes())
    arguments = build_data.Arguments("tiny", tmp_path)
    build_data.main(arguments)
    made = mbeir.load_queries(tmp_path / "tiny", "train")
    kept = [index for index, qid in enumerate(own.keys) if qid not in dropped]
    assert len(dropped) > 10 and made.keys == [own.keys[index] for index in kept] and len(made) < len(own)
    assert all(made[i] == own[kept[i]] for i in range(0, len(made), 7))
    for name in ("mbeir_emoji_task7_val", "mbeir_emoji_task8_test"):
        split, before = (mbeir.load_queries(folder, name) for folder in (tmp_path / "tiny", emoji.release.parent))
        assert [split[i] for i in range(len(split))] == [before[i] for i in range(len(before))]
    card = json.loads((tmp_path / "tiny/cot/card.json").read_text())
    assert [(row["reason"], row["rows"]) for row in card["dropped"]] == [("refusal", len(dropped))]
    before = digests(tmp_path / "tiny")
    monkeypatch.setattr(pipeline.Build, "pipeline", lambda build: pytest.fail("all is done"))
    build_data.main(arguments)
    assert digests(tmp_path / "tiny") == before


def test_training_reads_the_output_like_any_release(emoji, tiny_config):
    own = mbeir.load_queries(pathlib.Path(tiny_config.data.root) / "tiny", "train")
    made = mbeir.load_queries(emoji.output, "train")
    assert len(made) == len(own) > 1000
    assert all(made[i] == own[i] for i in range(0, len(own), 37))
    assert any(made[i]["complex"] for i in range(len(made)))


def test_parquet_and_jsonl_hold_the_same_rows(emoji):
    stems = sorted(path.stem for path in (emoji.output / "rows").glob("*.parquet"))
    assert len(stems) == len(TASKS)
    for stem in stems:
        rows = list(read_rows(emoji.output / f"rows/{stem}.jsonl"))
        table = pq.read_table(emoji.output / f"rows/{stem}.parquet").to_pylist()
        assert [Row(**(record | {"prompts": dict(record["prompts"])})) for record in table] == rows
        assert rows == sorted(rows, key=lambda row: row.order)


def test_the_card_tells_what_was_built(emoji):
    told = json.loads((emoji.output / "card.json").read_text())
    own = [row for row in told["reasoning"] if row["dataset"] == "emoji"]
    kept = sum(1 for record in traces(emoji.output).values() if record["complex"])
    assert own[0]["labelled"] == own[0]["kept"] == kept > 1000
    assert told["calibration"]["targets_accepted"] == 1.0 and told["calibration"]["decoys_accepted"] == 0.0
    assert told["calibration"]["area"] == 1.0 and told["calibration"]["decoys"] > 50
    assert sum(row["written"] for row in told["gold"]) == kept and len(told["gold"]) == 2
    assert sum(told["lengths"]["answer"].values()) == kept
    text, page = ((emoji.output / name).read_text() for name in ("README.md", "card.html"))
    assert "| oven | – | – | – | 293,875 |" in text and "| mscoco | i2t | – | 113K |" in text
    hashes = Prompts("v1").hashes()
    assert hashes["assess it2i"] in text and hashes["generate it2i, target shown"] in text
    assert page.count("data:image/png;base64,") > 10 and "hidden from the teacher" in page


def test_a_finished_build_does_nothing_again(emoji):
    parts = pipeline.read_source(emoji)
    assert len(parts) > len(TASKS)  # files are cut into parts
    assert [pipeline.run_stage(emoji, stage, parts) for stage in pipeline.NAMES] == [0, 0, 0, 0]
    before = digests(emoji.output)
    assert not write.write(emoji, parts)
    (emoji.work / "written.json").unlink()
    assert write.write(emoji, parts)
    assert digests(emoji.output) == before


def test_a_change_of_the_other_queries_is_seen_in_the_records(tmp_path, emoji):
    """Files of val and test are links, which a look for changes must follow."""
    (tmp_path / "release").mkdir()
    for folder in ("query", "cand_pool", "cot"):
        (tmp_path / "release" / folder).mkdir()
        for entry in (emoji.release / folder).iterdir():
            (tmp_path / "release" / folder / entry.name).symlink_to(entry)
    assert mbeir.fingerprint(tmp_path / "release") == mbeir.fingerprint(emoji.release)
    path = emoji.output / "release/query/val/mbeir_emoji_task7_val.jsonl"
    assert path.is_symlink()
    before = mbeir.fingerprint(emoji.output / "release")
    own = path.readlink()
    (tmp_path / "other.jsonl").write_text(own.read_text().replace("a", "b"))
    path.unlink()
    path.symlink_to(tmp_path / "other.jsonl")
    assert mbeir.fingerprint(emoji.output / "release") != before
    path.unlink()
    path.symlink_to(own)
    assert mbeir.fingerprint(emoji.output / "release") == before


def test_a_build_never_overwrites_its_source(tmp_path):
    release = write_release(tmp_path / "mine/release", 8)
    with pytest.raises(ValueError, match="would be overwritten"):
        pipeline.Build(emoji_config(), release, tmp_path / "mine")
    with pytest.raises(ValueError, match="would be overwritten"):
        pipeline.Build(emoji_config(), tmp_path / "elsewhere", tmp_path / "mine")
    for output in (release, release / "cot/mine"):
        with pytest.raises(ValueError, match="is in the release that is read"):
            pipeline.Build(emoji_config(), release, output)
    (tmp_path / "linked/work").mkdir(parents=True)
    (tmp_path / "linked/release").symlink_to(release)
    with pytest.raises(ValueError, match="would be overwritten"):
        pipeline.Build(emoji_config(), tmp_path / "elsewhere", tmp_path / "linked")


def test_metadata_teaches_what_it_holds(tmp_path, emoji):
    one = teacher.MetadataTeacher(emoji.release)
    unknown = one.submit(teacher.Request("assess", "", "", qid="999:1")).result()
    assert isinstance(unknown, Answer) and stages.read_json(unknown.text) == {
        "complex": False,
        "reason": "It has none.",
    }
    (tmp_path / "cot").symlink_to(emoji.release / "cot")
    with pytest.raises(layout.ReleaseError, match="no qrels/train, so its metadata cannot teach"):
        teacher.MetadataTeacher(tmp_path)
    build = pipeline.Build(emoji_config(), write_release(tmp_path / "release", 8), tmp_path / "out")
    with pytest.raises(layout.ReleaseError, match="no traces in cot/train"):
        pipeline.run_stage(build, "assess", pipeline.read_source(build))


def test_a_decoy_is_no_other_right_answer(tmp_path):
    release = write_release(tmp_path / "release", 8)
    path = release / "query/train/mbeir_fashioniq_train.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    everything = [record["qid"] for record in records]
    for record in records[:2]:
        record["pos_cand_list"] += everything
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    parts = source.read(release, CotConfig(name="x", verify=Verify(controls=1.0)), tmp_path / "parts")
    rows = {one.qid: one for part in parts for one in read_rows(tmp_path / "parts" / part)}
    assert [bool(rows[qid].decoy) for qid in everything] == [False, False, True, True]


def test_options_that_matter_begin_anew_and_others_do_not(emoji):
    def changed(**changes) -> set[str]:
        other = dataclasses.replace(emoji, config=dataclasses.replace(emoji.config, **changes))
        was, now = pipeline.folders(emoji), pipeline.folders(other)
        return {stage for stage in was if was[stage] != now[stage]}

    everything = {"source", "assess", "generate", "filter", "verify"}
    faster = dataclasses.replace(emoji.config.teacher, concurrency=1, timeout=1.0, base_url="http://elsewhere")
    assert changed(teacher=faster, budget=dataclasses.replace(emoji.config.budget, tokens=5), records=False) == set()
    assert changed(limit=5) == everything
    assert changed(policy={"emoji": "complex"}) == everything - {"source"}
    assert changed(show_gold=0.1) == {"generate", "filter", "verify"}
    assert changed(filters=dataclasses.replace(emoji.config.filters, ngram=4)) == {"filter", "verify"}
    assert changed(verifier=dataclasses.replace(emoji.config.verifier, model="n")) == {"verify"}


def test_stages_run_apart_in_their_order(tmp_path, emoji):
    build = dataclasses.replace(emoji, output=tmp_path, config=dataclasses.replace(emoji.config, limit=20))
    parts = pipeline.read_source(build)
    with pytest.raises(pipeline.UnfinishedError, match="stage generate needs stage assess"):
        pipeline.run_stage(build, "generate", parts)
    with pytest.raises(pipeline.UnfinishedError, match="stage write needs stage verify"):
        write.write(build, parts)


def test_near_duplicates_are_found_across_parts_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "SHARD", 16)
    options = scripted_config("", part_rows=8)
    build = pipeline.Build(options, write_release(tmp_path / "release", 8), tmp_path / "out")
    parts, before = [f"x-{number:05}.jsonl" for number in range(5)], pipeline.folders(build)["generate"]
    for number, part in enumerate(parts):  # each query of the first part comes again, in other words, in all others
        rows = []
        for place in range(1, 9):
            reasoning, answer = good_trace(2 * place)
            asked = row(qid=f"7:{8 * number + place}", text=f"the same in pink{'!' * number}", complex=True)
            raw = f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"
            rows.append(dataclasses.replace(asked, target_text=answer, raw=raw))
        write_lines(before / part, map(dump, rows))
    assert pipeline.run_stage(build, "filter", parts) == 5
    after = pipeline.folders(build)["filter"]
    assert len(list((after / "judged").glob("duplicates-*"))) == 3  # shards of at most 16 rows
    found = {one.qid: (one.dropped, one.detail) for part in parts for one in read_rows(after / part)}
    assert found == {
        f"7:{8 * number + place}": ("duplicate", f"7:{place}") if number else ("", "")
        for number in range(5)
        for place in range(1, 9)
    }
    (after / parts[3]).unlink()
    assert pipeline.run_stage(build, "filter", parts) == 1
    assert {one.qid: (one.dropped, one.detail) for part in parts for one in read_rows(after / part)} == found


# Assessment -----------------------------------------------------------------------------------


def row(**changes) -> Row:
    plain = Row("7:1", "cirr", "train", 7, "Find it.", "in blue", "", "", "7:2", "", "", "")
    return dataclasses.replace(plain, **changes)


def stage(kind: type[stages.Stage], **options) -> stages.Stage:
    return kind(CotConfig(name="x", **options), Prompts("v1"), pathlib.Path())


def test_the_policy_decides_and_the_teacher_is_compared():
    said = [Answer('{"complex": false, "reason": "Plain."}')]
    assess = stage(stages.Assess, policy={"cirr": "complex"})
    judged = assess.finish(row(), said)
    assert judged.complex and judged.assessed is False and judged.assessment == "Plain."
    assert not stage(stages.Assess).finish(row(), said).complex
    statistics = Statistics()
    statistics.add(judged, "complex", len, 0.7)
    assert statistics.counts["policy", "cirr", "complex", "simple"] == 1


def test_only_a_share_of_what_the_policy_decides_is_audited():
    assess = stage(stages.Assess, policy={"cirr": "complex"}, audit=0.25)
    asked = [bool(assess.requests(row(qid=f"7:{number}"))) for number in range(2000)]
    assert 400 < sum(asked) < 600
    assert all(stage(stages.Assess, audit=0.0).requests(row(qid=f"7:{number}")) for number in range(9))


def test_an_audit_without_an_answer_costs_no_row():
    failed = [stages.Unanswered("timeout")]
    assert stage(stages.Assess, policy={"cirr": "complex"}).finish(row(), failed).complex
    assert stage(stages.Assess).finish(row(), failed).dropped == "unanswered"
    assert stage(stages.Assess).finish(row(), [Answer("", error="HTTP 400")]).dropped == "rejected"
    assert stage(stages.Assess).finish(row(), [Answer("who knows")]).dropped == "assessment"


def test_the_target_is_shown_as_often_as_asked_and_marked():
    generate = stage(stages.Generate, show_gold=0.5, show_gold_of={"oven": 0.0})
    marked = 0
    for number in range(400):
        one = row(qid=f"7:{number}", complex=True, target_text="The Eiffel Tower")
        request = generate.requests(one)[0]
        finished = generate.finish(one, [Answer("x")])
        assert finished.gold == ("Eiffel" in request.text) == (request.target == "7:2")
        marked += finished.gold
        hidden = generate.requests(dataclasses.replace(one, dataset="oven"))[0]
        assert "Eiffel" not in hidden.text
    assert 160 < marked < 240
    assert generate.requests(row(complex=False)) == []


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ('{"consistent": true, "confidence": 0.71, "reason": ""}', ""),
        ('```json\n{"consistent": true, "confidence": 1, "reason": "ok"}\n```', ""),
        ('For {query}: {"consistent": true, "confidence": 0.9, "reason": "{x}"} as {asked}.', ""),
        ('{"consistent": true, "confidence": 0.7}', "confidence"),
        ('{"consistent": false, "confidence": 0.99}', "inconsistent"),
        ('{"consistent": "yes", "confidence": 0.9}', "verdict"),
        ('{"consistent": true, "confidence": 7}', "verdict"),
        ('{"consistent": true, "confidence": true}', "verdict"),
        ('{"consistent": true}', "verdict"),
        ("I agree.", "verdict"),
        ('{"consistent": true, "confid', "verdict"),
    ],
)
def test_verdicts(text, dropped):
    assert stage(stages.Verify).finish(row(complex=True, answer="x"), [Answer(text)]).dropped == dropped


def test_calibration_compares_targets_with_decoys():
    statistics = Statistics()
    for own, decoy, count in ((0.9, 0.2, 30), (0.8, 0.6, 10)):
        for _ in range(count):
            one = row(complex=True, consistent=True, confidence=own, decoy_consistent=True, decoy_confidence=decoy)
            statistics.add(one, None, len, 0.7)
    found = card.calibration(statistics)
    assert found is not None
    assert (found["targets"], found["decoys"], found["area"]) == (40, 40, 1.0)
    assert (found["targets_accepted"], found["decoys_accepted"]) == (1.0, 0.0)
    assert sum(entry["targets"] for entry in found["bins"]) == 40 and len(found["bins"]) <= BINS
    assert card.calibration(Statistics()) is None


# Prompts, source, batches, the command --------------------------------------------------------


def test_every_prompt_can_be_filled_and_has_a_hash_of_its_own():
    prompts = Prompts("v1")
    hashes = prompts.hashes()
    assert len(hashes) == 3 * len(TASKS) + 2 and len(set(hashes.values())) == len(hashes)
    for task in TASKS:
        assert "in blue" in prompts.assess(task).fill(instruction="i", query="in blue")
        hidden = prompts.generate(task, False).fill(instruction="i", query="q")
        shown = prompts.generate(task, True).fill(instruction="i", query="q", target="SECRET")
        assert "SECRET" in shown and "SECRET" not in hidden
    for kind in ("image", "text"):
        assert "X1" in prompts.verify(kind).fill(instruction="i", query="q", target="t", answer="X1")
    with pytest.raises(ValueError, match="no prompts 'v0'; there are v1"):
        Prompts("v0")


def test_queries_come_once_sorted_with_their_target(tmp_path):
    release = write_release(tmp_path / "release", 60)
    path = release / "query/train/mbeir_infoseek_train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*reversed(lines), lines[0]]) + "\n")
    parts = source.read(release, CotConfig(name="x", part_rows=7, verify=Verify(controls=1.0)), tmp_path / "parts")
    rows = [one for part in parts for one in read_rows(tmp_path / "parts" / part)]
    assert len(rows) == 60 and len(parts) == 5 + 3 + 3
    infoseek = [one for one in rows if one.dataset == "infoseek"]
    assert infoseek == sorted(infoseek, key=lambda one: one.order) and len(infoseek) == 15
    one = next(one for one in rows if one.qid == "6:1")
    assert (one.target_text, one.target_image) == ("House 1 of Greenville", "")
    assert one.instruction == "Find the text that answers the question."
    assert one.decoy != one.target and one.decoy_text.startswith("House")


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("query/train/mbeir_infoseek_train.jsonl", '"6:1"', '"61"', "is not of the form"),
        ("query/train/mbeir_infoseek_train.jsonl", '["6:1"]', "[]", "holds no id"),
        ("query/train/mbeir_infoseek_train.jsonl", '["6:1"]', '["6:999"]', "6:999 is in no file"),
        ("query/train/mbeir_infoseek_train.jsonl", "shop/blue.png", "shop/gone.png", "jsonl, line .* no picture"),
        ("query/train/mbeir_infoseek_train.jsonl", '"task_id": 6', '"task_id": 5', "task_id is 5; there are 0, 1,"),
        ("query/train/mbeir_infoseek_train.jsonl", '"task_id"', '"task"', "'task_id' is missing"),
        (
            "query/train/mbeir_infoseek_train.jsonl",
            '"query_img_path": "mbeir_images/shop/blue.png", "query_modality": "image,text"',
            '"query_img_path": [], "query_modality": "text"',
            "traces are for queries of one picture",
        ),
        (
            "query/train/mbeir_infoseek_train.jsonl",
            '"query_modality": "image,text"',
            '"query_modality": 3',
            "is 3; use",
        ),
    ],
)
def test_what_is_wrong_with_a_release_is_said(tmp_path, path, old, new, message):
    release = write_release(tmp_path / "release", 12)
    text = (release / path).read_text()
    assert old in text
    (release / path).write_text(text.replace(old, new, 1))
    with pytest.raises(layout.ReleaseError, match=message):
        source.read(release, CotConfig(name="x"), tmp_path / "parts")


def test_shares_are_drawn_evenly_and_alike_everywhere():
    drawn = [chosen(f"7:{number}", "gold", 0.3) for number in range(5000)]
    assert 1350 < sum(drawn) < 1650
    assert drawn == [chosen(f"7:{number}", "gold", 0.3) for number in range(5000)]
    assert all(chosen(f"7:{n}", "x", 1.0) and not chosen(f"7:{n}", "x", 0.0) for n in range(100))


def test_a_batch_is_exchanged_as_files(tmp_path):
    """Files go out, answers come back in any order with some missing, and what is missing goes out again."""
    release = write_release(tmp_path / "release", 24)
    build = pipeline.Build(scripted_config("http://127.0.0.1:1/v1"), release, tmp_path / "out")
    parts = pipeline.read_source(build)
    (sent,) = batch.write_requests(build, "assess", parts)
    lines = [json.loads(line) for line in sent.read_text().splitlines()]
    assert len({line["custom_id"] for line in lines}) == len(lines) == 24
    assert all(line["url"] == "/v1/chat/completions" and line["body"]["messages"] for line in lines)

    def back(lines, status: int = 200) -> str:
        message = {"choices": [{"message": {"content": '{"complex": false, "reason": "."}'}, "finish_reason": "stop"}]}
        body = message | {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}
        answers = [{"custom_id": x["custom_id"], "response": {"status_code": status, "body": body}} for x in lines]
        return "".join(json.dumps(answer) + "\n" for answer in reversed(answers))

    strict = dataclasses.replace(
        build, config=dataclasses.replace(build.config, teacher=Teacher("openai", "m", give_up_after=20))
    )
    (sent.parent / "answers-1.jsonl").write_text(back(lines, 400))
    with pytest.raises(pipeline.UnfinishedError, match="all 24 requests were rejected, the last with HTTP 400"):
        batch.read_answers(strict, "assess")
    (sent.parent / "answers-1.jsonl").write_text(back(lines[:20]) + back(lines[20:22], 429))
    assert batch.read_answers(build, "assess") == 20
    with pytest.raises(pipeline.UnfinishedError, match="(?s)waits for its batch.*requests-00000.jsonl"):
        batch.exchange(build, "assess", parts)
    with pytest.raises(pipeline.UnfinishedError, match="stage generate needs stage assess"):
        batch.exchange(build, "generate", parts)
    (again,) = batch.write_requests(build, "assess", parts)
    assert {json.loads(line)["custom_id"] for line in again.read_text().splitlines()} == {
        line["custom_id"] for line in lines[20:]
    }
    (sent.parent / "answers-2.jsonl").write_text(back(lines[20:]))
    assert batch.read_answers(build, "assess") == 24 and batch.write_requests(build, "assess", parts) == []
    assert pipeline.run_stage(build, "assess", parts) == len(parts)  # nobody listens at the address: all is cached
    rows = [one for part in parts for one in read_rows(pipeline.folders(build)["assess"] / part)]
    assert len(rows) == 24 and not any(one.complex or one.dropped for one in rows)
    (sent.parent / "answers-3.jsonl").write_text('{"response": null}\n')
    with pytest.raises(layout.ReleaseError, match="answers-3.jsonl, line 1: no custom_id"):
        batch.read_answers(build, "assess")
    (sent.parent / "answers-3.jsonl").write_text('{"custom_id": "x", "response": "no"}\n')
    with pytest.raises(layout.ReleaseError, match="answers-3.jsonl, line 1: response is no object"):
        batch.read_answers(build, "assess")


def test_requests_without_an_answer_stop_the_stage_and_keep_the_rest(tmp_path):
    release = write_release(tmp_path / "release", 8)
    dead = Teacher(model="m", base_url="http://127.0.0.1:1/v1", attempts=1, give_up_after=3, concurrency=1)
    options = scripted_config("", teacher=dead, unanswered="stop")
    build = pipeline.Build(options, release, tmp_path / "out")
    parts = pipeline.read_source(build)
    with pytest.raises(pipeline.UnfinishedError, match="8 requests have no answer .*3 requests in a row"):
        pipeline.run_stage(build, "assess", parts)
    assert pipeline.missing_parts(build, "assess", parts) == parts


def test_configs_of_builds_load_under_their_names():
    for name in ("emoji", "mbeir"):
        assert load_config(name, [], CotConfig, "configs/cot").name == name
    paper = load_config("mbeir", ["--teacher.model", "other", "--budget.tokens", "5"], CotConfig, "configs/cot")
    assert (paper.teacher.model, paper.budget.tokens) == ("other", 5)
    assert set(paper.policy) == set(card.PAPER_REASONING) | {name for name, _ in card.PAPER_SIMPLE}
    with pytest.raises(ValueError, match="choose simple or complex"):
        CotConfig(name="x", policy={"cirr": "hard"})
    with pytest.raises(ValueError, match="choose from 0 to 1"):
        CotConfig(name="x", show_gold=2.0)
    with pytest.raises(ValueError, match=r"'\(' is no regular expression: missing \)"):
        Filters(leaks=("(",))
    with pytest.raises(ValueError, match="part_rows is 0: choose more than 0"):
        CotConfig(name="x", part_rows=0)
    with pytest.raises(ValueError, match=r"verifier\.concurrency is 0: choose more than 0"):
        CotConfig(name="x", verifier=Teacher(concurrency=0))
    with pytest.raises(ValueError, match="needs prices: set --verifier.input-price"):
        CotConfig(name="x", teacher=Teacher(input_price=1.0), budget=Budget(dollars=5.0))


def test_the_command(tmp_path, capsys):
    release = write_release(tmp_path / "release", 8)
    tokenizer = ["--filters.tokenizer", "trace_jax/assets/emoji_base"]
    options = ["mbeir", "--output", str(tmp_path / "out"), *tokenizer, "--source"]
    with pytest.raises(SystemExit, match=r"(?s)error: stage generate waits for its batch.*requests-00000\.jsonl"):
        build_cot.main([*options, str(release), "--batch"])
    with pytest.raises(SystemExit, match="error: no .*/nowhere/instructions/.*: is this an M-BEIR release"):
        build_cot.main([*options, str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="error: no prompts 'v9'; there are v1"):
        build_cot.main([*options, str(release), "--prompts", "v9"])
    with pytest.raises(SystemExit, match="2"):
        build_cot.main([*options, str(release), "--stages", "asess"])
    assert "no stage asess" in capsys.readouterr().err
