"""Builds the ScaNN index of every pool: `python launch/build_index.py [config] [--untrained] [overrides]`.

`--vertex FOLDER`, local or gs://, also writes every pool's vectors as Vertex AI Vector Search reads them. Started on
several hosts at once, each takes its share of the pools.
"""

import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from etils import epath

from trace_jax import sharding
from trace_jax.retrieval import artifacts, program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.index import build_indexes, export_vertex

if __name__ == "__main__":
    config, options = program.arguments(sys.argv[1:], __doc__)
    program.prepare(config.run_dir)
    sharding.join_processes()
    with program.clear_errors(), artifacts.stage(config.run_dir, "index") as stage:
        benchmark = Benchmark(config)
        count = build_indexes(config, benchmark)
        stage.worked = count > 0
        logging.info("%d indexes built in %s/indexes", count, config.run_dir)
        for pool in sharding.dealt(benchmark.all_pools) if options.vertex else ():
            export_vertex(config, benchmark, pool, epath.Path(options.vertex) / pool)
