"""The embedded data set: its layout, its splits without leaks, its traces and its words."""

import collections
import hashlib
import io
import json
import pathlib
import re
from itertools import pairwise

import pytest
from PIL import Image

from trace_jax.data.emoji import concepts, drawings, edits, questions, release, wording, world

QUERY_FIELDS = {
    "qid",
    "query_txt",
    "query_img_path",
    "query_modality",
    "query_src_content",
    "pos_cand_list",
    "neg_cand_list",
    "task_id",
}
CANDIDATE_FIELDS = {"did", "txt", "img_path", "modality", "src_content"}
MODALITIES = {(True, False): "text", (False, True): "image", (True, True): "image,text"}
HELD_OUT = ("val", "test")


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def queries(folder: pathlib.Path, split: str, dataset: str = "*", task: str = "*") -> list[dict]:
    if split == "train":
        return lines(folder / "query/union_train/mbeir_union_up_train.jsonl")
    paths = sorted((folder / "query" / split).glob(f"mbeir_{dataset}_task{task}_{split}.jsonl"))
    return [record for path in paths for record in lines(path)]


def candidates(folder: pathlib.Path, split: str) -> dict[str, dict]:
    path = folder / f"cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
    return {record["did"]: record for record in lines(path)}


def traces(folder: pathlib.Path, split: str) -> dict[str, dict]:
    paths = sorted((folder / "cot" / split).glob("*.jsonl"))
    return {record["qid"]: record for path in paths for record in lines(path)}


def told_in_training(folder: pathlib.Path) -> list[tuple[set[str], str]]:
    """(pictures, everything said) of each record that training may read, from the files alone."""
    pool, thoughts, found = candidates(folder, "train"), traces(folder, "train"), []
    for query in queries(folder, "train"):
        answers = [pool[did] for did in query["pos_cand_list"]]
        thought = thoughts[query["qid"]]
        pictures = {query["query_img_path"], *(a["img_path"] for a in answers)} - {None}
        said = [query["query_txt"], thought["reasoning"], thought["answer"], *(a["txt"] for a in answers)]
        found.append((pictures, " | ".join(filter(None, said)).lower()))
    for record in lines(folder / "generative/train.jsonl"):
        pictures = {record["img_path"]} - {None}
        found.append((pictures, f"{record['prompt']} | {record['response']}".lower()))
    found += [({c["img_path"]} - {None}, (c["txt"] or "").lower()) for c in pool.values()]
    return found


def held_out(folder: pathlib.Path) -> tuple[set[str], set[str], set[tuple[str, str]]]:
    """(pictures, captions, (flag, fact) pairs) of what val and test hold out, from their files."""
    everything = candidates(folder, "test")
    pictures, captions, facts = set(), set(), set()
    for split in HELD_OUT:
        for query in queries(folder, split, "emoji", "[034]"):
            pictures.add(query["query_img_path"])
            for did in query["pos_cand_list"]:
                pictures.add(everything[did]["img_path"])
                captions.add(everything[did]["txt"])
        for query in queries(folder, split, "emoji", "6"):
            kind = json.loads(query["query_src_content"])["kind"]
            if kind in questions.KINDS:
                (did,) = query["pos_cand_list"]
                facts.add((query["query_img_path"], everything[did]["txt"].lower()))
    return pictures - {None}, {c.lower() for c in captions - {None}}, facts


def leaks(folder: pathlib.Path) -> list[str]:
    """Everything held out that training could read or see."""
    pictures, captions, facts = held_out(folder)
    assert pictures and captions and facts
    digest = {p: hashlib.sha256((folder / p).read_bytes()).digest() for p in pictures}
    hidden, flags = set(digest.values()), collections.defaultdict(set)
    for flag, fact in facts:
        flags[flag].add(fact)
    seen: dict[str, bytes] = {}
    pattern = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(captions, key=len, reverse=True))) + ")")
    found = []
    for shown, said in told_in_training(folder):
        for path in shown:
            if path not in seen:
                seen[path] = hashlib.sha256((folder / path).read_bytes()).digest()
            if seen[path] in hidden:
                found.append(f"picture {path}")
            found += [f"fact {fact} of {path}" for fact in flags[path] if fact in said]
        if (match := pattern.search(said)) is not None:
            found.append(f"caption {match[0]!r} in {said!r}")
    return found


