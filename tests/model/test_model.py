"""The model by itself: scan and unrolled, remat, gradients, dtypes, packing, padding, decoding, errors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import tiny
from trace_jax import sharding
from trace_jax.config import Lora, Mesh
from trace_jax.model import cache as kept
from trace_jax.model import weights
from trace_jax.model.architecture import Architecture
from trace_jax.model.layers import quantized
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

LORA = Lora(rank=4, alpha=8.0)


def make(**options) -> Qwen2_5_VL:
    options = {"lora": LORA, "emb_token_id": tiny.EMB, "scan_layers": True, **options}
    return Qwen2_5_VL(tiny.architecture(), rngs=nnx.Rngs(0), **options)


def loss(model, inputs):
    hidden = model(inputs)
    mask = jnp.asarray(inputs.segments > 0)[..., None]
    value = jnp.sum(jnp.where(mask, jnp.sin(hidden), 0.0)) / 1000 + jnp.mean(model.logits(hidden[:, :, 3]))
    return value, hidden


GRADIENT = jax.jit(jax.grad(loss, has_aux=True))


@pytest.fixture(scope="module")
def reference():
    """Gradients and states of the scanned model without remat."""
    return GRADIENT(make(), tiny.inputs())


@pytest.mark.parametrize(
    "options",
    [
        {"scan_layers": False},
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "attention"},
        {"remat": "full", "scan_layers": False},
    ],
    ids=str,
)
def test_ways_to_run_agree(reference, options):
    gradients, hidden = GRADIENT(make(**options), tiny.inputs())
    np.testing.assert_allclose(hidden, reference[1], atol=1e-5)
    expected = weights.flat_parameters(reference[0])
    for path, gradient in weights.flat_parameters(gradients).items():
        np.testing.assert_allclose(gradient[...], expected[path][...], atol=1e-5, rtol=1e-4, err_msg=path)


def test_gradients_are_finite_and_reach_what_trains(reference):
    for path, gradient in weights.flat_parameters(reference[0]).items():
        assert jnp.isfinite(gradient[...]).all(), path
        if path.endswith(("lora_b", "emb_row")) or path.startswith("projector"):
            assert jnp.abs(gradient[...]).max() > 0, path


def test_fresh_lora_changes_nothing():
    np.testing.assert_array_equal(tiny.states(make(), tiny.inputs()), tiny.states(make(lora=None), tiny.inputs()))


def test_bfloat16():
    model = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    stored = {path: leaf.dtype for path, leaf in weights.flat_parameters(model).items()}
    for path, dtype in stored.items():
        trained = path.endswith(("lora_a", "lora_b", "emb_row")) or path.startswith("projector/")
        assert dtype == (jnp.float32 if trained else jnp.bfloat16), path
    gradients, hidden = GRADIENT(model, tiny.inputs())
    assert hidden.dtype == jnp.float32 and model.logits(hidden[0, 0]).dtype == jnp.float32
    exact = tiny.states(make(), tiny.inputs())
    real = tiny.inputs().segments > 0
    cosine = (hidden * exact).sum(-1) / jnp.linalg.norm(hidden, axis=-1) / jnp.linalg.norm(exact, axis=-1)
    assert cosine[real].min() > 0.99
    assert jnp.isfinite(gradients.emb_row[...]).all()


def test_an_int8_base_is_the_base_but_for_rounding(reference):
    model, inputs = make(param_dtype=jnp.int8), tiny.inputs()
    floats, rounded = (weights.flat_parameters(each) for each in (make(), model))
    for path, leaf in rounded.items():
        if not path.startswith("language/layers/") or not path.endswith("/kernel"):
            assert leaf.dtype != jnp.int8, path
            continue
        assert leaf.dtype == jnp.int8
        values, scale = np.asarray(leaf[...], np.float32), np.asarray(rounded[f"{path}_scale"][...])
        assert scale.shape == (leaf.shape[0], leaf.shape[2]) and np.abs(values).max() == 127
        off = np.abs(values * scale[:, None] - floats[path][...])
        assert (off <= 0.501 * scale[:, None]).all(), path
    real, hidden, exact = inputs.segments > 0, tiny.states(model, inputs), reference[1]
    cosine = (hidden * exact).sum(-1) / jnp.linalg.norm(hidden, axis=-1) / jnp.linalg.norm(exact, axis=-1)
    assert cosine[real].min() > 0.999
    np.testing.assert_allclose(tiny.states(make(param_dtype=jnp.int8, scan_layers=False), inputs), hidden, atol=1e-5)


def test_a_column_of_zeros_can_be_quantized():
    values, scale = quantized(jnp.array([[0.0, 1.0], [0.0, -254.0]]))
    np.testing.assert_array_equal(values, [[0, 0], [0, -127]])
    np.testing.assert_array_equal(scale, [1, 2])


def test_padding_and_neighbours_change_nothing():
    model, packed = make(), tiny.packed()
    hidden = tiny.states(model, tiny.stack_shards([packed.inputs])).reshape(-1, 48)
    for start, sequence in zip(packed.starts, tiny.SEQUENCES, strict=True):
        alone = tiny.states(model, tiny.prompts([sequence]))[0, 0, : len(sequence)]
        np.testing.assert_allclose(hidden[start : start + len(sequence)], alone, atol=1e-5)
    assert jnp.isfinite(hidden).all()


def test_shards_do_not_mix():
    model, packed = make(), tiny.packed()
    other = tiny.packed(tiny.SEQUENCES[::-1])
    both = tiny.states(model, tiny.stack_shards([packed.inputs, other.inputs]))
    for i, one in enumerate((packed, other)):
        np.testing.assert_allclose(both[i], tiny.states(model, tiny.stack_shards([one.inputs]))[0], atol=1e-5)


def test_text_alone_skips_the_vision_encoder(monkeypatch):
    model, inputs = make(), tiny.prompts([tiny.SEQUENCES[1]])
    expected = tiny.states(model, inputs)
    none = {
        name: getattr(inputs, name)[:, :0]
        for name in ("patches", "patch_positions", "image_segments", "window_segments")
    }
    monkeypatch.setattr(Qwen2_5_VL, "visual", None)
    np.testing.assert_allclose(jax.jit(Qwen2_5_VL.__call__)(model, inputs._replace(**none)), expected, atol=1e-6)


def test_visual_tokens_can_be_given():
    model, inputs = make(), tiny.inputs()
    given = jax.jit(lambda model, inputs: model(inputs, visual=model.visual(inputs)))(model, inputs)
    np.testing.assert_allclose(given, tiny.states(model, inputs), atol=1e-5)


@pytest.mark.parametrize("tie", [False, True])
def test_emb_row_stands_in_for_its_token(tie):
    model = Qwen2_5_VL(tiny.architecture(tie), emb_token_id=tiny.EMB, rngs=nnx.Rngs(0))
    row = jnp.arange(48, dtype=jnp.float32) / 48
    model.emb_row[...] = row
    head = model.head()
    assert head.base.shape == (tiny.VOCABULARY, 48)
    np.testing.assert_array_equal(head.row_of(tiny.EMB), row)
    np.testing.assert_array_equal(head.row_of(3), head.base[3])
    hidden = jax.random.normal(jax.random.key(1), (5, 48))
    np.testing.assert_allclose(model.logits(hidden), hidden @ head.base.at[tiny.EMB].set(row).T, atol=1e-5)
    np.testing.assert_array_equal(model.embed(jnp.array([tiny.EMB, 3]))[0], row)


@pytest.mark.parametrize(
    ("scan", "key_slots", "attention"), [(True, 3, "xla"), (False, 3, "xla"), (True, 2, "xla"), (True, 2, "splash")]
)
def test_decoding_equals_reading(scan, key_slots, attention, monkeypatch):
    """Prompts of different lengths and images, then six more tokens; keys as they lie on a CPU, and on a TPU."""
    monkeypatch.setattr(kept, "key_slots", lambda: key_slots)
    model = make(scan_layers=scan, attention=attention)
    sequences = [tiny.SEQUENCES[i] for i in (0, 1, 2, 4)]
    more = np.random.default_rng(0).integers(1, 140, (4, 6)).astype(np.int32)
    inputs = tiny.prompts(sequences)
    lengths = np.array([len(sequence) for sequence in sequences])
    following = np.array([sequence.positions.max() + 1 for sequence in sequences])
    whole = jax.tree.map(np.copy, inputs)
    for i, length in enumerate(lengths):
        at = slice(length, length + 6)
        whole.tokens[0, i, at], whole.segments[0, i, at] = more[i], 1
        whole.positions[0, i, at] = (following[i] + np.arange(6))[:, None]
    expected = tiny.states(model, whole)[0]

    hidden, cache = jax.jit(lambda m, x: m.prefill(x))(model, inputs)
    assert len(cache) == 3 and all(each.shape == (4, 2, 64, 8) for each in cache[0])

    def put(old, new, slots):
        return jax.lax.dynamic_update_slice_in_dim(old, new, 0, slots)

    empty = kept.empty_cache(model.architecture.language, 4, 80, jnp.float32)
    assert empty[0][0].shape[key_slots] == empty[0][1].shape[2] == 80
    cache = tuple(kept.update(old, k, v, put) for old, (k, v) in zip(empty, cache, strict=True))
    seen, places = np.arange(80)[None] < lengths[:, None], np.arange(80)
    step = jax.jit(lambda m, *arguments: m.decode(*arguments))
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(hidden[0, i, :length], expected[i, :length], atol=1e-5)
    for t, n in ((0, 1), (1, 1), (2, 3), (5, 1)):  # one token, and several at once
        positions = np.repeat((following[:, None] + t + np.arange(n))[..., None], 3, axis=2).astype(np.int32)
        earlier = (places >= 64) & (places <= 64 + t + np.arange(n)[:, None])
        sees = seen[:, None] | earlier[None]
        state, cache = step(model, cache, more[:, t : t + n], positions, np.int32(64 + t), sees)
        at = (lengths + t)[:, None] + np.arange(n)
        np.testing.assert_allclose(state, expected[np.arange(4)[:, None], at], atol=1e-5)


@pytest.mark.parametrize("scan", [True, False])
def test_chosen_states_are_those_of_all(scan):
    """The last layer is computed for them alone; keys and values are kept of all tokens as ever."""
    model, inputs = make(scan_layers=scan), tiny.inputs()
    shards, rows, length = inputs.tokens.shape
    at = np.stack([np.random.default_rng(shard).permutation(rows * length)[:5] for shard in range(shards)])
    at = at.astype(np.int32)
    hidden, cache = jax.jit(lambda m, x: m.prefill(x))(model, inputs)
    chosen, kept = jax.jit(lambda m, x: m.prefill(x, at=at))(model, inputs)
    expected = np.take_along_axis(np.asarray(hidden).reshape(shards, rows * length, -1), at[..., None], axis=1)
    np.testing.assert_allclose(chosen, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), kept, cache)


def test_parameter_paths():
    paths = weights.flat_parameters(make())
    for path, shape in {
        "vision/patch_embed/kernel": (96, 32),
        "vision/blocks/attn/qkv/kernel": (4, 32, 96),
        "vision/blocks/mlp/gate_proj/kernel": (4, 32, 52),
        "projector/ln_q/scale": (32,),
        "projector/mlp_0/kernel": (128, 128),
        "language/embed_tokens/embedding": (160, 48),
        "language/layers/self_attn/q_proj/kernel": (3, 48, 48),
        "language/layers/self_attn/q_proj/lora_a": (3, 48, 4),
        "language/norm/scale": (48,),
        "lm_head/kernel": (48, 160),
        "emb_row": (48,),
    }.items():
        assert paths[path].shape == shape
    assert len(weights.flat_parameters(make(lora=None, emb_token_id=None))) == len(paths) - 15


def test_errors():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        make(emb_token_id=160)
    with pytest.raises(ValueError, match="LoRA targets"):
        make(lora=dataclasses.replace(LORA, targets=("lm_head",)))
    with pytest.raises(ValueError, match="remat"):
        make(remat="some")(tiny.inputs())


def test_other_architectures_are_refused(tmp_path):
    good = tiny.architecture().to_hf()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Architecture.from_hf(tmp_path)
    for change, message in (
        ({"model_type": "qwen2_vl"}, "only 'qwen2_5_vl'"),
        ({"use_sliding_window": True}, "sliding"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [1, 1, 2]}}, "rope_type"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 3]}}, "mrope_section"),
    ):
        with pytest.raises(ValueError, match=message):
            Architecture.from_dict(good | change)
    with pytest.raises(ValueError, match="'vocab_size' is missing"):
        Architecture.from_dict({key: value for key, value in good.items() if key != "vocab_size"})


def test_wrong_weights_are_listed_together(tmp_path):
    from safetensors.numpy import load_file, save_file

    weights.save(make(lora=None, emb_token_id=None), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["visual.extra"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        weights.load(tmp_path)
    for line in ("missing: model.norm.weight", "unexpected: visual.extra", "shape of lm_head.weight: (159, 48)"):
        assert line in str(error.value)


def test_bfloat16_files_and_sharded_loading(tmp_path):
    model = make(lora=None, emb_token_id=None, param_dtype=jnp.bfloat16)
    weights.save(model, tmp_path)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    def shardings(path, shape):
        split = [size % 8 == 0 and axis == len(shape) - 1 for axis, size in enumerate(shape)]
        spec = jax.sharding.PartitionSpec(*("fsdp" if on else None for on in split))
        return jax.sharding.NamedSharding(mesh, spec)

    again = weights.load(tmp_path, param_dtype=jnp.bfloat16, lora=LORA, emb_token_id=9, shardings=shardings)
    loaded = weights.flat_parameters(again)
    for path, leaf in weights.flat_parameters(model).items():
        assert loaded[path].dtype == leaf.dtype
        np.testing.assert_array_equal(loaded[path][...].astype(jnp.float32), leaf[...].astype(jnp.float32))
    assert len(loaded["language/layers/mlp/gate_proj/kernel"][...].sharding.device_set) == 8
    np.testing.assert_array_equal(again.emb_row[...], again.head().base[9].astype(jnp.float32))


def test_folded_adapters_give_the_same_states(reference):
    model, inputs = tiny.train_adapters(make()), tiny.inputs()
    before, real = tiny.states(model, inputs), inputs.segments > 0
    model.fold_adapters()
    assert not any("lora" in path for path in weights.flat_parameters(model))
    np.testing.assert_allclose(tiny.states(model, inputs)[real], before[real], atol=2e-5)
    assert np.abs(before - reference[1])[real].max() > 0.1


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_in_bfloat16_nothing_of_an_adapter_is_rounded_away(axes):
    """Its rows lie below the kernel's; a product of both rounds once, where two products and their sum round thrice."""
    devices = jax.devices()[: axes.get("fsdp", 1) * axes.get("tensor", 1)]
    mesh, inputs = sharding.make_mesh(Mesh(data=1, **{"fsdp": 1, **axes}), devices), tiny.inputs()
    real = inputs.segments > 0
    exact = tiny.states(tiny.train_adapters(make()), inputs)[real]
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    model = tiny.train_adapters(make(**options))
    kernel = model.language.layers.mlp.gate_proj.kernel[...]
    for path, leaf in weights.flat_parameters(model).items():
        leaf[...] = jax.device_put(leaf[...], sharding.sharding_of(path, leaf.shape, mesh))
    with jax.set_mesh(mesh):
        before = tiny.states(model, inputs)[real]
        model.fold_adapters()
        after = tiny.states(model, inputs)[real]
    leaves = weights.flat_parameters(model)
    for path, leaf in leaves.items():
        assert leaf[...].sharding.is_equivalent_to(sharding.sharding_of(path, leaf.shape, mesh), leaf.ndim), path
    appended = {path.split("/")[-2] for path in leaves if path.endswith("lora_a")} - {"o_proj", "down_proj"}
    assert appended == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert {path.split("/")[-2] for path in leaves if path.endswith("lora_b")} == {"o_proj", "down_proj"}
    np.testing.assert_array_equal(leaves["language/layers/mlp/gate_proj/kernel"][:, : kernel.shape[1]], kernel)
    errors = [float(np.sqrt(np.mean(np.square(states - exact)))) for states in (before, after)]
    assert errors[1] < 1.1 * errors[0] < 0.1, errors
    untouched = tiny.states(make(**options), inputs)[real]
    assert np.sqrt(np.mean(np.square(untouched - exact))) > 5 * errors[1]


def test_layers_held_one_by_one_give_the_same_states_where_they_are_unrolled():
    unrolled, inputs = make(scan_layers=False), tiny.inputs()
    before = tiny.states(unrolled, inputs)
    unrolled.unstack()
    assert len(unrolled.language.layers) == unrolled.architecture.language.num_layers
    np.testing.assert_array_equal(tiny.states(unrolled, inputs), before)
    scanned = make(scan_layers=True)
    scanned.unstack()
    np.testing.assert_allclose(tiny.states(scanned, inputs), before, atol=2e-5)
