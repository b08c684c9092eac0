"""Sequences of lengths like M-BEIR-CoT's, to plan with where the data are not: assumed, not measured.

Tasks in equal shares, as a run samples them; pictures of 256 pixels across (so M-BEIR ships them) and an aspect of 1 to
2, within the configuration's limits; texts of 20 tokens on average, articles of 150, cut at `data.max_text_tokens`; 95
tokens of prompt; and, where it reasons, a trace of any length that the paper's filter lets through (Sec. 3.2: 16 to 256
of reasoning, 2 to 64 of answer), cut at `data.max_trace_tokens`.
"""

import numpy as np

from trace_jax import config
from trace_jax.data.pipeline import Tokenized
from trace_jax.data.processor import Geometry, Patches, Sequence, fit_size
from trace_jax.data.schema import TASKS, Example, Query

PROMPT = 95
SIDE = 256  # pixels of a picture's shorter side
TEXT, ARTICLE = 20, 150
ARTICLES = ("t2t", "t2it", "it2t", "it2it")  # the tasks whose documents are long


def assumed_batches(data: config.Data, geometry: Geometry, batches: int, seed: int = 0) -> list[list[Tokenized]]:
    """Batches of data.batch_size pairs whose tokens and patches have lengths, but no values."""
    rng, tasks = np.random.default_rng(seed), list(TASKS.values())
    return [[_pair(tasks[i % len(tasks)], data, geometry, rng) for i in range(data.batch_size)] for _ in range(batches)]


def assumed_documents(
    kind: str, count: int, data: config.Data, geometry: Geometry, *, article: bool = False, seed: int = 0
) -> list[Sequence]:
    """Documents of one kind, "t", "i" or "it", with lengths but no values: as those of a data set are."""
    rng = np.random.default_rng(seed)
    return [_sequence(kind, ARTICLE if article else TEXT, 0, data, geometry, rng) for _ in range(count)]


def _pair(task: str, data: config.Data, geometry: Geometry, rng: np.random.Generator) -> Tokenized:
    query, document = task.split("2")
    trace = int(rng.integers(16, 257) + rng.integers(2, 65)) if query == "it" else 0
    trace = min(trace, data.max_trace_tokens)
    asked = _sequence(query, TEXT, trace, data, geometry, rng)
    answer = _sequence(document, ARTICLE if task in ARTICLES else TEXT, 0, data, geometry, rng)
    example = Example(Query("any"), None, "", task=0)
    return Tokenized(example, asked, len(asked) - trace, [0] * (trace + 1), [answer])


def _sequence(  # noqa: PLR0917 (as `_pair`)
    kind: str, mean: int, trace: int, data: config.Data, geometry: Geometry, rng: np.random.Generator
) -> Sequence:
    """A side of a pair: `kind` is "t", "i" or "it", `mean` of its text's tokens."""
    length, images, none = PROMPT + trace, (), np.zeros(0)
    if "i" in kind:
        height, width = rng.permutation([SIDE, int(SIDE * rng.uniform(1, 2))]).tolist()
        rows, columns = fit_size(height, width, geometry)
        patches = rows * columns // geometry.patch_size**2
        images = (Patches(np.zeros((patches, 0)), none, none, none, (0, 0)),)
        length += patches // geometry.merge_unit
    if "t" in kind:
        length += min(data.max_text_tokens, 1 + int(rng.exponential(mean)))
    return Sequence(np.zeros(length, np.int32), none, images, none)
