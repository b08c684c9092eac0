"""The queries of all eight task types, for the seen style, the unseen style and the unseen edits.

A record's split is the strictest of everything in it: its query, its picture and its answers.
Whatever the artists leave open (a picture that shows two different things, a person whom one of
them draws as a man) is not asked in a test.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from trace_jax.data.emoji.concepts import Emoji, keywords, share, translations
from trace_jax.data.emoji.edits import Edit, edits_of, unseen_edits_of
from trace_jax.data.emoji.questions import (
    KINDS,
    country_of,
    fact,
    name_questions,
    one_of,
    question_split,
    questions_of,
    riddles_of,
    strictest,
    tool_sentence,
)
from trace_jax.data.emoji.wording import capital
from trace_jax.data.emoji.world import TRAINED, World


class Candidate(NamedTuple):
    """A text, a picture (its path in the release folder) or both."""

    txt: str | None
    img: str | None


@dataclass(frozen=True)
class Query:
    """One query. `reasoning` and `answer` are empty where no thought is needed.

    `negatives` are wrong answers that lie near: the query's own picture, and what differs in one attribute.
    """

    dataset: str
    task: int
    split: str
    kind: str
    text: str | None
    image: str | None
    positives: tuple[Candidate, ...]
    reasoning: str = ""
    answer: str = ""
    negatives: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A set of queries of its own id, from pictures in `styles`, of the tasks in `tasks`."""

    name: str
    id: int
    styles: tuple[str, ...]
    tasks: tuple[int, ...]
    unseen: bool


DATASETS = (
    Dataset("emoji", 10, TRAINED, (0, 1, 2, 3, 4, 6, 7, 8), False),
    Dataset("emojinoto", 11, ("noto",), (0, 3, 4, 6, 7, 8), True),
    Dataset("emojiedits", 12, TRAINED, (7, 8), True),
)

# At most so many edits of each kind are asked of one picture.
_EDITS_7 = {"tone": 2, "concept": 3, "tone+concept": 3, "colour": 4, "shape+colour": 4, "time": 8}
_EDITS_8 = {"tone+concept": 2, "colour": 2, "shape+colour": 2, "time": 3}
_EDITS_2 = {"colour": 2, "time": 3}


def texts_of(world: World) -> list[str]:
    """Every text of the data set: captions in both wordings, facts and answers."""
    texts = [text for emoji in world.emojis for text in emoji.captions[:2]]
    for emoji in world.emojis:
        if (country := country_of(emoji)) is not None:
            texts += [fact(country, kind) for kind in KINDS]
        if emoji.kind == "person" and (sentence := tool_sentence(emoji.concept)):
            texts.append(sentence)
    return list(dict.fromkeys(texts))


def pool(world: World, dataset: Dataset, task: int) -> list[Candidate]:
    """Everything that a task may find: all pictures, all texts or all captioned pictures."""
    if task in (1, 3, 6):
        return [Candidate(text, None) for text in texts_of(world)]
    styles = TRAINED if (dataset.name, task) == ("emojinoto", 4) else dataset.styles
    paths = world.all(styles)
    if task in (0, 4, 7):
        return [Candidate(None, path) for path in paths]
    return [c for path in paths for e in world.shows[path] for c in _cards(path, e)]


def _cards(path: str, emoji: Emoji) -> tuple[Candidate, ...]:
    return (Candidate(emoji.caption, path),)


def _images(paths: Iterable[str]) -> tuple[Candidate, ...]:
    return tuple(Candidate(None, path) for path in paths)


def _captioned(world: World, emoji: Emoji, styles: tuple[str, ...]) -> tuple[Candidate, ...]:
    return tuple(Candidate(emoji.caption, path) for path in world.of(emoji, styles))


def _sources(world: World, dataset: Dataset) -> Iterator[tuple[Emoji, str]]:
    """Pictures that show one thing clearly, with that thing."""
    for path in world.all(dataset.styles):
        if (emoji := world.clear(path)) is not None:
            yield emoji, path


def _named(world: World) -> Iterator[Emoji]:
    """Emoji that a text may ask for: of held-out ones only those that nobody can dispute."""
    return (e for e in world.emojis if e.split == "train" or world.askable(e))


@functools.cache
def _near(world: World, emoji: Emoji) -> tuple[str, ...]:
    """Training pictures of what differs from an emoji in one attribute: tone, gender, concept, colour, shape, time."""
    edits = (e for e in edits_of(emoji) if not e.doubled and e.target.split == "train")
    nearest = _some(edits, {"tone": 2, "colour": 2, "time": 2}, f"near/{emoji.cell}", 1)
    return tuple(path for edit in nearest for path in world.of(edit.target, TRAINED) if world.split(path) == "train")


