"""The paper's Table 1 with our row beside the published ones, as text, CSV, LaTeX and HTML.

Published figures are data (`published.toml`), each with its source. Ours is measured: `<run_dir>/metrics*.json`.
"""

import csv
import dataclasses
import io
import pathlib
import tomllib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

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
    """Rows of figures under names of columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def cells(self) -> list[list[str]]:
        """Everything as it is printed: the head, then a line a row."""
        head = ["", *self.columns, "Avg"]
        return [head, *([row.name, *map(_cell, (*row.values, row.average))] for row in self.rows)]

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


def table1(metrics: dict[str, Any], name: str, scope: str = "local") -> Table | None:
    """The paper's Table 1 with the row of a run, from its metrics; None when it holds no file of M-BEIR's test split.

    The published figures are of the local pools; beside the global one (`scope`) there are none. Our mean is over all
    16 files, and left out while one is missing.
    """
    with PUBLISHED.open("rb") as file:
        published = tomllib.load(file)["table1"]
    columns: Sequence[dict[str, Any]] = published["columns"]
    files = metrics["files"]
    values = tuple(files.get(column["file"], {}).get(scope, {}).get(f"R@{column['k']}") for column in columns)
    known = [value for value in values if value is not None]
    if not known:
        return None
    average = float(np.mean(known)) if len(known) == len(values) else None
    checkpoint = (metrics["checkpoint"]["sha256"] or "the base alone")[:12]
    said = f"measured: config {metrics['config_hash']}, step {metrics['checkpoint']['step']}, checkpoint {checkpoint}"
    ours = Row(
        name, values, average, f"{said}, mode {metrics['mode']}, first prompts, {scope} pools of {metrics['release']}"
    )
    others = tuple(Row(row["name"], tuple(row["values"]), row["average"], row["source"]) for row in published["rows"])
    title = published["title"] if scope == "local" else published["title"].replace("local pools", "global pool")
    rows = (*others, ours) if scope == "local" else (ours,)
    return Table(title, tuple(column["name"] for column in columns), rows)


def write_tables(folder: epath.Path, metrics: dict[str, Any], name: str) -> list[Table]:
    """Writes table1.{txt,csv,tex} (and table1_global.*) to a folder, where there is something to tell."""
    written = []
    for stem, scope in (("table1", "local"), ("table1_global", "global")):
        table = table1(metrics, name, scope)
        if table is None:
            continue
        for ending, content in (("txt", table.text()), ("csv", table.csv()), ("tex", table.latex())):
            artifacts.write_bytes(folder / f"{stem}.{ending}", content.encode())
        written.append(table)
    return written
