"""All the emoji and a longer training: about an hour on two cores.

make quickstart RELEASE=emoji_full CONFIG=emoji_full
"""

import dataclasses

from trace_jax.config import load_config

_tiny = load_config("emoji_tiny")
config = dataclasses.replace(
    _tiny,
    name="emoji_full",
    workdir="",
    data=dataclasses.replace(_tiny.data, release="emoji_full"),
    training=dataclasses.replace(_tiny.training, steps=2400, checkpoint_every=200),
)
