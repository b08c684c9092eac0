"""Compiles the programs of a configuration and says what they need, as a table and as JSON."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from trace_jax import sharding
from trace_jax.chips import GIB, Chip, find_topology
from trace_jax.compile_check import flops, hlo, programs
from trace_jax.compile_check.programs import Program
from trace_jax.config import Config
from trace_jax.model.flops import model_flops

KINDS = ("train", "prefill", "decode")
ASSUMPTIONS = (
    "compute: hardware FLOPs at the chip's published bfloat16 peak; blocks that causal attention skips do not count",
    "HBM: bytes of the operands and results of every kernel, as laid out by the compiler, at the published bandwidth",
    "interconnect: bytes that ring algorithms send, at the published sum of a chip's links, all of them busy",
    "a bound is the largest of the three, as if they overlapped fully: no step can be faster; none was measured",
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
    collectives: tuple[hlo.Collective, ...] = ()
    hbm_bytes: float | None = None
    compute_seconds: float = 0.0
    hbm_seconds: float | None = None
    interconnect_seconds: float | None = None
    exposed_seconds: float | None = None
    compiler_seconds: float | None = None
    note: str = ""

    @property
    def bound_seconds(self) -> float:
        """The roofline: the slowest of compute, HBM and interconnect."""
        return max(self.compute_seconds, self.hbm_seconds or 0.0, self.interconnect_seconds or 0.0)

    @property
    def waste(self) -> float:
        """Hardware FLOPs over model FLOPs."""
        return self.hardware_flops / self.model_flops


def check(config: Config, topology: str, *, slices: int = 1, kinds: Sequence[str] = KINDS) -> list[Report]:
    """Compiles the chosen programs of `config` for a topology such as "v5p:2x2x4".

    Raises CompilerMissingError, and ValueError for a topology, a mesh or shapes that do not go together.
    """
    chip, devices = find_topology(topology, slices)
    architecture = programs.read_architecture(config)
    reports = []
    if "train" in kinds:
        mesh = sharding.make_mesh(config.mesh, devices)
        shards = sharding.data_shards(mesh)
        capacity = programs.capacity_of(config, architecture, shards)
        needed = model_flops(architecture, config, capacity, shards)
        program = programs.train_program(config, architecture, mesh)
        reports.append(
            compile_program(program, mesh, chip, config, model_flops=sum(needed.values()), shapes=str(capacity))
        )
    if {"prefill", "decode"} & set(kinds):
        mesh = sharding.make_mesh(config.evaluation.mesh or config.mesh, devices)
        for program in programs.generation_programs(config, architecture, mesh):
            if program.name in kinds:
                needed = programs.generation_flops(config, architecture, program.name)
                reports.append(
                    compile_program(
                        program, mesh, chip, config, model_flops=needed, shapes=f"{config.evaluation.batch_size} rows"
                    )
                )
    return reports


def compile_program(
    program: Program, mesh: jax.sharding.Mesh, chip: Chip, config: Config, *, model_flops: float, shapes: str
) -> Report:
    """Compiles one program and reads the result; `model_flops` are of all devices, `shapes` for people."""
    traced = program.trace(mesh)
    hardware = flops.program_flops(traced.jaxpr) / mesh.size
    common: dict[str, Any] = {
        "program": program.name,
        "shapes": shapes,
        "capacity": chip.hbm,
        "parameters": device_bytes(program.parameters),
        "optimizer": device_bytes(program.optimizer),
        "model_flops": model_flops / mesh.size,
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
    summary = hlo.read(text)
    loops = f"{summary.unknown_loops} loop(s) of unknown length counted once" if summary.unknown_loops else ""
    return dataclasses.replace(
        report,
        note=loops,
        collectives=summary.collectives,
        hbm_bytes=summary.hbm_bytes,
        hbm_seconds=summary.hbm_bytes / chip.hbm_bandwidth,
        interconnect_seconds=sum(each.sent for each in summary.collectives) / chip.interconnect,
        exposed_seconds=sum(each.exposed for each in summary.collectives) / chip.interconnect,
        compiler_seconds=summary.cycles / chip.clock,
    )


def device_bytes(tree: Any) -> float:
    """Bytes of one device's part of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def peak_of_error(message: str) -> float | None:
    """Bytes that a program would have needed, from the compiler's out-of-memory error; None for another error."""
    match = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
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


def table(reports: Sequence[Report], chip: Chip, devices: int) -> str:
    """The reports as text, with the assumptions."""
    lines = []
    for report in reports:
        verdict = "fits" if report.fits else f"does not fit: {report.advice}"
        lines += [f"{report.program}, each of {devices} {chip.name} devices: {verdict}"]
        rows = [
            ("shapes", report.shapes),
            ("peak HBM", f"{report.peak / GIB:.2f} of {report.capacity / GIB:.2f} GiB"),
            ("  parameters", f"{report.parameters / GIB:.2f} GiB"),
            ("  optimizer", f"{report.optimizer / GIB:.2f} GiB"),
            ("  activations and all else", f"{report.other / GIB:.2f} GiB"),
            ("model FLOPs", f"{report.model_flops / 1e12:.2f} T"),
            ("hardware FLOPs", f"{report.hardware_flops / 1e12:.2f} T, {report.waste:.2f} x the model's"),
            ("bound by compute", _milliseconds(report.compute_seconds)),
            ("bound by HBM", f"{_milliseconds(report.hbm_seconds)} for {(report.hbm_bytes or 0) / GIB:.1f} GiB"),
            ("bound by interconnect", _milliseconds(report.interconnect_seconds)),
        ]
        rows += [
            (f"  {each.kind}", f"{each.count} runs, {each.sent / GIB:.3f} GiB sent") for each in report.collectives
        ]
        if report.exposed_seconds is not None:
            mfu = report.model_flops / chip.bf16_flops / report.bound_seconds
            share = report.exposed_seconds / (report.bound_seconds + report.exposed_seconds)
            rows += [
                ("roofline step", f"{_milliseconds(report.bound_seconds)} at the least, model MFU at most {mfu:.0%}"),
                ("exposed collectives", f"{_milliseconds(report.exposed_seconds)}, {share:.0%} of bound + exposed"),
                ("compiler's estimate", _milliseconds(report.compiler_seconds)),
            ]
        rows += [("note", report.note)] if report.note else []
        lines += [f"  {name:<28}{value}" for name, value in rows]
    return "\n".join([*lines, "", "Assumptions", *(f"- {line}" for line in ASSUMPTIONS)])


def _milliseconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds * 1e3:.1f} ms"


def to_json(reports: Sequence[Report], topology: str) -> dict[str, Any]:
    """The reports as plain JSON values."""
    rows = [
        dataclasses.asdict(report) | {"bound_seconds": report.bound_seconds, "waste": report.waste}
        for report in reports
    ]
    return {"topology": topology, "programs": rows, "assumptions": list(ASSUMPTIONS)}
