"""What trains, what does not, and in which dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, traverse_util

from tests import tiny
from trace_jax import sharding
from trace_jax.config import Lora, Mesh, Model
from trace_jax.data.schema import tree_bytes
from trace_jax.data.tokenizer import Processor
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.model.weights import flat_parameters
from trace_jax.training.checkpoint import Checkpoints
from trace_jax.training.optimizer import make_optimizer, step_of
from trace_jax.training.train import (
    TrainState,
    host_batches,
    init_optimizer,
    load_model,
    make_train_step,
    merge_model,
    model_identity,
    restore_model,
    split_model,
)

FULL = (r".*",)


def paths(tree):
    return {"/".join(map(str, path)) for path in traverse_util.flatten_dict(tree)}


def split(trainable, lora):
    model = Qwen2_5_VL(tiny.architecture(), lora=lora, emb_token_id=tiny.EMB, rngs=nnx.Rngs(0))
    return set(flat_parameters(model)), *split_model(model, trainable)


def gradient(graph, trainable, frozen, inputs):
    def loss(trainable):
        model = merge_model(graph, trainable, frozen)
        hidden = model(inputs)
        real = jnp.asarray(inputs.segments > 0)[..., None]
        return jnp.sum(jnp.where(real, jnp.sin(hidden), 0.0)) + jnp.sum(jnp.cos(model.logits(hidden[:, :, 3])))

    return jax.grad(loss)(trainable)


@pytest.mark.parametrize("trainable, lora", [(Model.trainable, Lora(rank=4)), (FULL, None)], ids=["lora", "full"])
def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(tiny_config, trainable, lora):
    everything, graph, chosen, frozen = split(trainable, lora)
    assert paths(chosen) | paths(frozen) == everything and not paths(chosen) & paths(frozen)
    adapted = {path for path in everything if path.startswith("projector/") or "lora_" in path or path == "emb_row"}
    assert paths(chosen) == (everything if lora is None else adapted)
    assert bool(paths(frozen)) == (lora is not None)

    optimizer = make_optimizer(tiny_config.optimizer, 10)
    mesh = sharding.make_mesh(Mesh())
    on_mesh = jax.device_put(chosen, sharding.replicated(mesh))
    state = init_optimizer(optimizer, on_mesh, mesh)
    assert step_of(state) == 0
    sizes = [leaf.size for leaf in jax.tree.leaves(chosen)]
    moments = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(moments) == sorted(2 * sizes)
    assert tree_bytes(state) <= 2 * tree_bytes(chosen) + 16  # and the counts

    shapes = jax.eval_shape(gradient, graph, chosen, frozen, tiny.inputs())
    assert paths(shapes) == paths(chosen)


def test_an_int8_base_passes_the_gradients_of_its_floats_to_the_adapters():
    """Also where it is split over a mesh; the kernels themselves cannot train."""
    options = {"lora": Lora(rank=4, alpha=8.0), "emb_token_id": tiny.EMB}
    rounded = Qwen2_5_VL(tiny.architecture(), **options, param_dtype=jnp.int8, rngs=nnx.Rngs(0))
    exact = Qwen2_5_VL(tiny.architecture(), **options, rngs=nnx.Rngs(0))
    stored = flat_parameters(rounded)
    for path, leaf in stored.items():
        if path.endswith("lora_b"):
            leaf[...] = 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)
    for path, leaf in flat_parameters(exact).items():
        scale = stored[f"{path}_scale"][...][:, None] if f"{path}_scale" in stored else jnp.float32(1)
        leaf[...] = stored[path][...].astype(jnp.float32) * scale

    graph, chosen, frozen = split_model(rounded, Model.trainable)
    compiled = jax.jit(gradient, static_argnums=0)
    expected = traverse_util.flatten_dict(compiled(*split_model(exact, Model.trainable), tiny.inputs()))
    mesh = sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    placed = {
        path: jax.device_put(leaf, sharding.sharding_of("/".join(map(str, path)), leaf.shape, mesh))
        for path, leaf in traverse_util.flatten_dict(frozen).items()
    }
    inputs = jax.tree.map(lambda array: np.repeat(array, 4, axis=0), tiny.inputs())  # four shards
    with jax.set_mesh(mesh):
        found = compiled(graph, chosen, traverse_util.unflatten_dict(placed), inputs)
    for path, value in traverse_util.flatten_dict(found).items():
        wanted = 4 * expected[path]
        np.testing.assert_allclose(value, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0, err_msg=str(path))
    with pytest.raises(ValueError, match="is int8 and cannot train"):
        split_model(rounded, FULL)


def test_full_fine_tuning_trains_everything(tiny_config):
    _, graph, chosen, frozen = split(FULL, None)
    optimizer = make_optimizer(dataclasses.replace(tiny_config.optimizer, warmup_steps=0), 10)

    @jax.jit
    def step(chosen, inputs):
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(gradient(graph, chosen, frozen, inputs), optimizer.init(chosen), chosen)
        return optax.apply_updates(chosen, updates)

    after = traverse_util.flatten_dict(step(chosen, tiny.inputs()))
    for path, before in traverse_util.flatten_dict(chosen).items():
        assert (after[path] != before).any(), path


@pytest.mark.parametrize("trainable", [FULL, (r"language/.*/bias",)], ids=["all", "some"])
def test_what_trains_is_float32_whatever_the_base_is(tiny_config, trainable):
    """And the optimizer's moments with it, also after a step in bfloat16: nu * 0.98 of bfloat16 would stay nu."""
    model = dataclasses.replace(
        tiny_config.model, lora=None, trainable=trainable, dtype="bfloat16", param_dtype="bfloat16"
    )
    config = dataclasses.replace(tiny_config, model=model)
    mesh, processor = sharding.make_mesh(config.mesh), Processor.from_hf(config.model.base, config.data)
    graph, chosen, frozen = split_model(load_model(config, processor, mesh), trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(chosen)} == {jnp.dtype(jnp.float32)}
    own = {path for path in paths(frozen) if path.startswith("projector/") or path == "emb_row"}
    for path, leaf in traverse_util.flatten_dict(frozen).items():
        assert leaf.dtype == (jnp.float32 if "/".join(path) in own else jnp.bfloat16), path
    optimizer = make_optimizer(config.optimizer, 10)
    state = init_optimizer(optimizer, chosen, mesh)
    shardings = jax.tree.map(lambda array: array.sharding, TrainState(chosen, state))
    step = make_train_step(graph, optimizer, processor.emb, config, shardings)
    batch = sharding.to_devices(host_batches(config, processor, mesh).batches[0], mesh)
    with jax.set_mesh(mesh):
        after, measured = step(TrainState(chosen, state), frozen, batch)
    assert np.isfinite(float(measured["loss"].value()))
    assert {leaf.dtype for leaf in jax.tree.leaves(after) if leaf.ndim} == {jnp.dtype(jnp.float32)}


def test_a_bfloat16_base_has_float32_adapters_through_a_checkpoint(fresh_config):
    model = dataclasses.replace(fresh_config.model, dtype="bfloat16", param_dtype="bfloat16")
    config = dataclasses.replace(fresh_config, model=model)
    mesh, processor = sharding.make_mesh(config.mesh), Processor.from_hf(config.model.base, config.data)
    loaded = load_model(config, processor, mesh)
    _, trainable, frozen = split_model(loaded, config.model.trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}
    add = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + jnp.float32(2.0**-20), tree))  # lost in bfloat16
    moved = add(trainable)
    checkpoints = Checkpoints(config, model_identity(config))
    checkpoints.save(1, moved, {"count": jnp.int32(1)}, wait=True)
    checkpoints.close()
    restored = restore_model(config, processor, mesh)
    assert restored is not None
    _, again, base = split_model(restored[1], config.model.trainable)
    for ours, theirs in ((moved, again), (frozen, base)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
        assert jax.tree.map(lambda leaf: leaf.dtype, ours) == jax.tree.map(lambda leaf: leaf.dtype, theirs)
