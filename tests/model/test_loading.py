"""From files to shards and back: every shard has the size that the rules promise, every byte is read once."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests import tiny
from trace_jax import sharding
from trace_jax.config import Lora, Mesh
from trace_jax.model import weights
from trace_jax.model.architecture import Architecture
from trace_jax.model.layers import quantized
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL

MESH = Mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def saved(request, tmp_path_factory) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
    """A folder of several files, and its parameters."""
    folder = tmp_path_factory.mktemp("saved")
    model = Qwen2_5_VL(tiny.architecture(request.param), rngs=nnx.Rngs(0))
    weights.save(model, folder, shard_bytes=100_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, {path: np.asarray(leaf[...]) for path, leaf in weights.flat_parameters(model).items()}


def load(folder, mesh=MESH, **options):
    mesh = sharding.make_mesh(mesh)
    return weights.load(folder, shardings=lambda path, shape: sharding.sharding_of(path, shape, mesh), **options)


def test_every_shard_of_every_parameter_has_the_size_that_its_rule_promises(saved):
    mesh = sharding.make_mesh(MESH)
    parameters = weights.flat_parameters(load(saved[0], lora=Lora(rank=4), emb_token_id=tiny.EMB))
    assert len(parameters) == len(saved[1]) + 2 * 7 + 1
    whole = split = 0
    for path, leaf in parameters.items():
        array, spec = leaf[...], sharding.spec_of(path, leaf.shape, mesh)
        ways = [mesh.shape[axis] if axis else 1 for axis in (*spec, *[None] * (array.ndim - len(spec)))]
        promised = tuple(size // way for size, way in zip(array.shape, ways, strict=True))
        assert len(array.addressable_shards) == 8
        assert {shard.data.shape for shard in array.addressable_shards} == {promised}, path
        whole, split = whole + array.nbytes, split + array.addressable_shards[0].data.nbytes
        if path in saved[1]:
            np.testing.assert_array_equal(array, saved[1][path], err_msg=path)
    assert split < 0.3 * whole  # fsdp x tensor = 4: a quarter, and the norms


def test_nothing_is_read_twice_even_for_replicas(saved, monkeypatch):
    read = []
    real = weights.safetensors.safe_open

    class Counted:
        def __init__(self, handle, name):
            self.stored = handle.get_slice(name)

        def __getitem__(self, index):
            values = self.stored[index]
            read.append(values.size)
            return values

    class Handle:
        def __init__(self, *arguments, **options):
            self.handle = real(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.handle.__exit__(None, None, None)

        def get_slice(self, name):
            return Counted(self.handle, name)

    monkeypatch.setattr(weights.safetensors, "safe_open", Handle)
    load(saved[0], Mesh(data=4, fsdp=2))
    patch_embed = saved[1]["vision/patch_embed/kernel"].size  # read whole for each of its parts
    assert sum(read) == sum(value.size for value in saved[1].values()) + patch_embed


def test_a_remote_folder_is_staged_one_file_at_a_time(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(weights.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(weights, "is_remote", lambda _: True)
    real, staged = weights.read, []

    def read(file, *rest):
        assert file.is_relative_to(tmp_path)
        staged.append(sorted(tmp_path.rglob("*.safetensors")))
        return real(file, *rest)

    monkeypatch.setattr(weights, "read", read)
    loaded = weights.flat_parameters(load(saved[0]))
    assert {len(files) for files in staged} == {1} and len({files[0].name for files in staged}) > 3
    assert not list(tmp_path.iterdir())
    for path, value in saved[1].items():
        np.testing.assert_array_equal(loaded[path][...], value)


@pytest.mark.parametrize("saved", [False], indirect=True, ids=["untied"])
def test_an_int8_base_is_rounded_while_it_is_read(saved, tmp_path):
    options = {"param_dtype": jnp.int8, "lora": Lora(rank=4)}
    model = load(saved[0], **options)
    parameters = weights.flat_parameters(model)
    for path, leaf in parameters.items():
        if path not in saved[1]:
            continue
        if f"{path}_scale" not in parameters:
            assert leaf.dtype == (jnp.float32 if path.startswith("projector/") else jnp.bfloat16)
            continue
        values, scale = jax.jit(quantized)(saved[1][path].astype(jnp.bfloat16))
        np.testing.assert_array_equal(leaf[...], values, err_msg=path)
        np.testing.assert_allclose(parameters[f"{path}_scale"][...], scale, rtol=1e-6)
    kernel = parameters["language/layers/mlp/gate_proj/kernel"][...]
    assert kernel.dtype == jnp.int8 and kernel.addressable_shards[0].data.size == kernel.size // 4
    with pytest.raises(ValueError, match="a base in int8 is not written"):
        weights.save(model, tmp_path / "no")

    base = load(saved[0], param_dtype=jnp.bfloat16)
    weights.save_base(base, tmp_path / "base", str(saved[0]))
    (tmp_path / "base" / "config.json").write_text((saved[0] / "config.json").read_text())
    again = weights.flat_parameters(load(tmp_path / "base", Mesh(data=1, fsdp=8), **options))
    for path in parameters.keys() & (saved[1].keys() | {f"{path}_scale" for path in saved[1]}):
        np.testing.assert_array_equal(again[path][...], parameters[path][...], err_msg=path)


def test_a_cut_file_is_an_error_that_names_it(saved, tmp_path):
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{victim.name} is no safetensors file, or damaged"):
        load(tmp_path)
    victim.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=f"{victim.name} is no safetensors file, or damaged"):
        load(tmp_path)


def test_a_base_in_our_own_layout_is_the_same_base(saved, tmp_path):
    model = load(saved[0], param_dtype=jnp.bfloat16)
    weights.save_base(model, tmp_path / "base", str(saved[0]))
    (tmp_path / "base" / "config.json").write_text((saved[0] / "config.json").read_text())
    assert weights.fingerprint(tmp_path / "base") == weights.fingerprint(saved[0])
    options = {"lora": Lora(rank=4), "emb_token_id": tiny.EMB, "param_dtype": jnp.bfloat16}
    expected = weights.flat_parameters(load(saved[0], **options))
    again = weights.flat_parameters(load(tmp_path / "base", Mesh(data=1, fsdp=8), **options))
    for path, leaf in expected.items():
        assert again[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(again[path][...]), np.asarray(leaf[...]), err_msg=path)
    kernel = again["language/layers/mlp/gate_proj/kernel"][...]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8

    config = json.loads((saved[0] / "config.json").read_text()) | {"intermediate_size": 88}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"shape of language/layers/mlp/up_proj/kernel: \(3, 48, 80\)"):
        load(tmp_path / "base")


# ---- the cost of a real width --------------------------------------------------------------------------------------

GB = 10**9
MEASURE = """
import json, pathlib, re, sys, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from trace_jax import sharding
from trace_jax.config import Lora, Mesh
from trace_jax.model import weights

