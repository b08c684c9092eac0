"""The suite emoji in short, to see that it works: too little training and too few queries to tell anything.

python launch/ablate.py emoji_quick
"""

import dataclasses

from trace_jax.retrieval.ablation import load_suite

_whole = load_suite("emoji", ())
config = dataclasses.replace(
    _whole,
    name="emoji_quick",
    seeds=(0,),
    options=(*_whole.options, "--training.steps", "20", "--evaluation.queries", "16"),
    page="runs/ablations/emoji_quick/reproduction.md",
)
