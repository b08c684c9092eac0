"""A suite of small variations of one experiment, and what their figures say of the paper's claims.

`configs/ablations/` holds the suites: a base configuration, and for each variant the options that differ. Every variant
is trained and measured with several seeds, in a run directory of its own. A claim compares two sides, seed by seed. The
variant "trace" is the base; it comes first, because others may read what it wrote: `{trace}` in an option of theirs is
its run directory of the same seed.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from trace_jax.config import Config, load_config
from trace_jax.retrieval import artifacts
from trace_jax.retrieval.evaluation import EvaluationMode, config_hash, metrics_path
from trace_jax.retrieval.generation import MODES


@dataclasses.dataclass(frozen=True)
class Suite:
    """What is varied."""

    name: str
    base: str = "emoji_tiny"  # a file of configs/
    seeds: tuple[int, ...] = (0, 1, 2)
    options: tuple[str, ...] = ()  # of all variants: another length, other batches
    variants: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)  # name -> options of launch/train.py
    only: tuple[str, ...] = ()  # the variants that are run; default: all
    page: str = "docs/reproduction.md"  # where the findings are written

    @property
    def folder(self) -> str:
        """Where the runs are."""
        return f"runs/ablations/{self.name}"

    @property
    def chosen(self) -> list[str]:
        """The variants that are run, in their order. Raises ValueError for one that there is not."""
        if unknown := set(self.only) - set(self.variants):
            raise ValueError(f"no variant {', '.join(sorted(unknown))}; there are {', '.join(self.variants)}")
        return [variant for variant in self.variants if not self.only or variant in self.only]


@dataclasses.dataclass(frozen=True)
class Side:
    """A figure of a variant: `mode` is that of the search, `queries` are "complex", "simple" or "all" ones of the tasks
    trained for, or those of an unseen data set, by its name. `measure` is R@5 in the local pool, or the share of
    "reasoned" queries, in percent.
    """

    variant: str
    mode: EvaluationMode
    queries: str
    measure: Literal["R@5", "reasoned"] = "R@5"


@dataclasses.dataclass(frozen=True)
class Claim:
    """The paper says that `better` is above `worse` by more than `margin` points (negative: at most so far below)."""

    text: str
    paper: str  # its figures, and where they are
    better: Side
    worse: Side
    margin: float = 0.0


UNTOLD = "cannot be told"

_OWN = Side("trace", "adaptive", "complex")


def _lifts(variant: str, text: str, paper: str, margin: float = 0.0) -> Claim:
    return Claim(text, paper, _OWN, Side(variant, "adaptive", "complex"), margin)


def _carries_over(dataset: str, to: str) -> Claim:
    return Claim(
        f"What traces teach carries over to {to}",
        "above LamRA-Ret in 11 of 13 unseen columns, Table 3",
        Side("trace", "adaptive", dataset),
        Side("no_trace", "adaptive", dataset),
    )


CLAIMS = (
    Claim(
        "Reasoning lifts complex queries (one model, with and without its traces)",
        "CIRR R@5 57.03 against 53.06 direct, Table 2",
        _OWN,
        Side("trace", "direct", "complex"),
    ),
    Claim(
        "Routing is learned: complex queries reason far more often than simple ones (by over 50 points)",
        "text first for 62 % on CIRR, for 4 % on COCO, Sec. 4.5 (beside Table 2)",
        Side("trace", "adaptive", "complex", "reasoned"),
        Side("trace", "adaptive", "simple", "reasoned"),
        50.0,
    ),
    _lifts(
        "emb_token",
        "Reading right before <|emb|> beats reading <|emb|> itself",
        "CIRR R@5 57.03 against 52.25, Table 4",
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
    _lifts(
        "candidate_answer", "An answer on the candidates' side makes it worse", "CIRR R@5 57.03 against 19.78, Table 6"
    ),
    _lifts(
        "candidate_full", "A full trace on the candidates' side makes it worse", "CIRR R@5 57.03 against 18.90, Table 6"
    ),
    Claim(
        "One model beats two: the same traces as text for an encoder trained without any",
        "such a pipeline collapses (no figure), Sec. 4.6",
        _OWN,
        Side("no_trace", "external", "complex"),
    ),
    _lifts(
        "detached",
        "The losses do not conflict: joint training is no worse than with L_gen kept off the embedding",
        "trained jointly (no figure), Sec. 3.3",
        -1.0,
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
    _lifts(
        "lora_alpha", "A larger alpha of LoRA gains little", "CIRR R@5 57.03 (128/256), 56.74 (128/512), Table 7", -1.0
    ),
    _carries_over("emojinoto", "a style of drawing never seen"),
    _carries_over("emojiedits", "kinds of edits never seen"),
)


def config_of(suite: Suite, variant: str, seed: int) -> Config:
    """A run's configuration."""

    def workdir(of: str) -> str:
        return f"{suite.folder}/{of}_{seed}"

    own = [option.format(trace=workdir("trace")) for option in suite.variants[variant]]
    options = [*suite.options, *own, "--training.seed", str(seed), "--workdir", workdir(variant)]
    return load_config(suite.base, options)


