"""Embeds the candidates of a release: `python launch/embed.py [config] [--untrained] [overrides]`.

Stopped anywhere, the same command goes on; what is done is skipped. `--untrained` takes the base alone, into
<run>_untrained. Started on several hosts at once, each embeds its share, on its own devices alone
(`--evaluation.pool-mesh`), into a run directory that all of them see.
"""

import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax import sharding
from trace_jax.retrieval import artifacts, program
from trace_jax.retrieval.benchmark import Benchmark
from trace_jax.retrieval.embedder import Retriever
from trace_jax.retrieval.pools import embed_candidates, for_pools

if __name__ == "__main__":
    config, options = program.arguments(sys.argv[1:], __doc__)
    program.prepare(config.run_dir)
    sharding.join_processes()
    with program.clear_errors(), artifacts.stage(config.run_dir, "embed") as stage:
        retriever = Retriever.load(for_pools(config), untrained=options.untrained)
        count = embed_candidates(config, retriever, Benchmark(config))
        stage.worked = count > 0
        logging.info("%s candidates embedded into %s/embeddings", f"{count:,}", config.run_dir)
