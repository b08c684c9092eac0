"""The device mesh, one rule per parameter, and the way of host arrays onto the devices.

Axes: "data" replicates parameters and splits the batch, "fsdp" splits both, "tensor" splits the matmuls. A batch's
leading axis S is split over data and fsdp; the compiler inserts the collectives.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax import config

BATCH_AXES = ("data", "fsdp")

# Parameter path -> how its axes are split. Stacked layers have a leading axis, which is never split.
RULES: tuple[tuple[str, P], ...] = (
    (r"language/embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"emb_row", P()),
    (r"(vision/blocks|language/layers)/\w*norm\w*/scale", P()),
    (r"(projector/ln_q|language/norm)/scale", P()),
    (r"vision/patch_embed/kernel", P("fsdp", "tensor")),
    (r"(vision/blocks|language/layers)/.*/(qkv|[qkv]_proj|gate_proj|up_proj)/kernel", P(None, "fsdp", "tensor")),
    (r"(vision/blocks|language/layers)/.*/(qkv|[qkv]_proj|gate_proj|up_proj)/bias", P(None, "tensor")),
    (r"(vision/blocks|language/layers)/.*/(proj|o_proj|down_proj)/kernel", P(None, "tensor", "fsdp")),
    (r"(vision/blocks|language/layers)/.*/(proj|o_proj|down_proj)/bias", P()),
    (r"language/layers/.*/([qkv]_proj|gate_proj|up_proj)/lora_a", P(None, "fsdp", None)),
    (r"language/layers/.*/([qkv]_proj|gate_proj|up_proj)/lora_b", P(None, None, "tensor")),
    (r"language/layers/.*/(o_proj|down_proj)/lora_a", P(None, "tensor", None)),
    (r"language/layers/.*/(o_proj|down_proj)/lora_b", P(None, None, "fsdp")),
    (r"projector/mlp_0/kernel", P("fsdp", "tensor")),
    (r"projector/mlp_0/bias", P("tensor")),
    (r"projector/mlp_2/kernel", P("tensor", "fsdp")),
    (r"projector/mlp_2/bias", P()),
)


def join_processes() -> None:
    """Makes the processes of a TPU slice, or of any cluster that JAX detects, one program; call it before all else.

    Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell. A process alone stays alone.
    """
    if "JAX_PROCESS_ID" in os.environ:
        processes, own = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
        jax.distributed.initialize(num_processes=processes, process_id=own)
        return
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):  # what JAX says where it detects no cluster
            raise


def make_mesh(axes: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Arranges devices (default: all) as data x fsdp x tensor.

    Raises ValueError when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [axes.data, axes.fsdp, axes.tensor]
    if shape.count(-1) == 1:
        known = int(np.prod([size for size in shape if size != -1]))
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices) or min(shape) < 1:
        raise ValueError(
            f"mesh data={axes.data} fsdp={axes.fsdp} tensor={axes.tensor} does not fit {len(devices)} devices"
        )
    return jax.make_mesh(tuple(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def data_shards(mesh: jax.sharding.Mesh) -> int:
    """S: how many ways a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def spec_of(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """The spec of one parameter. An axis that its mesh axis does not divide is left whole.

    Raises ValueError unless exactly one rule matches the path.
    """
    matching = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(matching) != 1:
        raise ValueError(f"parameter {path!r} matches {len(matching)} sharding rules; it must match one")
    axes = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(matching[0], shape, strict=False)
    ]
    return P(*axes)


def sharding_of(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> NamedSharding:
    """`spec_of` on the mesh's devices."""
    return NamedSharding(mesh, spec_of(path, shape, mesh))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def to_devices(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Makes global arrays of this host's part of a batch, whose arrays all have the leading axis S / hosts."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)
