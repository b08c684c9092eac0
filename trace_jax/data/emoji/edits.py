"""Composed changes of a picture: "but with dark skin", "make her a pilot instead", "two hours later".

An edit knows its source, its target, several ways to ask for it, and the reasoning that leads from
one to the other; the target's canonical caption is the answer, so a trace is right by construction.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from trace_jax.data.emoji import wording
from trace_jax.data.emoji.concepts import PHASES, Emoji, emojis, share
from trace_jax.data.emoji.wording import capital, clock_words, span_words

_FAMILY_WORDS = {
    "job": "job",
    "activity": "activity",
    "sport": "sport",
    "gesture": "gesture",
    "fantasy": "figure",
    "spirit": "figure",
    "hand": "gesture",
}
"""Families of concepts that change into one another, and what a person calls the thing changed."""

SHAPES = ("heart", "circle", "square")
"""Concepts that are drawn in many colours."""
_HAIR = {
    ": red hair": ("red", "with red hair"),
    ": curly hair": ("curly", "with curly hair"),
    ": white hair": ("white", "with white hair"),
    ": bald": ("bald", "bald"),
    ": blond hair": ("blond", "with blond hair"),
}
_AGES = {
    "child": ("young", ("but as a child", "{as} a child again")),
    "adult": ("adult", ("but as a grown-up", "{as} an adult")),
    "older": ("old", ("but much older", "{as} an old person")),
}


@dataclass(frozen=True)
class Edit:
    """A change from one emoji to another. `kind` names what changes; `doubled` if two things do."""

    source: Emoji
    target: Emoji
    kind: str
    texts: tuple[str, ...]
    changes: tuple[str, ...]

    @property
    def doubled(self) -> bool:
        """Whether two attributes change at once."""
        return "+" in self.kind

    def text(self, salt: object = "") -> str:
        """One of the ways to ask for the edit, chosen by a hash."""
        where = share("edit text", self.source.cell, self.target.cell, salt)
        return self.texts[int(where * len(self.texts))]

    @property
    def reasoning(self) -> str:
        """What a person would think: what is seen, and what changes."""
        where = share("reasoning", self.source.cell, self.target.cell)
        return f"{capital(self.source.caption)}. {self.changes[int(where * len(self.changes))]}"

    @property
    def answer(self) -> str:
        """The target's canonical caption, as a sentence's end."""
        return f"{self.target.caption}."


def _thought(changed: list[tuple[str, str]]) -> tuple[str, ...]:
    """Two ways to say which attributes become what."""
    if len(changed) == 1:
        ((what, value),) = changed
        return (
            f"The {what} becomes {value}, the rest stays.",
            f"Only the {what} changes, to {value}.",
        )
    (what, value), (other, second) = changed
    return (
        f"The {what} becomes {value} and the {other} {second}.",
        f"Two changes: the {what} to {value}, the {other} to {second}.",
    )


def _concept_words(target: Emoji) -> tuple[str, str]:
    """(as it stands after "becomes", as it stands in "make her ..." or "but ...")."""
    if target.kind == "hand":
        bare = wording.HANDS[target.concept][0]
        return bare, bare
    if target.concept == "merperson":
        return {"woman": "mermaid", "man": "merman"}[target.gender], ""
    canonical = wording.PEOPLE[target.concept][1]
    if canonical[0] in "+^":
        return canonical[1:], canonical[1:]
    return canonical, wording.article(canonical)


def _person_texts(source: Emoji, target: Emoji, kind: str) -> tuple[str, ...]:
    her = {"woman": "her", "man": "him"}.get(source.gender, "it")
    skin = f"{target.tone or 'yellow'} skin"
    who = f"a {target.gender}"
    if kind == "tone":
        return (f"but with {skin}", f"the same with {skin}", f"now with {skin}", f"give {her} {skin}")
    if kind == "gender":
        return (f"but {who}", f"the same as {who}", f"make {her} {who}")
    if kind == "tone+gender":
        return (f"but {who} with {skin}", f"the same as {who} with {skin}", f"make {her} {who} with {skin}")
    value, phrase = _concept_words(target)
    phrase = phrase or f"a {value}"
    noun = target.kind == "hand" or wording.PEOPLE[target.concept][1][0] not in "+^"
    if kind == "concept":
        if target.kind == "hand":
            return (f"{phrase} instead", f"but {phrase}", f"change it to {phrase}")
        if noun:
            return (f"make {her} {phrase} instead", f"as {phrase} instead", f"but {phrase}")
        return (f"but {phrase}", f"now {phrase}", f"{phrase} instead")
    if kind == "tone+concept":
        if noun and target.kind == "person":
            return (
                f"make {her} {phrase} instead, with {skin}",
                f"as {phrase}, with {skin}",
                f"but {phrase}, with {skin}",
            )
        return (f"but {phrase}, with {skin}", f"{phrase} instead, with {skin}")
    if noun:  # gender and concept
        return (f"but {who}, as {phrase}", f"make {her} {who} and {phrase}")
    return (f"but {who} and {phrase}", f"{who} instead, and {phrase}")


def _person_edit(source: Emoji, target: Emoji) -> Edit:
    """The edit between two people (or hands) that differ in one or two of concept, gender, tone."""
    changed, kinds = [], []
    if source.tone != target.tone:
        kinds.append("tone")
    if source.gender != target.gender:
        kinds.append("gender")
        changed.append(("person", f"a {target.gender}"))
    if source.concept != target.concept:
        kinds.append("concept")
        changed.append((_FAMILY_WORDS[target.edit], _concept_words(target)[0]))
    if "tone" in kinds:
        changed.append(("skin", target.tone or "yellow"))
    kind = "+".join(kinds)
    return Edit(source, target, kind, _person_texts(source, target, kind), _thought(changed))


def coloured_edit(source: Emoji, target: Emoji) -> Edit:
    """The edit between two things that have a colour."""
    colour, shape = target.value, target.concept
    a_shape = wording.article(shape)
    if source.concept == shape:
        texts = (f"but in {colour}", f"the same {shape} in {colour}", f"make it {colour}")
        return Edit(source, target, "colour", texts, _thought([("colour", colour)]))
    if source.value == colour:
        texts = (f"as {a_shape} instead", f"{a_shape} of the same colour", f"make it {a_shape}")
        return Edit(source, target, "shape", texts, _thought([("shape", a_shape)]))
    texts = (f"as {a_shape} in {colour}", f"make it {a_shape} and {colour}")
    changed = [("shape", a_shape), ("colour", colour)]
    return Edit(source, target, "shape+colour", texts, _thought(changed))


def clock_edit(source: Emoji, target: Emoji, shift: int, now: str) -> Edit:
    """The edit by so many half hours, after which it is `now`."""
    span = span_words(abs(shift))
    when = "later" if shift > 0 else "earlier"
    texts = (f"{span} {when}", f"the clock {span} {when}")
    thought = (f"{capital(span)} {when} it is {now}.",)
    return Edit(source, target, "time", texts, thought)


@functools.cache
def _people() -> dict[tuple[str, str, str], Emoji]:
    kinds = ("person", "hand")
    return {(e.concept, e.gender, e.tone): e for e in emojis() if e.kind in kinds}


@functools.cache
def _family(edit: str, gender: str) -> tuple[str, ...]:
    """Concepts of a family that exist in this gender, each once, in the Unicode order."""
    named = (e.concept for e in emojis() if e.edit == edit and e.gender == gender)
    return tuple(dict.fromkeys(named))


@functools.cache
def _valued() -> dict[tuple[str, str], Emoji]:
    return {(e.concept, e.value): e for e in emojis() if e.value}


def _other(gender: str) -> str:
    return {"woman": "man", "man": "woman"}.get(gender, "")


def edits_of(source: Emoji) -> Iterator[Edit]:
    """Every seen edit of an emoji: the kinds that training and the ordinary test use.

    People without a sign of their gender have none if the artists also draw a man and a woman:
    their drawings are often the same.
    """
    if source.kind in ("person", "hand"):
        people, find = _people(), _people().get
        if not source.gender and (source.concept, "woman", source.tone) in people:
            return
        tones = [t for t in ("", *wording.TONES.values()) if t != source.tone]
        family = source.edit in _FAMILY_WORDS
        concepts = _family(source.edit, source.gender) if family else ()
        keys = [(source.concept, source.gender, t) for t in tones]
        if (other := _other(source.gender)) and source.edit not in ("age", ""):
            keys += [(source.concept, other, t) for t in (source.tone, *tones)]
        for concept in concepts:
            if concept != source.concept:
                keys += [(concept, source.gender, t) for t in (source.tone, *tones)]
                keys += [(concept, other, source.tone)] if other else []
        for key in keys:
            if (target := find(key)) is not None:
                yield _person_edit(source, target)
    elif source.concept in SHAPES:
        for (concept, _), target in _valued().items():
            if concept in SHAPES and target is not source:
                yield coloured_edit(source, target)
    elif source.kind == "clock":
        for shift in (*range(-6, 0), *range(1, 7)):
            target = _valued()["clock", str((int(source.value) + shift) % 24)]
            yield clock_edit(source, target, shift, clock_words(int(target.value)))


def _turned(emoji: Emoji) -> str:
    return f"{emoji.concept} facing right"


def unseen_edits_of(source: Emoji) -> Iterator[Edit]:
    """Edits that training never asks for: hair, age, direction and the phase of the moon."""
    find = _people().get
    if source.kind == "person" and source.gender:
        if source.concept in _HAIR or source.concept == "adult":
            for concept, (value, said) in _HAIR.items():
                target = find((concept, source.gender, source.tone))
                if target is not None and concept != source.concept:
                    texts = (f"but {said}", f"the same person, {said}")
                    what = "head" if value == "bald" else "hair"
                    yield Edit(source, target, "hair", texts, _thought([(what, value)]))
        if source.concept in _AGES:
            for concept, (value, ways) in _AGES.items():
                target = find((concept, source.gender, source.tone))
                if target is not None and concept != source.concept:
                    texts = tuple(way.format(**{"as": "the same, as"}) for way in ways)
                    yield Edit(source, target, "age", texts, _thought([("age", value)]))
        if (target := find((_turned(source), source.gender, source.tone))) is not None:
            texts = ("but facing right", "turned to the right")
            yield Edit(source, target, "direction", texts, _thought([("direction", "right")]))
    elif source.kind == "moon":
        for step in range(1, 8):
            phase = PHASES[(int(source.value) + step) % 8]
            target = _valued()["moon", str(PHASES.index(phase))]
            said = wording.article(phase)
            texts = (f"as {said}", f"but when it is {said}")
            if step == 1:
                texts = ("one phase later", "a few days later")
            yield Edit(source, target, "moon", texts, _thought([("phase", said)]))
