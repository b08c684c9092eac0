"""Trains a configuration: `python launch/train.py [config] [overrides]`; `--help` lists the overrides."""

import logging
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax import config
from trace_jax.training.train import train

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)
    train(config.from_command_line(sys.argv[1:]))
