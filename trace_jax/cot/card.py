"""The dataset card: README.md to share, card.html with pictures to look at, card.json with the figures."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2

from trace_jax.cot.cache import Cache
from trace_jax.cot.client import data_url
from trace_jax.cot.pipeline import Build
from trace_jax.cot.prompts import Prompts
from trace_jax.cot.schema import REASONS, write_lines
from trace_jax.cot.statistics import BINS, WIDTHS, Statistics, load
from trace_jax.data.schema import TASKS

PAPER_REASONING = {"cirr": 24_935, "fashioniq": 15_626, "infoseek": 241_006, "oven": 293_875}
"""Reasoning samples of each data set (paper, supplement 9, Table 9)."""
PAPER_SIMPLE = {
    ("visualnews", 0): "99K",
    ("visualnews", 3): "100K",
    ("mscoco", 0): "100K",
    ("mscoco", 3): "113K",
    ("fashion200k", 0): "15K",
    ("fashion200k", 3): "15K",
    ("webqa", 1): "16K",
    ("webqa", 2): "17K",
    ("edis", 2): "26K",
    ("nights", 4): "16K",
}
"""Simple samples of each data set and task (Table 10), as rounded there."""

_SHOWN = 24  # kept samples on the page, and twice as many dropped ones at most


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _streams(statistics: Statistics) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of Tables 9 and 10: reasoning samples by data set, simple ones by data set and task. Own ones come
    first; where the paper has some and the build none, ours are None.
    """
    complex_rows: dict[str, Counter[str]] = {}
    simple_rows: Counter[tuple[str, int]] = Counter()
    for (dataset, task, stream, reason), count in statistics.table("row"):
        if stream == "complex":
            row = complex_rows.setdefault(dataset, Counter())
            row["labelled"] += count
            row["kept"] += count if not reason else 0
        elif not reason:
            simple_rows[dataset, task] += count
    reasoning = []
    for name in [*complex_rows, *(name for name in PAPER_REASONING if name not in complex_rows)]:
        labelled, kept = (complex_rows.get(name, {}).get(column) for column in ("labelled", "kept"))
        share = _share(kept, labelled) if kept is not None and labelled else None
        paper = PAPER_REASONING.get(name)
        reasoning.append({"dataset": name, "labelled": labelled, "kept": kept, "share": share, "paper": paper})
    simple = [
        {
            "dataset": name,
            "task": TASKS[task],
            "kept": simple_rows.get((name, task)),
            "paper": PAPER_SIMPLE.get((name, task)),
        }
        for name, task in [*simple_rows, *(key for key in PAPER_SIMPLE if key not in simple_rows)]
    ]
    return reasoning, simple


def _tasks(statistics: Statistics) -> list[dict[str, Any]]:
    """Queries of each task: simple, complex and kept, dropped."""
    found: dict[int, Counter[str]] = {}
    for (_, task, stream, reason), count in statistics.table("row"):
        found.setdefault(task, Counter())["dropped" if reason else stream] += count
    return [
        {"task": TASKS[task], "simple": row["simple"], "complex": row["complex"], "dropped": row["dropped"]}
        for task, row in sorted(found.items())
    ]


def _dropped(statistics: Statistics) -> list[dict[str, Any]]:
    """Why rows were dropped; of written traces apart for the target shown and hidden."""
    total: Counter[str] = Counter()
    for (_, _, _, reason), count in statistics.table("row"):
        total[reason] += count
    gold = dict(statistics.table("gold"))
    return [
        {
            "reason": reason,
            "rows": total[reason],
            "shown": gold.get((True, reason), 0),
            "hidden": gold.get((False, reason), 0),
        }
        for reason in REASONS
        if total[reason]
    ]


def _gold(statistics: Statistics) -> list[dict[str, Any]]:
    written: dict[bool, Counter[bool]] = {True: Counter(), False: Counter()}
    for (shown, reason), count in statistics.table("gold"):
        written[shown][not reason] += count
    return [
        {"shown": shown, "written": sum(row.values()), "kept": row[True], "share": _share(row[True], sum(row.values()))}
        for shown, row in written.items()
        if row
    ]


def _policy(statistics: Statistics) -> list[dict[str, Any]]:
    """How often the teacher's assessment agrees with the policy, by data set."""
    found: dict[tuple[str, str], Counter[str]] = {}
    for (dataset, policy, opinion), count in statistics.table("policy"):
        found.setdefault((dataset, policy), Counter())[opinion] += count
    return [
        {
            "dataset": dataset,
            "policy": policy,
            **{name: row[name] for name in ("simple", "complex", "unread")},
            "agreement": _share(row[policy], row["simple"] + row["complex"]),
        }
        for (dataset, policy), row in found.items()
    ]


