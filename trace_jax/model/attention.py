"""One attention for windows, images, packed text and decoding: what may see what is told by segment ids.

Two backends. `xla` runs everywhere and holds the scores of a block of queries in memory. `splash` is JAX's Pallas
kernel for TPUs, whose scores never leave the chip; on CPU it is interpreted, for tests.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from trace_jax import sharding
from trace_jax.data.schema import SHARED
from trace_jax.model.layers import ATTENTION

Array = jax.Array
Backend = Literal["xla", "splash"]
CAUSAL_BLOCKS = 4  # of queries: 10 of 16 tiles are computed, a third less time than all
LANES = 128  # splash's blocks are multiples of this
LARGEST_BLOCK = 512  # of queries and of keys in splash: its gradient needs them in the chip's memory at once
MASKED = -1e30  # a score that no softmax sees; finite, so that its gradient is zero and not NaN


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    segments_q: Array,
    segments_kv: Array,
    causal: bool,
    backend: Backend,
) -> Array:
    """Softmax attention, scaled by 1/sqrt(head_dim), within equal segments.

    q [rows, heads, length_q, head_dim]; k, v [rows, kv_heads, length_kv, head_dim], each kv head serving
    heads / kv_heads neighbouring heads; segments_q [rows, length_q], segments_kv [rows, length_kv] int32, 0 is padding:
    it is never seen, and its own result is 0; SHARED is seen by all of the row (not in splash, which knows equal
    segments alone). `causal` hides later slots. The softmax is float32. Returns [rows, heads, length_q, head_dim] in
    q's dtype.

    Raises ValueError for an unknown backend, and for queries and keys that are not the same slots where that is
    needed: a causal call, and splash, in which a query must see itself.
    """
    length, slots = q.shape[2], k.shape[2]
    if backend not in ("xla", "splash"):
        raise ValueError(f"attention backend {backend!r} is neither 'xla' nor 'splash'")
    if length != slots and (causal or backend == "splash"):
        kind = "causal" if causal else "splash"
        raise ValueError(f"{kind} attention of {length} queries to {slots} keys; say what is seen by segments, in xla")
    q, k, v = (checkpoint_name(x, ATTENTION) for x in (q, k, v))
    if backend == "splash":
        return _splash(q, k, v, segments_q, segments_kv, causal)
    if not causal:
        return checkpoint_name(attend(q, k.swapaxes(2, 3), v, _same_segment(segments_q, segments_kv)), ATTENTION)
    block = length // CAUSAL_BLOCKS if length >= 128 and length % CAUSAL_BLOCKS == 0 else length
    parts = []
    for start in range(0, length, block):  # a block of queries leaves out the keys after it
        rows, keys = slice(start, start + block), slice(0, start + block)
        earlier = jnp.tril(jnp.ones((block, start + block), bool), start)[None]
        seen = earlier & _same_segment(segments_q[:, rows], segments_kv[:, keys])
        parts.append(attend(q[:, :, rows], k[:, :, keys].swapaxes(2, 3), v[:, :, keys], seen))
    return checkpoint_name(jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0], ATTENTION)


def _same_segment(segments_q: Array, segments_kv: Array) -> Array:
    """[rows, length_q], [rows, length_kv] -> [rows, length_q, length_kv] bool."""
    seen = (segments_q[:, :, None] == segments_kv[:, None, :]) | (segments_kv == SHARED)[:, None, :]
    return seen & (segments_q != 0)[:, :, None]


def attend(q: Array, k: Array, v: Array, mask: Array, scales: Sequence[Array] = ()) -> Array:
    """As `attention`, but k is [rows, kv_heads, head_dim, length_kv], and mask [rows, length_q, length_kv] bool tells
    who sees whom. `scales`, of the keys and of the values, [rows, kv_heads, 1, length_kv] float32, are factors.
    """
    rows, heads, length, width = q.shape
    kv_heads, slots = v.shape[1:3]
    mask = mask[:, None, None]
    grouped = (q * jnp.asarray(1 / math.sqrt(width), q.dtype)).reshape(rows, kv_heads, -1, width)
    scores = jnp.einsum("bhqd,bhdk->bhqk", grouped, k, preferred_element_type=jnp.float32)
    scores = scores * scales[0] if scales else scores
    scores = jnp.where(mask, scores.reshape(rows, kv_heads, heads // kv_heads, length, slots), MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    weights = jnp.where(mask, weights, 0.0).reshape(rows, kv_heads, -1, slots)
    weights = weights * scales[1] if scales else weights
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v).reshape(q.shape)


def _splash(  # noqa: PLR0917 (as `attend`)
    q: Array, k: Array, v: Array, segments_q: Array, segments_kv: Array, causal: bool
) -> Array:
    """Shapes as `attention`, one query a key. Any length: rows are filled up with padding to whole lanes."""
    rows, heads, length, width = q.shape
    kv_heads = k.shape[1]
    room = (0, -length % LANES)
    q = q * jnp.asarray(1 / math.sqrt(width), q.dtype)
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), room, (0, 0))) for x in (q, k, v))
    ids = splash.SegmentIds(*(jnp.pad(x, ((0, 0), room)) for x in (segments_q, segments_kv)))
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, -1, width)

    def kernels(q: Array, k: Array, v: Array, ids: splash.SegmentIds) -> Array:
        kernel = _splash_kernel(q.shape[2], q.shape[3], causal)
        return jax.vmap(jax.vmap(kernel, in_axes=(0, 0, 0, None)))(q, k, v, ids)

    out = on_each_device(kernels, kv_heads, (True, True, True, False))(grouped, k, v, ids)
    out = out.reshape(q.shape)[:, :, :length]
    return jnp.where((segments_q > 0)[:, None, :, None], out, jnp.zeros((), q.dtype))


def on_each_device(kernel: Callable[..., Array], kv_heads: int, with_heads: Sequence[bool]) -> Callable[..., Array]:
    """The kernel, run by each device of the mesh (`jax.set_mesh`) for its rows and its heads: no compiler splits one.

    `with_heads` tells which arguments are [rows, kv_heads, ...], as is the result; the others are [rows, ...]. Heads
    that do not divide are attended to by every device of the tensor axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel
    rows = P(sharding.BATCH_AXES)
    heads = P(sharding.BATCH_AXES, "tensor") if kv_heads % mesh.shape["tensor"] == 0 else rows
    specs = tuple(heads if each else rows for each in with_heads)
    return jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)


def _splash_kernel(group: int, length: int, causal: bool) -> Callable[[Array, Array, Array, splash.SegmentIds], Array]:
    """Attention of `group` heads that share one key head: q [group, length, d], k and v [length, d]."""
    block = next(size for size in range(min(LARGEST_BLOCK, length), 0, -LANES) if length % size == 0)
    mask = splash.CausalMask((length, length)) if causal else splash.FullMask((length, length))
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mqa(  # pyright: ignore[reportReturnType] (of its two results, one is asked for)
        splash.MultiHeadMask([mask] * group),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=sharding.platform() == "cpu",
    )
