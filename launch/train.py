"""Trains a configuration: `python launch/train.py [config] [overrides]`; `--help` lists the overrides.

Stopped anywhere, the same command goes on from the newest good checkpoint. On a TPU slice it is started on every worker
at once (launch/tpu_vm.sh).
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trace_jax import config, sharding
from trace_jax.retrieval import artifacts, program
from trace_jax.training.train import train

if __name__ == "__main__":
    chosen = config.from_command_line(sys.argv[1:])
    sharding.join_processes()
    program.prepare(chosen.run_dir)
    with program.clear_errors(ValueError, FloatingPointError), artifacts.stage(chosen.run_dir, "train") as stage:
        stage.worked = train(chosen)
