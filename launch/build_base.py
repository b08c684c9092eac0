"""Rebuilds the embedded base model: tokenizer, random start, generative pretraining in two stages, export.

`python launch/build_base.py`. Stopped anywhere, the same command goes on.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax.config import load_config
from trace_jax.retrieval import program
from trace_jax.training import base
from trace_jax.training.train import train

if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    moved, exact = load_config("emoji_base"), load_config("emoji_base_exact")
    program.prepare_logging()
    with program.clear_errors(ValueError):
        base.make_start(moved)
        train(moved)
        base.export([moved], pathlib.Path(exact.model.base))
        train(exact)
        base.export([moved, exact], base.EMBEDDED)
