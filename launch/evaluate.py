"""Measures a run: `python launch/evaluate.py [config] [--modes direct,always] [--untrained] [overrides]`.

Writes `<run_dir>/metrics.json` and UniIR's run files. The figures that count are of `--evaluation.mode`;
`--modes` are run beside it. Stopped anywhere, the same command goes on.
"""

import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax.retrieval import artifacts, program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.evaluation import describe, evaluate, record_seconds

if __name__ == "__main__":
    config, options = program.arguments(sys.argv[1:], __doc__)
    with program.clear_errors(), artifacts.stage(config.run_dir, "evaluate") as stage:
        retriever = Retriever.load(config, untrained=options.untrained)
        benchmark = Benchmark(config)
        metrics, encoded = evaluate(config, retriever, benchmark, options.modes)
        stage.worked = encoded > 0
    record_seconds(config, benchmark)
    logging.info("%s", describe(metrics))
