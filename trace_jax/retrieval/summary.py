"""The figures of query files (`evaluation.measure`), arranged as `metrics.json` has them, and in a few lines."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from trace_jax.retrieval.benchmark import POOLS, PROMPTS, QuerySet
from trace_jax.retrieval.measures import POOL_CAVEAT
from trace_jax.retrieval.tables import table1_average


def summarise(entries: dict[QuerySet, dict[str, Any]]) -> dict[str, Any]:
    """Arranges the figures of all query files: by task, by unseen set, and of the validation split."""
    tasks: dict[str, list[dict]] = {}
    unseen: dict[str, dict[str, dict]] = {}
    validation: dict[str, list[dict]] = {}
    for query_set, entry in entries.items():
        if query_set.split == "val":
            validation.setdefault(query_set.task, []).append(entry)
        elif query_set.trained:
            tasks.setdefault(query_set.task, []).append(entry)
        else:
            unseen.setdefault(query_set.dataset, {})[query_set.task] = entry
    merged = {task: merge(same) for task, same in tasks.items()}
    tested = [entry for same in tasks.values() for entry in same]
    files = {query_set.stem: entry for query_set, entry in entries.items()}

    def average(scope: str, mode: str | None = None) -> float | None:
        rows = [entry["modes"].get(mode, {}) if mode else entry for entry in merged.values()]
        values = [row[scope]["R@5"] for row in rows if "R@5" in row.get(scope, {})]
        return round(float(np.mean(values)), 2) if values and len(values) == len(rows) else None

    def routed(figure: str, queries: str) -> float | None:
        there = [entry for entry in tested if entry[queries]]
        if not there:
            return None
        shares, counts = ([entry["routing"][figure] for entry in there], [entry[queries] for entry in there])
        return round(float(np.average(shares, weights=counts)), 2)

    modes = sorted({mode for entry in merged.values() for mode in entry["modes"]})
    return {
        "average": average("local"),
        "average_global": average("global"),
        "paper_average": table1_average(files, "local"),
        "paper_average_global": table1_average(files, "global"),
        "average_by_mode": {mode: average("local", mode) for mode in modes},
        "routing": {
            "simple_direct": routed("simple_direct", "simple_queries"),
            "complex_reasoned": routed("complex_reasoned", "complex_queries"),
        },
        "tasks": merged,
        "unseen": unseen,
        "validation": {task: merge(same) for task, same in validation.items()},
        "files": files,
        "caveat": POOL_CAVEAT,
    }


def merge(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One entry for a task that several data sets share: counts are summed, all else is the plain mean. Pools and modes
    are those that all of them were measured in.
    """
    if len(entries) == 1:
        return dict(entries[0])
    counts = ("queries", "complex_queries", "simple_queries", "local_pool", "written")

    def join(name: str, values: list[Any]) -> Any:
        there = [value for value in values if value is not None]
        if not there:
            return None
        if isinstance(there[0], dict):
            if name in POOLS and not all(values):
                return {}
            names = dict.fromkeys(inner for value in there for inner in value)
            if name == "modes":
                names = [mode for mode in names if all(mode in value for value in there)]
            return {inner: join(inner, [value.get(inner) for value in there]) for inner in names}
        if isinstance(there[0], str):
            return ", ".join(there)
        return sum(there) if name in counts else round(float(np.mean(there)), 4)

    return join("", list(entries))


def lay_over(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What is known now, and of what was known before all else: dicts in dicts likewise."""
    inner = {
        name: lay_over(before[name], value)
        for name, value in now.items()
        if isinstance(value, dict) and isinstance(before.get(name), dict)
    }
    return before | now | inner


def describe(metrics: dict[str, Any]) -> str:
    """The figures in a few lines."""
    columns = ("R@1", "R@5", "R@10", "R@50", "true R@10", "MRR@10", "nDCG@10", "mAP@5")
    width = max(map(len, metrics["files"]), default=0)
    head = "".join(f"{name:>10}" for name in columns)
    lines = [f"{'':{width}}{'queries':>9}{'pool':>9}{head}{'global R@5':>12}{'reasoned':>10}"]
    for stem, entry in metrics["files"].items():
        figures = entry["local"] | entry["ranking"].get("local", {})
        local = "".join(f"{_cell(figures.get(name)):>10}" for name in columns)
        lines.append(
            f"{stem:{width}}{entry['queries']:9,}{entry['local_pool']:9,}{local}"
            f"{_cell(entry['global'].get('R@5')):>12}{entry['reasoned_fraction']:10.2f}"
        )
        for scope, figures in entry.get("prompts", {}).items():
            said = figures.get("R@5")
            lines.append(f"  R@5 over {PROMPTS} prompts, {scope}: {said['mean']} ± {said['deviation']}")
    routing = metrics["routing"]
    lines.append(f"mean R@5 over {len(metrics['tasks'])} tasks: {_both(metrics, 'average')}")
    if metrics["paper_average"] is not None or metrics["paper_average_global"] is not None:
        lines.append(f"mean over the 16 files as in the paper, R@10 for fashion: {_both(metrics, 'paper_average')}")
    if routing["simple_direct"] is not None:
        lines.append(f"{routing['simple_direct']} % of simple queries emit <|emb|> first")
    if routing["complex_reasoned"] is not None:
        lines.append(f"{routing['complex_reasoned']} % of complex queries reason first")
    return "\n".join([*lines, f"Note: {metrics['caveat']}."])


def _both(metrics: dict[str, Any], name: str) -> str:
    local, everywhere = ("–" if value is None else value for value in (metrics[name], metrics[f"{name}_global"]))
    return f"{local} local, {everywhere} global"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
