"""Drafts: which tokens may come next, from what followed the same two tokens before, in the row itself or in others.

A guess changes how long writing takes, and nothing of what is written: `generation` keeps it only where it is the very
token that the model chooses.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

Array = jax.Array
PAIRS = 1 << 16  # pairs of tokens whose follower is remembered; two may have the same place


@dataclasses.dataclass
class Memory:
    """Which token came last after a pair of tokens, in all traces that were written with this memory."""

    follows: Array | None = None  # [PAIRS] int32, at `_place`; None: nothing yet


def nothing() -> Array:
    """`Memory.follows` before anything was written."""
    return whole(jnp.zeros(PAIRS, jnp.int32))


def whole(follows: Array) -> Array:
    """A copy on every device."""
    mesh = jax.sharding.get_abstract_mesh()
    return follows if mesh.empty else jax.lax.with_sharding_constraint(follows, P())


def guess(tokens: Array, length: Array, before: Array, token: Array, follows: Array, *, count: int) -> Array:
    """The tokens that are due [n, 1], and after each what may follow it and those before them [n, 1]: [n, 1 + count].

    What followed the same two in the row itself, tokens [n, C] of which length [n] have been read, else what is
    remembered of others.
    """
    places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    pair = (tokens == token) & (jnp.roll(tokens, 1, axis=1) == before)
    earlier = jnp.where(pair & (places > 0) & (places < length[:, None]), places, -1).max(axis=1, keepdims=True)
    number = jnp.arange(1, count + 1, dtype=jnp.int32)[None]
    own = jnp.take_along_axis(tokens, jnp.maximum(earlier, 0) + number, axis=1)
    others = [before, token]
    for _ in range(count):
        others.append(follows[_place(others[-2], others[-1])])
    return jnp.concatenate([token, jnp.where(earlier >= 0, own, jnp.concatenate(others[2:], axis=1))], axis=1)


def remember(follows: Array, before: Array, read: Array, chosen: Array, known: Array) -> Array:
    """With what was chosen after each token that was read [n, k], where that is `known`; `before` [n, 1] the first."""
    place = _place(jnp.concatenate([before, read[:, :-1]], axis=1), read)
    return whole(follows.at[jnp.where(known, place, PAIRS)].set(chosen, mode="drop"))


def _place(before: Array, token: Array) -> Array:
    """Where the follower of two tokens is remembered: int32 of their shape, below PAIRS."""
    mixed = before.astype(jnp.uint32) * jnp.uint32(0x9E3779B1) + token.astype(jnp.uint32) * jnp.uint32(0x85EBCA77)
    return (mixed >> jnp.uint32(16)).astype(jnp.int32) % PAIRS
