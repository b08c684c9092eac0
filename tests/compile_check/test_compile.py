"""The real TPU compiler, where it is installed (requirements-tpu.txt)."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from trace_jax import chips

needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs requirements-tpu.txt")

# A process of its own: the compiler's library reads its environment when it is loaded, and is loaded once.
SCRIPT = """
import functools, json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tests import tiny
from tests.compile_check.test_flops import CONFIG, replaced
from trace_jax import chips, sharding
from trace_jax.compile_check import hlo, programs, report
from trace_jax.config import Mesh
from trace_jax.model import cache
from trace_jax.model.attention import attention

programs.read_architecture = lambda config: tiny.architecture()
config = replaced(CONFIG, attention="splash", remat="full", dtype="bfloat16", param_dtype="bfloat16")
reports = list(report.check(config, "v5e:2x2"))

chip, devices = chips.find_topology("v5e:2x2")
mesh = sharding.make_mesh(config.mesh, devices)
peaks = {}
for backend in ("xla", "splash"):
    def loss(q, k, v, segments):
        same = {"segments_q": segments, "segments_kv": segments}
        return attention(q, k, v, **same, causal=True, backend=backend).astype(jnp.float32).sum()
    rows, heads = P(sharding.BATCH_AXES), P(sharding.BATCH_AXES, "tensor")
    shapes = [((4, 28, 8192, 128), jnp.bfloat16, heads)] + [((4, 4, 8192, 128), jnp.bfloat16, heads)] * 2
    shapes += [((4, 8192), jnp.int32, rows)]
    arrays = [jax.ShapeDtypeStruct(s, t, sharding=NamedSharding(mesh, p)) for s, t, p in shapes]
    with jax.set_mesh(mesh), jax.default_device(devices[0]):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*arrays)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    peaks[backend] = compiled.memory_analysis().peak_memory_in_bytes

# A layer's cache of the 7B, 4 key heads on 4 chips, in the kernel's shapes: many rows, three tokens a step, odd slots.
mesh = sharding.make_mesh(Mesh(data=1, fsdp=1, tensor=4), devices)
traffic = {}
for dtype in ("bfloat16", "int8"):
    for rows, queries, slots in ((64, 1, 768), (8, 3, 1792), (6, 2, 2900)):
        row, heads = (NamedSharding(mesh, P(sharding.BATCH_AXES, *axes)) for axes in ((), ("tensor",)))
        values = jax.ShapeDtypeStruct((rows, 4, slots, 128), jnp.dtype(dtype), sharding=heads)
        scales = jax.ShapeDtypeStruct((rows, 4, 1, slots), jnp.float32, sharding=heads)
        kept = cache.Int8(values, scales) if dtype == "int8" else values
        q = jax.ShapeDtypeStruct((rows, 28, queries, 128), jnp.bfloat16, sharding=heads)
        seen = jax.ShapeDtypeStruct((rows, queries, slots), jnp.bool_, sharding=row)
        with jax.set_mesh(mesh), jax.default_device(devices[0]):
            traced = jax.jit(functools.partial(cache.attend_to, backend="splash")).trace((kept, kept), q, seen)
            text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
        least = 2 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept)) / 4
        traffic[f"{dtype} {rows} {queries} {slots}"] = [text.count("tpu_custom_call"), hlo.read(text).hbm_bytes / least]
print(*(report.describe(each, chip, 4) for each in reports), sep="\\n")
print(json.dumps(report.to_json(reports, "v5e:2x2") | {"attention": peaks, "cache": traffic}))
"""


@pytest.fixture(scope="module")
def compiled():
    found = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    environment = {**os.environ, **found, "PYTHONPATH": os.pathsep.join([".", *filter(None, sys.path)])}
    ran = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


@needs_compiler
@pytest.mark.slow
def test_the_programs_compile_and_fit(compiled):
    names = [f"{kind}, {what}" for kind in ("prefill", "embed") for what in ("texts", "with images")]
    assert [each["program"] for each in compiled["programs"]] == ["train step", *names, "decode"]
    for each in compiled["programs"]:
        assert each["fits"] and 0 < each["peak"] < chips.CHIPS["v5e"].hbm
        assert each["hbm_seconds"] > 0 and each["compute_seconds"] > 0
    assert compiled["programs"][0]["optimizer"] > 0
    decode = compiled["programs"][-1]
    assert decode["note"].startswith("1 loop")  # the decoding ends when all rows have ended
    assert decode["least_bytes"] > 0 and decode["hbm_bytes"] > 0  # the chip holds all of a model so small


@needs_compiler
@pytest.mark.slow
def test_weights_are_gathered_and_no_einsum_is_windowed(compiled):
    kinds = {each["kind"]: each for each in compiled["programs"][0]["collectives"]}
    # Vectors of the contrastive loss are exchanged; a windowed einsum would send weights.
    assert kinds["collective-permute"]["sent"] < 0.05 * kinds["all-gather"]["sent"], kinds
    layers = 3 + 4  # of the decoder and of the vision encoder
    assert layers <= kinds["all-gather"]["count"] <= 60 * layers


@needs_compiler
@pytest.mark.slow
def test_splash_needs_less_memory_than_xla(compiled):
    """In rows of 8192: XLA's holds the scores of a quarter of the queries."""
    assert compiled["attention"]["splash"] < 0.5 * compiled["attention"]["xla"]


@needs_compiler
@pytest.mark.slow
def test_decoding_reads_the_cache_once_and_nothing_else(compiled):
    """Scores and weights stay on the chip, and int8 is read as such."""
    assert len(compiled["cache"]) == 6
    for shape, (kernels, traffic) in compiled["cache"].items():
        assert kernels == 1 and 1 <= traffic < 1.06, shape


def test_without_the_compiler_the_error_says_what_to_install():
    code = "from trace_jax import chips; chips.find_topology('v5p:2x2x4')"
    hidden = f"import sys; sys.modules['libtpu'] = None; {code}"
    environment = {**os.environ, "TPU_LIBRARY_PATH": "/nowhere/libtpu.so", "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", hidden], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "pip install -r requirements-tpu.txt" in ran.stderr.splitlines()[-1]
