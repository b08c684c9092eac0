"""Published peaks of TPU chips, and topologies to compile for.

Sources. FLOP/s, HBM bandwidth and interconnect: the system architecture pages of Cloud TPU (v4, v5e, v5p, v6e, tpu7x),
as published for a chip; the interconnect figure is the sum over a chip's links, one way. The network between slices:
the pages of v5e and v6e name 6.4 and 25.6 Tbit/s for a pod, which has 256 chips; those of the others name none. HBM
that a program may use: what the compiler of libtpu 0.0.42.1 names in its out-of-memory errors.
"""

import dataclasses
from typing import Any

from jax.experimental import topologies

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one JAX device (a chip; half of one for tpu7x)."""

    name: str
    bf16_flops: float  # FLOP/s
    hbm_bandwidth: float  # bytes/s
    hbm: float  # bytes that a program may use
    interconnect: float  # bytes/s out of a device, over all its links
    clock: float  # Hz, with which the compiler's cycles become seconds
    kind: str  # what JAX calls such a device
    network: float | None = None  # bytes/s out of a device to other slices; None: not published


CHIPS = {
    "v4": Chip("v4", 275e12, 1.228e12, 30.75 * GIB, 300e9, 1.05e9, "TPU v4"),
    "v5e": Chip("v5e", 197e12, 0.819e12, 15.75 * GIB, 200e9, 1.5e9, "TPU v5 lite", 3.125e9),
    "v5p": Chip("v5p", 459e12, 2.765e12, 95.74 * GIB, 600e9, 1.75e9, "TPU v5"),
    "v6e": Chip("v6e", 918e12, 1.640e12, 31.25 * GIB, 448e9, 1.75e9, "TPU v6 lite", 12.5e9),
    "tpu7x": Chip("tpu7x", 1153.5e12, 3.69e12, 94.75 * GIB, 600e9, 2.2e9, "TPU7x"),
}


def chip_of(device: Any) -> Chip | None:
    """The published peaks of a JAX device; None where it is no TPU that is known here."""
    return next((chip for chip in CHIPS.values() if chip.kind == device.device_kind), None)


class CompilerMissingError(RuntimeError):
    """There is no TPU compiler in this environment."""


def find_topology(name: str, slices: int = 1) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a topology such as "v5p:2x2x4", without any TPU.

    Raises CompilerMissingError that says what to install, ValueError for a topology that the compiler does not know.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise ValueError(f"topology {name!r}: no chip {kind!r}; there are {', '.join(CHIPS)}, as in v5p:2x2x4")
    more: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind == "v4":
        more["chip_config_name"] = "megacore"  # one device a chip
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        missing = ("libtpu", "not found", "unknown backend", "tpu support not installed")
        if any(words in reason.lower() for words in missing):
            raise CompilerMissingError(
                f"no TPU compiler here ({reason}): pip install -r requirements-tpu.txt"
            ) from error
        raise ValueError(f"topology {name!r}: {reason}") from error
    return CHIPS[kind], list(topology.devices)
