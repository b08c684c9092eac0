"""A suite of small variations of one experiment, and what their figures say of the paper's claims.

`configs/ablations/` holds the suites: a base configuration, and for each variant the options that differ. Every variant
is trained and measured with several seeds, in a run directory of its own. A claim compares two sides, seed by seed.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from trace_jax.config import Config, load_config
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.evaluation import config_hash, metrics_path


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is varied."""

    name: str
    base: str = "emoji_tiny"  # a file of configs/
    seeds: tuple[int, ...] = (0, 1, 2)
    options: tuple[str, ...] = ()  # of all variants: another length, other batches
    variants: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # name -> options of launch/train.py


@dataclasses.dataclass(frozen=True)
class Side:
    """A figure of a variant: `mode` is that of the search, `queries` are "complex", "simple" or "all" ones."""

    variant: str
    mode: str
    queries: str


@dataclasses.dataclass(frozen=True)
class Claim:
    """The paper says that `better` is above `worse` by more than `margin` points of R@5 (negative: at most so far
    below).
    """

    text: str
    paper: str  # its figures, and where they are
    better: Side
    worse: Side
    margin: float = 0.0


_OWN = Side("trace", "adaptive", "complex")


def _lifts(variant: str, text: str, paper: str, margin: float = 0.0) -> Claim:
    return Claim(text, paper, _OWN, Side(variant, "adaptive", "complex"), margin)


CLAIMS = (
    Claim(
        "Reasoning lifts complex queries (one model, with and without its traces)",
        "CIRR R@5 57.03 against 53.06 direct, Table 2",
        _OWN,
        Side("trace", "direct", "complex"),
    ),
    _lifts(
        "closing_tag",
        "Reading right before <|emb|> beats reading a closing tag",
        "CIRR R@5 57.03 against 53.06, Table 4",
    ),
    _lifts("no_trace", "Training with traces beats training without", "CIRR R@5 57.03 against 53.15, Table 5"),
    _lifts("answer_only", "The full trace beats its answer alone", "CIRR R@5 57.03 against 53.67, Table 5"),
    _lifts("reasoning_only", "The full trace beats its reasoning alone", "CIRR R@5 57.03 against 53.41, Table 5"),
    Claim(
        "Reasoning about every query hurts simple ones",
        "COCO R@5 89.10 against 63.90 always, Table 2",
        Side("trace", "adaptive", "simple"),
        Side("trace", "always", "simple"),
    ),
    _lifts("generation_0", "The generation loss helps (weight 1 against 0)", "CIRR R@5 57.03 against 53.15, Table 8"),
    _lifts("generation_0.5", "Its weight 1 is near the best (0.5)", "CIRR R@5 57.03 against 55.92, Table 8", -1.0),
    _lifts("generation_2", "Its weight 1 is near the best (2)", "CIRR R@5 57.03 against 55.74, Table 8", -1.0),
    _lifts(
        "lora_small", "A smaller rank of LoRA costs little", "CIRR R@5 57.03 (128/256), 56.31 (16/32), Table 7", -1.0
    ),
    _lifts(
        "lora_large", "A larger rank of LoRA gains little", "CIRR R@5 57.03 (128/256), 56.81 (256/512), Table 7", -1.0
    ),
)


def config_of(suite: Suite, variant: str, seed: int) -> tuple[Config, list[str]]:
    """A run's configuration, and the command line that makes it."""
    workdir = f"runs/ablations/{suite.name}/{variant}_{seed}"
    options = [*suite.options, *suite.variants[variant], "--training.seed", str(seed), "--workdir", workdir]
    return load_config(suite.base, options), [suite.base, *options]


def finished(config: Config) -> dict[str, Any] | None:
    """The metrics of a run that was measured with this configuration, else None."""
    metrics = artifacts.read_json(metrics_path(config))
    return metrics if metrics and metrics["config_hash"] == config_hash(config) else None


def recall_at_5(metrics: dict[str, Any], side: Side) -> float:
    """The mean over tasks of R@5 in the local pool, in percent. Raises ValueError where no query is of that sort."""
    rows = []
    for entry in metrics["tasks"].values():
        if side.queries == "simple" and entry["complex_queries"]:
            continue
        row = entry["modes"][side.mode].get("local_complex" if side.queries == "complex" else "local")
        rows += [row["R@5"]] if row else []
    if not rows:
        raise ValueError(f"{metrics['release']} has no {side.queries} queries to compare")
    return float(np.mean(rows))


def speed(metrics: dict[str, Any], mode: str) -> float:
    """The mean over tasks of queries per second."""
    return float(np.mean([entry["modes"][mode]["queries_per_second"] for entry in metrics["tasks"].values()]))


def verdict(differences: Sequence[float], margin: float) -> str:
    """What the differences of several seeds, better minus worse, say of a claim."""
    if min(differences) > margin:
        return "holds"
    return "does not hold" if max(differences) <= margin else "cannot be told"


def describe(suite: Suite, results: dict[str, list[dict[str, Any]]], hours: float) -> str:
    """The page (Markdown) of a whole suite, of which "trace" is the base: `results` holds each variant's metrics, a
    seed each.
    """

    def values(side: Side) -> np.ndarray:
        return np.array([recall_at_5(metrics, side) for metrics in results[side.variant]])

    def shown(figures: np.ndarray) -> str:
        return f"{figures.mean():.1f} ± {figures.std(ddof=1):.1f}" if len(figures) > 1 else f"{figures.mean():.1f}"

    lines = [
        f"# The paper's claims in miniature: {suite.name}",
        "",
        f"`python launch/ablate.py {suite.name}`: {len(results)} variants of `{suite.base}`, seeds"
        f" {', '.join(map(str, suite.seeds))}, {hours:.1f} hours of training and measuring in all. Figures are R@5 in"
        " the local pool, the mean over tasks, ± the standard deviation over seeds. A claim holds when every seed says"
        " so, does not when none does, and cannot be told otherwise.",
        "",
        "| claim | paper | ours | against | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        if {claim.better.variant, claim.worse.variant} <= set(results):
            better, worse = values(claim.better), values(claim.worse)
            word = verdict((better - worse).tolist(), claim.margin)
            lines.append(f"| {claim.text} | {claim.paper} | {shown(better)} | {shown(worse)} | {word} |")
    lines += ["", "| mode (paper, Table 2) | complex | simple | queries/s |", "|---|---|---|---|"]
    for mode in ("direct", "adaptive", "always"):
        figures = [shown(values(Side("trace", mode, queries))) for queries in ("complex", "simple")]
        speeds = shown(np.array([speed(metrics, mode) for metrics in results["trace"]]))
        lines.append(f"| {mode} | {' | '.join(figures)} | {speeds} |")
    lines += ["", "| variant | options | all | complex | simple | reasons if complex | direct if simple |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for variant, runs in results.items():
        mode = runs[0]["mode"]
        parts = [shown(values(Side(variant, mode, queries))) for queries in ("all", "complex", "simple")]
        parts += [
            shown(np.array([run["routing"][name] for run in runs])) for name in ("complex_reasoned", "simple_direct")
        ]
        lines.append(f"| {variant} | `{' '.join(suite.variants[variant]) or '–'}` | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def seconds_of(config: Config) -> float:
    """Wall seconds of all stages of a run."""
    return sum((artifacts.read_json(epath.Path(config.run_dir) / "seconds.json") or {}).values())


def load_suite(name: str, options: Sequence[str]) -> Suite:
    """Reads configs/ablations/<name>.py with command-line overrides."""
    return load_config(name, options, kind=Suite, folder=str(pathlib.Path("configs") / "ablations"))
