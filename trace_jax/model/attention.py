"""One attention for windows, images, packed text and decoding: what may see what is told by segment ids."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array
CAUSAL_BLOCKS = 4  # of queries: 10 of 16 tiles are computed, a third less time than all
MASKED = -1e30  # a score that no softmax sees; finite, so that its gradient is zero and not NaN


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    segments_q: Array,
    segments_kv: Array,
    causal: bool,
) -> Array:
    """Softmax attention, scaled by 1/sqrt(head_dim), within equal segments.

    q [rows, heads, length_q, head_dim]; k, v [rows, kv_heads, length_kv, head_dim], each kv head serving
    heads / kv_heads neighbouring heads; segments_q [rows, length_q], segments_kv [rows, length_kv] int32, 0 is padding:
    it is never seen, and its own result is 0. `causal` hides later slots. The softmax is float32. Returns
    [rows, heads, length_q, head_dim] in q's dtype. Raises ValueError for a causal
    call whose queries and keys are not the same slots.
    """
    length, slots = q.shape[2], k.shape[2]
    if not causal:
        return _attend(q, k, v, segments_q, segments_kv, None)
    if length != slots:
        raise ValueError(f"causal attention of {length} queries to {slots} keys; say what is seen by segments")
    block = length // CAUSAL_BLOCKS if length >= 128 and length % CAUSAL_BLOCKS == 0 else length
    parts = []
    for start in range(0, length, block):  # a block of queries leaves out the keys after it
        rows, seen = slice(start, start + block), slice(0, start + block)
        parts.append(
            _attend(q[:, :, rows], k[:, :, seen], v[:, :, seen], segments_q[:, rows], segments_kv[:, seen], start)
        )
    return jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _attend(  # noqa: PLR0917 (the six arrays and numbers of one product)
    q: Array, k: Array, v: Array, segments_q: Array, segments_kv: Array, offset: int | None
) -> Array:
    """Shapes as `attention`. With an offset, query i sees the slots up to i + offset; None sees all."""
    rows, heads, length, width = q.shape
    kv_heads, slots = k.shape[1:3]
    mask = (segments_q[:, :, None] == segments_kv[:, None, :]) & (segments_q > 0)[:, :, None]
    if offset is not None:
        mask &= jnp.tril(jnp.ones((length, slots), bool), offset)[None]
    mask = mask[:, None, None]
    grouped = (q * jnp.asarray(1 / math.sqrt(width), q.dtype)).reshape(rows, kv_heads, -1, width)
    scores = jnp.einsum("bhqd,bhkd->bhqk", grouped, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores.reshape(rows, kv_heads, heads // kv_heads, length, slots), MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    weights = jnp.where(mask, weights, 0.0).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.reshape(rows, kv_heads, -1, slots), v).reshape(q.shape)
