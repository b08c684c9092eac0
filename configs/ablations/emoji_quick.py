"""The suite emoji in short, to see that it works: too little training and too few queries to tell anything.

python launch/ablate.py emoji_quick
"""

import dataclasses

from trace_jax.retrieval.ablation import load_suite

config = dataclasses.replace(
    load_suite("emoji", ()),
    name="emoji_quick",
    seeds=(0,),
    options=("--training.steps", "20", "--evaluation.queries", "16"),
    page="runs/ablations/emoji_quick/reproduction.md",
)
