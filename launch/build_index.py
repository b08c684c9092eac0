"""Builds the ScaNN index of every pool: `python launch/build_index.py [config] [--untrained] [overrides]`."""

import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax.retrieval import artifacts, program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.index import build_indexes

if __name__ == "__main__":
    config, _ = program.arguments(sys.argv[1:], __doc__)
    with program.clear_errors(), artifacts.stage(config.run_dir, "index") as stage:
        count = build_indexes(config, Benchmark(config))
        stage.worked = count > 0
        logging.info("%d indexes built in %s/indexes", count, config.run_dir)
