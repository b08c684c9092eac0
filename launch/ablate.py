"""Runs a suite of ablations: `python launch/ablate.py emoji [--seeds 0 1 2] [--only trace no_trace]`.

Every variant of configs/ablations/<suite>.py is trained, embedded, indexed and measured with every seed, one after
another; what is done is skipped, so that the same command goes on. When all are done, a page (of the suite emoji
docs/reproduction.md) says which of the paper's claims hold. emoji_quick is the same suite, short.
"""

import logging
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax

from trace_jax.config import Config
from trace_jax.retrieval import artifacts, program
from trace_jax.retrieval.ablation import Suite, config_of, describe, finished, load_suite, modes_of, seconds_of
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.evaluation import EvaluationMode, Scope, evaluate
from trace_jax.retrieval.index import build_indexes
from trace_jax.retrieval.pools import embed_candidates
from trace_jax.training.train import train


def measure(config: Config, modes: list[EvaluationMode]) -> None:
    """Trains a variant and measures it on the test split's local pools; what is done of it is skipped."""
    with artifacts.stage(config.run_dir, "train") as stage:
        stage.worked = train(config)
    retriever, benchmark = Retriever.load(config), Benchmark(config)
    with artifacts.stage(config.run_dir, "embed") as stage:
        stage.worked = embed_candidates(config, retriever, benchmark) > 0
    with artifacts.stage(config.run_dir, "index") as stage:
        stage.worked = build_indexes(config, benchmark) > 0
    with artifacts.stage(config.run_dir, "evaluate") as stage:
        _, encoded = evaluate(config, retriever, benchmark, modes, Scope(splits=("test",), pools=("local",)))
        stage.worked = encoded > 0


def run(suite: Suite) -> str:
    """Runs what is missing of a suite and returns its page."""
    program.keep_compiled(suite.folder)  # one for all: most of them run the same programs
    results, seconds = {}, 0.0
    for variant in suite.chosen:
        for seed in suite.seeds:
            config = config_of(suite, variant, seed)
            if not finished(config):
                logging.info("%s, seed %d", variant, seed)
                measure(config, modes_of(variant))
                jax.clear_caches()  # no later run needs these in memory
            results.setdefault(variant, []).append(finished(config))
            seconds += seconds_of(config)
    return describe(suite, results, seconds / 3600)


if __name__ == "__main__":
    program.prepare_logging()
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(__doc__)
    suite = load_suite(arguments[0], arguments[1:])
    with program.clear_errors(ValueError, FloatingPointError):
        page = run(suite)
    (ROOT / suite.page).write_text(page, "utf-8")
    print(page)
