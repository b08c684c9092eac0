"""What an optimised HLO text says: how often each instruction runs, collectives, HBM traffic, the compiler's cycles.

The compiler's own totals count the body of a loop once; here every instruction is weighted by the trip counts of the
loops around it, read from their conditions.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
NO_TRAFFIC = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call")
ARRAY = r"\w+\[[\d,]*\](?:\{[^}]*\})?"  # dtype, dimensions, layout
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}  # the others' names end in theirs


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    number: int | None  # a scalar constant's value, or which parameter it is
    attributes: str
    is_root: bool

    def attribute(self, key: str) -> str | None:
        """The computation that an attribute names."""
        match = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return match.group(1) if match else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """All runs of one kind of collective in a step of one device."""

    kind: str
    count: int  # runs
    sent: float  # bytes that leave a device over the interconnect of its slice, ring algorithms assumed
    result: float  # bytes of the results
    exposed: float  # of `sent`: by instructions that nothing runs beside
    crossed: float = 0.0  # bytes that leave it for another slice
    crossed_exposed: float = 0.0  # of `crossed`


@dataclasses.dataclass(frozen=True)
class Summary:
    """One step of one device, loops multiplied out."""

    collectives: tuple[Collective, ...]
    hbm_bytes: float  # operands and results of every kernel that lie in HBM
    looped_bytes: float  # of these, what one trip of the loops of unknown length takes
    cycles: float  # the compiler's estimates of its fusions; other instructions have none
    unknown_loops: int  # loops whose trip count is not in the text, counted as one trip


def read(text: str, slice_devices: int = 0) -> Summary:
    """Sums up an HLO module. Raises ValueError when the text has no ENTRY computation.

    With several slices, so many neighbouring devices are a slice each.
    """
    return _Module(text).summary(slice_devices)


def bytes_of(shape: str, *, hbm_only: bool = False) -> float:
    """Bytes of all arrays of a shape; `hbm_only` leaves out those that are laid out in an on-chip memory, S(n)."""
    total = 0.0
    for dtype, dimensions, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", shape):
        if hbm_only and re.search(r"S\(\d+\)", layout):
            continue
        bits = BITS.get(dtype) or int((re.search(r"\d+", dtype) or [0])[0])
        total += math.prod(int(size) for size in dimensions.split(",") if size) * bits / 8
    return total


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opens = rest.index("(")
    closes = _closing(rest, opens)
    inner = rest[opens + 1 : closes]
    operands, number = tuple(re.findall(r"%([\w.\-]+)", inner)), int(inner) if inner.isdecimal() else None
    return Instruction(match[2], shape, rest[:opens], operands, number, rest[closes + 1 :], match[1] is not None)


Computation = Mapping[str, Instruction]


class _Module:
    """The computations of a module, by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, dict[str, Instruction]] = {}
        entry, current = None, None
        for line in text.splitlines():
            if header := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
                current = self.computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
            elif line.rstrip() == "}":  # a kernel's attributes go over several lines, one of which begins with braces
                current = None
            elif current is not None and (instruction := _instruction(line)):
                current[instruction.name] = instruction
        if entry is None:
            raise ValueError("the HLO text has no ENTRY computation")
        self.entry = entry

    def trips(self, condition: str) -> int | None:
        """How often a loop with this condition runs: the constant that its counter is compared to, None without one."""
        instructions = self.computations[condition]
        root = next(instruction for instruction in instructions.values() if instruction.is_root)
        if root.opcode == "compare" and "direction=LT" in root.attributes:
            bound = instructions[root.operands[1]]
            if bound.number is not None:
                return bound.number
        return None

    def runs(self, computation: str, times: int = 1, loops: int = 0) -> Iterator[tuple[str, int, int]]:
        """The computations that run one instruction after another, with how often and in how many loops of unknown
        length, which run once; both branches of a conditional.
        """
        yield computation, times, loops
        for instruction in self.computations[computation].values():
            if instruction.opcode == "while":
                condition, body = instruction.attribute("condition"), instruction.attribute("body")
                if condition and body:
                    trips = self.trips(condition)
                    yield from self.runs(body, times * (trips or 1), loops + (trips is None))
            elif instruction.opcode == "conditional":
                names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                found = re.findall(r"%([\w.\-]+)", names[1]) if names else []
                both = (instruction.attribute(f"{which}_computation") for which in ("true", "false"))
                for branch in [*found, *filter(None, both)]:
                    yield from self.runs(branch, times, loops)
            elif instruction.opcode == "call" and (callee := instruction.attribute("to_apply")):
                yield from self.runs(callee, times, loops)

    def summary(self, slice_devices: int) -> Summary:
        """Walks all that runs."""
        found: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0, 0.0, 0.0])
        traffic = looped = cycles = 0.0
        unknown = 0
        for name, times, loops in self.runs(self.entry):
            for instruction in self.computations[name].values():
                moved = times * self.traffic(name, instruction)
                traffic, looped = traffic + moved, looped + (moved if loops else 0.0)
                condition = instruction.attribute("condition") if instruction.opcode == "while" else None
                unknown += condition is not None and self.trips(condition) is None
                if match := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes):
                    cycles += times * int(match[1])
                for collective, exposed in self.collectives(instruction):
                    kind = collective.opcode.removesuffix("-start")
                    crossed = crossed_bytes(collective, slice_devices) if slice_devices else 0.0
                    sent = sent_bytes(collective) - crossed
                    parts = (1, sent, result_bytes(collective), sent * exposed, crossed, crossed * exposed)
                    found[kind] = [old + times * new for old, new in zip(found[kind], parts, strict=True)]
        rows = (Collective(kind, int(parts[0]), *parts[1:]) for kind, parts in sorted(found.items()))
        return Summary(tuple(rows), traffic, looped, cycles, unknown)

    def collectives(self, instruction: Instruction) -> Iterator[tuple[Instruction, bool]]:
        """The collectives that an instruction starts, and whether nothing runs beside them."""
        if instruction.opcode.removesuffix("-start") in COLLECTIVES:
            yield instruction, not instruction.opcode.endswith("-start")
        elif instruction.opcode in ("fusion", "async-start"):
            inside = self.computations.get(instruction.attribute("calls") or "", {}).values()
            if not any("AsyncCollectiveDone" in each.attributes for each in inside):  # it repeats the one begun
                for each in inside:
                    yield from ((found, False) for found, _ in self.collectives(each))

    def traffic(self, computation: str, instruction: Instruction) -> float:
        """Bytes between HBM and the chip. A slice that is read or written in place counts as itself, not its whole."""
        kind = instruction.opcode
        if kind == "copy-start":  # to or from the chip's own memory, which is not counted
            return bytes_of(instruction.shape, hbm_only=True)
        if kind == "slice-start":
            source, part = re.findall(ARRAY, instruction.shape)[:2]
            return bytes_of(part) * (bytes_of(source, hbm_only=True) > 0) + bytes_of(part, hbm_only=True)
        if kind in NO_TRAFFIC or kind.endswith(("-start", "-done")):
            return 0.0
        there = self.computations[computation]
        shapes = [there[name].shape if name in there else "" for name in instruction.operands]
        reads = [bytes_of(shape, hbm_only=True) for shape in shapes]
        writes = bytes_of(instruction.shape, hbm_only=True)
        if kind == "dynamic-slice":
            return 2 * writes
        if kind == "dynamic-update-slice":
            return 2 * reads[1]
        inside = self.computations.get(instruction.attribute("calls") or "") if kind == "fusion" else None
        if inside:
            for parameter in inside.values():
                number = parameter.number
                if parameter.opcode != "parameter" or number is None or not reads[number]:
                    continue
                users = _users(inside, parameter.name)
                if users and all(_in_place(inside, each, parameter.name) for each in users):
                    update = sum(bytes_of(inside[each.operands[1]].shape) for each in users)
                    writes, reads[number] = min(writes, update), 0.0
                else:
                    reads[number] = self.read_of(inside, parameter.name, reads[number])
        return sum(reads) + writes

    def read_of(self, inside: Computation, name: str, whole: float) -> float:
        """Bytes that a fusion reads of an array of `whole` bytes: of a stack or a table no more than it takes out."""
        if inside[name].is_root:
            return whole
        total = 0.0
        for user in _users(inside, name):
            if user.opcode in ("slice", "dynamic-slice", "gather") and user.operands[0] == name:
                total += bytes_of(user.shape)
            elif user.opcode == "bitcast":
                total += self.read_of(inside, user.name, whole)
            elif user.opcode == "fusion" and (callee := self.computations.get(user.attribute("calls") or "")):
                numbers = [number for number, operand in enumerate(user.operands) if operand == name]
                for each in callee.values():
                    if each.opcode == "parameter" and each.number in numbers:
                        total += self.read_of(callee, each.name, whole)
            else:
                return whole
        return min(total, whole)