def memory(name):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\\s+(\\d+)", status)[1]) * 1024

jnp.zeros(8).block_until_ready()
before = memory("VmRSS")
mesh = sharding.make_mesh(Mesh(data=1, fsdp=8))
start = time.perf_counter()
model = weights.load(
    sys.argv[1], param_dtype=jnp.bfloat16, lora=Lora(rank=128), emb_token_id=151665,
    shardings=lambda path, shape: sharding.sharding_of(path, shape, mesh),
)
leaves = [leaf[...] for leaf in weights.flat_parameters(model).values()]
jax.block_until_ready(leaves)
seconds = time.perf_counter() - start
loading = memory("VmHWM")
if len(sys.argv) > 2:
    weights.save(model, sys.argv[2])
print(json.dumps({
    "seconds": seconds, "parameters": sum(leaf.nbytes for leaf in leaves),
    "before": before, "after": memory("VmRSS"), "peak": loading, "saving": memory("VmHWM"),
}))
"""


def write_wide(folder: pathlib.Path) -> None:
    """Zeros in the shapes of Qwen2.5-VL-7B, 2 decoder layers and 2 vision blocks: 4 files of at most 1.1 GB."""
    config = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 2,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_config": {
            "depth": 2,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    architecture = Architecture.from_hf(folder)
    model = nnx.eval_shape(lambda: Qwen2_5_VL(architecture, rngs=nnx.Rngs(0)))
    table = weights.sources(architecture, {p: leaf.shape for p, leaf in weights.flat_parameters(model).items()})
    shapes = {key: source.shape for source in table.values() for key in source.keys}
    files = {"head": ["lm_head.weight"], "embedding": ["model.embed_tokens.weight"]}
    files |= {f"layer-{i}": [key for key in shapes if key.startswith(f"model.layers.{i}.")] for i in range(2)}
    files["rest"] = [key for key in shapes if not any(key in keys for keys in files.values())]
    for name, keys in files.items():
        save_file({key: np.zeros(shapes[key], jnp.bfloat16) for key in keys}, folder / f"{name}.safetensors")
    weight_map = {key: f"{name}.safetensors" for name, keys in files.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.slow
def test_loading_a_wide_model_takes_one_file_and_two_gigabytes_beside_its_parameters(tmp_path):
    """In a process of its own. On CPU the devices' memory is the host's: what counts is what is beside it."""
    write_wide(tmp_path)
    largest = max(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])}
    environment.pop("XLA_FLAGS")
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "again")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    extra = measured["peak"] - measured["before"] - measured["parameters"]
    saving = measured["saving"] - measured["before"] - measured["parameters"]
    print(
        f"{measured['parameters'] / GB:.2f} GB of parameters read in {measured['seconds']:.1f} s; beside them at most "
        f"{extra / GB:.2f} GB while reading and {saving / GB:.2f} GB while writing; largest file {largest / GB:.2f} GB"
    )
    assert extra < largest + 2 * GB
    assert saving < 2 * weights.SHARD_BYTES + 2 * GB
