"""What a compiled program costs, read from its text.

A kernel is an instruction that is not a mere name for something: its bytes are those of the arrays
that it reads, each once, and of what it writes. An array of which it takes a slice, or into which
it puts one in place, counts as much as the slice; what is in a loop, as often as the loop turns.
"""

import math
import re
from typing import NamedTuple

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier",
}  # fmt: skip
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """`%name = shape opcode(inside), rest`; `operands` are the names inside."""

    root: bool
    name: str
    shape: str
    opcode: str
    inside: str
    operands: list[str]
    rest: str

    def calls(self, key: str) -> str | None:
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return found and found.group(1)


class Cost(NamedTuple):
    """Of a part of a program."""

    kernels: int = 0
    bytes: int = 0
    cycles: int = 0

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        return Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


class Program:
    """The text of a compiled program, as computations: lists of instructions."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        for line in text.splitlines():
            if head := _HEAD.match(line):
                instructions = self.computations[head.group(2)] = {}
                if head.group(1):
                    self.entry = head.group(2)
            elif found := _INSTRUCTION.match(line):
                root, name, shape, opcode, rest = found.groups()
                inside, rest = _up_to_closing(rest)
                names = [o for o in re.findall(r"[\w.\-]+", inside) if o in instructions]
                instructions[name] = Instruction(
                    bool(root), name, shape, opcode, inside, names, rest
                )

    def cost(self, computation: str | None = None) -> Cost:
        """Of one computation, and of all that it calls; by default of the whole program."""
        total = Cost()
        for one in self.computations[computation or self.entry].values():
            if one.opcode == "while":
                body = self.cost(one.calls("body")).plus(self.cost(one.calls("condition")))
                total = total.plus(body, times=self._turns(one))
            elif one.opcode == "call":
                total = total.plus(self.cost(one.calls("to_apply")))
            elif one.opcode not in FREE and not one.opcode.endswith("-done"):
                total = total.plus(
                    Cost(1, self._bytes(computation or self.entry, one), _cycles(one))
                )
        return total

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Of each kind that there is, how many and the bytes of their results."""
        found: dict[str, tuple[int, int]] = {}
        for computation in self.computations.values():
            for one in computation.values():
                kind = one.opcode.removesuffix("-done")  # What is begun names its operands too.
                if kind in COLLECTIVES:
                    count, size = found.get(kind, (0, 0))
                    found[kind] = count + 1, size + nbytes(one.shape)
        return found

    def _turns(self, loop: Instruction) -> int:
        """How often a loop turns: as XLA says, or as its condition does."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(known.group(1))
        condition = self.computations[loop.calls("condition")]
        limits = [int(o.inside) for o in condition.values() if o.opcode == "constant"]
        if len(limits) != 1:
            raise ValueError(f"It does not say how often {loop.name} turns.")
        return limits[0]

    def _bytes(self, computation: str, one: Instruction) -> int:
        operands = [self.computations[computation][name] for name in one.operands]
        if one.opcode in ("dynamic-slice", "slice"):
            return 2 * nbytes(one.shape)
        if one.opcode == "dynamic-update-slice":
            return 2 * nbytes(operands[1].shape)
        inside = self.computations.get(one.calls("calls") or "", {})
        if one.opcode not in ("fusion", "fusion-start") or not inside:
            return nbytes(one.shape) + sum(nbytes(o.shape) for o in operands)
        arrays = [_origin(self.computations[computation], name) for name in one.operands]
        read = dict.fromkeys(arrays, 0)
        for parameter in inside.values():
            if parameter.opcode == "parameter":
                read[arrays[int(parameter.inside)]] += _read(inside, parameter)
        whole = {array: nbytes(o.shape) for array, o in zip(arrays, operands, strict=True)}
        return _written(inside) + sum(min(size, whole[array]) for array, size in read.items())


def _up_to_closing(text: str) -> tuple[str, str]:
    """What stands before the parenthesis that closes one opened before `text`, and after it."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:i], text[i + 1 :]
    return text, ""


def nbytes(shape: str) -> int:
    """Of an array or a tuple: `(f32[8,4]{1,0}, pred[])` are 129."""
    return sum(
        math.ceil(math.prod(int(n) for n in sizes.split(",") if n) * int(bits or 8) / 8)
        for _, bits, sizes in _ARRAY.findall(shape)
    )


def _cycles(one: Instruction) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
    return int(found.group(1)) if found else 0


def _read(inside: dict[str, Instruction], source: Instruction) -> int:
    """Of a parameter of a fusion."""
    users = _users(inside, source)
    whole = [u for u in users if _origin(inside, u.operands[0]) != source.name]
    if not whole and all(u.opcode in ("dynamic-slice", "slice") for u in users):
        return sum(nbytes(u.shape) for u in users)
    if not whole and all(u.opcode == "dynamic-update-slice" for u in users):
        return 0
    return nbytes(source.shape)


def _users(inside: dict[str, Instruction], source: Instruction) -> list[Instruction]:
    """Who reads it, through what only gives it another name."""
    users = []
    for one in inside.values():
        if source.name in one.operands:
            users += _users(inside, one) if one.opcode == "bitcast" else [one]
    return users


def _origin(inside: dict[str, Instruction], name: str) -> str:
    """What a name stands for, behind bitcasts and tuples that are made to be taken apart."""
    one = inside[name]
    if one.opcode in ("bitcast", "opt-barrier"):
        return _origin(inside, one.operands[0])
    if one.opcode == "get-tuple-element":
        whole = inside[_origin(inside, one.operands[0])]
        if whole.opcode == "tuple":
            index = re.search(r"\bindex=(\d+)", one.rest).group(1)
            return _origin(inside, whole.operands[int(index)])
    return name


def _written(inside: dict[str, Instruction]) -> int:
    """By a fusion: its root, or the parts of a tuple."""
    (root,) = (one for one in inside.values() if one.root)
    names = root.operands if root.opcode == "tuple" else [root.name]
    written = [inside[_origin(inside, name)] for name in names]
    return sum(
        nbytes(inside[one.operands[1]].shape if one.opcode == "dynamic-update-slice" else one.shape)
        for one in written
    )
