"""The whole program in seconds, on synthetic data: to try a change, not to learn anything.

python launch/build_data.py tiny && python launch/train.py debug
"""

import dataclasses

from trace_jax.config import load_config

_tiny = load_config("emoji_tiny")
config = dataclasses.replace(
    _tiny,
    name="debug",
    workdir="runs/debug",
    model=dataclasses.replace(_tiny.model, scan_layers=True),  # it compiles faster
    data=dataclasses.replace(_tiny.data, release="tiny", batch_size=8),
    training=dataclasses.replace(_tiny.training, steps=4, log_every=1, checkpoint_every=2),
)
