"""Attention against a plain reference, and the backends against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests import tiny
from trace_jax import sharding
from trace_jax.config import Lora, Mesh
from trace_jax.model import attention as module
from trace_jax.model.attention import attention
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def draw(length: int, slots: int, *, heads: int = HEADS, kv_heads: int = KV_HEADS, width: int = WIDTH, rows: int = 2):
    shapes = (rows, heads, length, width), (rows, kv_heads, slots, width), (rows, kv_heads, slots, width)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


def packed_segments(length: int) -> jax.Array:
    """Two rows: two sequences and a little padding; one sequence and half a row of padding."""
    segments = np.zeros((2, length), np.int32)
    segments[0, :10], segments[0, 10:-3], segments[1, : length // 2] = 1, 2, 1
    return jnp.asarray(segments)


def window_segments(length: int) -> jax.Array:
    """Two rows of vision windows: whole ones of 16 patches, border windows of 4 and 8, padding last and inside."""
    row = np.repeat(np.arange(1, 1 + length // 4), [16, 4, 8, 16, 8] * (length // 20) + [0] * (length // 4 % 5))
    segments = np.stack([np.resize(row, length), np.resize(row, length)])
    segments[0, -9:], segments[1, 20:28] = 0, 0
    return jnp.asarray(segments.astype(np.int32))


def plain(q, k, v, mask):
    """One row and head at a time, in numpy; unseen queries give zeros."""
    out = np.zeros(q.shape, np.float32)
    group = q.shape[1] // k.shape[1]
    for row, head in np.ndindex(q.shape[:2]):
        keys, values = np.asarray(k[row, head // group]), np.asarray(v[row, head // group])
        scores = np.asarray(q[row, head]) @ keys.T / np.sqrt(q.shape[-1])
        weights = np.where(mask[row], np.exp(scores), 0)
        out[row, head] = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30) @ values
    return out


def within(segments, *, causal, backend):
    """Attention within `segments`, of q, k and v."""
    same = {"segments_q": segments, "segments_kv": segments}
    return functools.partial(attention, **same, causal=causal, backend=backend)


def with_gradients(run, *arrays):
    """The result, and the gradients of a scalar that depends on all of it."""
    push = np.random.default_rng(7).standard_normal(arrays[0].shape).astype(np.float32)

    @jax.jit
    def both(*arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, *pull(jnp.asarray(push))

    return both(*arrays)


@pytest.mark.parametrize("backend", ["xla", "splash"])
@pytest.mark.parametrize("length", [24, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_segments_and_padding(length, causal, backend):
    q, k, v = draw(length, length)
    segments = packed_segments(length)
    mask = np.asarray((segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None])
    if causal:
        mask = mask & np.tril(np.ones((length, length), bool))
    out, *gradients = with_gradients(within(segments, causal=causal, backend=backend), q, k, v)
    np.testing.assert_allclose(out, plain(q, k, v, mask), atol=1e-5)
    for array in (out, *gradients):
        assert jnp.isfinite(array).all()
        assert (np.asarray(array).transpose(0, 2, 1, 3)[np.asarray(segments) == 0] == 0).all()


@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "width", "causal", "segments"),
    [
        (256, 4, 2, 128, True, packed_segments),  # the decoder's head
        (256, 2, 2, 80, False, window_segments),  # the vision encoder's head and windows
        (200, 4, 1, 16, True, packed_segments),  # filled up to whole lanes, one key head
        (100, 2, 2, 16, False, window_segments),
    ],
)
def test_splash_equals_xla(monkeypatch, length, heads, kv_heads, width, causal, segments):
    monkeypatch.setattr(module, "LARGEST_BLOCK", 128)  # several blocks of queries and of keys
    q, k, v = draw(length, length, heads=heads, kv_heads=kv_heads, width=width)
    ours, theirs = (
        with_gradients(within(segments(length), causal=causal, backend=backend), q, k, v)
        for backend in ("splash", "xla")
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("mesh", [Mesh(data=2, fsdp=2, tensor=2), Mesh(slice=2, data=1, fsdp=1, tensor=4)], ids=str)
def test_splash_on_a_mesh_equals_splash_on_one_device(mesh):
    """Key heads that divide the tensor axis (2 over 2) and that do not (2 over 4)."""
    q, k, v = draw(128, 128, rows=4)
    segments = jnp.concatenate([packed_segments(128)] * 2)
    alone = with_gradients(within(segments, causal=True, backend="splash"), q, k, v)
    devices = sharding.make_mesh(mesh)
    rows = NamedSharding(devices, P(sharding.BATCH_AXES))
    with jax.set_mesh(devices):
        arrays = [jax.device_put(x, rows) for x in (q, k, v)]
        split = with_gradients(within(segments, causal=True, backend="splash"), *arrays)
    for one, other in zip(split, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_whole_model_agrees_on_both_backends():
    def states(backend):
        model = Qwen2_5_VL(tiny.architecture(), lora=Lora(rank=4), attention=backend, rngs=nnx.Rngs(0))
        inputs = tiny.inputs()
        return np.asarray(tiny.states(model, inputs))[inputs.segments > 0]

    np.testing.assert_allclose(states("splash"), states("xla"), atol=2e-5)


def test_one_query_over_a_cache():
    q, k, v = draw(1, 16)
    seen = np.arange(16)[None] <= np.array([3, 9])[:, None]
    ones = jnp.ones((2, 1), jnp.int32)
    segments = {"segments_q": ones, "segments_kv": jnp.asarray(seen.astype(np.int32))}
    out = attention(q, k, v, **segments, causal=False, backend="xla")
    np.testing.assert_allclose(out, plain(q, k, v, seen[:, None]), atol=1e-5)


def test_errors():
    q, k, v = draw(4, 8)
    some = {"segments_q": jnp.ones((2, 4), jnp.int32), "segments_kv": jnp.ones((2, 8), jnp.int32)}
    with pytest.raises(ValueError, match="causal attention of 4 queries to 8 keys"):
        attention(q, k, v, **some, causal=True, backend="xla")
    with pytest.raises(ValueError, match="splash attention of 4 queries to 8 keys"):
        attention(q, k, v, **some, causal=False, backend="splash")
    with pytest.raises(ValueError, match="'flash' is neither 'xla' nor 'splash'"):
        attention(q, k, v, **some, causal=False, backend="flash")
