"""Every rule drops what it should, names itself, and lets the rest pass."""

import dataclasses
import json
import random

import pytest

from trace_jax.benchmarks.cot import filters as benchmark
from trace_jax.config import ROOT
from trace_jax.cot import duplicates, filters
from trace_jax.cot.config import Filters
from trace_jax.cot.prompts import Prompts
from trace_jax.cot.schema import REASONS, Row

TOKENIZER = str(ROOT / "trace_jax/assets/emoji_base")
GOOD = (
    "The picture shows a woman in a red dress with long sleeves. The change asks for a blue one with shorter sleeves."
    " The cut and the fabric stay as they are.",
    "A blue dress with short sleeves.",
)


@pytest.fixture(scope="module")
def rules() -> filters.Rules:
    return filters.Rules(Filters(tokenizer=TOKENIZER), Prompts("v1"))


def row(reasoning: str = GOOD[0], answer: str = GOOD[1], **changes) -> Row:
    plain = Row(
        qid="7:1",
        dataset="fashioniq",
        split="train",
        task=7,
        instruction="Find the garment after the change.",
        text="is blue and has shorter sleeves",
        image="a.png",
        source_caption="A red dress",
        target="7:2",
        target_text="",
        target_image="b.png",
        target_caption="",
        complex=True,
        raw=f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>",
    )
    return dataclasses.replace(plain, **changes)


def test_a_good_trace_passes_and_is_taken_apart(rules):
    judged = rules.judge(row())
    assert (judged.dropped, judged.reasoning, judged.answer) == ("", *GOOD)


def test_rows_without_a_trace_to_judge_come_back_as_they_are(rules):
    for untouched in (row(complex=False, raw=""), row(raw="rubbish").drop("unanswered")):
        assert rules.judge(untouched) is untouched


TAGGED = f"<reasoning>{GOOD[0]}</reasoning><answer>{GOOD[1]}</answer>"


@pytest.mark.parametrize(
    "raw",
    [
        "",
        GOOD[0],
        TAGGED + TAGGED,
        TAGGED + " And more.",
        "Now: " + TAGGED,
        f"<answer>{GOOD[1]}</answer><reasoning>{GOOD[0]}</reasoning>",
        f"<reasoning>{GOOD[0]}<answer>{GOOD[1]}</answer></reasoning>",
        f"<reasoning>{GOOD[0]}</reasoning> between <answer>{GOOD[1]}</answer>",
        f"<reasoning>{GOOD[0]}</reasoning><answer>{GOOD[1]}",
        f"<reasoning>{GOOD[0]}</reasoning><answer> </answer>",
        f"<reasoning></reasoning><answer>{GOOD[1]}</answer>",
        f"<reasoning>{GOOD[0]} <Answer>x</reasoning><answer>{GOOD[1]}</answer>",
        '{"reasoning": "' + GOOD[0],
    ],
)
def test_format(rules, raw):
    assert rules.judge(row(raw=raw)).dropped == "format"


def test_tags_are_found_again_whatever_is_between_them():
    generator = random.Random(0)
    letters = "ab <>/&\n.é日"
    for _ in range(500):
        texts = ["x" + "".join(generator.choices(letters, k=generator.randrange(12))) + "y" for _ in range(2)]
        raw = f"<reasoning>{texts[0]}</reasoning>{' ' * generator.randrange(3)}<answer>{texts[1]}</answer>"
        assert filters.split_trace(raw) == tuple(texts)
        assert filters.split_trace(raw + raw) is None
        cut = generator.randrange(len(raw))
        assert filters.split_trace(raw[:cut]) is None


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("leakage", {"reasoning": GOOD[0] + " This matches the ground truth."}),
        ("leakage", {"reasoning": GOOD[0] + " The target image shows exactly this."}),
        ("leakage", {"answer": GOOD[1] + " <|emb|>"}),
        ("leakage", {"reasoning": GOOD[0] + " The answer describes the target alone, concretely, in one sentence."}),
        ("reasoning_length", {"reasoning": "A red dress becomes blue."}),
        ("reasoning_length", {"reasoning": " ".join(f"The {i}th button of the dress is black." for i in range(60))}),
        ("answer_length", {"answer": "x"}),
        ("answer_length", {"answer": " ".join(f"a blue dress number {i}," for i in range(40))}),
        ("repetition", {"reasoning": "The red dress becomes blue and " * 8}),
        (
            "language",
            {"reasoning": "Das Bild zeigt eine Frau in einem roten Kleid, und die Farbe ändert sich in Blau."},
        ),
        (
            "language",
            {"reasoning": "La robe rouge devient bleue, et les manches sont plus courtes; le reste est inchangé."},
        ),
        ("unchanged", {"answer": "a red  DRESS."}),
        ("unchanged", {"answer": "the woman wears a dress", "reasoning": "A woman wears a dress. " + GOOD[0]}),
        ("keyword", {"answer": "Something rather nice to wear."}),
    ],
)
def test_each_rule_names_itself(rules, expected, changes):
    judged = rules.judge(row(**changes))
    assert judged.dropped == expected and (judged.detail or expected == "format")
    assert expected in REASONS


