"""What positions are called: numbers, tuples of numbers along several axes, and labels."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .._real import Integer
from ._inputs import Axes, Problem, place

# A sequence for all positions, or one nested as the axes are; a text is one of letters.
Labels = Iterable[Any] | None


@dataclasses.dataclass(frozen=True)
class Positions:
    """How many positions there are along each axis, and what else to call them, in C order.

    `axis` is the axis of the array, or the axes, as the caller named them.
    """

    lengths: tuple[int, ...]
    labels: tuple[str, ...] | None = None
    axis: Axes = 0

    def __str__(self) -> str:
        lengths = " x ".join(map(str, self.lengths))
        return f"{'axes' if len(self.lengths) > 1 else 'axis'} {self.axis}, {lengths} positions"

    def index(self, number: Integer) -> int | tuple[int, ...]:
        """The number of a position, along several axes a tuple."""
        return place(number, self.lengths)

    def name(self, number: Integer) -> str:
        """The number and the label, as in `3` or `(0, 3) 'n'`."""
        label = f" {self.labels[number]!r}" if self.labels else ""
        return f"{self.index(number)}{label}"

    def mark(self, number: Integer) -> str:
        """The label, or the number if there is none: for the margin of a picture."""
        return self.labels[number] if self.labels else str(self.index(number))


def make_positions(
    problem: Problem, labels: Labels, out_labels: Labels
) -> tuple[Positions, Positions]:
    """Those of the output and of the input. Labels are for both if there are as many of one."""
    names = _flat("labels", labels, problem.in_lengths)
    inputs = Positions(problem.in_lengths, names, problem.axis)
    if out_labels is not None or problem.out_length != problem.length:
        names = _flat("out_labels", out_labels, problem.out_lengths)
    return Positions(problem.out_lengths, names, problem.out_axis), inputs


def _flat(name: str, labels: Labels, lengths: Sequence[int]) -> tuple[str, ...] | None:
    if labels is None:
        return None
    flat, count = list(labels), math.prod(lengths)
    for _ in lengths[1:]:
        if len(flat) < count:
            flat = [label for row in flat for label in row]
    if len(flat) != count:
        where = f", {lengths}" if len(lengths) > 1 else ""
        raise ValueError(f"{name} must name the {count} positions{where}, got {len(flat)} labels")
    # A line end would break the lines of a report.
    shown = lambda letter: letter if letter.isprintable() else "·"
    return tuple("".join(map(shown, str(label))) for label in flat)
