import dataclasses
import functools
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from tests import tiny
from trace_jax import sharding
from trace_jax.config import Config, Data, Lora, Loss, Mesh
from trace_jax.data.pipeline import Capacity, Tokenized, pack_batch
from trace_jax.data.schema import Example, Query
from trace_jax.model.architecture import Architecture
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.model.weights import flat_parameters
from trace_jax.training.losses import SCALE, hybrid_loss, loss_parameters, read_out

ASSETS = "trace_jax/assets"


def parameters():
    found = {}
    for tie in (True, False):
        model = nnx.eval_shape(
            lambda tie=tie: Qwen2_5_VL(tiny.architecture(tie), lora=Lora(rank=4), emb_token_id=5, rngs=nnx.Rngs(0))
        )
        found |= {path: leaf.shape for path, leaf in flat_parameters(model).items()}
    return found


# ---- rules -------------------------------------------------------------------------------------------------------


def test_every_parameter_matches_one_rule_and_every_rule_is_needed():
    paths = parameters()
    used = {pattern: [p for p in paths if re.fullmatch(pattern, p)] for pattern, _ in sharding.RULES}
    assert all(used.values()), [pattern for pattern, matched in used.items() if not matched]
    assert sorted(path for matched in used.values() for path in matched) == sorted(paths)


def real_architecture(size: str) -> Architecture:
    """The published shapes; the 72B differs from the 7B in its decoder and in the width of the vision encoder's MLP."""
    if size != "72b":
        return Architecture.from_hf(f"{ASSETS}/qwen2_5_vl_{size}")
    config = Architecture.from_hf(f"{ASSETS}/qwen2_5_vl_7b").to_hf()
    decoder = {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    vision = config["vision_config"] | {"out_hidden_size": 8192, "intermediate_size": 3456}
    return Architecture.from_dict(config | decoder | heads | {"vision_config": vision})


@pytest.mark.parametrize(("size", "parameters"), [("3b", 3754622976), ("7b", 8292166656), ("72b", 73410777344)])
def test_nothing_large_is_left_whole_in_the_real_models(size, parameters):
    architecture = real_architecture(size)
    bare = nnx.eval_shape(lambda: Qwen2_5_VL(architecture, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in flat_parameters(bare).values()) == parameters  # as published
    model = nnx.eval_shape(lambda: Qwen2_5_VL(architecture, lora=Lora(), emb_token_id=5, rngs=nnx.Rngs(0)))
    for fsdp, tensor in [(16, 1), (64, 1), (16, 4)]:
        mesh = AbstractMesh((1, 1, fsdp, tensor), sharding.AXES)
        whole = {}
        for path, leaf in flat_parameters(model).items():
            spec = sharding.spec_of(path, leaf.shape, mesh)
            ways = (fsdp if "fsdp" in spec else 1) * (tensor if "tensor" in spec else 1)
            if path.endswith(("lora_a", "lora_b")):  # small: split one way at least
                assert ways > 1, path
            elif ways < fsdp * tensor:
                whole[path] = leaf.size // ways
        # Norms, biases, one row: all that is not split every way, in elements a device.
        assert all(re.search(r"(scale|bias|emb_row)$", path) for path in whole), whole
        assert sum(whole.values()) < 0.001 * parameters, whole


def test_large_parameters_are_split_over_both_axes():
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    for path, shape in parameters().items():
        if path.endswith(("kernel", "lora_b")):
            assert set(sharding.spec_of(path, shape, mesh)) & {"fsdp", "tensor"}, path
        if path.endswith("kernel"):
            assert set(sharding.spec_of(path, shape, mesh)) >= {"fsdp", "tensor"}, path


def test_an_axis_that_does_not_divide_is_left_whole():
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=8))
    assert sharding.spec_of("lm_head/kernel", (12, 16), mesh) == P(None, "tensor")


def test_unknown_parameters_and_impossible_meshes_are_refused():
    mesh = sharding.make_mesh(Mesh())
    assert sharding.data_shards(mesh) == jax.device_count() == 8
    with pytest.raises(ValueError, match="matches 0 sharding rules"):
        sharding.spec_of("language/other", (4,), mesh)
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        sharding.make_mesh(Mesh(data=3))


# ---- slices ------------------------------------------------------------------------------------------------------


