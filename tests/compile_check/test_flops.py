"""Counted FLOPs against hand counts, and what the architecture needs against what a step does."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests import tiny
from trace_jax import chips, sharding
from trace_jax.compile_check import flops, programs, report
from trace_jax.config import Config, Data, Evaluation, Lora, Loss, Mesh, Model, load_config
from trace_jax.data.lengths import assumed_batches
from trace_jax.data.processor import Geometry
from trace_jax.model.attention import attention
from trace_jax.model.flops import forward_flops, model_flops
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

CONFIG = Config(
    name="tiny",
    model=Model(lora=Lora(rank=8), scan_layers=True, remat="none", dtype="float32", param_dtype="float32"),
    data=Data(
        batch_size=16,
        row_length=256,
        rows=3,
        patch_row_length=256,
        patch_rows=2,
        max_pixels=64 * 64,
        max_text_tokens=32,
        max_trace_tokens=32,
    ),
    loss=Loss(vocabulary_chunk=64),
    mesh=Mesh(data=1, fsdp=2, tensor=2),
    evaluation=Evaluation(batch_size=8, max_trace_tokens=16, mesh=Mesh(data=2, tensor=2)),
)


def replaced(config, **model):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def test_loops_multiply_and_dead_products_do_not_count():
    x = jnp.ones((8, 16))

    def scanned(x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(body, x, jnp.ones((5, 16, 16)))[0].sum()

    product = 2 * 8 * 16 * 16
    assert flops.program_flops(jax.make_jaxpr(scanned)(x)) == 5 * product
    # Forward, the same again for tanh's derivative, and the gradient of x
    assert flops.program_flops(jax.make_jaxpr(jax.grad(scanned))(x)) == 3 * 5 * product

    def wasteful(x):
        unused = x @ x.T
        del unused
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ jnp.ones((16, 4)), lambda: jnp.zeros((8, 4)))

    assert flops.program_flops(jax.make_jaxpr(wasteful)(x)) == 2 * 8 * 16 * 4


@pytest.mark.parametrize("scan", [True, False])
def test_of_the_last_layer_only_the_ends_are_computed(scan):
    """Traced: what is saved is the output projection and the MLP of one layer, for all tokens but the chosen ones."""
    architecture, inputs = tiny.architecture(), tiny.inputs()
    model = Qwen2_5_VL(architecture, scan_layers=scan, rngs=nnx.Rngs(0))
    shards, tokens = inputs.tokens.shape[0], inputs.tokens.size
    at = jnp.zeros((shards, 3), jnp.int32)
    of_all, of_some = (
        flops.program_flops(jax.make_jaxpr(lambda inputs, at=at: model(inputs, at=at))(inputs)) for at in (None, at)
    )
    read = functools.partial(forward_flops, architecture, tokens=tokens, seen=0, heads=0)
    assert of_all - of_some == read() - read(ends=3 * shards)
    language = architecture.language
    wide, deep = language.hidden_size, language.intermediate_size
    assert of_all - of_some == 2 * (tokens - 3 * shards) * wide * (wide + 3 * deep)


def test_a_causal_kernel_counts_the_blocks_that_it_computes():
    """2048 slots in blocks of 512: 10 of 16 blocks. Two products forward; seven backward, in two kernels."""
    q, kv = (jax.ShapeDtypeStruct((2, heads, 2048, 128), jnp.bfloat16) for heads in (4, 2))
    segments = jax.ShapeDtypeStruct((2, 2048), jnp.int32)

    def attend(q, k, v, segments, causal=True):
        same = {"segments_q": segments, "segments_kv": segments}
        return attention(q, k, v, **same, causal=causal, backend="splash")

    def total(*arguments):
        return attend(*arguments).astype(jnp.float32).sum()

    def looped(q, k, v, segments):  # constants pass through the loop, its remat and the map over devices
        body = jax.checkpoint(lambda q, _: (attend(q, k, v, segments), None))
        return jax.lax.scan(body, q, None, length=3)[0].astype(jnp.float32).sum()

    product = 2 * 2 * 4 * 2048 * 2048 * 128

    def products(function):
        return flops.program_flops(jax.jit(function).trace(q, kv, kv, segments).jaxpr) / product

    assert products(attend) == 2 * 10 / 16
    assert products(functools.partial(attend, causal=False)) == 2
    assert products(jax.grad(total)) == pytest.approx(9 * 10 / 16, rel=1e-3)
    with jax.set_mesh(sharding.make_mesh(Mesh(data=2), jax.devices()[:2])):
        assert products(jax.grad(looped)) == pytest.approx(3 * 11 * 10 / 16, rel=1e-3)


def test_int8_halves_the_frozen_kernels_of_a_device():
    config = load_config("mbeir_qwen2_5_vl_7b")
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=4), jax.devices()[:4])
    architecture = programs.read_architecture(config)
    whole, rounded = (
        report.device_bytes(programs.abstract_model(replaced(config, param_dtype=dtype), architecture, mesh))
        for dtype in ("bfloat16", "int8")
    )
    kernels = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert whole - rounded == pytest.approx(kernels / 4, rel=0.01)  # a byte of two; scales are few


@functools.cache
def real_step(remat):
    """The 7B configuration's step on four devices, of the real layers and widths, reduced in depth: the program, and
    the FLOPs that its model needs."""
    config = replaced(load_config("mbeir_qwen2_5_vl_7b"), remat=remat, attention="xla")
    config = dataclasses.replace(config, mesh=Mesh(data=1, fsdp=4))
    whole = programs.read_architecture(config)
    architecture = dataclasses.replace(
        whole,
        language=dataclasses.replace(whole.language, num_layers=4),
        vision=dataclasses.replace(whole.vision, depth=4, full_attention_blocks=(3,)),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
    capacity = programs.capacity_of(config, architecture, 4)
    needed = sum(model_flops(architecture, config, capacity, 4).values())
    return programs.train_program(config, architecture, mesh).trace(mesh).jaxpr, needed


@pytest.mark.parametrize(("remat", "most"), [("none", 1.1), ("attention", 1.3), ("full", 1.4)])
def test_a_step_does_little_more_than_the_model_needs(remat, most):
    """The attention's masked half is the largest part of the rest."""
    program, needed = real_step(remat)
    assert 1.0 <= flops.program_flops(program) / needed <= most


