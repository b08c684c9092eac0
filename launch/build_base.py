"""Rebuilds the embedded base model: tokenizer, random start, generative pretraining, export.

`python launch/build_base.py [config] [overrides]`; the default config is emoji_base. Stopped anywhere, the same
command goes on.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax import config
from trace_jax.retrieval import program
from trace_jax.training import base
from trace_jax.training.train import train

if __name__ == "__main__":
    chosen = config.from_command_line(sys.argv[1:], default="emoji_base")
    program.prepare_logging()
    with program.clear_errors(ValueError):
        base.make_start(chosen)
        train(chosen)
        base.export(chosen)