def calibration(statistics: Statistics) -> dict[str, Any] | None:
    """What the verifier says of the rows' own targets and of decoys, which are wrong by construction. None without
    verdicts. `precision` is what a bin would hold of true pairs if half of all pairs were wrong; `area` is the chance
    that an own target is given a higher probability than a decoy (own targets of bad traces count against it).
    """
    bins = {kind: [0] * BINS for kind in ("target", "decoy")}
    accepted = Counter()
    for (kind, index, accept), count in statistics.table("verdict"):
        bins[kind][index] += count
        accepted[kind] += count if accept else 0
    targets, decoys = sum(bins["target"]), sum(bins["decoy"])
    if not targets:
        return None
    table = []
    for index, (own, other) in enumerate(zip(bins["target"], bins["decoy"], strict=True)):
        if own or other:
            rate, other_rate = own / targets, other / decoys if decoys else 0.0
            precision = round(rate / (rate + other_rate), 4) if decoys else None
            table.append({"from": index / BINS, "targets": own, "decoys": other, "precision": precision})
    wins = sum(
        own * (sum(bins["decoy"][:index]) + bins["decoy"][index] / 2) for index, own in enumerate(bins["target"])
    )
    return {
        "targets": targets,
        "decoys": decoys,
        "targets_accepted": _share(accepted["target"], targets),
        "decoys_accepted": _share(accepted["decoy"], decoys),
        "area": round(wins / (targets * decoys), 4) if decoys else None,
        "bins": table,
    }


def _cost(build: Build) -> list[dict[str, Any]]:
    if not build.cache.exists():
        return []
    cache = Cache(build.cache)
    spent = cache.spent()
    cache.close()
    return [{"stage": stage, "model": model, **dataclasses.asdict(part)} for (stage, model), part in spent.items()]


def _histogram(statistics: Statistics, part: str, width: int) -> dict[int, int]:
    """Tokens from -> rows, from the first bar to the last without a gap."""
    found = {start: count for (name, start), count in statistics.table("length") if name == part}
    return {start: found.get(start, 0) for start in range(min(found), max(found) + 1, width)} if found else {}


def figures(build: Build, statistics: Statistics) -> dict[str, Any]:
    """Everything that the card tells, as plain JSON values."""
    reasoning, simple = _streams(statistics)
    config = build.config
    names = {hashed: name for name, hashed in Prompts(config.prompts).hashes().items()}
    return {
        "name": config.name,
        "reasoning": reasoning,
        "simple": simple,
        "tasks": _tasks(statistics),
        "dropped": _dropped(statistics),
        "gold": _gold(statistics),
        "policy": _policy(statistics),
        "lengths": {name: _histogram(statistics, name, width) for name, width in WIDTHS.items()},
        "calibration": calibration(statistics),
        "min_confidence": config.verify.min_confidence,
        "filters": dataclasses.asdict(config.filters),
        "prompts": {
            "version": config.prompts,
            "used": [[names[hashed], hashed, count] for (_, hashed), count in statistics.table("prompt")],
        },
        "teachers": [[name, count] for (name,), count in statistics.table("teacher")],
        "verifiers": [[name, count] for (name,), count in statistics.table("verifier")],
        "cost": _cost(build),
    }


def _picture(release: Path, relative: str) -> str:
    """A data URL; "" where there is no picture."""
    return data_url((release / relative).read_bytes()) if relative else ""


def _bars(histogram: dict[int, int]) -> list[tuple[int, int, float]]:
    """(tokens from, rows, length of the bar from 0 to 1)."""
    most = max(histogram.values(), default=0)
    return [(start, count, round(count / most, 4)) for start, count in histogram.items()]


def write_card(build: Build, lines: list[str]) -> None:
    """Writes README.md, card.html and card.json from the statistics of the files."""
    statistics, samples = load(lines)
    told = figures(build, statistics)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=jinja2.select_autoescape(("html.jinja",)),
    )
    environment.filters["percent"] = lambda value: "–" if value is None else f"{100 * value:.1f} %"
    environment.filters["number"] = lambda value: (
        "–" if value is None else f"{value:,}" if isinstance(value, int) else value
    )
    kept = samples.pop("", [])[:_SHOWN]
    dropped = [row for reason in REASONS for row in samples.get(reason, [])[:3]]
    for row in (*kept, *dropped):
        row["picture"] = _picture(build.release, row["image"])
        row["target_picture"] = _picture(build.release, row["target_image"])
        row["task_name"] = TASKS[row["task"]]
    bars = {name: _bars(histogram) for name, histogram in told["lengths"].items()}
    for template, name in (("card.md.jinja", "README.md"), ("card.html.jinja", "card.html")):
        text = environment.get_template(template).render(**told, bars=bars, kept=kept, dropped_rows=dropped)
        write_lines(build.output / name, [text.rstrip("\n")])
    write_lines(build.output / "card.json", [json.dumps(told, indent=1, ensure_ascii=False)])
