"""Collectives of a compiled program: how often each runs in a step, and how much a device receives."""

from __future__ import annotations

import math
import re
from typing import NamedTuple


class Traffic(NamedTuple):
    """A kind of collective: how often it runs in a step, and bytes that a device receives."""

    count: int
    bytes: float


_SHAPE = re.compile(r"(pred|[suf]\d+|bf16|f8\w+)\[([\d,]*)\]")
_COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"^(?:ROOT )?%?\S+ = (.*?) ({_COLLECTIVES})(-start)?\((.*)$")
BETWEEN_SLICES = "between slices"
# libtpu hands what goes over the data-center network to the host, under the name of the collective that wants it.
_FROM_HOST = re.compile(r"^(?:ROOT )?%?\S+ = (\(.*?\)) recv\(.*is_host_transfer=true")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?(%[^\s,}]+(?:, ?%[^\s,}]+)*)"
)
_TRIPS = re.compile(r'known_trip_count[^\d}]*"?(\d+)')


def traffic(hlo: str, devices: int) -> dict[str, Traffic]:
    """Collectives of a compiled program by kind, each as often as it runs; BETWEEN_SLICES is a kind of its own.

    A loop runs as often as the compiler says (`known_trip_count`), or as its condition's bound and its body's step say:
    loops count from 0, those of a scan in ones, a ring of partial products (libtpu's gather or scatter that hides
    behind the product) in twos. Bytes are those that a device receives: of n devices, (n - 1) / n of what a gather puts
    out or a scatter takes in, twice that for a reduction to all.

    Args:
      hlo: `compiled.as_text()`, the program of one device.
      devices: of the whole mesh, for collectives that name no groups.
    """
    computations, entry = _computations(hlo)
    # libtpu spreads an asynchronous collective over several fusions, some of them in the loop that hides it, all with
    # its channel; it runs as often as the rarest.
    by_channel: dict[str, tuple[str, int, float]] = {}
    from_host = Traffic(0, 0.0)
    for name, turns in _how_often(computations, entry).items():
        for line in computations[name]:
            if match := _FROM_HOST.match(line):
                arrays = match[1].replace("u32[]", "")
                from_host = Traffic(from_host.count + turns, from_host.bytes + turns * sum(_sizes(arrays)))
            if match := _COLLECTIVE.match(line):
                shape, kind, start, rest = match.groups()
                moved = _received(kind, shape, bool(start), _group_size(rest, devices))
                channel = re.search(r"channel_id=(\d+)", rest)
                key = channel[1] if channel else line
                if key not in by_channel or turns < by_channel[key][1]:
                    by_channel[key] = kind, turns, turns * moved
    found = {BETWEEN_SLICES: from_host} if from_host.count else {}
    for kind, turns, moved in by_channel.values():
        before = found.get(kind, Traffic(0, 0.0))
        found[kind] = Traffic(before.count + turns, before.bytes + moved)
    return found


def _received(kind: str, shape: str, start: bool, group: int) -> float:
    """Bytes that a device receives, by the shape that a collective puts out. The start of an asynchronous one puts out
    a tuple of its operands, its results and scalars that are signals."""
    size = sum(_sizes(shape.replace("u32[]", "") if start else shape))
    if kind == "collective-permute":
        return size / 2 if start else size
    if kind == "all-reduce":
        return 2 * size * (group - 1) / group
    if kind in ("all-gather", "reduce-scatter") and start:
        size *= group / (group + 1)  # a part and the whole
    elif kind == "reduce-scatter":
        size *= group  # a part
    return size * (group - 1) / group


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by name, and which is the program."""
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?(%?[^\s(]+) \(", line)):
            name = "%" + head[2].removeprefix("%")
            lines = computations[name] = []
            entry = name if head[1] else entry
        elif line.startswith("  "):
            lines.append(line.strip())
    return computations, entry


def _how_often(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs in a step. Callers stand after what they call."""
    times = dict.fromkeys(computations, 0)
    times[entry] = 1
    for name in reversed(computations):
        if not times[name]:
            continue
        for line in computations[name]:
            called = [callee for group in _CALLED.findall(line) for callee in re.split(r", ?", group)]
            turns = _trip_count(line, computations) if re.search(r"\bwhile\(", line) else 1
            for callee in called:
                times[callee] = times.get(callee, 0) + turns * times[name]
    return {name: count for name, count in times.items() if count}


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
    if stated := _TRIPS.search(line):
        return int(stated[1])
    called = dict(re.findall(r"(condition|body)=(%[^\s,]+)", line))
    if "condition" not in called:
        return 1
    condition = "\n".join(computations[called["condition"]])
    bounds, counter = (
        re.findall(r" constant\((\d+)\)", condition),
        re.search(r"get-tuple-element\(\S+\), index=(\d+)", condition),
    )
    if len(bounds) != 1:
        return 1
    step = _step(computations[called["body"]], int(counter[1])) if counter and "body" in called else 1
    return -(-int(bounds[0]) // step)


def _step(body: list[str], counter: int) -> int:
    """What a loop's body adds to its counter, which is that entry of the tuple that it puts out; 1 if it hides that."""
    defined = {match[1]: match[2] for line in body if (match := re.match(r"(?:ROOT )?(%\S+) = (.*)", line))}
    root = next((line for line in body if line.startswith("ROOT")), "")
    entries = re.findall(r"%[^\s,)]+", root.partition(" tuple(")[2].split(")")[0])
    added = re.search(r" add\(([^)]*)\)", defined.get(entries[counter], "")) if counter < len(entries) else None
    constants = [
        match[1]
        for name in (re.findall(r"%[^\s,]+", added[1]) if added else ())
        if (match := re.search(r" constant\((\d+)\)", defined.get(name, "")))
    ]
    return int(constants[0]) if len(constants) == 1 else 1


def _sizes(shape: str) -> list[float]:
    """Bytes of a shape, or of each of a tuple of them."""
    return [_width(dtype) * math.prod(map(int, filter(None, axes.split(",")))) for dtype, axes in _SHAPE.findall(shape)]


def _width(dtype: str) -> float:
    return 1 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) / 8  # type: ignore[index]


def _group_size(rest: str, devices: int) -> int:
    """Devices of one group: `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['axis_0'=2,'axis_1'=4] {'axis_1'}`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    return devices
