"""Plots as inline SVG, the same bytes for the same figures: training curves, and a table of the paper as points."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.typing import RcKeyType

from trace_jax.retrieval.tables import Row, Table

CURVES = (
    ("Losses", (("loss_gen", "generation"), ("loss_ret", "retrieval")), None),
    ("Recall in the batch", (("recall_in_batch", "right document first"),), (0, 1)),
    ("Routing", (("emb_first", "<|emb|> first"), ("routing_accuracy", "as labelled")), (0, 1)),
)
COLOURS = ("#4c7ee8", "#e07b39")
_GREY = "#8a8f98"
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trace",
    "font.size": 9,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.labelcolor": _GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.labelcolor": _GREY,
    "text.color": _GREY,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}


def curves(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The training curves, from the rows of metrics.jsonl; none for fewer than two rows."""
    drawn = []
    for title, lines, limits in CURVES:
        present = [(name, label) for name, label in lines if any(name in row for row in rows)]
        if len(rows) < 2 or not present:
            continue
        with mpl.rc_context(_STYLE):
            figure = Figure(figsize=(4.2, 2.5), layout="constrained")
            axes = figure.add_subplot()
            for (name, label), colour in zip(present, COLOURS, strict=False):
                line = [(row["step"], row[name]) for row in rows if name in row]
                axes.plot(*zip(*line, strict=True), color=colour, linewidth=1.6, label=label)
            axes.set_title(title, fontsize=10, loc="left")
            axes.set_xlabel("step")
            axes.set_ylim(*(limits or (0,)))
            axes.legend()
            drawn.append(_svg(figure))
    return drawn


def points(table: Table) -> str:
    """A table of the paper: a column a place, a row a marker; ours stand out, and the best of the published ones."""
    published, ours = table.published, table.measured
    best = max(published, key=_mean, default=None)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xticks(range(len(table.columns)), table.columns, rotation=50, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(table.columns) - 0.5)
        axes.set_ylim(0, 100)
        axes.set_ylabel("%")

        def mark(row: Row, marker: str, **style: Any) -> None:
            axes.plot(np.asarray(row.values, float), marker, **style)  # None is drawn as a gap

        for number, row in enumerate(row for row in published if row is not best):
            label = None if number else "other published rows"
            mark(row, "o", color=_GREY, markersize=3, alpha=0.6, label=label)
        if best is not None:
            mark(best, "o", color=COLOURS[0], markersize=5, label=f"{best.name}, best on average")
        for row, marker in zip(ours, "Ds", strict=False):
            mark(row, marker, color=COLOURS[1], markersize=6, label=row.name)
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        return _svg(figure)


def _mean(row: Row) -> float:
    known = [value for value in row.values if value is not None]
    return sum(known) / len(known)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