def test_nothing_held_out_is_seen_in_training(tiny_release):
    assert leaks(tiny_release) == []


def test_the_leak_check_finds_leaks(tiny_release, tmp_path):
    pictures, captions, facts = held_out(tiny_release)
    copy = tmp_path / "release"
    copy.symlink_to(tiny_release)
    flag, fact = min(facts)
    told = [({min(pictures)}, ""), (set(), f"a | {min(captions)}."), ({flag}, f"so: {fact}")]
    for pair in told:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "told_in_training", lambda _, pair=pair: [pair])
            assert len(leaks(copy)) == 1


def test_queries_have_exactly_the_fields_of_mbeir(tiny_release):
    for split in ("train", *HELD_OUT):
        everything = candidates(tiny_release, split)
        asked = queries(tiny_release, split)
        own = lines(tiny_release / "query/train/mbeir_emoji_train.jsonl") if split == "train" else asked
        assert len({q["qid"] for q in own}) == len(own)
        for query in asked:
            assert set(query) == QUERY_FIELDS
            has = (bool(query["query_txt"]), bool(query["query_img_path"]))
            assert query["query_modality"] == MODALITIES[has]
            assert query["pos_cand_list"] and len(set(query["pos_cand_list"])) == len(query["pos_cand_list"])
            assert set(query["pos_cand_list"]) <= set(everything)
            assert re.fullmatch(r"1[012]:[1-9]\d*", query["qid"])


def test_every_task_is_there(tiny_release):
    tasks = [0, 1, 2, 3, 4, 6, 7, 8]
    assert sorted({q["task_id"] for q in queries(tiny_release, "train")}) == tasks
    for task in tasks:
        assert queries(tiny_release, "test", "emoji", str(task)), task
        assert queries(tiny_release, "val", "emoji", str(task)), task
    assert {q["task_id"] for q in queries(tiny_release, "test", "emojinoto")} == {0, 3, 4, 6, 7, 8}
    assert {q["task_id"] for q in queries(tiny_release, "test", "emojiedits")} == {7, 8}
    assert not queries(tiny_release, "val", "emojinoto") and not queries(tiny_release, "val", "emojiedits")


def test_one_content_has_one_did(tiny_release):
    by_content: dict[tuple, str] = {}
    by_did: dict[str, tuple] = {}
    for path in sorted((tiny_release / "cand_pool").rglob("*.jsonl")):
        records = lines(path)
        assert len({r["did"] for r in records}) == len(records)
        for record in records:
            assert set(record) == CANDIDATE_FIELDS
            content = (record["modality"], record["txt"], record["img_path"])
            assert by_content.setdefault(content, record["did"]) == record["did"]
            assert by_did.setdefault(record["did"], content) == content
            assert record["modality"] == MODALITIES[bool(record["txt"]), bool(record["img_path"])]


def test_pools_are_whole_and_nest(tiny_release):
    local = {p.stem: {r["did"] for r in lines(p)} for p in (tiny_release / "cand_pool/local").glob("*.jsonl")}
    pictures = sorted((tiny_release / "mbeir_images/emoji_images").rglob("*.png"))
    for task in (0, 4, 7):
        assert len(local[f"mbeir_emoji_task{task}_cand_pool"]) == len(pictures)
    assert local["mbeir_emojiedits_task7_cand_pool"] == local["mbeir_emoji_task7_cand_pool"]
    assert set().union(*local.values()) == set(candidates(tiny_release, "test"))
    assert set(candidates(tiny_release, "val")) < set(candidates(tiny_release, "test"))
    named = {did for q in queries(tiny_release, "train") for did in q["pos_cand_list"] + q["neg_cand_list"]}
    assert set(candidates(tiny_release, "train")) == named
    for split in HELD_OUT:
        for path in (tiny_release / "query" / split).glob("*.jsonl"):
            pool = local[path.stem.removesuffix(split) + "cand_pool"]
            assert all(set(q["pos_cand_list"]) <= pool for q in lines(path)), path


