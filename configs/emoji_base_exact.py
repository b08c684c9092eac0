"""The embedded base's second stage: pictures as they are, after many that were moved a little.

A moved picture cannot be learned by heart, so the base learns to see; but people differ in a few pixels, and those want
the exact picture. `launch/build_base.py` runs it after emoji_base.
"""

import dataclasses

from trace_jax.config import load_config

_moved = load_config("emoji_base")
config = dataclasses.replace(
    _moved,
    name="emoji_base_exact",
    model=dataclasses.replace(_moved.model, base="runs/emoji_base/exported"),
    data=dataclasses.replace(_moved.data, jitter=0.0),
    optimizer=dataclasses.replace(_moved.optimizer, learning_rate=6e-4, warmup_steps=50),
    training=dataclasses.replace(_moved.training, steps=1400, seed=1),
)