@pytest.mark.parametrize(
    "raw",
    [
        "I'm sorry, but I cannot help with that.",
        f"Sure, here it is. {TAGGED}",
        TAGGED.replace("The picture", "As an AI language model I see that the picture"),
        TAGGED.replace("<answer>", "<answer>I cannot identify people, but "),
        "No image was provided.",
        "I\u2019m sorry, but I can\u2019t help with that.",  # with typographic apostrophes
        TAGGED.replace("The picture", "As a large language model I cannot know, but the picture"),
    ],
)
def test_refusals_and_boilerplate(rules, raw):
    assert rules.judge(row(raw=raw)).dropped == "refusal"


def test_harmless_likenesses_pass(rules):
    for reasoning in (
        "A sure hand sewed this red dress of certainly fine silk, and of course the colour turns to blue as asked.",
        "The source is a red dress; the target is the same one in blue. The sleeves get shorter, and the cut stays.",
        "The woman works as an assistant in a shop. Her red dress becomes blue, one that lets her feel free all day.",
        "The answer lies in the colour: the red dress becomes blue, its sleeves get shorter, and the rest of it stays.",
    ):
        assert rules.judge(row(reasoning)).dropped == ""


def test_lengths_are_kept_at_both_ends(rules):
    tokenizer = filters.load_tokenizer(TOKENIZER)
    size = len(tokenizer.encode(GOOD[0], add_special_tokens=False).ids)
    for low, high, dropped in (
        (size, size, ""),
        (size + 1, 999, "reasoning_length"),
        (1, size - 1, "reasoning_length"),
    ):
        narrow = filters.Rules(Filters(tokenizer=TOKENIZER, reasoning_tokens=(low, high)), Prompts("v1"))
        assert narrow.judge(row()).dropped == dropped


def test_a_tokenizer_that_cannot_be_had_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)  # folders are looked for from the repository's root, wherever a build is started
    assert filters.load_tokenizer("trace_jax/assets/emoji_base")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no tokenizer .* give --filters.tokenizer"):
        filters.load_tokenizer(str(tmp_path))


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert filters.repeated_share("a b c d e f", 3) == 0
    assert filters.repeated_share("a b a b a b", 2) == pytest.approx(1 - 2 / 5)
    assert filters.repeated_share("a b", 3) == 0
    generator = random.Random(1)
    for _ in range(200):
        words = [str(generator.randrange(5)) for _ in range(generator.randrange(3, 40))]
        share = filters.repeated_share(" ".join(words), 3)
        assert 0 <= share < 1
        assert filters.repeated_share(" ".join(words * 2), 3) >= share


def test_unchanged_is_asked_of_composed_retrieval_alone(rules):
    same = {"answer": "A red dress.", "text": "red dress"}
    assert rules.judge(row(**same)).dropped == "unchanged"
    assert rules.judge(row(**same, task=6)).dropped == ""


def test_keywords_may_come_from_the_query_or_the_target_in_any_form(rules):
    assert rules.judge(row(answer="Something with a short sleeve.")).dropped == ""  # sleeves in the query
    assert rules.judge(row(answer="Something from Santiago.", target_text="Santiago is a city")).dropped == ""
    assert rules.judge(row(answer="Something from Santiago.", target_caption="Santiago")).dropped == ""
    assert rules.judge(row(answer="Something from Santiago.")).dropped == "keyword"
    assert rules.judge(row(answer="Something from Santiago.", text="")).dropped == ""  # nothing to hold it against
    assert filters.keywords("Find the picture of it, please") == set()


