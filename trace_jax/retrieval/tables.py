"""The paper's Tables 1 and 3 with our row beside the published ones, as text, CSV and LaTeX (and in the report's page).

Published figures are data (`published.toml`), each with its source. Ours is measured: `<run_dir>/metrics*.json`.
"""

import csv
import dataclasses
import functools
import io
import math
import pathlib
import tomllib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from trace_jax.config import Config
from trace_jax.retrieval import artifacts

PUBLISHED = pathlib.Path(__file__).parent / "published.toml"


@dataclasses.dataclass(frozen=True)
class Row:
    """A system: its name, its figures in percent (None where there is none), their mean, and where they come from."""

    name: str
    values: tuple[float | None, ...]
    average: float | None
    source: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of figures under names of columns: those of others, then those of a run."""

    title: str
    columns: tuple[str, ...]
    published: tuple[Row, ...]
    measured: tuple[Row, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them."""
        return self.published + self.measured

    @property
    def cells(self) -> list[list[str]]:
        """Everything as it is printed: the head, then a line a row."""
        averaged = any(row.average is not None for row in self.rows)
        head = ["", *self.columns, *(["Avg"] if averaged else [])]
        lines = [[row.name, *map(_cell, row.values), *([_cell(row.average)] if averaged else [])] for row in self.rows]
        return [head, *lines]

    def text(self) -> str:
        """For a terminal."""
        widths = [max(map(len, column)) for column in zip(*self.cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if not i else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in self.cells
        ]
        return "\n".join([self.title, "", *lines, "", *(f"{row.name}: {row.source}" for row in self.rows)]) + "\n"

    def csv(self) -> str:
        """One line a row, its source last."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        sources = ["source", *(row.source for row in self.rows)]
        writer.writerows([*line, source] for line, source in zip(self.cells, sources, strict=True))
        return out.getvalue()

    def latex(self) -> str:
        """A booktabs tabular; the sources are comments."""
        head, *lines = ([_escape(cell) for cell in line] for line in self.cells)
        head = [rf"\rotatebox{{90}}{{{cell}}}" if cell else "" for cell in head]
        body = [" & ".join(line) + r" \\" for line in lines]
        sources = [f"% {row.name}: {row.source}" for row in self.rows]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
        parts = [f"% {self.title}", *sources, begin, r"\toprule", " & ".join(head) + r" \\", r"\midrule", *body]
        return "\n".join([*parts, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _escape(text: str) -> str:
    for plain, tex in (("&", r"\&"), ("_", r"\_"), ("%", r"\%"), ("→", r"$\to$"), ("–", "--")):
        text = text.replace(plain, tex)
    return text


def table(which: str, metrics: dict[str, Any], name: str, scope: str = "local") -> Table | None:
    """A table of the paper ("table1", "table3") with the row of a run, from its metrics; None when it fills no column.
    Where each of the four prompts was asked with, a second row holds the means over prompts.

    The published figures are of the local pools; beside the global one (`scope`) there are none. Our mean is over all
    columns, and left out while one is missing, or where the paper has none.
    """
    published = _published()[which]
    columns: Sequence[dict[str, Any]] = published["columns"]
    checkpoint, asked = metrics["checkpoint"], metrics["asked"]
    source = (
        f"measured: config {metrics['config_hash']}, step {checkpoint['step']}, checkpoint {checkpoint['sha256'][:12]},"
        f" mode {metrics['mode']}, {scope} pools of {metrics['release']}"
        f"{f', asked {asked} queries of each file alone' if asked else ''}"
    )

    def row(label: str, values: tuple[float | None, ...], said: str) -> Row | None:
        known = [value for value in values if value is not None]
        whole = len(known) == len(values) and "average" in published["rows"][0]
        return Row(label, values, float(np.mean(known)) if whole else None, f"{source}, {said}") if known else None

    first = row(name, tuple(_measured(metrics["files"], column, scope) for column in columns), "first prompts")
    if first is None:
        return None
    means = tuple(_over_prompts(metrics["files"], column, scope, "mean") for column in columns)
    deviations = [_over_prompts(metrics["files"], column, scope, "deviation") for column in columns]
    largest = max((value for value in deviations if value is not None), default=0.0)
    every = row(f"{name}, 4 prompts", means, f"means over four prompts, whose deviation is {largest:.1f} at most")
    ours = (first, every) if every else (first,)
    others = tuple(
        Row(
            other["name"],
            tuple(None if math.isnan(value) else value for value in other["values"]),
            other.get("average"),
            other["source"],
        )
        for other in published["rows"]
    )
    title = published["title"] if scope == "local" else published["title"].replace("local pools", "global pool")
    return Table(title, tuple(column["name"] for column in columns), others if scope == "local" else (), ours)


def table1_average(files: dict[str, Any], scope: str) -> float | None:
    """The paper's average: the plain mean of Table 1's columns, in percent, from the figures of query files by stem;
    None while one of the 16 is not measured.
    """
    values = [_measured(files, column, scope) for column in _published()["table1"]["columns"]]
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), 2) if len(known) == len(values) else None


@functools.cache
def _published() -> dict[str, Any]:
    with PUBLISHED.open("rb") as file:
        return tomllib.load(file)


def _measured(files: dict[str, Any], column: dict[str, Any], scope: str) -> float | None:
    """The mean of a column's measure over its files; None while one of them is not measured."""
    entries = [files.get(stem, {scope: {}, "ranking": {}}) for stem in column["files"]]
    values = [(entry[scope] | entry["ranking"].get(scope, {})).get(column["measure"]) for entry in entries]
    return None if None in values else float(np.mean(values))


def _asked_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the figures of two benchmarks are of one checkpoint, and of as large a share of the queries."""
    same = one["checkpoint"]["sha256"] == other["checkpoint"]["sha256"]
    return same and one.get("asked") == other["asked"]


def _over_prompts(files: dict[str, Any], column: dict[str, Any], scope: str, figure: str) -> float | None:
    """The mean of a column's "mean" or "deviation" over prompts; None where a file was asked with its first alone."""
    entries = [files.get(stem, {}).get("prompts", {}).get(scope, {}) for stem in column["files"]]
    values = [entry.get(column["measure"], {}).get(figure) for entry in entries]
    return None if None in values else float(np.mean(values))


def write_tables(config: Config, metrics: dict[str, Any]) -> list[Table]:
    """Writes `<run_dir>/tables/` where there is something to tell: table1 and table1_global of M-BEIR, and table3 of
    all the unseen benchmarks that were measured alike with the same checkpoint; each as .txt, .csv and .tex.
    """
    run_dir, written = epath.Path(config.run_dir), []
    measured = [artifacts.read_json(path) for path in sorted(run_dir.glob("metrics_*.json"))]
    same = [other for other in measured if other and _asked_alike(other, metrics)]
    unseen = {stem: entry for other in same for stem, entry in other["files"].items()}
    everything = metrics | {"files": unseen | metrics["files"], "release": "each benchmark"}
    kinds = (
        ("table1", table("table1", metrics, config.name)),
        ("table1_global", table("table1", metrics, config.name, "global")),
        ("table3", table("table3", everything, config.name)),
    )
    for stem, made in kinds:
        if made is None:
            continue
        for ending, content in (("txt", made.text()), ("csv", made.csv()), ("tex", made.latex())):
            artifacts.write_bytes(run_dir / "tables" / f"{stem}.{ending}", content.encode())
        written.append(made)
    return written