def test_qrels_repeat_the_positives(tiny_release):
    for split in ("train", *HELD_OUT):
        found = collections.defaultdict(list)
        for path in (tiny_release / "qrels" / split).glob("*.txt"):
            for line in path.read_text().splitlines():
                qid, zero, did, one, task = line.split(" ")
                assert (zero, one) == ("0", "1") and f"_task{task}_" in path.name
                found[qid].append(did)
        assert dict(found) == {q["qid"]: q["pos_cand_list"] for q in queries(tiny_release, split)}


def test_a_picture_is_never_its_own_answer(tiny_release):
    everything = candidates(tiny_release, "test")
    for split in ("train", *HELD_OUT):
        for query in queries(tiny_release, split):
            if query["task_id"] in (4, 7):
                shown = {everything[did]["img_path"] for did in query["pos_cand_list"]}
                assert query["query_img_path"] not in shown


def test_traces_end_in_the_answer(tiny_release):
    everything = candidates(tiny_release, "test")
    captions = collections.defaultdict(set)
    for record in everything.values():
        if record["modality"] == "image,text":
            captions[record["img_path"]].add(record["txt"])
    for split in ("train", *HELD_OUT):
        thoughts = traces(tiny_release, split)
        for query in queries(tiny_release, split):
            thought = thoughts[query["qid"]]
            assert set(thought) == {"qid", "complex", "reasoning", "answer"}
            assert thought["complex"] == bool(thought["reasoning"]) == bool(thought["answer"])
            if query["task_id"] in (6, 7, 8):
                assert thought["complex"]
            if query["task_id"] in (0, 1, 3, 4):
                assert not thought["complex"]
            if not thought["complex"]:
                continue
            answer = thought["answer"].removesuffix(".")
            for did in query["pos_cand_list"]:
                found = everything[did]
                said = {found["txt"]} if found["txt"] else captions[found["img_path"]]
                assert answer in {wording.capital(text).removesuffix(".") for text in said}
            words = f"{thought['reasoning']} {thought['answer']}".split()
            assert 6 <= len(words) <= 34, words


def test_both_styles_are_right_answers(tiny_release):
    everything = candidates(tiny_release, "test")
    for query in queries(tiny_release, "test", "emoji", "7"):
        styles = {everything[did]["img_path"].split("/")[2] for did in query["pos_cand_list"]}
        assert styles == {"twemoji", "openmoji"}


def test_pictures_are_small_rgb_and_all_different(tiny_release):
    digests = set()
    for path in (tiny_release / "mbeir_images").rglob("*.png"):
        with Image.open(path) as picture:
            assert picture.size == (drawings.SIDE, drawings.SIDE) and picture.mode == "RGB"
        digests.add(hashlib.sha256(path.read_bytes()).digest())
    info = json.loads((tiny_release / "info.json").read_text())
    assert len(digests) == info["pictures"] == len(list((tiny_release / "mbeir_images").rglob("*.png")))


def test_unseen_style_and_edits_stay_out_of_training(tiny_release):
    for pictures, _ in told_in_training(tiny_release):
        assert not any("noto" in path for path in pictures)
    edited = [q for q in queries(tiny_release, "train") if q["task_id"] in (2, 7, 8)]
    kinds = {json.loads(q["query_src_content"])["kind"] for q in edited}
    assert not kinds & {"hair", "age", "direction", "moon"}
    unseen = {json.loads(q["query_src_content"])["kind"] for q in queries(tiny_release, "test", "emojiedits")}
    assert {"hair", "moon"} <= unseen


def test_instructions_cover_every_query(tiny_release):
    rows = (tiny_release / "instructions/query_instructions.tsv").read_text().splitlines()
    assert rows[0].split("\t")[:4] == ["query_modality", "cand_modality", "dataset_name", "dataset_id"]
    keys = {}
    for row in rows[1:]:
        query, candidate, _, dataset, *prompts = row.split("\t")
        assert len(prompts) == len(set(prompts)) == 4
        keys[dataset, query, candidate] = prompts
    everything = candidates(tiny_release, "test")
    for split in ("train", *HELD_OUT):
        for query in queries(tiny_release, split):
            answer = everything[query["pos_cand_list"][0]]["modality"]
            assert (query["qid"].split(":")[0], query["query_modality"], answer) in keys


