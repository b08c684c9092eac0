"""Coloured things and odd times that nobody drew, and their changes, told in text alone.

Some hearts, circles, squares and clocks are held out, even as words. A base that reads of colours with nothing but the
others learns by heart which colour goes with which shape, and will not write a pair that it has never read. Of cars and
hats in every colour, and of ten past and twenty to, there are too many for that: it has to learn that a colour and a
thing, an hour and a minute, are put together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from trace_jax.data.emoji.concepts import Emoji, share
from trace_jax.data.emoji.edits import SHAPES, Edit, clock_edit, coloured_edit
from trace_jax.data.emoji.wording import article, time_words
from trace_jax.data.emoji.world import World

_OF_A_THING = 12
"""Edits that start from one thing, and from one drawn shape in one colour."""
_OF_A_TIME = 6


def _coloured(thing: Emoji, noun: str, colour: str) -> Emoji:
    caption = article(f"{colour} {noun}")
    cell = f"imagined {noun}/{colour}"
    return replace(thing, concept=noun, value=colour, captions=(caption,), cell=cell, split="train")


def imagined_things(world: World) -> Iterator[Edit]:
    """Changes of colour and thing, between things and the drawn shapes whose cell is read in training."""
    shapes = [e for e in world.emojis if e.concept in SHAPES and e.split == "train"]
    colours = sorted({e.value for e in shapes})
    named = {}
    for emoji in world.emojis:
        found = re.fullmatch(r"an? ([a-z]+(?: [a-z]+)?)", emoji.caption)
        if emoji.kind == "thing" and found and not {*colours, *SHAPES} & set(found[1].split()):
            named[found[1]] = emoji
    things = [_coloured(emoji, noun, colour) for noun, emoji in sorted(named.items()) for colour in colours]

    def targets(source: Emoji) -> Iterator[Emoji]:
        """The thing in other colours, other things in the same, and anything else."""
        drawn = source.concept in SHAPES
        by_hash = sorted(things if drawn else things + shapes, key=lambda e: share("imagined", source.cell, e.cell))
        for same in (
            lambda e: e.concept == source.concept and e.value != source.value,
            lambda e: e.concept != source.concept and e.value == source.value,
            lambda e: e.concept != source.concept and e.value != source.value,
        ):
            yield from [e for e in by_hash if same(e)][: _OF_A_THING // 3]

    sources = [min(group, key=lambda e: share("source", e.cell)) for group in _by_noun(things)]
    for source in (*sources, *shapes):
        for target in targets(source):
            yield coloured_edit(source, target)


def _by_noun(things: list[Emoji]) -> list[list[Emoji]]:
    grouped: dict[str, list[Emoji]] = {}
    for thing in things:
        grouped.setdefault(thing.concept, []).append(thing)
    return list(grouped.values())


def imagined_times(world: World) -> Iterator[Edit]:
    """Shifts, as those of the drawn clocks, of the five-minute times between the half hours."""
    clock = next(e for e in world.emojis if e.kind == "clock")

    def at(minutes: int) -> Emoji:
        said = time_words(minutes % 720)
        return replace(clock, captions=(f"a clock showing {said}",), cell=f"imagined clock/{said}", split="train")

    for minutes in range(0, 720, 5):
        if minutes % 30:
            shifts = sorted((*range(-6, 0), *range(1, 7)), key=lambda s: share("shift", minutes, s))
            for shift in shifts[:_OF_A_TIME]:
                later = minutes + 30 * shift
                yield clock_edit(at(minutes), at(later), shift, time_words(later % 720))
