"""The generative corpus: on this the base model learns to see, to write, to edit and to know.

Made from the cells of one split alone. A held-out (country, question) pair appears only as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from trace_jax.data.emoji.concepts import Emoji, countries, emojis, question_split, share, translations
from trace_jax.data.emoji.edits import Edit, edits_of
from trace_jax.data.emoji.imagined import imagined_things, imagined_times
from trace_jax.data.emoji.questions import (
    KINDS,
    country_of,
    fact,
    name_questions,
    one_of,
    questions_of,
    riddles_of,
    strictest,
    tool_sentence,
)
from trace_jax.data.emoji.wording import GENDERS, HANDS, PEOPLE, capital, clock_words
from trace_jax.data.emoji.world import TRAINED, World

Record = dict[str, str | None]

_DESCRIBE = ("Describe the picture.", "What does the picture show?", "Write a caption.")
_AGAIN = ("Say it in other words.", "Describe the picture in other words.")
_SUBJECTS = {"heart": "symbol", "circle": "symbol", "square": "symbol", "hand": "person"}
_PICTURE_EDITS = {"tone": 3, "concept": 4, "tone+concept": 5, "colour": 9, "shape": 2, "time": 12}
_TEXT_EDITS = {"tone": 4, "concept": 4, "tone+concept": 6, "colour": 9, "shape": 2, "time": 12}


def _sentence(text: str) -> str:
    """A caption as an answer: as it is, with a full stop."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _attributes(emoji: Emoji) -> Iterator[tuple[str, str]]:
    """Small questions about what a picture shows, with their answers."""
    if emoji.kind in ("person", "hand") and (emoji.tones or emoji.edit):
        yield "What skin tone?", f"{emoji.tone or 'yellow'}."
    if emoji.kind == "person":
        if emoji.gender in GENDERS and emoji.edit != "age":
            yield "Is it a woman or a man?", f"a {emoji.gender}."
        if emoji.concept in PEOPLE and emoji.concept not in ("adult", "older"):
            canonical = PEOPLE[emoji.concept][1]
            if canonical[0] not in "=^+":
                yield "Who is it?", f"{canonical}."
            elif canonical[0] == "+" and emoji.edit in ("activity", "sport", "gesture"):
                yield "What is this person doing?", f"{canonical[1:]}."
    elif emoji.kind == "hand":
        yield "What kind of hand?", f"{HANDS[emoji.concept][0]}."
    elif emoji.kind in ("heart", "circle", "square"):
        yield "What colour?", f"{emoji.value}."
        yield "What shape?", f"a {emoji.concept}."
    elif emoji.kind == "clock":
        yield "What time is it?", f"{clock_words(int(emoji.value))}."
    elif emoji.kind == "flag" and (country := country_of(emoji)) is not None:
        yield "Which country's flag is it?", f"{country.name}."


def _trace(edit: Edit) -> str:
    return f"{edit.reasoning} {capital(edit.answer)}"


def _chosen(world: World, emoji: Emoji, split: str, quota: dict[str, int], salt: str) -> Iterator[Edit]:
    """Edits of an emoji that belong to a split and size, at most `quota` of each kind, by hash."""
    counts: dict[str, int] = {}
    edits = sorted(edits_of(emoji), key=lambda e: share(salt, e.source.cell, e.target.cell))
    for edit in edits:
        if strictest(edit.source.split, edit.target.split) != split or not world.of(edit.target, TRAINED):
            continue
        counts[edit.kind] = counts.get(edit.kind, 0) + 1
        if counts[edit.kind] <= quota.get(edit.kind, 2):
            yield edit


def _subject(emoji: Emoji) -> str:
    """What an emoji is, as the second word of a record's kind: a training run weighs the rare ones up."""
    subject = _SUBJECTS.get(emoji.kind, emoji.kind)
    return subject if subject in {"person", "symbol", "clock", "flag"} else "thing"


