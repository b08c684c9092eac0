"""The device mesh, one rule per parameter, and the way of host arrays onto the devices.

Axes: "slice" and "data" replicate parameters and split the batch, "fsdp" splits both, "tensor" splits the matmuls. Only
"slice" crosses the data-centre network, so nothing but gradients and embeddings does. A batch's leading axis S is
split over slice, data and fsdp; the compiler inserts the collectives.

A program that runs under `jax.set_mesh(mesh)` gathers each weight whole over fsdp where it is used (`gathered`): left
to itself the TPU compiler turns split weights into windowed einsums, tens of thousands of small permutes. Without a
mesh nothing here has an effect.
"""

import functools
import os
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from trace_jax import config

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")
T = TypeVar("T")

# Parameter path -> how its axes are split. Stacked layers have a leading axis, which is never split.
RULES: tuple[tuple[str, P], ...] = (
    (r"language/embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
    (r"emb_row", P()),
    (r"(vision/blocks|language/layers)/\w*norm\w*/scale", P()),
    (r"(projector/ln_q|language/norm)/scale", P()),
    (r"vision/patch_embed/kernel", P("tensor", "fsdp")),
    (r"(vision/blocks|language/layers)/.*/(qkv|[qkv]_proj|gate_proj|up_proj)/kernel", P(None, "fsdp", "tensor")),
    (r"(vision/blocks|language/layers)/.*/(qkv|[qkv]_proj|gate_proj|up_proj)/(bias|kernel_scale)", P(None, "tensor")),
    (r"(vision/blocks|language/layers)/.*/(proj|o_proj|down_proj)/kernel", P(None, "tensor", "fsdp")),
    (r"(vision/blocks|language/layers)/.*/(proj|o_proj|down_proj)/(bias|kernel_scale)", P()),
    (r"language/layers/.*/([qkv]_proj|gate_proj|up_proj)/lora_a", P(None, "fsdp", None)),
    (r"language/layers/.*/([qkv]_proj|gate_proj|up_proj)/lora_b", P(None, "fsdp", "tensor")),
    (r"language/layers/.*/(o_proj|down_proj)/lora_a", P(None, "tensor", "fsdp")),
    (r"language/layers/.*/(o_proj|down_proj)/lora_b", P(None, None, "fsdp")),
    (r"projector/mlp_0/kernel", P("fsdp", "tensor")),
    (r"projector/mlp_0/bias", P("tensor")),
    (r"projector/mlp_2/kernel", P("tensor", "fsdp")),
    (r"projector/mlp_2/bias", P()),
)
REORDERED = r"vision/blocks/attn/qkv/\w+"  # its columns are put together by head before they are used (model/vision.py)


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
    """Arranges devices (default: all) as slice x data x fsdp x tensor.

    TPUs of several slices are told apart by their own account; other devices are cut into equal parts, in order. Raises
    ValueError when the axes do not multiply to the number of devices, or `axes.slice` is not their number of slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [axes.slice, axes.data, axes.fsdp, axes.tensor]
    if shape.count(-1) == 1:
        known = int(np.prod([size for size in shape if size != -1]))
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices) or min(shape) < 1:
        raise ValueError(
            f"mesh slice={axes.slice} data={axes.data} fsdp={axes.fsdp} tensor={axes.tensor} does not fit"
            f" {len(devices)} devices"
        )
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        if len(slices) != shape[0]:
            raise ValueError(f"the devices are of {len(slices)} slices; set --mesh.slice {len(slices)}")
        arranged = mesh_utils.create_hybrid_device_mesh(
            [1, *shape[1:]], [shape[0], 1, 1, 1], devices, allow_split_physical_axes=True
        )
    else:  # an axis may be a part of a physical one: tensor 4 on a v6e of 8x8
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_shards(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> int:
    """S: how many ways a batch is split."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def data_host(mesh: jax.sharding.Mesh, process: int) -> tuple[int, int]:
    """(host, hosts): which part of a batch a process feeds, of how many.

    Processes whose devices hold the same shards, as when "tensor" goes across hosts, are one host and read the same
    examples. Raises ValueError where hosts would share some of their shards, or hold different numbers of them.
    """
    held: dict[int, set[int]] = {}
    for shard, devices in enumerate(mesh.devices.reshape(data_shards(mesh), -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(shard)
    hosts = sorted({tuple(sorted(shards)) for shards in held.values()})
    if len({len(shards) for shards in hosts}) > 1 or sum(map(len, hosts)) > data_shards(mesh):
        raise ValueError(
            f"mesh {dict(mesh.shape)}: processes hold the shards {hosts} of a batch, which are no even parts of it;"
            " let --mesh.tensor divide the number of a host's devices, or be a multiple of it"
        )
    return hosts.index(tuple(sorted(held[process]))), len(hosts)


def spec_of(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> P:
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


def placed(value: jax.Array, path: str) -> jax.Array:
    """The value of the parameter at `path`, split as its rule says; without a mesh as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    return value if mesh.empty else jax.lax.with_sharding_constraint(value, spec_of(path, value.shape, mesh))


def gathered(module: T, path: str, *, stacked: bool = False) -> T:
    """The module at `path` with its parameters whole over fsdp, still split over tensor, for use right here; those of
    REORDERED are whole over tensor, too.

    The gradients come back split as the rules say. `stacked` tells that it is one layer of a stack. The same module
    without a mesh (`jax.set_mesh`). Raises ValueError for a parameter that matches no rule.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return module

    def gather(keys: tuple[Any, ...], value: jax.Array) -> jax.Array:
        names = [key.name for key in keys if key.name != "value"]  # a variable's only leaf is its "value"
        shape = (1, *value.shape) if stacked else value.shape
        name = "/".join([path, *names])
        split = spec_of(name, shape, mesh)
        split = P(*split[1:]) if stacked else split
        over = ("fsdp", "tensor") if re.fullmatch(REORDERED, name) else ("fsdp",)
        used = P(*(None if axis in over else axis for axis in split))
        return value if used == split else _gather(value, split, used)

    return jax.tree_util.tree_map_with_path(gather, module)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(value: jax.Array, split: P, used: P) -> jax.Array:
    return jax.lax.with_sharding_constraint(value, used)


def _gather_forward(value: jax.Array, split: P, used: P) -> tuple[jax.Array, None]:
    return _gather(value, split, used), None


def _gather_backward(split: P, used: P, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # Whole first: a product whose result is split at once would be a windowed einsum again.
    gradient = jax.lax.with_sharding_constraint(gradient, used)
    return (jax.lax.with_sharding_constraint(gradient, split),)


_gather.defvjp(_gather_forward, _gather_backward)


def platform() -> str:
    """What the program being traced is for: the platform of its mesh (`jax.set_mesh`), else of the default device."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def dealt(items: Sequence[T]) -> Sequence[T]:
    """Every n-th item, of n processes: the share of this one in work that each can do alone."""
    return items[jax.process_index() :: jax.process_count()]


def to_devices(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """Makes global arrays of this host's part of a batch (`data_host`), all with the leading axis S / hosts."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, array), batch)
