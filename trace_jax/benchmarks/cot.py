"""The rules that every trace of M-BEIR-CoT must pass."""

import math
import pathlib
import random
import resource
import time
from collections.abc import Iterator

from trace_jax.benchmarks.measuring import report
from trace_jax.cot import duplicates
from trace_jax.cot import filters as rules
from trace_jax.cot.config import Filters
from trace_jax.cot.prompts import Prompts
from trace_jax.cot.schema import Row

_ADJECTIVES = ("red", "blue", "green", "narrow", "wide", "old", "new", "striped", "plain", "wooden", "bright", "round")
_NOUNS = ("dress", "bridge", "tower", "cat", "bicycle", "lamp", "church", "violin", "boat", "scarf", "kettle", "garden")
_STEPS = 10  # lines of the table


def _rows(count: int) -> Iterator[Row]:
    """Rows of composed retrieval that break no rule, so that each rule looks at each. Two in turn share their picture
    and answer; of every hundred, two ask nearly the same.
    """
    rng = random.Random(0)
    for pair in range(count // 2):
        shown, beside, behind, wanted = (f"{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}" for _ in range(4))
        first = f"a {wanted} in place of the {shown}, item {pair}"
        second = f"{first}, please" if pair % 50 == 0 else f"swap what is shown for item {pair}: a {wanted}"
        for number, text in enumerate((first, second), 2 * pair + 1):
            reasoning = (
                f"The picture shows a {shown} beside a {beside}, and behind them stands a {behind}. The query asks for"
                f" item {number}, in which a {wanted} has taken the place of the first of them. The {beside} and the"
                f" {behind} stay where they are, and so does the light of the afternoon."
            )
            answer = f"A {wanted} beside a {beside}, with a {behind} behind them."
            yield Row(
                qid=f"7:{number}",
                dataset="cirr",
                split="train",
                task=rules.COMPOSED,
                instruction="Find the picture after this change.",
                text=text,
                image=f"{pair}.jpg",
                source_caption=f"A {shown} and a {beside}",
                target=f"7:{number}",
                target_text="",
                target_image=f"{pair}_after.jpg",
                target_caption="",
                complex=True,
                raw=f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>",
                reasoning=reasoning,
                answer=answer,
            )


def _peak() -> float:
    """MiB that the process had in memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def filters(
    rows: int = 50_000, tokenizer: str = "trace_jax/assets/emoji_base", json: pathlib.Path | None = None
) -> None:
    """Rows a second and core through the rules of M-BEIR-CoT, one after the other, and the memory that it takes.

    Time is the process's own, so that a busy machine does not matter. The near-duplicate step is measured apart, shard
    by shard as the stage does it, on the groups and texts of a shard's rows.

    Args:
        rows: that pass.
        tokenizer: by whose tokens lengths are counted.
        json: where to write the figures.
    """
    options = Filters(tokenizer=tokenizer)
    judge = rules.Rules(options, Prompts("v1")).judge
    encode = rules.load_tokenizer(tokenizer).encode
    first = list(_rows(200))
    if any(judge(row).dropped for row in first):  # also loads what is loaded at first use
        raise AssertionError("the benchmark's rows break a rule")
    tokens = sum(len(encode(f"{row.reasoning} {row.answer}").ids) for row in first) / len(first)
    print(f"{rows:,} rows of {tokens:.0f} tokens ({tokenizer})\n\n{'rows':>8}{'rows/s':>9}{'peak MiB':>10}")
    steps = []
    started = time.process_time()
    for number, row in enumerate(_rows(rows), 1):
        judge(row)
        if number % max(1, rows // _STEPS) == 0:
            now = time.process_time()
            rate = rows // _STEPS / (now - started)
            started = now
            steps.append({"rows": number, "rows_per_second": rate, "peak_mib": _peak()})
            print(f"{number:8,}{rate:9,.0f}{steps[-1]['peak_mib']:10.0f}", flush=True)
    print(f"\n{'shard of':>8}{'rows/s':>9}{'peak MiB':>10}{'near-duplicates':>17}")
    shards = []
    count = math.ceil(rows / duplicates.SHARD)
    for shard in range(count):
        compared = [
            (group, row.qid, row.text)
            for row in _rows(rows)
            if duplicates.shard_of(group := duplicates.group_key(row), count) == shard
        ]
        started = time.process_time()
        found = len(duplicates.of_all(compared, options))
        rate = len(compared) / (time.process_time() - started)
        shards.append({"rows": len(compared), "rows_per_second": rate, "peak_mib": _peak(), "found": found})
        print(f"{len(compared):8,}{rate:9,.0f}{_peak():10.0f}{found:17,}", flush=True)
    report({"tokens": tokens, "rules": steps, "near_duplicates": shards}, json)
