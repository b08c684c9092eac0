"""Rebuilds the embedded base model: tokenizer, random start, generative pretraining in three stages, export.

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
    program.prepare_logging()
    stages = [load_config(name) for name in ("emoji_base", "emoji_base_exact", "emoji_base_composed")]
    with program.clear_errors(ValueError):
        base.make_start(stages[0])
        for number, stage in enumerate(stages, start=1):
            train(stage)
            following = stages[number].model.base if number < len(stages) else base.EMBEDDED
            base.export(stages[:number], pathlib.Path(following))
