"""Questions about a picture that take two hops: flag -> country -> fact, person -> job -> tool.

Every question knows how people ask it, the sentence that answers it, and the reasoning between.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from trace_jax.data.emoji import wording
from trace_jax.data.emoji.concepts import (
    SPLITS,
    Country,
    Emoji,
    countries,
    emojis,
    question_split,
    share,
)
from trace_jax.data.emoji.wording import capital, clock_words, span_words

KINDS = ("capital", "continent", "currency")
"""The facts that are asked of a flag."""

_OF_A_FLAG = {
    "capital": ("What is the capital of this country?", "Which city is this country's capital?"),
    "continent": ("On which continent is this country?", "Which continent is this country part of?"),
    "currency": ("What money do people use in this country?", "What is this country's currency?"),
}
_OF_A_NAME = {
    "capital": ("What is the capital of {}?", "Which city is the capital of {}?"),
    "continent": ("On which continent is {}?", "Which continent is {} part of?"),
    "currency": ("What money do people use in {}?", "What is the currency of {}?"),
}
_OF_A_WORKER = {
    "works with": ("What does this person work with?", "Which tool belongs to this person?"),
    "needs": ("What does this person need?", "Which thing belongs to this person?"),
}
_OF_A_CLOCK = ("What time will it be in {}?", "What time was it {} ago?")


@dataclass(frozen=True)
class Question:
    """A question about one emoji. `split` is that of the pair asked; `tool` the emoji, if any."""

    emoji: Emoji
    kind: str
    split: str
    texts: tuple[str, ...]
    reasoning: str
    sentence: str
    tool: Emoji | None = None


def strictest(*splits: str) -> str:
    """Test if any is test, else val if any is val, else train."""
    return max(splits, key=SPLITS.index)


def fact(country: Country, kind: str) -> str:
    """The fact as a sentence of its own: the answer of a question, and a candidate text."""
    match kind:
        case "capital":
            return f"{capital(country.capital)} is the capital of {country.name}."
        case "continent":
            return f"{capital(country.name)} is in {country.continent}."
        case _:
            return f"The currency of {country.name} is the {country.currency}."


def name_questions(country: Country, kind: str) -> tuple[str, ...]:
    """The same questions asked of the country's name, in text alone."""
    return tuple(text.format(country.name) for text in _OF_A_NAME[kind])


def country_of(emoji: Emoji) -> Country | None:
    """The country whose flag the emoji is, if its facts are known."""
    return countries().get(emoji.concept) if emoji.kind == "flag" else None


@functools.cache
def _tools() -> dict[str, Emoji]:
    """Concept -> the emoji of what such a person works with."""
    named = {e.name: e for e in emojis() if not e.tones}
    return {who: named[row[3]] for who, row in wording.PEOPLE.items() if row[3]}


def _said(tool: Emoji) -> str:
    return wording.TOOLS.get(tool.name, tool.caption)


def _verb(concept: str) -> str:
    """Whoever has a job works with its tool; others need theirs."""
    return "works with" if wording.PEOPLE[concept][0] == "job" else "needs"


def tool_sentence(concept: str) -> str | None:
    """What such a person works with ("A firefighter works with a fire engine."), or None."""
    if (tool := _tools().get(concept)) is None:
        return None
    _, canonical, other, _ = wording.PEOPLE[concept]
    noun = other if canonical.startswith("+") else canonical
    return f"{capital(wording.article(noun))} {_verb(concept)} {_said(tool)}."


def tool_of(concept: str) -> Emoji | None:
    """The emoji of what such a person works with."""
    return _tools().get(concept)


def questions_of(emoji: Emoji) -> Iterator[Question]:
    """Every question about one emoji."""
    if (country := country_of(emoji)) is not None:
        for kind in KINDS:
            yield Question(
                emoji,
                kind,
                question_split(country.iso, kind),
                _OF_A_FLAG[kind],
                f"This is the flag of {country.name}.",
                fact(country, kind),
            )
    elif emoji.kind == "person" and (sentence := tool_sentence(emoji.concept)):
        tool = _tools()[emoji.concept]
        seen = f"{capital(emoji.caption)}."
        yield Question(emoji, "tool", emoji.split, _OF_A_WORKER[_verb(emoji.concept)], seen, sentence, tool)
    elif emoji.kind == "clock":
        for shift in (*range(-4, 0), *range(1, 5)):
            later = clock_words(int(emoji.value) + shift)
            span = span_words(abs(shift))
            text = _OF_A_CLOCK[shift < 0].format(span)
            when = "later" if shift > 0 else "earlier"
            target = next(e for e in _clocks() if int(e.value) == (int(emoji.value) + shift) % 24)
            yield Question(
                emoji,
                "time",
                strictest(emoji.split, target.split),
                (text,),
                f"{capital(emoji.caption)}. {capital(span)} {when} it is {later}.",
                f"{target.caption}.",
            )


@functools.cache
def _clocks() -> tuple[Emoji, ...]:
    return tuple(e for e in emojis() if e.kind == "clock")


@functools.cache
def _currencies() -> Counter[str]:
    return Counter(c.currency for c in countries().values())


def riddles_of(emoji: Emoji) -> Iterator[Question]:
    """Texts that name an emoji only by what is known of it: "the flag of the country whose ..."."""
    if (country := country_of(emoji)) is not None:
        city, money = country.capital, country.currency
        said = (f"the flag of the country whose capital is {city}", f"which flag flies over {city}?")
        split = question_split(country.iso, "capital")
        yield Question(emoji, "capital", split, said, fact(country, "capital"), f"{emoji.caption}.")
        if _currencies()[money] == 1:
            said = (
                f"the flag of the country that pays with the {money}",
                f"which flag flies where people pay with the {money}?",
            )
            split = question_split(country.iso, "currency")
            reason = fact(country, "currency")
            yield Question(emoji, "currency", split, said, reason, f"{emoji.caption}.")
    elif emoji.kind == "person" and emoji.gender and (sentence := tool_sentence(emoji.concept)):
        tool = _said(_tools()[emoji.concept])
        who = f"a {emoji.gender}" + (f" with {emoji.tone} skin" if emoji.tone else "")
        said = (f"{who} who {_verb(emoji.concept)} {tool}", f"{who} whose tool is {tool}")
        yield Question(emoji, "tool", emoji.split, said, sentence, f"{emoji.caption}.")


def one_of(texts: tuple[str, ...], *salt: object) -> str:
    """One of several wordings, chosen by a hash."""
    return texts[int(share("one of", *salt) * len(texts))]