def _users(inside: Computation, name: str) -> list[Instruction]:
    return [each for each in inside.values() if name in each.operands]


def _in_place(inside: Computation, user: Instruction, name: str) -> bool:
    """Whether an instruction changes a part of the array where it is, and nothing here reads the result."""
    changes = user.opcode == "dynamic-update-slice" and user.operands[0] == name
    return changes and all(each.opcode == "tuple" for each in _users(inside, user.name))


def result_bytes(collective: Instruction) -> float:
    """Bytes of a collective's result; an asynchronous one gives (operands, results, ...)."""
    if not collective.opcode.endswith("-start"):
        return bytes_of(collective.shape)
    leaves = re.findall(ARRAY, collective.shape)
    return max(bytes_of(leaf) for leaf in leaves)


def groups(collective: Instruction) -> np.ndarray:
    """Who takes part together: [groups, devices] int, of the lists, the iota form or the mesh form of replica_groups.

    The pairs of a permute, sender and receiver.
    """
    text = collective.attributes
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text):
        return np.array([list(map(int, each.split(","))) for each in re.findall(r"\{([\d,]+)\}", match[1])])
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(match[3], match[4]).reshape(int(match[1]), int(match[2]))
    ids = r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))?"  # where they are not in order
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]" + ids + r" \{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        within = re.findall(r"'(\w+)'", match[5])
        order = [list(sizes).index(axis) for axis in (*(axis for axis in sizes if axis not in within), *within)]
        listed = np.array(match[4].split(","), int) if match[4] else None
        devices = _iota(match[2] or str(math.prod(sizes.values())), match[3]) if listed is None else listed
        devices = devices.reshape(*sizes.values()).transpose(order)
        return devices.reshape(-1, math.prod(sizes[axis] for axis in within))
    raise ValueError(f"{collective.name}: no groups of devices in {text[:200]!r}")


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """0, 1, ... in an array of these sizes, with its axes in this order."""
    shape = list(map(int, sizes.split(",")))
    return np.arange(math.prod(shape)).reshape(shape).transpose(list(map(int, order.split(","))) if order else None)


def sent_bytes(collective: Instruction) -> float:
    """Bytes that leave each device, by the ring algorithms."""
    return _sent(collective, groups(collective).shape[1])


def crossed_bytes(collective: Instruction, slice_devices: int) -> float:
    """Of `sent_bytes`, those for another slice: each slice sums up, or collects, its own part first."""
    members = groups(collective)
    slices = max(len(set(group)) for group in (members // slice_devices).tolist())
    if slices == 1:
        return 0.0
    share = 1.0 if collective.opcode.startswith(("reduce-scatter", "collective-permute")) else slices / members.shape[1]
    return _sent(collective, slices) * share


def _sent(collective: Instruction, size: int) -> float:
    kind, result = collective.opcode.removesuffix("-start"), result_bytes(collective)
    if kind == "collective-permute":
        return result
    factor = {"all-reduce": 2 * (size - 1) / size, "reduce-scatter": size - 1}
    return result * factor.get(kind, (size - 1) / size)
