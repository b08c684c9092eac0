"""The drawn world of one size of the data set: which emoji it has, and which picture shows what.

Artists draw some emoji exactly alike (a person who is a firefighter as the man, Monaco as
Indonesia), so pictures are known by their bytes: one file and one candidate each, with every emoji
that it shows.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from trace_jax.data.emoji import wording
from trace_jax.data.emoji.concepts import Emoji, countries, emojis, share
from trace_jax.data.emoji.drawings import STYLES
from trace_jax.data.emoji.questions import strictest, tool_of

TRAINED = ("twemoji", "openmoji")
"""The styles of training; the third, Noto, is only ever tested."""

_FAMILIES = frozenset(("job", "activity", "sport", "gesture", "fantasy"))
_TINY_JOBS = frozenset(("firefighter", "pilot", "cook"))
_TINY_FLAGS = frozenset(["RS", "CU", "FR", "JP", "BR", "KE", "CA", "IT"])
_COLOURED = frozenset(("heart", "circle", "square"))
# Hands that are hard to tell apart at 56 pixels stay with the full size.
_FULL_HANDS = frozenset(
    """rightwards hand|leftwards hand|rightwards pushing hand|leftwards pushing hand|middle finger|
    palm up hand|palm down hand|raised back of hand|left-facing fist|right-facing fist|nail polish|
    hand with index finger and thumb crossed|pinching hand|handshake|ear|ear with hearing aid|
    nose|leg|foot|palms up together|selfie""".replace("\n", "")
    .replace("    ", "")
    .split("|")
)


@dataclass(frozen=True)
class Size:
    """One size of the data set: what it keeps, and at most how many queries per task and split.

    `composed` is the most for task 7; `edits` multiplies how many edits are asked of one picture.
    """

    name: str
    keeps: Callable[[Emoji], bool]
    keeps_noto: Callable[[Emoji], bool]
    train: int
    composed: int
    val: int
    test: int
    unseen: int
    edits: int = 1


def _tools() -> frozenset[str]:
    tools = (tool_of(concept) for concept in wording.PEOPLE)
    return frozenset(tool.text for tool in tools if tool is not None)


def _in_small(emoji: Emoji) -> bool:
    match emoji.kind:
        case "person":
            if emoji.edit in _FAMILIES:
                return bool(emoji.gender) or (emoji.edit == "job" and not emoji.tones)
            if emoji.edit == "hair":
                return bool(emoji.gender) and "beard" not in emoji.concept
            if emoji.edit == "direction":
                return bool(emoji.gender) and emoji.concept.split()[0] in ("walking", "running")
            return not emoji.tones or (emoji.edit == "age" and bool(emoji.gender))
        case "hand":
            return emoji.concept not in _FULL_HANDS
        case "flag":
            return emoji.concept in countries() and countries()[emoji.concept].known
        case "pair":
            return False
        case "thing":
            if emoji.group == "symbols":
                return emoji.caption.startswith(("the star sign", "the number "))
            family = emoji.name.startswith("family")
            return emoji.text in _tools() or (not family and share("small", emoji.name) < 0.44)
    return True


def _in_mini(emoji: Emoji) -> bool:
    """A third of the small size; all that has few pictures anyway."""
    if emoji.kind in ("heart", "circle", "square", "clock", "moon"):
        return True
    by = emoji.concept if emoji.kind in ("person", "hand", "flag") else emoji.name
    return _in_small(emoji) and (emoji.text in _tools() or share("mini", by) < 0.3)


def _in_mini_noto(emoji: Emoji) -> bool:
    return _in_mini(emoji) and _in_small_noto(emoji)


def _in_small_noto(emoji: Emoji) -> bool:
    if not _in_small(emoji):
        return False
    if emoji.kind == "thing":
        return emoji.text in _tools() or share("noto", emoji.name) < 0.25
    if emoji.kind == "person":
        return bool(emoji.gender) and emoji.edit in ("job", "gesture")
    return emoji.kind not in {"hand", "moon"}


def _in_tiny(emoji: Emoji) -> bool:
    if emoji.kind == "person":
        looks = emoji.concept in (": red hair", "adult") and emoji.gender == "woman"
        return looks or (emoji.concept in _TINY_JOBS and bool(emoji.gender))
    if emoji.kind == "flag":
        return emoji.concept in _TINY_FLAGS
    if emoji.kind == "thing":
        return any(e is emoji for e in map(tool_of, _TINY_JOBS)) or (
            _in_small(emoji) and share("tiny", emoji.name) < 0.02
        )
    return emoji.kind in ("moon", "clock") or emoji.kind in _COLOURED


SIZES = {
    size.name: size
    for size in (
        Size("tiny", _in_tiny, _in_tiny, 300, 500, 20, 30, 20),
        Size("emoji_mini", _in_mini, _in_mini_noto, 3000, 6000, 50, 100, 60),
        Size("emoji_small", _in_small, _in_small_noto, 6000, 15000, 100, 250, 150),
        Size("emoji_full", lambda _: True, lambda _: True, 12000, 60000, 300, 1000, 500, edits=3),
    )
}
"""Name -> size: "tiny" for tests, "emoji_mini" for many short runs, "emoji_small" for the quickstart, "emoji_full" for
long ones.
"""


@dataclass(eq=False)
class World:
    """Pictures of one size. `pictures[style][emoji text]` is a path inside the release folder;
    `shows[path]` are all the emoji that this very picture shows.
    """

    size: Size
    emojis: tuple[Emoji, ...]
    pictures: dict[str, dict[str, str]] = field(default_factory=dict)
    shows: dict[str, list[Emoji]] = field(default_factory=lambda: defaultdict(list))

    def of(self, emoji: Emoji, styles: tuple[str, ...]) -> list[str]:
        """The different pictures of an emoji in some styles."""
        found = (self.pictures[style].get(emoji.text) for style in styles)
        return list(dict.fromkeys(path for path in found if path))

    def all(self, styles: tuple[str, ...]) -> list[str]:
        """Every different picture in some styles, in the Unicode order of what it shows."""
        paths = (path for style in styles for path in self.pictures[style].values())
        return list(dict.fromkeys(paths))

    def split(self, *paths: str) -> str:
        """The strictest split of anything that the pictures show."""
        return strictest("train", *(e.split for path in paths for e in self.certain(path)))

    def certain(self, path: str) -> list[Emoji]:
        """What a picture shows; a gendered reading goes before a neutral one that is drawn alike."""
        return [e for e in self.shows[path] if e.gender] or self.shows[path]

    def readings(self, path: str) -> list[Emoji]:
        """All that a picture may be called; in training nothing that is held out."""
        held_out = self.split(path) != "train"
        return [e for e in self.shows[path] if held_out or e.split == "train"]

    def clear(self, path: str) -> Emoji | None:
        """What a picture shows, if that can be said: a picture of two different things shows none."""
        certain = self.certain(path)
        return certain[0] if len({e.cell for e in certain}) == 1 else None

    def askable(self, emoji: Emoji) -> bool:
        """Whether a test may ask for it: not for a neutral person whom artists draw as a man."""
        if emoji.kind != "person" or emoji.gender:
            return True
        return not any(e.concept == emoji.concept and e.gender for e in self.emojis)


def draw(size: Size, folder: Path) -> World:
    """Renders every emoji of a size in every style into `folder`; equal drawings share a file."""
    world = World(size, tuple(e for e in emojis() if size.keeps(e)))
    seen: dict[bytes, str] = {}
    jobs = [(s, e) for s in STYLES for e in world.emojis if s in TRAINED or size.keeps_noto(e)]
    for style, emoji in tqdm(jobs, desc="drawing", unit="picture", leave=False, disable=None):
        data = STYLES[style](emoji.text)
        dataset = "emoji" if style in TRAINED else "emojinoto"
        path = f"mbeir_images/{dataset}_images/{style}/{emoji.key}.png"
        known = seen.setdefault(hashlib.sha256(data).digest(), path)
        if known == path:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        world.pictures.setdefault(style, {})[emoji.text] = known
        world.shows[known].append(emoji)
    return world
