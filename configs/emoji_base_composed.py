"""The embedded base's third stage: what nobody drew, so that it writes what it has never read.

After two stages it sees a red circle and is asked to make it brown, but never having read of a brown circle it writes
"a brown heart". Here it also reads of things in every colour and of times between the half hours
(trace_jax/data/emoji/imagined.py). `launch/build_base.py` runs it after emoji_base_exact.
"""

import dataclasses

from trace_jax.config import load_config

_exact = load_config("emoji_base_exact")
config = dataclasses.replace(
    _exact,
    name="emoji_base_composed",
    model=dataclasses.replace(_exact.model, base="runs/emoji_base_exact/exported"),
    data=dataclasses.replace(_exact.data, weights=_exact.data.weights | {"imagined thing": 70, "imagined clock": 30}),
    training=dataclasses.replace(_exact.training, steps=800, seed=2),
)
