"""Dropout of the adapters: a pure function of its key, off without one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from trace_jax.config import Lora
from trace_jax.model import weights
from trace_jax.model.layers import DTypes, Linear
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

LORA = Lora(rank=4, alpha=8.0, dropout=0.5)
FLOAT32 = DTypes(jnp.dtype(jnp.float32), jnp.dtype(jnp.float32))


def make(**options):
    model = Qwen2_5_VL(
        tiny.architecture(), rngs=nnx.Rngs(0), **{"lora": LORA, "emb_token_id": tiny.EMB, "scan_layers": True} | options
    )
    key = jax.random.key(1)
    for path, leaf in weights.flat_parameters(model).items():
        if path.endswith("lora_b"):
            key, use = jax.random.split(key)
            leaf[...] = 0.1 * jax.random.normal(use, leaf.shape)
    return model


@jax.jit
def step(model, inputs, count):
    """The loss of a training step and its gradients."""
    key = jax.random.fold_in(jax.random.key(0), count)

    def loss(model):
        hidden = model(inputs, dropout=key)
        return jnp.mean(jnp.where(jnp.asarray(inputs.segments > 0)[..., None], jnp.sin(hidden), 0.0))

    return jax.value_and_grad(loss)(model)


@pytest.mark.parametrize("options", [{}, {"scan_layers": False, "remat": "full"}], ids=["scan", "unrolled"])
def test_the_loss_is_a_function_of_the_step(options):
    model, inputs = make(**options), tiny.inputs()
    first, gradients = step(model, inputs, 3)
    again, _ = step(model, inputs, 3)
    other, _ = step(model, inputs, 4)
    assert first == again and first != other
    for path, gradient in weights.flat_parameters(gradients).items():
        assert jnp.isfinite(gradient[...]).all(), path
        if path.endswith(("lora_a", "lora_b")):
            assert jnp.abs(gradient[...]).max() > 0, path
    if options:  # each layer draws the same, however the layers are run
        np.testing.assert_allclose(first, step(make(), inputs, 3)[0], rtol=1e-5)


def test_without_a_key_the_program_is_that_of_a_model_without_dropout():
    plain = make(lora=dataclasses.replace(LORA, dropout=0.0))
    read = jax.jit(lambda model, inputs: model(inputs))
    texts = {read.lower(model, tiny.inputs()).as_text() for model in (make(), plain)}
    assert len(texts) == 1 and "threefry" not in texts.pop()


def linear(rate):
    layer = Linear(64, 8, lora=dataclasses.replace(LORA, dropout=rate), dtypes=FLOAT32, rngs=nnx.Rngs(0))
    assert layer.lora_b is not None
    layer.lora_b[...] = jax.random.normal(jax.random.key(2), layer.lora_b.shape)
    return layer


def test_it_drops_what_peft_drops_and_keeps_the_expectation():
    layer, x = linear(0.25), jax.random.normal(jax.random.key(3), (2, 64))
    keys = jax.random.split(jax.random.key(4), 20_000)
    draws = jax.vmap(lambda key: layer(x, key))(keys)
    error = jnp.std(draws, axis=0) / np.sqrt(len(keys))
    assert (error > 0).all()
    assert (jnp.abs(jnp.mean(draws, axis=0) - layer(x)) < 5 * error).all()
    np.testing.assert_array_equal(layer(x), linear(0.0)(x, keys[0]))

    # the kernel's own product sees all of x; the adapter sees x / 0.75 where it is kept
    kept = np.asarray(jax.random.bernoulli(keys[0], 0.75, x.shape))
    assert layer.lora_a is not None and layer.lora_b is not None
    low = np.where(kept, np.asarray(x) / 0.75, 0) @ np.asarray(layer.lora_a[...]) @ np.asarray(layer.lora_b[...])
    expected = np.asarray(x) @ np.asarray(layer.kernel[...]) + 2.0 * low
    np.testing.assert_allclose(layer(x, keys[0]), expected, rtol=1e-4, atol=1e-5)


def test_a_rate_that_is_none_is_refused():
    with pytest.raises(ValueError, match="dropout 1.0 is not in"):
        make(lora=dataclasses.replace(LORA, dropout=1.0))