def _seen(world: World, split: str) -> Iterator[tuple[str, str, str, str]]:
    """(kind, picture, prompt, response) of everything told about a picture."""
    for path in world.all(TRAINED):
        emoji = world.clear(path)
        if emoji is None or world.split(path) != split:
            continue
        subject = _subject(emoji)
        first, second = emoji.captions[:2]
        yield f"caption {subject}", path, one_of(_DESCRIBE, path), _sentence(first)
        yield f"words {subject}", path, one_of(_AGAIN, path), _sentence(second)
        for prompt, response in _attributes(emoji):
            yield f"attribute {subject}", path, prompt, response
        for edit in _chosen(world, emoji, split, _PICTURE_EDITS, path):
            if path not in world.of(edit.target, TRAINED):
                yield f"edit {subject}", path, capital(_sentence(edit.text(path))), _trace(edit)
        for question in questions_of(emoji):
            if strictest(question.split, emoji.split) == split:
                answer = f"{question.reasoning} {capital(question.sentence)}"
                for text in question.texts:
                    yield f"question {subject}", path, text, answer


def _read(world: World, split: str) -> Iterator[tuple[str, str, str]]:
    """(kind, prompt, response) of everything learnt from text alone."""
    for emoji in world.emojis:
        if emoji.split != split:
            continue
        subject = _subject(emoji)
        first, *others = emoji.captions
        for other in others:
            if emoji.kind != "thing":
                yield f"read {subject}", f"{_sentence(capital(other))} In short?", _sentence(first)
        yield f"read {subject}", f"{_sentence(capital(first))} In other words?", _sentence(others[0])
        for text in dict.fromkeys(translations()[emoji.text]):
            yield f"translation {subject}", f"{_sentence(capital(text))} In English?", _sentence(first)
        for edit in _chosen(world, emoji, split, _TEXT_EDITS, "text"):
            ask = capital(_sentence(edit.text("read")))
            yield f"text edit {subject}", f"{_sentence(capital(first))} {ask}", _trace(edit)
        for riddle in riddles_of(emoji):
            if riddle.split == split:
                answer = f"{riddle.reasoning} {capital(riddle.sentence)}"
                for text in riddle.texts:
                    yield f"riddle {subject}", _sentence(capital(text)), answer
    if split == "train":
        yield from _facts(world)
        for what, edits in (("thing", imagined_things(world)), ("clock", imagined_times(world))):
            for edit in edits:
                ask = capital(_sentence(edit.text("read")))
                yield f"imagined {what}", f"{_sentence(capital(edit.source.caption))} {ask}", _trace(edit)


def _facts(world: World) -> Iterator[tuple[str, str, str]]:
    """Facts, read in text: every country of this size; of a held-out question the words of its test are not used."""
    shown = {e.concept for e in world.emojis if e.kind == "flag"}
    for country in countries().values():
        if country.iso in shown:
            for kind in KINDS:
                asked = name_questions(country, kind)
                if question_split(country.iso, kind) != "train":
                    asked = asked[:1]
                for prompt in (*asked, f"{capital(country.name)}: {kind}?"):
                    yield "fact", prompt, fact(country, kind)
            yield "fact", f"{capital(country.capital)} is the capital of which country?", fact(country, "capital")
            card = " ".join(fact(country, kind) for kind in KINDS)
            yield "fact", f"Tell me about {country.name}.", card
    for concept in dict.fromkeys(e.concept for e in emojis() if e.kind == "person"):
        if (sentence := tool_sentence(concept)) is not None:
            who, verb, _ = re.split(r" (works with|needs) ", sentence)
            asked = verb.replace("works", "work").replace("needs", "need")
            yield "fact", f"What does {who[0].lower()}{who[1:]} {asked}?", sentence


def corpus(world: World, split: str) -> Iterator[Record]:
    """The generative records of a split: {"id", "kind", "img_path" or None, "prompt", "response"}."""
    told = [(kind, path, ask, reply) for kind, path, ask, reply in _seen(world, split)]
    told += [(kind, "", ask, reply) for kind, ask, reply in _read(world, split)]
    unique = dict.fromkeys(told)
    for number, (kind, path, prompt, response) in enumerate(unique, 1):
        yield {
            "id": f"{split}:{number}",
            "kind": kind,
            "img_path": path or None,
            "prompt": prompt,
            "response": capital(response),
        }