def modes_of(variant: str) -> list[EvaluationMode]:
    """The modes that a variant is searched in: those that a claim or the table of modes asks for."""
    asked: set[EvaluationMode] = {"adaptive", *(MODES if variant == "trace" else ())}
    asked |= {side.mode for claim in CLAIMS for side in (claim.better, claim.worse) if side.variant == variant}
    return sorted(asked)


def finished(config: Config) -> dict[str, Any] | None:
    """The metrics of a run that was measured with this configuration, else None."""
    metrics = artifacts.read_json(metrics_path(config))
    return metrics if metrics and metrics["config_hash"] == config_hash(config) else None


def figure(metrics: dict[str, Any], side: Side) -> float | None:
    """What a side measures, in percent; R@5 is the mean over tasks. None where no query is known to be of its sort."""
    if side.measure == "reasoned":
        reasoned, direct = metrics["routing"]["complex_reasoned"], metrics["routing"]["simple_direct"]
        if side.queries == "complex":
            return reasoned
        return None if direct is None else 100 - direct
    rows = []
    trained = side.queries in ("complex", "simple", "all")
    for entry in (metrics["tasks"] if trained else metrics["unseen"].get(side.queries, {})).values():
        if side.queries == "simple" and entry["complex_queries"] != 0:
            continue
        row = entry["modes"][side.mode].get("local_complex" if side.queries == "complex" else "local")
        rows += [row["R@5"]] if row else []
    return float(np.mean(rows)) if rows else None


def speed(metrics: dict[str, Any], mode: str) -> float | None:
    """The mean over tasks of queries per second; None where none is trained for."""
    speeds = [entry["modes"][mode]["queries_per_second"] for entry in metrics["tasks"].values()]
    return float(np.mean(speeds)) if speeds else None


def verdict(differences: Sequence[float], margin: float) -> str:
    """What the differences of several seeds, better minus worse, say of a claim."""
    if min(differences) > margin:
        return "holds"
    return "does not hold" if max(differences) <= margin else UNTOLD


def describe(suite: Suite, results: dict[str, list[dict[str, Any]]], hours: float) -> str:
    """The page (Markdown) of a whole suite, of which "trace" is the base: `results` holds each variant's metrics, a
    seed each.
    """

    def values(side: Side) -> list[float | None]:
        return [figure(metrics, side) for metrics in results[side.variant]]

    def shown(figures: Sequence[float | None]) -> str:
        known = [each for each in figures if each is not None]
        if not known:
            return "–"
        return f"{np.mean(known):.1f} ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else f"{known[0]:.1f}"

    missing = [variant for variant in suite.variants if variant not in results]
    lines = [
        f"# The paper's claims in miniature: {suite.name}",
        "",
        f"`python launch/ablate.py {suite.name}{' --only ' + ' '.join(results) if missing else ''}`"
        f"{' (not run: ' + ', '.join(missing) + ')' if missing else ''}: {len(results)} variants of `{suite.base}`,"
        f" seeds {', '.join(map(str, suite.seeds))}, {hours:.1f} hours of training and measuring in all"
        f"{', options `' + ' '.join(suite.options) + '`' if suite.options else ''}. Figures are R@5 in"
        " the local pool, the mean over tasks, ± the standard deviation over seeds. A claim holds when every seed says"
        f' so, does not when none does, and {UNTOLD} otherwise; "costs little", "gains little", "near the'
        ' best" and "do not conflict" allow one point.',
        "",
        "| claim | paper | ours | against | verdict |",
        "|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        if {claim.better.variant, claim.worse.variant} <= set(results):
            better, worse = values(claim.better), values(claim.worse)
            pairs = [(b, w) for b, w in zip(better, worse, strict=True) if b is not None and w is not None]
            word = verdict([b - w for b, w in pairs], claim.margin) if pairs else f"{UNTOLD}: no such queries"
            text = claim.text.replace("|", r"\|")  # of <|emb|>; else a column ends there
            lines.append(f"| {text} | {claim.paper} | {shown(better)} | {shown(worse)} | {word} |")
    lines += ["", "| mode (paper, Table 2) | complex | simple | queries/s |", "|---|---|---|---|"]
    for mode in MODES:
        figures = [shown(values(Side("trace", mode, queries))) for queries in ("complex", "simple")]
        speeds = shown([speed(metrics, mode) for metrics in results["trace"]])
        lines.append(f"| {mode} | {' | '.join(figures)} | {speeds} |")
    lines += ["", "| variant | options | all | complex | simple | reasons if complex | direct if simple |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for variant, runs in results.items():
        mode = runs[0]["mode"]
        parts = [shown(values(Side(variant, mode, queries))) for queries in ("all", "complex", "simple")]
        parts += [shown([run["routing"][name] for run in runs]) for name in ("complex_reasoned", "simple_direct")]
        lines.append(f"| {variant} | `{' '.join(suite.variants[variant]) or '–'}` | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def seconds_of(config: Config) -> float:
    """Wall seconds of all stages of a run."""
    return sum((artifacts.read_json(epath.Path(config.run_dir) / "seconds.json") or {}).values())


def load_suite(name: str, options: Sequence[str]) -> Suite:
    """Reads configs/ablations/<name>.py with command-line overrides."""
    return load_config(name, options, kind=Suite, folder=str(pathlib.Path("configs") / "ablations"))
