"""The quickstart's plain contrastive twin: the same length, no traces. For comparison.

python launch/train.py emoji_contrastive
"""

import dataclasses

from trace_jax.config import load_config

_trace = load_config("emoji_tiny")
config = dataclasses.replace(
    _trace,
    name="emoji_contrastive",
    workdir="",
    data=dataclasses.replace(_trace.data, trace="none"),
    evaluation=dataclasses.replace(_trace.evaluation, mode="direct"),
)
