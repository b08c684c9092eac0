"""Measures a run: `python launch/evaluate.py [config] [--benchmark mbeir] [--tasks all] [--pools local,global]
[--splits val,test] [--prompts first] [--modes direct,always] [--untrained] [overrides]`.

Writes `<run_dir>/metrics.json` and run files in TREC's format; of a benchmark other than the run's own release,
`metrics_<benchmark>.json`. The figures that count are of `--evaluation.mode` and each task's first prompt; `--modes`
are run beside it, `--prompts all` asks with all four for their spread. Stopped anywhere, the same command goes on.
"""

import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax.retrieval import artifacts, program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.evaluation import Scope, evaluate, record_seconds
from trace_jax.retrieval.summary import describe

if __name__ == "__main__":
    config, options = program.arguments(sys.argv[1:], __doc__)
    program.prepare(config.run_dir)
    scope = Scope(options.tasks, options.splits, options.pools, options.prompts)
    with program.clear_errors(ValueError), artifacts.stage(config.run_dir, "evaluate") as stage:
        retriever = Retriever.load(config, untrained=options.untrained)
        benchmark = Benchmark(config)
        metrics, encoded = evaluate(config, retriever, benchmark, options.modes, scope)
        stage.worked = encoded > 0
    record_seconds(config, benchmark)
    logging.info("%s", describe(metrics))
