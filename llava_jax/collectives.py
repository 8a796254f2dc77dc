"""What a compiled program sends between devices, read from its text."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "u64": 8, "f64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<rest>.*)")
_COLLECTIVE = re.compile(rf"(?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)|\b(?:called|branch)_computations=\{([^}]*)\}"
)
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?\s*\{([^}]*)\}"
)


class Collective(NamedTuple):
    """Equal collectives of a step: over which mesh axes, how often, and their bytes on one device.

    `num_bytes` is the whole array that a group holds together, all turns of loops added; `link_bytes` what one
    device must receive for it at the least: (n-1)/n of it for a gather or scatter among n, twice that for an
    all-reduce.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    num_bytes: int
    link_bytes: int


def read_collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled program's text (`compiled.as_text()`), the largest first.

    One in the body of a loop counts once per turn. TPUs cut one collective into fused pieces that share its
    channel; it counts once.

    Raises:
      ValueError: a loop around a collective does not say how often it turns.
    """
    computations, entry = _computations(text)
    found: dict[tuple[str, str], tuple[int, tuple[str, ...], int, int]] = {}
    for name, turns, is_fused in _turns(computations, entry):
        for line in computations[name]:
            instruction = _INSTRUCTION.match(line)
            match = instruction and _COLLECTIVE.match(instruction["rest"])
            if not instruction or not match:
                continue
            axes, group = _group(line, mesh_shape)
            if group == 1:
                continue
            if math.isnan(turns):
                raise ValueError(f"The loop around {instruction['name']} does not say how often it turns.")
            channel = re.search(r"channel_id=(\d+)", line)
            kind = match["kind"]
            size = _payload(kind, match["shape"], bool(match["start"]), group)
            if name.startswith("all-reduce-scatter"):
                # How TPUs write a reduce-scatter: a computation that reduces all and keeps a slice.
                kind = "reduce-scatter"
            key = (kind, f"channel {channel[1]}" if channel and is_fused else instruction["name"])
            found[key] = (int(turns), axes, size, group)
    sums: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
    for (kind, _), (turns, axes, size, group) in found.items():
        passes = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1.0}.get(kind, (group - 1) / group)
        sums.setdefault((kind, axes), np.zeros(3))
        sums[kind, axes] += turns * np.array([1, size, size * passes])
    collectives = [Collective(kind, axes, *(int(x) for x in values)) for (kind, axes), values in sums.items()]
    return sorted(collectives, key=lambda collective: -collective.link_bytes)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match:
            name = match["name"]
            computations[name] = []
            entry = name if match["entry"] else entry
        elif name and line.strip() != "}":
            computations[name].append(line)
    return computations, entry


def _turns(computations: Mapping[str, list[str]], entry: str) -> Iterator[tuple[str, float, bool]]:
    """Every computation that runs, how often (NaN if a loop around it does not say), and whether in a fusion."""
    waiting = [(entry, 1.0, False)]
    while waiting:
        name, turns, is_fused = waiting.pop()
        yield name, turns, is_fused
        for line in computations[name]:
            inner = turns * _trip_count(line, computations) if " while(" in line else turns
            for single, several in _CALLS.findall(line):
                for callee in [single] if single else re.findall(r"[\w.\-]+", several):
                    if callee in computations:
                        waiting.append((callee, inner, is_fused or " fusion(" in line))


def _trip_count(line: str, computations: Mapping[str, list[str]]) -> float:
    """Turns of a loop that counts from 0 up to a constant, as `lax.scan` and XLA itself make them; else NaN."""
    known = re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', line)
    if known:
        return float(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    text = "\n".join(computations.get(condition[1], [])) if condition else ""
    bounds, compared = _constants(text), re.search(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", text)
    counter = compared and re.search(rf"%?{re.escape(compared[1])} = .*get-tuple-element\(.*index=(\d+)", text)
    if not compared or not counter or compared[2] not in bounds:
        return math.nan
    body = re.search(r"body=%?([\w.\-]+)", line)
    step = _step("\n".join(computations[body[1]]) if body else "", int(counter[1]))
    return float(math.ceil(bounds[compared[2]] / step))


def _constants(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", text)}


def _step(body: str, index: int) -> int:
    """By how much a loop's counter, entry `index` of what it carries, grows: 2 where XLA has unrolled it once."""
    carried = re.search(r"ROOT .* tuple\((.*?)\)(?:,|$)", re.sub(r"/\*.*?\*/", "", body), re.MULTILINE)
    names = re.findall(r"%?([\w.\-]+)(?:, |$)", carried[1]) if carried else []
    added = index < len(names) and re.search(rf"%?{re.escape(names[index])} = \S+ add\(([^)]*)\)", body)
    constants = _constants(body)
    steps = [constants[word] for word in re.findall(r"[\w.\-]+", added[1]) if word in constants] if added else []
    return steps[0] if len(steps) == 1 else 1


def _payload(kind: str, shape: str, start: bool, group: int) -> int:
    """Bytes of the whole array; the text's shape is the result's, and an asynchronous start's has the operand first."""
    halves = _elements(shape)[:2]
    # (operands, results, contexts), but that TPUs start an all-reduce with its results alone.
    if start and (kind != "all-reduce" or halves[0].startswith("(")):
        return max(map(_num_bytes, halves))
    return _num_bytes(shape) * (group if kind == "reduce-scatter" else 1)


def _elements(shape: str) -> list[str]:
    """The shapes in a tuple's: of `((f32[2]{0}, f32[4]{0}), f32[8]{0})` a tuple's and an array's."""
    if not shape.startswith("("):
        return [shape]
    elements, depth = [""], 0
    for character in shape[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip() for element in elements]


def _num_bytes(shape: str) -> int:
    arrays = _ARRAY.findall(shape)
    return sum(math.prod(map(int, filter(None, dims.split(",")))) * BYTES.get(t, 4) for t, dims in arrays)


def _group(line: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The mesh axes along which the devices of a group differ, and how many those devices are."""
    members = np.array(_members(line, math.prod(mesh_shape.values())))
    places = np.unravel_index(members, tuple(mesh_shape.values()))
    axes = tuple(axis for axis, place in zip(mesh_shape, places, strict=True) if len(set(place.tolist())) > 1)
    return axes, len(members)


def _members(line: str, num_devices: int) -> list[int]:
    """The devices of the first group."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", line):
        moves = [_integers(pair) for pair in re.findall(r"\d+,\d+", pairs[1])]
        # A device may keep its own.
        return next((move for move in moves if move[0] != move[1]), moves[0][:1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return _integers(listed[1])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        devices = np.arange(num_devices).reshape(_integers(iota[2]))
        if iota[3]:
            devices = devices.transpose(_integers(iota[3]))
        return devices.reshape(_integers(iota[1]))[0].tolist()
    if named := _NAMED_GROUPS.search(line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        used = set(re.findall(r"'(\w+)'", named[4]))
        if set(re.sub(r"'\w+'", "", named[4])) <= set(", "):
            devices = np.arange(num_devices)
            if named[2]:
                devices = devices.reshape(_integers(named[2])).transpose(_integers(named[3]))
            devices = devices.reshape(tuple(sizes.values()))
            return devices[tuple(slice(None) if axis in used else 0 for axis in sizes)].ravel().tolist()
    if "replica_groups={}" in line:
        return list(range(num_devices))
    raise ValueError(f"The devices of a collective cannot be read from {line.strip()[:200]!r}.")


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]