def shapes(program):
    """Of all arrays that a program makes, and the programs within it."""
    for equation in program.eqns:
        yield from (result.aval.shape for result in equation.outvars)
        for inner, _ in flops._inner_jaxprs(list(equation.params.values())):
            yield from shapes(inner)


def test_no_step_makes_logits_of_all_tokens_or_documents_for_each_query():
    config, found = load_config("mbeir_qwen2_5_vl_7b"), set(shapes(real_step("none")[0].jaxpr))
    vocabulary, pairs, width = 152064, config.data.batch_size, 3584
    logits = [math.prod(shape) // vocabulary for shape in found if vocabulary in shape]
    assert max(logits) == 4 * config.loss.vocabulary_chunk  # a chunk of each device
    assert (pairs, pairs) in found  # the scores
    assert not any(shape.count(pairs) > 1 and width in shape for shape in found)


def test_shapes_are_the_configuration_s_or_measured_on_assumed_lengths():
    assert programs.capacity_of(CONFIG, tiny.architecture(), 2).rows == 3
    config = load_config("mbeir_qwen2_5_vl_7b")
    architecture = programs.read_architecture(config)
    capacity = programs.capacity_of(config, architecture, 16)
    assert capacity.pairs == 64
    batch = assumed_batches(config.data, Geometry(max_pixels=config.data.max_pixels), 1)[0]
    tokens = sum(item.tokens for item in batch) / 16
    assert tokens <= capacity.rows * config.data.row_length <= 1.1 * tokens
    assert capacity.targets % config.loss.vocabulary_chunk == 0
    with pytest.raises(ValueError, match="cannot be dealt to 3 shards"):
        programs.capacity_of(config, architecture, 3)


def test_assumed_pictures_are_those_that_m_beir_ships():
    data = load_config("mbeir_qwen2_5_vl_7b").data
    sequences = [each for item in assumed_batches(data, Geometry(), 1)[0] for each in item.sequences]
    tokens = [len(image.values) // 4 for sequence in sequences for image in sequence.images]
    assert 81 <= min(tokens) < 85 and 155 < max(tokens) <= 162  # 256 pixels across, up to 512 along
    assert max(map(len, sequences)) <= data.row_length


def test_a_device_holds_its_part():
    mesh = sharding.make_mesh(CONFIG.mesh, jax.devices()[:4])
    model = programs.abstract_model(CONFIG, tiny.architecture(), mesh)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(model))
    assert whole / 4 < report.device_bytes(model) < whole / 3  # norms and biases are on each


def test_an_out_of_memory_error_tells_how_much_was_needed():
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.36G of 15.75G hbm. Exceeded by 4.61G."
    assert report.peak_of_error(message) == 20.36 * 2**30
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (20.01G)"
    assert report.peak_of_error(f"{message} exceeds available HBM (15.75G).") == 20.01 * 2**30
    assert report.peak_of_error("INTERNAL: something else") is None


def test_a_report_is_yielded_before_the_next_program_is_made(monkeypatch):
    """What fails later does not take with it what was compiled before."""
    monkeypatch.setattr(report, "find_topology", lambda *_: (chips.CHIPS["v5e"], jax.devices()[:4]))
    monkeypatch.setattr(programs, "read_architecture", lambda _: tiny.architecture())
    monkeypatch.setattr(report, "compile_program", lambda program, *_: program.name)
    config = dataclasses.replace(CONFIG, evaluation=dataclasses.replace(CONFIG.evaluation, batch_size=7))
    found = report.check(config, "v5e:2x2")
    assert next(found) == "train step"
    with pytest.raises(ValueError, match="evaluation.batch_size 7 cannot be dealt"):
        next(found)
    kinds = list(report.check(CONFIG, "v5e:2x2", kinds=("embed", "decode", "prefill")))
    assert kinds == [f"{kind}, {what}" for kind in ("prefill", "embed") for what in ("texts", "with images")] + [
        "decode"
    ]
    with pytest.raises(ValueError, match="no programs serve; there are train, prefill, decode, embed"):
        next(report.check(CONFIG, "v5e:2x2", kinds=("serve",)))
