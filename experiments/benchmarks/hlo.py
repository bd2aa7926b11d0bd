"""Collectives and matrix products of a compiled program, read from its HLO text.

A partitioned program is what one device runs, so all numbers are per device. A loop counts as often
as it runs; of a conditional, the most expensive branch.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
ITEM_BYTES = {"pred": 1, "bf16": 2, "c64": 8, "c128": 16}  # others end in their bits

_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass
class Cost:
    """What a program does on one device.

    collectives: (kind, mesh axes) -> bytes sent. flops: of matrix products. bytes: read and written
    by matrix products. unknown_loops: loops whose number of rounds the text does not tell, which
    are counted once.
    """

    collectives: dict[tuple[str, str], float] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    unknown_loops: int = 0

    def add(self, other: "Cost", times: int = 1) -> None:
        for key, sent in other.collectives.items():
            self.collectives[key] = self.collectives.get(key, 0.0) + times * sent
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.unknown_loops += other.unknown_loops

    @property
    def sent(self) -> float:
        return sum(self.collectives.values())


def program_cost(text: str, mesh_shape: Mapping[str, int]) -> Cost:
    """The cost of the entry computation of an optimised HLO module, as `compiled.as_text()`.

    Args:
        mesh_shape: axis -> size, in the order of the mesh the program was partitioned for.

    Bytes sent by a device in a group of g that exchanges arrays of b bytes (the larger of operand
    and result): ring algorithms, b (g - 1) / g for all-gather, reduce-scatter and all-to-all, twice
    that for all-reduce, b for collective-permute.
    """
    computations, entry = _computations(text)
    costs: dict[str, Cost] = {}

    def cost(name: str) -> Cost:
        if name not in costs:
            costs[name] = _cost(computations[name], mesh_shape, cost)
        return costs[name]

    return cost(entry)


def axes_of_groups(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> str:
    """The mesh axes along which the members of a group [g] of device numbers differ, joined by
    '+'; empty for a group of one."""
    coordinates = np.unravel_index(groups, tuple(mesh_shape.values()))
    differ = [name for name, c in zip(mesh_shape, coordinates) if len(set(c.tolist())) > 1]
    return "+".join(differ)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations, entry, lines = {}, "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations[match[1]] = []
            entry = match[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    return computations, entry


def _cost(lines: list[str], mesh_shape: Mapping[str, int], cost_of: Callable) -> Cost:
    total, shapes = Cost(), {}
    for line in lines:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        name, result, kind, rest = match.groups()
        shapes[name] = result
        kind = kind.removesuffix("-start")
        if kind in COLLECTIVES:
            _add_collective(total, kind, result, rest, shapes, mesh_shape)
        elif kind == "dot":
            _add_dot(total, result, rest, shapes)
        elif kind == "conditional":
            branches = _BRANCHES.search(rest)
            names = branches[1].replace("%", "").split(", ") if branches else _CALLED.findall(rest)
            total.add(max(map(cost_of, names), key=lambda c: (c.flops, c.sent)))
        elif kind == "while":
            trips = _TRIPS.search(rest)
            body = cost_of(_CALLED.search(rest)[1])
            total.add(body, int(trips[1]) if trips else 1)
            total.unknown_loops += trips is None and (body.flops > 0 or body.sent > 0)
        elif kind in ("call", "fusion", "async"):
            for called in _CALLED.findall(rest):
                total.add(cost_of(called))
    return total


def _add_collective(total, kind, result, rest, shapes, mesh_shape) -> None:
    operands = sum(_size(shapes.get(name, "")) for name in _operands(rest))
    size = max(_size(result), operands)
    if kind == "collective-permute":
        pairs = np.asarray(re.findall(r"\{(\d+),(\d+)\}", rest.split("source_target_pairs=")[1]))
        moving = [pair for pair in pairs.astype(int) if pair[0] != pair[1]]
        if moving:
            key = kind, axes_of_groups(moving[0], mesh_shape)
            total.add(Cost({key: float(size)}))
        return
    group = _groups(rest, math.prod(mesh_shape.values()))[0]
    axes = axes_of_groups(group, mesh_shape)
    if axes:
        share = (len(group) - 1) / len(group) * (2 if kind == "all-reduce" else 1)
        total.add(Cost({(kind, axes): share * size}))


def _groups(rest: str, devices: int) -> np.ndarray:
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, reshape, transpose = (_numbers(x) for x in match.groups())
        numbers = np.arange(devices).reshape(reshape)
        return (numbers.transpose(transpose) if transpose else numbers).reshape(shape)
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", rest):
        return np.asarray([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])])
    if match := re.search(r"replica_groups=mesh\[(.*?)\](.*?)\{('axis_.*?)\}", rest):
        return _groups_of_mesh(*match.groups(), devices)
    if "replica_groups={}" in rest:
        return np.arange(devices)[None]
    raise ValueError(f"replica groups in a notation that is not known: {rest[:200]}")


def _groups_of_mesh(axes: str, order: str, varying: str, devices: int) -> np.ndarray:
    """Groups named by the axes of a mesh of their own: sizes, perhaps an order of the devices, and
    the axes (or parts `axis:(before)size`) along which the members of a group vary."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    numbers = np.arange(devices)
    if match := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", order):
        numbers = numbers.reshape(_numbers(match[1]))
        numbers = numbers.transpose(_numbers(match[2])) if match[2] else numbers
    shape, inside = [], []
    parts = {
        name: (int(before), int(size))
        for name, before, size in re.findall(r"'(\w+)':\((\d+)\)(\d+)", varying)
    }
    for name, size in sizes.items():
        if name in parts:
            before, length = parts[name]
            split = (before, length, size // (before * length))
            inside.append(len(shape) + 1)
        else:
            split = (size,)
            if f"'{name}'" in varying:
                inside.append(len(shape))
        shape += split
    numbers = numbers.reshape(shape)
    outside = [i for i in range(len(shape)) if i not in inside]
    return numbers.transpose(outside + inside).reshape(-1, math.prod(shape[i] for i in inside))


def _add_dot(total, result, rest, shapes) -> None:
    names = _operands(rest)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
    left = _ARRAY.search(shapes.get(names[0], "")) if names else None
    if not contracted or not left:
        return
    left = _numbers(left[2])
    depth = math.prod(left[i] for i in _numbers(contracted[1]))
    output = _ARRAY.search(result)
    total.flops += 2.0 * depth * math.prod(_numbers(output[2]))
    total.bytes += _size(result) + sum(_size(shapes.get(name, "")) for name in names)


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _size(shape: str) -> int:
    """Bytes of an array's or a tuple's HLO shape."""
    total = 0
    for kind, dimensions in _ARRAY.findall(shape):
        digits = re.search(r"\d+", kind)
        item = ITEM_BYTES.get(kind) or max(int(digits[0]) // 8, 1)
        total += item * math.prod(_numbers(dimensions))
    return total


def _numbers(text: str | None) -> list[int]:
    return [int(x) for x in text.split(",") if x] if text else []
