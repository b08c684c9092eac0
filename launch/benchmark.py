"""Measures one part of the program: `python launch/benchmark.py images [options]`; `--help` lists the parts.

Every part prints a table, and writes its figures as JSON with `--json FILE`.
"""

import os
import pathlib
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import tyro

from trace_jax.benchmarks import cot, data, engine, index, training

PARTS = {
    "images": data.images,
    "pairs": data.pairs,
    "packing": data.packing,
    "pool-packing": data.pool_packing,
    "train-step": training.train_step,
    "engine": engine.engine,
    "drafts": engine.drafts,
    "transformers": engine.transformers,
    "index": index.index,
    "filters": cot.filters,
}

if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(PARTS, description=__doc__)