def _text_to_image(world: World, dataset: Dataset) -> Iterator[Query]:
    tags = {e.text: ", ".join(keywords().get(e.text, ())[:3]) for e in world.emojis}
    common = Counter(tags.values())
    for emoji in _named(world):
        paths = world.of(emoji, dataset.styles)
        asked = [("caption", emoji.caption), *(("words", text) for text in emoji.captions[1:])]
        if emoji.kind == "thing":
            asked = asked[:1]
            if "," in tags[emoji.text] and common[tags[emoji.text]] == 1:
                asked.append(("words", tags[emoji.text]))
        for kind, text in asked:
            near = _images(path for path in _near(world, emoji) if path not in paths)
            yield Query(dataset.name, 0, emoji.split, kind, text, None, _images(paths), negatives=near)


def _image_to_text(world: World, dataset: Dataset) -> Iterator[Query]:
    for path in world.all(dataset.styles):
        texts = [text for emoji in world.readings(path) for text in emoji.captions[:2]]
        found = tuple(Candidate(text, None) for text in dict.fromkeys(texts))
        yield Query(dataset.name, 3, "train", world.shows[path][0].kind, None, path, found)


def _image_to_image(world: World, dataset: Dataset) -> Iterator[Query]:
    for path in world.all(dataset.styles):
        alike = [p for emoji in world.certain(path) for p in world.of(emoji, TRAINED)]
        found = _images(p for p in dict.fromkeys(alike) if p != path)
        near = [p for p in _near(world, world.certain(path)[0]) if p not in alike]
        kind = world.shows[path][0].kind
        yield Query(dataset.name, 4, "train", kind, None, path, found, negatives=_images([path, *near]))


def _text_to_text(world: World, dataset: Dataset) -> Iterator[Query]:
    for emoji in _named(world):
        canonical = (Candidate(emoji.caption, None),)
        both = tuple(Candidate(text, None) for text in emoji.captions[:2])
        for text in emoji.captions[1:]:
            found = tuple(c for c in both if c.txt != text)
            yield Query(dataset.name, 1, emoji.split, "words", text, None, found)
        for text in dict.fromkeys(translations()[emoji.text]):
            if text not in emoji.captions:
                kept = both if emoji.kind != "thing" else canonical
                yield Query(dataset.name, 1, emoji.split, "translation", text, None, kept)
        if (country := country_of(emoji)) is not None:
            for kind in KINDS:
                # The fact of a held-out pair may be read as text; its other question is the test.
                split = question_split(country.iso, kind)
                first, second = name_questions(country, kind)
                found = (Candidate(fact(country, kind), None),)
                yield Query(dataset.name, 1, "train", "fact", first, None, found)
                yield Query(dataset.name, 1, split, "fact", second, None, found)


def _picture_questions(world: World, dataset: Dataset) -> Iterator[Query]:
    for emoji, path in _sources(world, dataset):
        for question in questions_of(emoji):
            found = question.sentence
            if question.kind == "time":
                found = found.removesuffix(".")
            texts = question.texts
            if dataset.unseen or (len(texts) > 1 and question.split != "train"):
                texts = (one_of(texts, path, question.kind),)
            for text in texts:
                yield Query(
                    dataset.name,
                    6,
                    strictest(question.split, emoji.split),
                    question.kind,
                    text,
                    path,
                    (Candidate(found, None),),
                    question.reasoning,
                    question.sentence,
                )


def _some(edits: Iterable[Edit], quota: dict[str, int], salt: str, times: int) -> Iterator[Edit]:
    """At most `quota` edits of each kind (one of kinds not named) so many `times`, by hash."""
    grouped = defaultdict(list)
    for edit in edits:
        grouped[edit.kind].append(edit)
    for kind, group in grouped.items():
        group.sort(key=lambda e: share(salt, e.source.cell, e.target.cell))
        yield from group[: quota.get(kind, 1) * times]


def _edited(
    world: World,
    dataset: Dataset,
    task: int,
    edits: Callable[[Emoji], Iterable[Edit]],
    quota: dict[str, int],
) -> Iterator[Query]:
    """Picture and change -> picture (task 7), or picture with its caption (task 8)."""
    for emoji, path in _sources(world, dataset):
        drawn = (e for e in edits(emoji) if world.of(e.target, dataset.styles))
        for edit in _some(drawn, quota, f"{task}/{path}", world.size.edits):
            paths = world.of(edit.target, dataset.styles)
            if path in paths:  # drawn alike: the change cannot be seen
                continue
            found = _images(paths) if task == 7 else _captioned(world, edit.target, dataset.styles)
            near = [Candidate(None if task == 7 else emoji.caption, path)]
            if task == 7:
                near += _images(p for p in _near(world, edit.target) if p not in (*paths, path))
            yield Query(
                dataset.name,
                task,
                strictest(edit.source.split, edit.target.split),
                edit.kind,
                edit.text((task, path)),
                path,
                found,
                edit.reasoning,
                edit.answer,
                tuple(near),
            )


