"""The keys and values that decoding goes back to: how they are kept, written and attended to.

Attention to them has the two backends of `attention.py`. `splash` is here a kernel of our own, for a few queries a row:
what passes between its products never leaves the chip, and keys and values in int8 are read as they are.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from trace_jax import sharding
from trace_jax.model.architecture import LanguageArchitecture
from trace_jax.model.attention import MASKED, Backend, attend, on_each_device

Array = jax.Array
BLOCK = 3 << 20  # bytes of keys and values that the kernel reads at once; the next ones are on their way meanwhile


class Int8(NamedTuple):
    """Keys or values in a byte each: the product of both is meant."""

    values: Array  # int8, in the shape of the keys or values
    scales: Array  # [rows, kv_heads, 1, slots] float32


Kept = Array | Int8  # [rows, kv_heads, slots, head_dim], of keys the last two as `key_slots` says
LayerCache = tuple[Kept, Kept]  # k, v
KeysValues = tuple[Array, Array]  # of a layer, both [rows, kv_heads, length, head_dim]
Cache = tuple[LayerCache, ...]  # one a layer; a stacked cache would be copied at every step
Put = Callable[[Array, Array, int], Array]  # a leaf of a cache, what comes into it, which axis is the slots


def key_slots() -> int:
    """Which axis of a cache's keys is the slots.

    On CPU the last, like that of the scores, which then take a third of the time. A TPU's tiles are 128 wide there:
    writing one slot of each row would be writing a sixth of the cache.
    """
    return 3 if sharding.platform() == "cpu" else 2


def empty_cache(architecture: LanguageArchitecture, rows: int, slots: int, dtype: Any) -> Cache:
    """Zeros for the keys and values of so many rows and slots; `dtype` int8 also keeps scales."""
    shape = (rows, architecture.num_kv_heads, slots)

    def one(axis: int) -> Kept:
        values = jnp.zeros((*shape, architecture.head_dim), dtype).swapaxes(2, axis)
        return Int8(values, jnp.zeros((*shape[:2], 1, slots), jnp.float32)) if values.dtype == jnp.int8 else values

    return tuple((one(key_slots()), one(2)) for _ in range(architecture.num_layers))


def update(cache: LayerCache, k: Array, v: Array, put: Put) -> LayerCache:
    """A layer's cache with k and v [rows, kv_heads, n, head_dim] put into it, in its own dtype or bytes."""

    def one(old: Kept, new: Array, axis: int) -> Kept:
        if not isinstance(old, Int8):
            return put(old, new.astype(old.dtype).swapaxes(2, axis), axis)
        new = new.astype(jnp.float32)
        scales = jnp.maximum(jnp.abs(new).max(axis=3), 1e-30) / 127
        values = jnp.round(new / scales[..., None]).astype(jnp.int8)
        return Int8(put(old.values, values.swapaxes(2, axis), axis), put(old.scales, scales[:, :, None], 3))

    return one(cache[0], k, key_slots()), one(cache[1], v, 2)


def attend_to(cache: LayerCache, q: Array, seen: Array, *, backend: Backend) -> Array:
    """Softmax attention, scaled by 1/sqrt(head_dim), of q [rows, heads, n, head_dim] to a layer's cache.

    `seen` [rows, n, slots] bool tells who sees which slots, at least one each. The softmax is float32. Returns
    [rows, heads, n, head_dim] in q's dtype.
    """
    k, v = (kept.values if isinstance(kept, Int8) else kept for kept in cache)
    scales = [kept.scales for kept in cache if isinstance(kept, Int8)]
    k = k.swapaxes(key_slots(), 2)  # on CPU its slots lie last, and xla turns it back
    if backend == "xla":
        return attend(q, k.swapaxes(2, 3).astype(q.dtype), v.astype(q.dtype), seen, scales)
    rows, heads, length, width = q.shape
    kv_heads = k.shape[1]
    q = q * jnp.asarray(1 / math.sqrt(width), q.dtype)
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, length, width).swapaxes(2, 3)
    hidden = jnp.where(seen, jnp.float32(0), jnp.float32(MASKED))
    kernel = on_each_device(_kernel, kv_heads, (True, True, True, False, True))
    return kernel(grouped, k, v, hidden, scales).swapaxes(2, 3).reshape(q.shape)


def _kernel(q: Array, k: Array, v: Array, hidden: Array, scales: list[Array]) -> Array:
    """Queries [rows, kv_heads, n, group, head_dim], keys and values [rows, kv_heads, slots, head_dim], what is added to
    the scores [rows, n, slots], scales as in `attend`.
    """
    rows, kv_heads = q.shape[:2]
    wide = max(k.dtype.itemsize, q.dtype.itemsize)  # int8 is read as such, but made wider on the chip
    of_row = wide * (k.size + v.size) // (rows * kv_heads)
    block = next(size for size in range(max(1, min(rows, BLOCK // of_row)), 0, -1) if rows % size == 0)

    def of_head(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((block, 1, *x.shape[2:]), lambda i, j: (i, j, *[0] * (x.ndim - 2)))

    return pl.pallas_call(
        _attend_to_block,
        grid=(rows // block, kv_heads),
        in_specs=[
            *map(of_head, (q, k, v)),
            pl.BlockSpec((block, *hidden.shape[1:]), lambda i, j: (i, 0, 0)),
            *map(of_head, scales),
        ],
        out_specs=of_head(q),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=sharding.platform() == "cpu",
    )(q, k, v, hidden, *scales)


def _attend_to_block(q: Any, k: Any, v: Any, hidden: Any, *rest: Any) -> None:
    """One key head of some rows; `rest` is the scales of int8, and the result."""
    *scales, out = rest
    product = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    keys, values = (each[:, 0].astype(q.dtype) for each in (k, v))
    for n in range(q.shape[2]):
        scores = product(q[:, 0, n], keys, (((2,), (2,)), ((0,), (0,))))
        scores = (scores * scales[0][:, 0] if scales else scores) + hidden[:, n][:, None]
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = weights / weights.sum(axis=-1, keepdims=True)
        weights = (weights * scales[1][:, 0] if scales else weights).astype(values.dtype)
        out[:, 0, n] = product(weights, values, (((2,), (1,)), ((0,), (0,)))).astype(out.dtype)
