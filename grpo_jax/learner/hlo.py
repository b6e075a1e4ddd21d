"""What a compiled program does, read from XLA's text of it: FLOPs, collectives, kernels, copies.

`cost_analysis` of XLA counts the body of a loop once: of scanned layers, one. Here a loop counts as often
as it runs.
"""

import collections
import dataclasses
import functools
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN_SLICES = "transfer between slices"
"""Of TPUs, by their hosts' network: what stands for a collective of several slices beside one within each."""
PAIRED = ("all-gather-start", "all-to-all-start", "collective-permute-start", "reduce-scatter-start", "send")
"""Instructions whose results hold their operands."""
ITEM_BYTES = {"bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
"""Others of more than one byte have four."""
ONE_BYTE = ("pred", "s8", "u8", "f8", "s4", "u4")
KERNELS = ("tpu_custom_call", "__cudnn$fmha", "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
"""Targets of custom calls that compute attention. Other calls are the compiler's own, or products."""
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
CALLEES = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)|_computations=\{([^}]*)\}")
NO_LOOPS = re.compile(r"known_trip_count\W+n\W+(\d+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective, or of copy, in a whole run of a program on one device."""

    count: int = 0
    num_bytes: int = 0
    """Of all arrays that each reads, or of those that it writes, whichever are larger."""

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.count + other.count, self.num_bytes + other.num_bytes)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one run of a program on one device."""

    flops: float
    """Of matrix products. What kernels compute is not known."""
    traffic: dict[str, Traffic]
    """Collective, "copy" (an array written in another layout), or `BETWEEN_SLICES` -> how many, and how large."""
    kernels: dict[str, int]
    """Target of an attention kernel's custom call -> how often the program's text has it."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shape: str
    opcode: str
    rest: str
    """Operands and attributes."""

    @property
    def num_bytes(self) -> int:
        """Of its result: of all arrays, or of the largest where operands are among them."""
        sizes = [_bytes(kind, dims) for kind, dims in ARRAY.findall(self.shape)]
        return max(sizes, default=0) if self.opcode in PAIRED else sum(sizes)

    @property
    def traffic(self) -> str:
        """A key of `Facts.traffic`; "": it moves nothing."""
        if self.opcode == "send" and "xla_megascale_runtime" in self.rest:
            return BETWEEN_SLICES
        # "copy-start" fetches into a nearer memory ahead of use: no copy in another layout.
        name = self.opcode.removesuffix("-start")
        return name if name in COLLECTIVES or self.opcode == "copy" else ""

    @property
    def dims(self) -> list[int]:
        """Of its result, an array."""
        found = ARRAY.search(self.shape)
        return _dims(found[2]) if found else []

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    @property
    def number(self) -> int:
        """Of a constant, a whole number."""
        return int(self.rest.partition(")")[0])

    def attribute(self, name: str) -> str:
        found = re.search(rf"\b{name}=([^\s,}}]+)", self.rest)
        return found[1] if found else ""


def read_facts(text: str) -> Facts:
    """Args: text: of `jax.stages.Compiled.as_text`."""
    entry, computations = _parse(text)
    reader = _Reader(computations)
    traffic: dict[str, Traffic] = collections.defaultdict(Traffic)
    for (opcode, _), one in reader.traffic(entry).items():
        traffic[opcode] += one
    targets = re.findall(r'custom_call_target="([^"]*)"', text)
    kernels = collections.Counter(target for target in targets if target.startswith(KERNELS))
    return Facts(reader.flops(entry), dict(sorted(traffic.items())), dict(kernels))