def test_slices_split_the_batch_and_keep_parameters_whole():
    mesh = sharding.make_mesh(Mesh(slice=2, data=1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert sharding.data_shards(mesh) == 4
    assert [device.id for device in mesh.devices[0].flat] == [0, 1, 2, 3]
    assert not any("slice" in spec for _, spec in sharding.RULES)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a TPU device."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    device_kind: str
    core_on_chip: int = 0
    platform: str = "tpu"

    @property
    def process_index(self) -> int:
        """A host has four."""
        return self.id // 4


def torus(kind: str, *sizes: int, slices: int = 1) -> list[Chip]:
    places = itertools.product(range(slices), *map(range, sizes))
    return [Chip(number, (x, y, z), of, kind) for number, (of, z, y, x) in enumerate(places)]


@pytest.mark.parametrize(
    ("kind", "sizes"), [("TPU v6 lite", (1, 8, 8)), ("TPU v5 lite", (1, 8, 8)), ("TPU v5", (4, 4, 4))]
)
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("tensor", [2, 4])
def test_a_part_of_a_physical_axis_is_an_axis_too(kind, sizes, slices, tensor):
    """Tensor 4 on a v6e of 8x8, tensor 2 on a v5p of 4x4x4; those who share a product are neighbours."""
    mesh = sharding.make_mesh(Mesh(slice=slices, data=-1, tensor=tensor), torus(kind, *sizes, slices=slices))
    assert dict(mesh.shape) == {"slice": slices, "data": 64 // tensor, "fsdp": 1, "tensor": tensor}
    for group in mesh.devices.reshape(-1, tensor):
        assert len({chip.slice_index for chip in group}) == 1
        steps = [np.abs(np.subtract(a.coords, b.coords)).sum() for a, b in itertools.pairwise(group)]
        assert steps == [1] * (tensor - 1), [chip.coords for chip in group]
    assert [{chip.slice_index for chip in part.flat} for part in mesh.devices] == [{of} for of in range(slices)]


# ---- hosts -------------------------------------------------------------------------------------------------------


def of_hosts(processes, shape) -> types.SimpleNamespace:
    """A mesh of so many slices x data x fsdp x tensor devices, each of the process given for it."""
    devices = [types.SimpleNamespace(process_index=process) for process in processes]
    sizes = dict(zip(sharding.AXES, shape, strict=True))
    return types.SimpleNamespace(devices=np.array(devices).reshape(shape), shape=sizes)


@pytest.mark.parametrize(
    ("processes", "shape", "hosts"),
    [
        ([0, 0, 1, 1], (1, 2, 2, 1), [(0, 2), (1, 2)]),  # each its own shards
        ([1, 1, 0, 0], (1, 4, 1, 1), [(1, 2), (0, 2)]),  # in the order of the shards, not of the processes
        ([0, 1, 0, 1], (1, 4, 1, 1), [(0, 2), (1, 2)]),  # not side by side
        ([0, 0, 1, 1, 2, 2, 3, 3], (1, 2, 1, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),  # a shard on two processes
        ([0, 1, 0, 1], (2, 1, 1, 2), [(0, 1), (0, 1)]),  # all shards on both
    ],
)
def test_processes_that_hold_the_same_shards_read_the_same_examples(processes, shape, hosts):
    mesh = of_hosts(processes, shape)
    assert [sharding.data_host(mesh, process) for process in range(len(hosts))] == hosts


@pytest.mark.parametrize("processes", [[0, 0, 0, 1], [0, 0, 0, 1, 1, 1]])
def test_hosts_that_share_some_of_their_shards_are_refused(processes):
    with pytest.raises(ValueError, match="which are no even parts of it; let --mesh.tensor"):
        sharding.data_host(of_hosts(processes, (1, len(processes) // 2, 1, 2)), 0)


def test_devices_of_several_slices_are_told_apart():
    def device(number: int) -> types.SimpleNamespace:
        where = {"slice_index": number % 2, "process_index": number % 2, "platform": "tpu", "device_kind": "none"}
        return types.SimpleNamespace(id=number, **where)

    with pytest.raises(ValueError, match="of 2 slices; set --mesh.slice 2"):
        sharding.make_mesh(Mesh(data=8), [device(number) for number in range(8)])


# ---- the same result on every mesh -------------------------------------------------------------------------------

PAIRS = 8
CONFIG = Config(
    name="mesh",
    data=Data(row_length=64, patch_row_length=64, max_positives=2),
    # Scores are divided by the temperature: a low one magnifies float32's rounding beyond the tolerance below.
    loss=Loss(vocabulary_chunk=8, temperature=0.5, learn_temperature=True, both_directions=True),
)


def pairs() -> list[Tokenized]:
    """Eight pairs of different lengths; some with an image, some with a trace; two share their document."""
    made = []
    for i in range(PAIRS):
        query = tiny.sequence(i, 3 + i, [(16, 16)] if i % 2 else [])
        document = tiny.sequence(50 + i % 7, 4, [(8, 24)] if i % 3 else [])
        prompt = len(query) - (i % 3)
        targets = [*query.tokens[prompt:].tolist(), tiny.EMB]
        key = i % 7
        example = Example(Query("any"), None, "", task=i % 4, document_key=key, positives=(key,))
        made.append(Tokenized(example, query, prompt, targets, [document]))
    return made


@functools.cache
def loss_and_gradients(mesh: Mesh) -> tuple[float, dict[str, np.ndarray]]:
    """Of the hybrid loss, for every parameter and the temperature, on as many devices as the mesh needs."""
    count = mesh.slice * mesh.data * mesh.fsdp * mesh.tensor
    devices = sharding.make_mesh(mesh, jax.devices()[:count])
    shards = sharding.data_shards(devices)
    capacity = Capacity(pairs=PAIRS // shards, rows=4 if shards > 1 else 6, patch_rows=4, targets=32)
    processor = types.SimpleNamespace(geometry=tiny.GEOMETRY, pad=tiny.PAD)
    batch = pack_batch(pairs(), shards, capacity, processor, CONFIG)
    assert (batch.query_index >= 0).sum() == PAIRS
    model = Qwen2_5_VL(tiny.architecture(), lora=Lora(rank=4), emb_token_id=tiny.EMB, remat="full", rngs=nnx.Rngs(0))
    for path, leaf in flat_parameters(model).items():
        if path.endswith("lora_b"):
            leaf[...] = jnp.full(leaf.shape, 0.01)
    graph, _ = nnx.split(model)
    split = {
        path: jax.device_put(leaf[...], sharding.sharding_of(path, leaf.shape, devices))
        for path, leaf in flat_parameters(model).items()
    }
    split |= loss_parameters(CONFIG.loss, sharding.replicated(devices))

    def loss(split, batch):
        split, scale = dict(split), split[SCALE]
        del split[SCALE]
        leaves = nnx.from_flat_state([(tuple(path.split("/")), leaf) for path, leaf in split.items()])
        model = nnx.merge(graph, leaves)
        head = model.head()
        out = read_out(model(batch.inputs), head, batch, tiny.EMB, CONFIG.loss)
        return hybrid_loss(out, batch, head.row_of(tiny.EMB), CONFIG.loss, scale)[0]

    with jax.set_mesh(devices):
        value, gradients = jax.jit(jax.value_and_grad(loss))(split, sharding.to_devices(batch, devices))
    for path, gradient in gradients.items():
        assert gradient.sharding.is_equivalent_to(split[path].sharding, gradient.ndim), path
    return float(value), jax.device_get(gradients)


ONE = Mesh(data=1)
QUICK = [Mesh(data=1, tensor=2), Mesh(data=1, fsdp=4), Mesh(slice=2, data=1, fsdp=2, tensor=2)]
EVERY = [Mesh(*shape) for shape in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(shape) in (2, 4, 8)]


@pytest.mark.parametrize(
    "mesh", [pytest.param(mesh, marks=[] if mesh in QUICK else pytest.mark.slow) for mesh in EVERY], ids=str
)
def test_every_mesh_gives_the_loss_and_the_gradients_of_one_device(mesh):
    loss, gradients = loss_and_gradients(mesh)
    expected, references = loss_and_gradients(ONE)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, reference in references.items():
        # Of the whole array: one element's rounding, which is random, has a longer tail.
        assert np.linalg.norm(gradients[path] - reference) < 1e-5 * np.linalg.norm(reference), path
