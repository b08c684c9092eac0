import re

import jax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from tests import tiny
from trace_jax import sharding
from trace_jax.config import Lora, Mesh
from trace_jax.model.qwen2_5_vl import Qwen2_5_VL
from trace_jax.model.weights import flat_parameters


def parameters():
    found = {}
    for tie in (True, False):
        model = nnx.eval_shape(
            lambda tie=tie: Qwen2_5_VL(tiny.architecture(tie), lora=Lora(rank=4), emb_token_id=5, rngs=nnx.Rngs(0))
        )
        found |= {path: leaf.shape for path, leaf in flat_parameters(model).items()}
    return found


def test_every_parameter_matches_one_rule_and_every_rule_is_needed():
    paths = parameters()
    used = {pattern: [p for p in paths if re.fullmatch(pattern, p)] for pattern, _ in sharding.RULES}
    assert all(used.values()), [pattern for pattern, matched in used.items() if not matched]
    assert sorted(path for matched in used.values() for path in matched) == sorted(paths)


def test_large_parameters_are_split_over_both_axes():
    mesh = sharding.make_mesh(Mesh(data=1, fsdp=4, tensor=2))
    for path, shape in parameters().items():
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