def _picture_tools(world: World, dataset: Dataset) -> Iterator[Query]:
    for emoji, path in _sources(world, dataset):
        for question in questions_of(emoji):
            if question.tool is not None and (found := _captioned(world, question.tool, dataset.styles)):
                yield Query(
                    dataset.name,
                    8,
                    emoji.split,
                    "tool",
                    one_of(question.texts, "it2it", path),
                    path,
                    found,
                    f"{question.reasoning} {question.sentence}",
                    f"{question.tool.caption}.",
                )


def _text_to_card(world: World, dataset: Dataset) -> Iterator[Query]:
    """Text -> picture with its caption: plain ones, riddles of two hops, changes told in text."""
    for emoji in _named(world):
        found = _captioned(world, emoji, dataset.styles)
        said = emoji.captions[-1] if emoji.kind != "thing" else emoji.caption
        plain = (f"{said}, with a caption", f"a captioned picture of {said}")
        for text in plain:
            yield Query(dataset.name, 2, emoji.split, "plain", text, None, found)
        for riddle in riddles_of(emoji):
            for text in riddle.texts:
                yield Query(
                    dataset.name,
                    2,
                    strictest(riddle.split, emoji.split),
                    f"riddle {riddle.kind}",
                    text,
                    None,
                    found,
                    riddle.reasoning,
                    f"{emoji.caption}.",
                )
        drawn = (e for e in edits_of(emoji) if world.of(e.target, dataset.styles))
        for edit in _some(drawn, _EDITS_2, "text", world.size.edits):
            yield Query(
                dataset.name,
                2,
                strictest(edit.source.split, edit.target.split),
                "edit",
                f"{emoji.caption}, {edit.text('text')}",
                None,
                _captioned(world, edit.target, dataset.styles),
                edit.reasoning,
                edit.answer,
            )


def _generate(world: World, dataset: Dataset) -> Iterator[Query]:
    if dataset.name == "emojiedits":
        for task in dataset.tasks:
            yield from _edited(world, dataset, task, unseen_edits_of, {"moon": 3, "hair": 2})
        return
    makers: dict[int, list[Callable[[World, Dataset], Iterator[Query]]]] = {
        0: [_text_to_image],
        1: [_text_to_text],
        2: [_text_to_card],
        3: [_image_to_text],
        4: [_image_to_image],
        6: [_picture_questions],
        7: [lambda w, d: _edited(w, d, 7, edits_of, _EDITS_7)],
        8: [_picture_tools, lambda w, d: _edited(w, d, 8, edits_of, _EDITS_8)],
    }
    for task in dataset.tasks:
        for make in makers[task]:
            yield from make(world, dataset)


def _askable(world: World, query: Query) -> bool:
    """Whether a held-out query has answers that nobody can dispute."""
    if not query.positives:
        return False
    for path in filter(None, (query.image, *(c.img for c in query.positives))):
        if world.clear(path) is None and query.task not in (0, 2, 3, 4):
            return False
    if query.image is not None and query.task in (3, 4):
        return any(map(world.askable, world.shows[query.image]))
    shown = [world.shows[c.img] for c in query.positives if c.img]
    return not shown or any(world.askable(e) for group in shown for e in group)


def _balanced(queries: list[Query], most: int) -> list[Query]:
    """At most `most` queries, the kinds taken in turn, each in the order of a hash."""
    grouped: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        grouped[query.kind].append(query)
    for group in grouped.values():
        group.sort(key=lambda q: share("pick", q.text, q.image, q.answer))
    ranked = [(i, kind, q) for kind, qs in sorted(grouped.items()) for i, q in enumerate(qs)]
    ranked.sort(key=lambda item: item[:2])
    return [query for _, _, query in ranked[:most]]


def queries(world: World) -> dict[tuple[str, int, str], list[Query]]:
    """(dataset, task, split) -> its queries, balanced over their kinds and capped by the size."""
    sorted_out: dict[tuple[str, int, str], list[Query]] = defaultdict(list)
    for dataset in DATASETS:
        for query in _generate(world, dataset):
            pictures = filter(None, (query.image, *(c.img for c in query.positives)))
            split = strictest(query.split, world.split(*pictures))
            if dataset.unseen:
                split = "test"
            if not query.positives or (split != "train" and not _askable(world, query)):
                continue
            text = capital(query.text) if query.text and query.text.endswith("?") else query.text
            sorted_out[dataset.name, query.task, split].append(replace(query, split=split, text=text))
    size = world.size
    for (name, task, split), found in sorted_out.items():
        most = {"val": size.val, "test": size.unseen if name != "emoji" else size.test}.get(split)
        most = most or (size.composed if task == 7 else size.train)
        unique = list({(q.text, q.image): q for q in found}.values())
        sorted_out[name, task, split] = _balanced(unique, most)
    return dict(sorted(sorted_out.items()))