def test_normalisation():
    assert filters.normalise("  The Sagrada  Família! ") == "sagrada familia"
    assert filters.normalise("A") == "a"


def test_near_duplicates_are_of_the_same_picture_and_answer():
    one, other = row(answer="A blue dress"), row(answer="a  blue dress.")
    one, other = (dataclasses.replace(r, answer=r.raw.split("<answer>")[1][:-9]) for r in (one, other))
    assert duplicates.group_key(one) == duplicates.group_key(other)
    for change in ({"image": "c.png"}, {"answer": "A green dress"}, {"task": 8}):
        assert duplicates.group_key(one) != duplicates.group_key(dataclasses.replace(one, **change))


def test_near_duplicates_lose_to_the_earliest_whatever_the_order():
    options = Filters(tokenizer=TOKENIZER)
    rows = [
        ("7:1", "is blue and has shorter sleeves, please"),
        ("7:10", "is blue and has shorter sleeves please!"),
        ("7:2", "is blue, and has shorter sleeves, pleas"),
        ("7:3", "looks more formal"),
        ("7:4", "is much longer"),
        ("7:5", "IS MUCH  LONGER."),
    ]
    expected = [("7:2", "7:1"), ("7:5", "7:4"), ("7:10", "7:1")]
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert list(duplicates.duplicates(rows, options)) == expected


def test_near_duplicates_agree_with_comparing_all_pairs():
    """MinHash only saves work: at the thresholds and sizes used it misses nothing that comparing all pairs finds."""
    generator = random.Random(2)
    words = ["red", "blue", "short", "long", "formal", "casual", "sleeve", "collar", "button", "darker"]
    rows = [(f"7:{n}", " ".join(generator.choices(words, k=8))) for n in range(150)]
    rows += [(f"7:{n + 150}", text + " now") for n, (_, text) in enumerate(rows[:75])]
    options = Filters(tokenizer=TOKENIZER, duplicate_similarity=0.85)
    kept, expected = [], set()
    for qid, text in rows:
        parts = duplicates.shingles(text)
        if any(duplicates.similarity(parts, other) >= 0.85 for other in kept):
            expected.add(qid)
        else:
            kept.append(parts)
    found = {qid for qid, _ in duplicates.duplicates(rows, options)}
    assert found <= expected and len(found) >= 0.95 * len(expected) > 50


def test_small_groups_cost_little(monkeypatch):
    """Most groups have two or three rows: what an index needs to know is found out once, not for each of them."""
    made = []
    real = duplicates.MinHashLSH
    monkeypatch.setattr(duplicates, "MinHashLSH", lambda **options: made.append(options) or real(**options))
    for number in range(20):
        list(duplicates.duplicates([("7:1", f"number {number}"), ("7:2", "another")], Filters()))
    assert sum("threshold" in options for options in made) <= 1 < len(made)


def test_the_benchmark_lets_every_rule_look_at_every_row(tmp_path):
    benchmark(rows=400, json=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [step["rows"] for step in figures["rules"]] == list(range(40, 401, 40))
    assert [(shard["rows"], shard["found"]) for shard in figures["near_duplicates"]] == [(400, 4)]  # one of a hundred


def test_work_is_linear_in_rows(rules, monkeypatch):
    """Counted, not timed: one judgement a row, and in a large group of equal answers few comparisons a row."""
    compared = 0
    real = duplicates.similarity

    def counting(one, other):
        nonlocal compared
        compared += 1
        return real(one, other)

    monkeypatch.setattr(duplicates, "similarity", counting)
    generator = random.Random(3)
    counts = {}
    for size in (200, 800):
        rows = [(f"7:{n}", "".join(generator.choices("abcdefghij ", k=60))) for n in range(size)]
        compared = 0
        assert list(duplicates.duplicates(rows, Filters(tokenizer=TOKENIZER))) == []
        counts[size] = compared
    assert counts[800] <= 0.05 * 800
