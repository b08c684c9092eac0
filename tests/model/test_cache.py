"""Attention to kept keys and values, in both backends, against a plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.test_attention import plain
from trace_jax import sharding
from trace_jax.config import Mesh
from trace_jax.model import cache as module
from trace_jax.model.architecture import LanguageArchitecture
from trace_jax.model.cache import attend_to, empty_cache, update

HEADS, KV_HEADS, WIDTH, SLOTS = 6, 2, 8, 40
ARCHITECTURE = LanguageArchitecture(
    vocab_size=8,
    hidden_size=HEADS * WIDTH,
    intermediate_size=8,
    num_layers=1,
    num_heads=HEADS,
    num_kv_heads=KV_HEADS,
    mrope_section=(2, 1, 1),
    rope_theta=1e4,
    norm_eps=1e-6,
    max_positions=64,
    tie_embeddings=True,
)


def filled(rows: int, dtype: str, queries: int):
    """A layer's cache full of noise, what its keys and values are, queries, and who sees what."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, rows, KV_HEADS, SLOTS, WIDTH)).astype(np.float32)
    q = jnp.asarray(rng.standard_normal((rows, HEADS, queries, WIDTH)).astype(np.float32))
    seen = rng.random((rows, queries, SLOTS)) < 0.6
    seen[..., 0] = True
    (empty,) = empty_cache(ARCHITECTURE, rows, SLOTS, jnp.dtype(dtype))

    def put(old, new, axis):
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis)

    return update(empty, jnp.asarray(k), jnp.asarray(v), put), (k, v), q, jnp.asarray(seen)


@pytest.mark.parametrize("key_slots", [2, 3])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("bfloat16", 0.02), ("int8", 0.02)])
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_a_cache_is_attended_to_as_the_reference(backend, dtype, atol, queries, key_slots, monkeypatch):
    monkeypatch.setattr(module, "key_slots", lambda: key_slots)
    monkeypatch.setattr(module, "BLOCK", 2 * 2 * SLOTS * WIDTH * 4)  # the kernel reads two rows of float32 at once
    cache, (k, v), q, seen = filled(6, dtype, queries)
    expected = plain(q, k, v, np.asarray(seen))
    result = attend_to(cache, q, seen, backend=backend)
    np.testing.assert_allclose(result, expected, atol=atol)
    assert result.dtype == q.dtype
    if dtype != "float32":
        assert np.abs(result - expected).max() > 1e-4


def test_the_backends_agree_on_int8():
    cache, _, q, seen = filled(5, "int8", 2)
    alike = [attend_to(cache, q, seen, backend=backend) for backend in ("xla", "splash")]
    np.testing.assert_allclose(*alike, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("tensor", [2, 4])  # the two key heads divide, or are whole on every device
def test_a_mesh_changes_nothing(tensor, dtype):
    cache, _, q, seen = filled(8, dtype, 2)
    expected = attend_to(cache, q, seen, backend="splash")
    with jax.set_mesh(sharding.make_mesh(Mesh(data=8 // tensor, fsdp=1, tensor=tensor))):
        result = jax.jit(lambda *arguments: attend_to(*arguments, backend="splash"))(cache, q, seen)
    np.testing.assert_allclose(result, expected, atol=1e-6)