def _parse(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the first computation that is run, and the instructions of all."""
    entry, now = "", ""
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            now = head[2]
            computations[now] = []
            entry = now if head[1] else entry
        elif now and (found := INSTRUCTION.match(line)):
            computations[now].append(Instruction(*found.groups()))
    return entry, computations


class _Reader:
    """Sums over a computation and those that it calls."""

    def __init__(self, computations: dict[str, list[Instruction]]):
        self._computations = computations
        self.flops = functools.cache(self._flops)
        self.traffic = functools.cache(self._traffic)

    def _called(self, one: Instruction) -> list[tuple[str, int]]:
        """The computations that an instruction runs, and how often."""
        names = [a or b for a, b in CALLEES.findall(one.rest)]
        times = self._num_loops(one) if one.opcode == "while" else 1
        split = [name.strip(" %") for names_ in names for name in names_.split(",")]
        return [(name, times) for name in split if name in self._computations]

    def _num_loops(self, one: Instruction) -> int:
        if told := NO_LOOPS.search(one.rest):
            return int(told[1])
        # TPU programs do not tell it: a counter from 0 is compared to a constant. Others run until data say so.
        condition = self._by_name(one.attribute("condition"))
        body = self._by_name(one.attribute("body"))
        compared = list(condition.values())[-1:]
        if not compared or compared[0].opcode != "compare" or "direction=LT" not in compared[0].rest:
            return 1
        counter, limit = (condition[name] for name in compared[0].operands)
        root = list(body.values())[-1]
        added = body.get(root.operands[int(counter.attribute("index") or 0)])
        steps = (
            [body[name] for name in added.operands if name in body] if added and added.opcode == "add" else []
        )
        step = next((constant.number for constant in steps if constant.opcode == "constant"), 1)
        return -(-limit.number // step) if limit.opcode == "constant" else 1

    def _by_name(self, name: str) -> dict[str, Instruction]:
        return {one.name: one for one in self._computations.get(name.strip("%"), [])}

    def _flops(self, name: str) -> float:
        shapes = {one.name: one.dims for one in self._computations[name]}
        total = 0.0
        for one in self._computations[name]:
            if one.opcode in FLOPS:
                operands = [shapes[operand] for operand in one.operands[:2]]
                total += FLOPS[one.opcode](one, *operands)
            total += sum(times * self.flops(callee) for callee, times in self._called(one))
        return total

    def _traffic(self, name: str) -> dict[tuple[str, str], Traffic]:
        """By kind, and by channel and source.

        Several of one channel are several where they stand side by side. Beneath one another, as in two fusions or
        in and before a loop, they are pieces of one.
        """
        sizes = {one.name: one.num_bytes for one in self._computations[name]}
        found: dict[tuple[str, str], Traffic] = collections.defaultdict(Traffic)
        for one in self._computations[name]:
            if one.traffic:
                most = max(one.num_bytes, sum(sizes.get(operand, 0) for operand in one.operands))
                # What was written as two collectives may have one channel.
                channel = one.attribute("channel_id")
                found[one.traffic, channel and f"{channel} {one.attribute('op_name')}"] += Traffic(1, most)
        for one in self._computations[name]:
            for callee, times in self._called(one):
                for key, inner in self.traffic(callee).items():
                    traffic, known = Traffic(times * inner.count, times * inner.num_bytes), found[key]
                    # The first piece is outside of inner loops.
                    is_piece = key[1] and known.count
                    found[key] = min(known, traffic, key=lambda x: x.count) if is_piece else known + traffic
        return found


def _dot_flops(one: Instruction, left: list[int], _: list[int]) -> float:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    return 2.0 * math.prod(one.dims) * math.prod(left[d] for d in _dims(contracted[1] if contracted else ""))


def _convolution_flops(one: Instruction, left: list[int], right: list[int]) -> float:
    """TPUs compute every product as a convolution; its window may reach over padding, which is not computed."""
    labels, _, out_labels = one.attribute("dim_labels").partition("->")
    left_labels, _, right_labels = labels.partition("_")
    flops = 2.0 * right[right_labels.index("i")]
    for label, size in zip(out_labels, one.dims, strict=True):
        if label.isdecimal():
            d = int(label)
            window = {key: values[d] for key, values in _window(one.rest).items() if d < len(values)}
            size = _valid(left[left_labels.index(label)], right[right_labels.index(label)], size, window)
        flops *= size
    return flops


FLOPS = {"dot": _dot_flops, "convolution": _convolution_flops}


def _window(rest: str) -> dict[str, list[int]]:
    """The window of a convolution by dimension: stride, low padding, dilations."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    pairs = (item.split("=") for item in (found[1].split() if found else []))
    return {key: [int(part.partition("_")[0]) for part in value.split("x")] for key, value in pairs}


def _valid(num_in: int, num_window: int, num_out: int, window: dict[str, int]) -> int:
    """Pairs of a place of the output and one of the window that meet an input, along one dimension."""
    stride, pad = window.get("stride", 1), window.get("pad", 0)
    spread, step = window.get("lhs_dilate", 1), window.get("rhs_dilate", 1)
    places = (o * stride + w * step - pad for o in range(num_out) for w in range(num_window))
    return sum(0 <= at <= (num_in - 1) * spread and at % spread == 0 for at in places)


def _dims(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]


def _bytes(kind: str, dims: str) -> int:
    item = 1 if kind.startswith(ONE_BYTE) else ITEM_BYTES.get(kind, 4)
    return item * math.prod(_dims(dims))
