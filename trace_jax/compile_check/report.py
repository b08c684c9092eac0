"""Compiles the programs of a configuration and says what they need, as a table and as JSON."""

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax

from trace_jax import sharding
from trace_jax.chips import GIB, Chip, find_topology
from trace_jax.compile_check import flops, hlo, programs
from trace_jax.compile_check.programs import Program
from trace_jax.config import Config
from trace_jax.retrieval.pools import for_pools

KINDS = ("train", "prefill", "decode", "embed")
ASSUMPTIONS = (
    "compute: hardware FLOPs at the chip's published bfloat16 peak; blocks that causal attention skips do not count",
    "HBM: bytes of the operands and results of every kernel, as laid out by the compiler, at the published bandwidth",
    "interconnect: bytes that ring algorithms send, at the published sum of a chip's links, all of them busy",
    "network between slices: a pod's published bandwidth, dealt to its chips; each slice sums up its own part first",
    "a bound is the largest of these, as if they overlapped fully: no step can be faster; none was measured",
    "exposed: a model; collectives that the schedule starts on their own are exposed, all others hidden",
    "compiler's estimate: its cycles of each fusion, at the clock of chips.py; kernels and collectives have none",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What one program needs of one device; bytes, FLOPs and seconds. None where a program does not fit."""

    program: str
    shapes: str
    fits: bool
    peak: float  # bytes of HBM at the worst moment, all included
    capacity: float
    parameters: float
    optimizer: float
    other: float  # activations, temporaries, gradients, batch
    advice: str
    model_flops: float
    hardware_flops: float
    items: int  # pairs, queries or documents that a run reads, or tokens that it writes, over all devices
    least_bytes: float  # of weights and cache that a step of decoding must read; 0 for other programs
    collectives: tuple[hlo.Collective, ...] = ()
    hbm_bytes: float | None = None
    compute_seconds: float = 0.0
    hbm_seconds: float | None = None
    interconnect_seconds: float | None = None
    network_seconds: float | None = None  # between slices
    exposed_seconds: float | None = None
    compiler_seconds: float | None = None
    note: str = ""

    @property
    def bound_seconds(self) -> float:
        """The roofline: the slowest of compute, HBM, interconnect and network."""
        others = (self.hbm_seconds, self.interconnect_seconds, self.network_seconds)
        return max(self.compute_seconds, *(seconds or 0.0 for seconds in others))

    @property
    def waste(self) -> float:
        """Hardware FLOPs over model FLOPs."""
        return self.hardware_flops / self.model_flops


def check(config: Config, topology: str, *, slices: int = 1, kinds: Collection[str] = KINDS) -> Iterator[Report]:
    """Compiles the chosen programs of `config` for a topology such as "v5p:2x2x4", and yields each as it is done.

    Raises CompilerMissingError, and ValueError for a topology, kinds, a mesh or shapes that do not go together.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"no programs {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    chip, devices = find_topology(topology, slices)
    architecture = programs.read_architecture(config)
    if "train" in kinds:
        mesh = sharding.make_mesh(config.mesh, devices)
        yield compile_program(programs.train_program(config, architecture, mesh), mesh, chip, config)
    for kind, used in (("prefill", config), ("embed", for_pools(config)), ("decode", config)):
        if kind in kinds:
            mesh = sharding.make_mesh(used.evaluation.mesh or used.mesh, devices)
            for program in programs.generation_programs(used, architecture, mesh, {kind}):
                yield compile_program(program, mesh, chip, used)


def compile_program(program: Program, mesh: jax.sharding.Mesh, chip: Chip, config: Config) -> Report:
    """Compiles one program and reads the result."""
    traced = program.trace(mesh)
    hardware = flops.program_flops(traced.jaxpr) / mesh.size
    common: dict[str, Any] = {
        "program": program.name,
        "shapes": program.shapes,
        "items": program.items,
        "least_bytes": device_bytes(program.read),
        "capacity": chip.hbm,
        "parameters": device_bytes(program.parameters),
        "optimizer": device_bytes(program.optimizer),
        "model_flops": program.model_flops / mesh.size,
        "hardware_flops": hardware,
        "compute_seconds": hardware / chip.bf16_flops,
    }
    fixed = common["parameters"] + common["optimizer"]
    try:
        with jax.default_device(mesh.devices.flat[0]), jax.set_mesh(mesh):
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except jax.errors.JaxRuntimeError as error:
        peak = peak_of_error(str(error))
        if peak is None:
            raise
        advice = _advice(peak, fixed, chip, config)
        return Report(fits=False, peak=peak, other=peak - fixed, advice=advice, **common)
    peak = float(compiled.memory_analysis().peak_memory_in_bytes)
    report = Report(fits=True, peak=peak, other=peak - fixed, advice="", **common)
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(report, note=f"the compiler could not print its program: {str(error)[:100]}")
    slices = mesh.shape["slice"]
    summary = hlo.read(text, mesh.size // slices if slices > 1 else 0)
    crossed, crossed_exposed = (
        sum(getattr(each, name) for each in summary.collectives) for name in ("crossed", "crossed_exposed")
    )
    notes = [f"{summary.unknown_loops} loop(s) of unknown length counted once"] if summary.unknown_loops else []
    if slices > 1 and chip.network is None:
        notes += [f"{crossed / GIB:.3f} GiB to other slices are in no bound: no bandwidth is published for {chip.name}"]
    moved = summary.looped_bytes if program.read else summary.hbm_bytes
    if moved < summary.hbm_bytes:
        notes += [f"HBM: of one trip; before and after the loop {(summary.hbm_bytes - moved) / GIB:.2f} GiB more"]
    between = chip.network or math.inf
    return dataclasses.replace(
        report,
        note="; ".join(notes),
        collectives=summary.collectives,
        hbm_bytes=moved,
        hbm_seconds=moved / chip.hbm_bandwidth,
        interconnect_seconds=sum(each.sent for each in summary.collectives) / chip.interconnect,
        network_seconds=crossed / between if slices > 1 and chip.network else None,
        exposed_seconds=sum(each.exposed for each in summary.collectives) / chip.interconnect
        + crossed_exposed / between,
        compiler_seconds=summary.cycles / chip.clock,
    )


def device_bytes(tree: Any) -> float:
    """Bytes of one device's part of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def peak_of_error(message: str) -> float | None:
    """Bytes that a program would have needed, from the compiler's out-of-memory error; None for another error.

    Where its temporaries alone are too much, the compiler names these alone.
    """
    match = re.search(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)", message)
    if match is None:
        return None
    return float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")


def _advice(peak: float, fixed: float, chip: Chip, config: Config) -> str:
    over = f"{(peak - chip.hbm) / GIB:.1f} GiB too much"
    if fixed > chip.hbm:
        return f"{over}; the parameters and the optimizer alone need {fixed / GIB:.1f} GiB: more devices on mesh.fsdp"
    share = (chip.hbm - fixed) / (peak - fixed)
    pairs = int(config.data.batch_size * share)
    return (
        f"{over}; if memory grew in proportion to the batch, about {pairs} pairs would fit here, or"
        f" {config.data.batch_size} on {1 / share:.1f} times the devices"
    )


# ---- for people and for programs ---------------------------------------------------------------------------------


def describe(report: Report, chip: Chip, devices: int) -> str:
    """One report as text."""
    verdict = "fits" if report.fits else f"does not fit: {report.advice}"
    rows = [
        ("shapes", report.shapes),
        ("peak HBM", f"{report.peak / GIB:.2f} of {report.capacity / GIB:.2f} GiB"),
        ("  parameters", f"{report.parameters / GIB:.2f} GiB"),
        ("  optimizer", f"{report.optimizer / GIB:.2f} GiB"),
        ("  activations and all else", f"{report.other / GIB:.2f} GiB"),
        ("model FLOPs", f"{report.model_flops / 1e12:.2f} T"),
        ("hardware FLOPs", f"{report.hardware_flops / 1e12:.2f} T, {report.waste:.2f} x the model's"),
        ("bound by compute", _milliseconds(report.compute_seconds)),
    ]
    if report.hbm_bytes is not None:
        ideal = f", {report.hbm_bytes / report.least_bytes:.2f} x weights and cache" if report.least_bytes else ""
        traffic = f"{_milliseconds(report.hbm_seconds)} for {report.hbm_bytes / GIB:.2f} GiB{ideal}"
        rows += [("bound by HBM", traffic), ("bound by interconnect", _milliseconds(report.interconnect_seconds))]
    if report.network_seconds is not None:
        rows += [("bound by the network", _milliseconds(report.network_seconds))]
    for each in report.collectives:
        crossed = f", {each.crossed / GIB:.3f} GiB to other slices" if each.crossed else ""
        sent = f"{each.sent / GIB:.3f} GiB sent, {each.exposed / GIB:.3f} of them exposed"
        rows += [(f"  {each.kind}", f"{each.count} runs, {sent}{crossed}")]
    if report.exposed_seconds is not None:
        bound = report.bound_seconds
        mfu = report.model_flops / chip.bf16_flops / bound
        share = report.exposed_seconds / (bound + report.exposed_seconds)
        rows += [
            ("roofline step", f"{_milliseconds(bound)} at the least, model MFU at most {mfu:.0%}"),
            ("items", f"{report.items}, at most {report.items / bound:.4g} a second"),
            ("exposed collectives", f"{_milliseconds(report.exposed_seconds)}, {share:.0%} of bound + exposed"),
            ("compiler's estimate", _milliseconds(report.compiler_seconds)),
        ]
    rows += [("note", report.note)] if report.note else []
    title = f"{report.program}, each of {devices} {chip.name} devices: {verdict}"
    return "\n".join([title, *(f"  {name:<28}{value}" for name, value in rows)])


def _milliseconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds * 1e3:.1f} ms"


def to_json(reports: Sequence[Report], topology: str) -> dict[str, Any]:
    """The reports as plain JSON values."""
    rows = [
        dataclasses.asdict(report) | {"bound_seconds": report.bound_seconds, "waste": report.waste}
        for report in reports
    ]
    return {"topology": topology, "programs": rows, "assumptions": list(ASSUMPTIONS)}
