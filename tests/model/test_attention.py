"""Attention against a plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trace_jax.model.attention import attention


def draw(length: int, slots: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (2, 4, length, 8))
    k, v = (jax.random.normal(key, (2, 2, slots, 8)) for key in keys[1:])
    return q, k, v


def plain(q, k, v, mask):
    """One row and head at a time, in numpy; unseen queries give zeros."""
    out = np.zeros(q.shape, np.float32)
    for row, head in np.ndindex(q.shape[:2]):
        keys, values = np.asarray(k[row, head // 2]), np.asarray(v[row, head // 2])
        scores = np.asarray(q[row, head]) @ keys.T / np.sqrt(q.shape[-1])
        weights = np.where(mask[row], np.exp(scores), 0)
        out[row, head] = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30) @ values
    return out


@pytest.mark.parametrize("length", [24, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_segments_and_padding(length, causal):
    q, k, v = draw(length, length)
    segments = np.zeros((2, length), np.int32)
    segments[0, :10], segments[0, 10:-3], segments[1, : length // 2] = 1, 2, 1
    mask = (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, :, None]
    if causal:
        mask &= np.tril(np.ones((length, length), bool))

    def run(q, k, v):
        return attention(q, k, v, segments_q=jnp.asarray(segments), segments_kv=jnp.asarray(segments), causal=causal)

    out = run(q, k, v)
    np.testing.assert_allclose(out, plain(q, k, v, mask), atol=1e-5)
    assert (np.asarray(out).transpose(0, 2, 1, 3)[segments == 0] == 0).all()
    gradients = jax.grad(lambda *x: jnp.square(run(*x)).sum(), argnums=(0, 1, 2))(q, k, v)
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()
        assert (np.asarray(gradient).transpose(0, 2, 1, 3)[segments == 0] == 0).all()


def test_one_query_over_a_cache():
    q, k, v = draw(1, 16)
    seen = np.arange(16)[None] <= np.array([3, 9])[:, None]
    ones = jnp.ones((2, 1), jnp.int32)
    out = attention(q, k, v, segments_q=ones, segments_kv=jnp.asarray(seen.astype(np.int32)), causal=False)
    np.testing.assert_allclose(out, plain(q, k, v, seen[:, None]), atol=1e-5)


def test_errors():
    q, k, v = draw(4, 8)
    some = {"segments_q": jnp.ones((2, 4), jnp.int32), "segments_kv": jnp.ones((2, 8), jnp.int32)}
    with pytest.raises(ValueError, match="4 queries to 8 keys"):
        attention(q, k, v, **some, causal=True)
