"""The rules that a written trace must pass (paper, supplement 9), each with a name of `schema.REASONS`.

A rule says why it drops a row, or "" to let it pass. The first that speaks up gives the reason; none looks at another
row (see duplicates.py for the one that does).
"""

import dataclasses
import functools
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import snowballstemmer
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from tokenizers import Tokenizer

from trace_jax.config import ROOT
from trace_jax.cot.config import Filters
from trace_jax.cot.prompts import Prompts
from trace_jax.cot.schema import Row

COMPOSED = 7
"""M-BEIR's task of composed retrieval: a picture and a change -> a picture."""

_TRACE = re.compile(r"\s*<reasoning>(.*?)</reasoning>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_TAG = re.compile(r"</?\s*(reasoning|answer)\b[^>]*>?", re.IGNORECASE)
_WORD = re.compile(r"\w+")
_ORDINARY = frozenset((Path(__file__).parent / "ordinary_words.txt").read_text("utf-8").split())
"""Words that say nothing about a target: function words, and those of every instruction."""


def split_trace(raw: str) -> tuple[str, str] | None:
    """(reasoning, answer) of exactly one pair of each tag, in order, not nested, nothing else around; else None."""
    found = _TRACE.fullmatch(raw)
    if found is None or any(_TAG.search(part) for part in found.groups()):
        return None
    reasoning, answer = (part.strip() for part in found.groups())
    return (reasoning, answer) if reasoning and answer else None


def normalise(text: str) -> str:
    """Lower case, plain letters and digits, single spaces, no leading article."""
    plain = unicodedata.normalize("NFKD", text)
    words = _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)).lower())
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words)


@functools.cache
def _stemmer() -> Callable[[str], str]:
    return functools.lru_cache(65536)(snowballstemmer.stemmer("english").stemWord)


def keywords(text: str) -> set[str]:
    """The stems of the words of a text that say something."""
    stem = _stemmer()
    return {
        stem(word) for word in normalise(text).split() if word not in _ORDINARY and (len(word) > 1 or word.isdigit())
    }


def repeated_share(text: str, size: int) -> float:
    """The share of a text's word n-grams that occurred in it before; 0 for a text too short to have two."""
    words = [word.lower() for word in _WORD.findall(text)]
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def _runs(text: str, size: int) -> set[tuple[str, ...]]:
    words = normalise(text).split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder (from the repository's root), or of a name on the Hub. Raises ValueError."""
    path = ROOT / name / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers raises no other kind
        raise ValueError(
            f"no tokenizer {name!r} ({error}): give --filters.tokenizer a folder with tokenizer.json, or a name on the"
            " Hub"
        ) from error


class Rules:
    """The rules with their thresholds, ready to judge rows."""

    def __init__(self, options: Filters, prompts: Prompts) -> None:
        self._options, self._prompts = options, prompts
        self._tokenizer = load_tokenizer(options.tokenizer)
        self._leaks = re.compile("|".join(options.leaks), re.IGNORECASE) if options.leaks else None
        self._refusals = re.compile("|".join(options.refusals), re.IGNORECASE) if options.refusals else None
        self._prompt_runs: dict[int, set[tuple[str, ...]]] = {}
        self._rules: dict[str, Callable[[Row], str]] = {
            "leakage": self._leakage,
            "reasoning_length": lambda row: self._length(row.reasoning, options.reasoning_tokens),
            "answer_length": lambda row: self._length(row.answer, options.answer_tokens),
            "repetition": self._repetition,
            "language": self._language,
            "unchanged": self._unchanged,
            "keyword": self._keyword,
        }

    def judge(self, row: Row) -> Row:
        """The row with its trace taken apart, or dropped. Rows that have no trace to judge come back as they are."""
        if row.dropped or not row.complex:
            return row
        if self._refusals and (found := self._refusals.search(row.raw.replace("’", "'"))):
            return row.drop("refusal", found[0])
        parts = split_trace(row.raw)
        if parts is None:
            return row.drop("format")
        row = dataclasses.replace(row, reasoning=parts[0], answer=parts[1])
        for name, rule in self._rules.items():
            if why := rule(row):
                return row.drop(name, why)
        return row

    def _leakage(self, row: Row) -> str:
        """Words of the prompt, or words that tell of a target that was shown."""
        written = f"{row.reasoning}\n{row.answer}"
        if self._leaks and (found := self._leaks.search(written)):
            return found[0]
        size = self._options.leaked_words
        if row.task not in self._prompt_runs:
            prompts = [self._prompts.generate(row.task, gold) for gold in (False, True)]
            self._prompt_runs[row.task] = set().union(*(_runs(f"{p.system}\n{p.template}", size) for p in prompts))
        common = _runs(written, size) & self._prompt_runs[row.task]
        return " ".join(min(common)) if common else ""

    def _length(self, text: str, bounds: tuple[int, int]) -> str:
        tokens = len(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return "" if bounds[0] <= tokens <= bounds[1] else f"{tokens} tokens"

    def _repetition(self, row: Row) -> str:
        share = max(repeated_share(text, self._options.ngram) for text in (row.reasoning, row.answer))
        return f"{share:.2f} of the n-grams" if share > self._options.max_repeated else ""

    def _language(self, row: Row) -> str:
        ranked = dict(_identifier().rank(f"{row.reasoning} {row.answer}"))
        return "" if ranked["en"] >= self._options.min_english else max(ranked, key=lambda name: ranked[name])

    def _unchanged(self, row: Row) -> str:
        """For composed retrieval the answer must differ from what the source is: the pools' caption of its picture,
        and the first sentence of the reasoning, which states it.
        """
        if row.task != COMPOSED:
            return ""
        sources = {row.source_caption, re.split(r"(?<=[.!?])\s", row.reasoning)[0]} - {""}
        return row.answer if normalise(row.answer) in map(normalise, sources) else ""

    def _keyword(self, row: Row) -> str:
        """The answer must name something of the query or of the target, where either says anything."""
        wanted = keywords(f"{row.text} {row.target_text} {row.target_caption}")
        return "none of the query's or the target's" if wanted and not wanted & keywords(row.answer) else ""