def test_generative_records(tiny_release):
    for split in ("train", "val"):
        records = lines(tiny_release / f"generative/{split}.jsonl")
        assert len({r["id"] for r in records}) == len(records)
        for record in records:
            assert set(record) == {"id", "kind", "img_path", "prompt", "response"}
            assert record["prompt"] and record["response"]
            assert record["img_path"] is None or (tiny_release / record["img_path"]).exists()
    kinds = {r["kind"] for r in lines(tiny_release / "generative/train.jsonl")}
    subjects = {
        "caption": "person thing flag symbol clock",
        "words": "person thing flag symbol clock",
        "attribute": "person flag symbol clock",
        "edit": "person symbol clock",
        "question": "person flag clock",
        "read": "person thing flag symbol clock",
        "translation": "person thing symbol clock",
        "text edit": "person symbol clock",
        "riddle": "person flag",
        "imagined": "thing clock",
    }
    assert kinds == {f"{what} {subject}" for what, of in subjects.items() for subject in of.split()} | {"fact"}


def test_what_is_imagined_is_right_and_names_no_drawn_cell_that_is_held_out(tiny_release):
    records = [r for r in lines(tiny_release / "generative/train.jsonl") if r["kind"].startswith("imagined")]
    written = {r["prompt"]: r["response"] for r in records}
    assert len(written) == len(records) > 800
    held_out = [e.caption for e in concepts.emojis() if e.split != "train" and e.kind in ("heart", "circle", "square")]
    times = [e.caption for e in concepts.emojis() if e.kind == "clock"]
    for prompt, response in written.items():
        for caption in held_out:
            assert not re.search(rf"\b{caption}\b", f"{prompt} {response}", re.IGNORECASE), (prompt, response)
        assert not any(f"{caption}." in f"{prompt} {response}".lower() for caption in times), (prompt, response)
        source, target = prompt.split(". ")[0], response.rstrip(".").split(". ")[-1]
        assert response.startswith(f"{source}. ") and target != source
        change = prompt.split(". ")[1].rstrip(".")
        if found := re.fullmatch(r"(?:But in|The same .* in|Make it) ([a-z ]+)", change):
            stays = re.sub(r"^An? (?:light )?[a-z]+ ", "", source)
            if found[1] in {e.value for e in concepts.emojis()}:  # a colour, and not a thing in one
                assert target.lower() == wording.article(f"{found[1]} {stays}")
    later = re.compile(r"A clock showing (.* (?:past|to)) (\w+)\. (?:The clock )?one hour later\.", re.IGNORECASE)
    shifted = {prompt: found for prompt in written if (found := later.fullmatch(prompt))}
    numbers = [wording.clock_words(2 * hour).removesuffix(" o'clock") for hour in range(13)]
    following = dict(pairwise(numbers))
    assert {found[2] for found in shifted.values()} == set(numbers)
    for prompt, found in shifted.items():
        assert written[prompt].endswith(f"A clock showing {found[1]} {following[found[2]]}."), prompt


def test_times_are_said_as_people_say_them():
    said = {0: "twelve o'clock", 15: "a quarter past twelve", 30: "half past twelve", 45: "a quarter to one"}
    said |= {55: "five to one", 685: "twenty-five past eleven", 700: "twenty to twelve"}
    assert {minutes: wording.time_words(minutes) for minutes in said} == said


def test_the_words_of_a_held_out_question_are_not_read(tiny_release):
    asked = {q["query_txt"] for split in HELD_OUT for q in queries(tiny_release, split, "emoji", 1)}
    read = {r["prompt"] for r in lines(tiny_release / "generative/train.jsonl")}
    facts = {q for q in asked if q.startswith(("Which city", "Which continent", "What is the currency"))}
    assert facts and not facts & read


def test_a_second_build_is_the_same_and_a_third_is_skipped(tiny_release, tmp_path):
    (tmp_path / "release.partial").mkdir()  # what an interrupted build leaves behind
    (tmp_path / "release.partial/rubbish").write_text("half")
    release.build("tiny", tmp_path / "release")
    first = {p.relative_to(tiny_release): p.read_bytes() for p in tiny_release.rglob("*") if p.is_file()}
    again = tmp_path / "release"
    second = {p.relative_to(again): p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert first == second
    assert not (tmp_path / "release.partial").exists()
    before = (again / "info.json").stat().st_mtime_ns
    release.build("tiny", again)
    assert (again / "info.json").stat().st_mtime_ns == before


def test_unknown_size(tmp_path):
    with pytest.raises(ValueError, match="emoji_small"):
        release.build("huge", tmp_path / "release")
    assert not list(tmp_path.iterdir())


# Splits over the whole of Unicode, whatever the size ------------------------------------------


def test_smaller_sizes_are_subsets():
    kept = {name: {e.text for e in concepts.emojis() if size.keeps(e)} for name, size in world.SIZES.items()}
    assert kept["tiny"] < kept["emoji_small"] < kept["emoji_full"]
    assert kept["emoji_mini"] < kept["emoji_small"]
    assert len(kept["emoji_full"]) == 3781
    for size in world.SIZES.values():
        assert all(size.keeps(e) for e in concepts.emojis() if size.keeps_noto(e))


def test_splits_leave_everything_seen_in_training():
    emojis = concepts.emojis()
    train = [e for e in emojis if e.split == "train"]
    assert {e.concept for e in emojis} == {e.concept for e in train}
    assert {e.tone for e in emojis} == {e.tone for e in train}
    shapes = ("heart", "circle", "square")
    coloured = [e for e in emojis if e.kind in shapes]
    assert {e.value for e in coloured} == {e.value for e in coloured if e.split == "train"}
    hours = {int(e.value) // 2 for e in train if e.kind == "clock"}
    assert hours == set(range(12))
    toned = [e for e in emojis if e.kind in ("person", "hand") and e.tones and e.gender]
    shares = collections.Counter(e.split for e in toned)
    assert 0.10 < shares["test"] / len(toned) < 0.15
    assert 0.03 < shares["val"] / len(toned) < 0.06


def test_a_neutral_drawing_is_held_out_with_the_man_or_the_woman():
    split = {(e.concept, e.gender, e.tone): e.split for e in concepts.emojis() if e.kind == "person"}
    for (concept, gender, tone), own in split.items():
        if not gender and (concept, "woman", tone) in split and (concept, "man", tone) in split:
            both = [split[concept, g, tone] for g in ("woman", "man")]
            assert own == questions.strictest(*both)


# Words ----------------------------------------------------------------------------------------


def test_cells_have_captions_of_their_own():
    owners = collections.defaultdict(set)
    for emoji in concepts.emojis():
        for caption in emoji.captions:
            owners[caption].add(emoji.cell)
    assert {c: o for c, o in owners.items() if len(o) > 1} == {}


def test_captions_are_clean_english():
    for emoji in concepts.emojis():
        assert len(emoji.captions) >= 2
        for caption in emoji.captions:
            assert caption == caption.strip() and "  " not in caption and "{" not in caption
            assert not re.search(r"\b(a|an) (a|an|the)\b|[:|]$|U\+|\bNone\b", caption), caption
            assert not re.search(r"\ba (?!one|eu|ewe)[aeio]", caption), caption


@pytest.mark.parametrize(
    ("text", "caption", "other"),
    [
        ("👩🏿‍🚒", "a woman firefighter with dark skin", "a female fire fighter, dark skin tone"),
        ("👨‍🚀", "a man astronaut", "a male space traveller"),
        ("🏄🏼‍♂️", "a man surfing, with medium-light skin", "a male surfer, medium-light skin tone"),
        ("🧜‍♀️", "a mermaid", "a female sea person with a fish tail"),
        ("👩🏽‍🦰", "a woman with red hair and medium skin", "a female redhead, medium skin tone"),
        ("👍🏿", "a thumbs up with dark skin", "a thumb that says yes, dark skin tone"),
        ("❤️", "a red heart", "a love symbol in red"),
        ("🟠", "an orange circle", "a round dot in orange"),
        ("🇷🇸", "the flag of Serbia", "Serbia's flag"),
        ("🇳🇱", "the flag of the Netherlands", "the Netherlands' flag"),
        ("🕟", "a clock showing half past four", "a clock face at 4:30"),
        ("🕛", "a clock showing twelve o'clock", "a clock face at 12:00"),
        ("🦄", "a unicorn", None),
        ("⏳", "an hourglass still running", None),
        ("🍇", "grapes", None),
    ],
)
def test_captions(text, caption, other):
    (emoji,) = (e for e in concepts.emojis() if e.text == text)
    assert emoji.caption == caption
    if other is not None:
        assert emoji.captions[1] == other


def test_edits_say_what_changes():
    found = {e.text: e for e in concepts.emojis()}
    pilot, source = found["👩🏻‍✈️"], found["👩🏿‍🚒"]
    (edit,) = (e for e in edits.edits_of(source) if e.target is pilot)
    assert edit.kind == "tone+concept" and edit.doubled
    assert all("pilot" in text and "light skin" in text for text in edit.texts)
    assert edit.reasoning.startswith("A woman firefighter with dark skin. ")
    assert edit.answer == "a woman pilot with light skin."
    assert not list(edits.edits_of(found["🧑🏿‍🚒"]))  # neutral: drawn as the man or the woman
    later = {e.text(): e.target for e in edits.edits_of(found["🕟"])}
    assert found["🕡"] in later.values()


def test_facts_and_tools():
    found = {e.text: e for e in concepts.emojis()}
    asked = {q.kind: q for q in questions.questions_of(found["🇷🇸"])}
    assert asked["capital"].sentence == "Belgrade is the capital of Serbia."
    assert asked["continent"].sentence == "Serbia is in Europe."
    assert asked["currency"].sentence == "The currency of Serbia is the dinar."
    assert asked["capital"].reasoning == "This is the flag of Serbia."
    assert questions.tool_sentence("firefighter") == "A firefighter works with a fire engine."
    assert questions.tool_of("firefighter") is found["🚒"]
    capitals = collections.Counter(c.capital for c in concepts.countries().values())
    assert {c for c, n in capitals.items() if n > 1} <= {"Kingston"}


@pytest.mark.parametrize(
    ("half_hours", "words"), [(0, "twelve o'clock"), (9, "half past four"), (-1, "half past eleven")]
)
def test_clock_words(half_hours, words):
    assert wording.clock_words(half_hours) == words


def test_every_emoji_can_be_drawn_in_every_style():
    some = [e for i, e in enumerate(concepts.emojis()) if i % 60 == 0]
    for draw in drawings.STYLES.values():
        for emoji in some:
            with Image.open(io.BytesIO(draw(emoji.text))) as picture:
                assert len(picture.getcolors(100_000)) > 1
    with pytest.raises(FileNotFoundError):
        drawings.twemoji("nothing like this")


def test_the_union_repeats_rare_kinds_and_nothing_else(tiny_release):
    own = {record["qid"]: record for record in lines(tiny_release / "query/train/mbeir_emoji_train.jsonl")}
    union = queries(tiny_release, "train")
    assert all(own[record["qid"]] == record for record in union)
    assert {record["qid"] for record in union} == set(own)

    def kinds(records):
        return collections.Counter(
            (record["task_id"], json.loads(record["query_src_content"])["kind"]) for record in records
        )

    sizes = collections.Counter(record["task_id"] for record in own.values())
    before, after = kinds(own.values()), kinds(union)
    assert after != before
    for (task, kind), count in before.items():
        repeats, rest = divmod(after[task, kind], count)
        assert rest == 0 and 1 <= repeats <= 20
        assert repeats == 1 or count * repeats <= sizes[task] / 12
        assert repeats == 20 or count * (repeats + 1) > sizes[task] / 12
