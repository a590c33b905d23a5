"""What a check found, in numbers, in words and as a picture."""

import dataclasses
import textwrap
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ._plot import block_max, heat_map

_SHORT_MAP = 32
_SHOWN = 5


class Pair(NamedTuple):
    """`output` changed by `change` when `input` was edited, and it must not."""

    output: int
    input: int
    change: float


@dataclasses.dataclass(frozen=True)
class CausalityReport:
    """What a check found. `print(report)` says it in words.

    **Fields:**

    - `leak`: whether an output was seen to read an input that it must not read.
    - `status`: `"clear"`, not a bit changed; `"clear (float noise)"`, what changed is rounding;
        `"leak"`; `"undecided"`, outputs changed that must not, and nothing tells by what; or
        `"proved"`, where that was asked for: they cannot change. `assert_causal` raises on
        `"leak"` and `"undecided"`.
    - `matrix`: `matrix[t, j]` is the largest absolute change of output `t` when input `j` alone
        was edited, over all edits tried; NaN where that was not measured. A check that finds
        nothing has no need to edit inputs one by one: then a forbidden pair that the edits
        covered has 0, and the rest NaN, as have outputs that are undecided.
        `dependency_matrix` measures every pair. A change that was taken for rounding is 0 in a
        forbidden cell.
    - `allowed`: `allowed[t, j]` says whether output `t` may read input `j`.
    - `worst`: the largest change of an output that should not have changed, relative to its
        noise level, as an absolute number. 0 where there was none.
    - `scale`: the largest magnitude of the output during the edit that gave `worst`.
    - `noise`: the noise level there, `noise_ulps * eps * scale`, with the eps of the least
        precise dtype found in the function, float8 and float4 aside. Where float64 can be
        asked, it decides on either side of that.
    - `splits`: the splits (or the examples kept) that were tried.
    - `possible_splits`: how many there are.
    - `edits`: how many edited inputs were run to find out.
    - `joint`: the leak shows only where several inputs are edited together. Then `matrix` holds,
        for every such output, one entry: in the column of the last split that still changes it.
    - `notes`: remarks, in sentences.
    - `kind`: `"causal"`, `"strictly causal"` or `"independent"`.
    - `assumptions`: what a proof takes for granted beside finite numbers, in sentences.
    - `obstacles`: what stood in the way of a proof that was asked for: each operation, the line
        that traced to it, and the outputs that it connects.
    """

    leak: bool
    status: str
    matrix: Float[np.ndarray, "T_out T_in"]
    allowed: Bool[np.ndarray, "T_out T_in"]
    worst: float
    scale: float
    noise: float
    splits: tuple[int, ...]
    possible_splits: int
    edits: int
    joint: bool
    notes: tuple[str, ...]
    kind: str
    assumptions: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()

    def pairs(self) -> list[Pair]:
        """The leaking (output, input, change) triples, the largest change first."""
        found = np.argwhere(self.leaking())
        pairs = [Pair(int(t), int(j), float(self.matrix[t, j])) for t, j in found]
        return sorted(pairs, key=lambda pair: -pair.change)

    def heatmap(self, width: int = 64) -> str:
        """The matrix as characters: a row for every output, a column for every input.

        Above `width` positions a character stands for a block, and shows the worst of it.
        """
        block = -(-len(self.allowed) // width)
        cells = np.select(
            [np.isnan(self.matrix), self.matrix == 0, self.allowed], [0, 1, 2], default=3
        )
        cells = block_max(cells, block)
        rows = ["".join("-.oX"[cell] for cell in row) for row in cells]
        digits = len(str(len(self.allowed) - 1))
        lines = [f"  {t * block:>{digits}}  {row}" for t, row in enumerate(rows)]
        words = ("- not measured", ". no effect", "o reads it, and may", "X reads it, and must not")
        legend = ", ".join(words[cell] for cell in (3, 2, 1, 0) if (cells == cell).any())
        each = f", a character for {block} positions" if block > 1 else ""
        return "\n".join([f"  output by input{each}: {legend}", *lines])

    def plot(self, ax=None):
        """Draws the matrix as a heat map and returns the matplotlib axes.

        **Arguments:**

        - `ax`: the matplotlib axes to draw on; by default a new figure.

        Needs matplotlib: `pip install "eqx-norms[plot]"`.
        """
        noun = "example" if self.kind == "independent" else "position"
        return heat_map(self.matrix, self.allowed, title=_title(self), noun=noun, ax=ax)

    def __str__(self) -> str:
        others = {"proved": _proved_lines, "leak": _leak_lines, "undecided": _undecided_lines}
        return "\n".join(others.get(self.status, _clear_lines)(self))

    def leaking(self) -> Bool[np.ndarray, "T_out T_in"]:
        """Where `matrix` has a leak."""
        return ~self.allowed & (self.matrix > 0)


_READS = {
    "causal": "an output reads a later position",
    "strictly causal": "an output reads its own or a later position",
    "independent": "an output reads another example",
}
_READS_NOT = {
    "causal": "no output reads a later position",
    "strictly causal": "no output reads its own or a later position",
    "independent": "no output reads another example",
}

_UNDECIDED = (
    "What can decide: float64 (confirm_x64=True, the default), on an fn without callbacks and "
    "kernels or with plain JAX forms of them; smaller scales=, such as (1.,), which round less; or "
    "size alone, by confirm_x64=False, which takes changes below the noise level for rounding, "
    "and noise_ulps=, which moves that level."
)


def _proved_lines(report: CausalityReport) -> list[str]:
    scope = (
        "For every finite input of this shape, any finite values of the floating-point parameters, "
        "and as long as no intermediate result overflows."
    )
    return [
        f"proved: {_READS_NOT[report.kind]}.",
        *map(_wrap, [scope, *report.assumptions]),
    ]


def _unproved(report: CausalityReport) -> list[str]:
    return [f"Not proved: {obstacle}" for obstacle in report.obstacles]


def _clear_lines(report: CausalityReport) -> list[str]:
    lines = [f"{report.status}: {_READS_NOT[report.kind]}, as far as the edits can tell."]
    if report.worst > 0:
        lines.append(
            f"Largest change {report.worst:.2g}, rounding: outputs are of size "
            f"{report.scale:.2g}, noise is up to {report.noise:.2g}."
        )
    return [*lines, _effort(report), *map(_wrap, [*report.notes, *_unproved(report)])]


def _undecided_lines(report: CausalityReport) -> list[str]:
    return [
        f"undecided: {_READS[report.kind]}, or what changed is rounding; nothing tells which.",
        f"Largest change {report.worst:.2g}: outputs are of size {report.scale:.2g}, the noise "
        f"level is {report.noise:.2g}.",
        *map(_wrap, [*report.notes, *_unproved(report), _UNDECIDED]),
        _effort(report),
    ]


def _leak_lines(report: CausalityReport) -> list[str]:
    pairs = report.pairs()
    lines = [f"leak: {_READS[report.kind]}."]
    if report.joint:
        lines.append(
            "No input does it alone: only edits of several inputs together change these outputs "
            "(a capacity, a count or a threshold?)."
        )
        rows = [f"  output {t} <- input {j} and later   {c:.2g}" for t, j, c in pairs[:_SHOWN]]
    else:
        measured = int((~report.allowed & ~np.isnan(report.matrix)).sum())
        lines.append(f"{len(pairs)} of {measured} forbidden pairs, the largest change first:")
        rows = [f"  output {t} <- input {j}   {change:.2g}" for t, j, change in pairs[:_SHOWN]]
    more = len(pairs) - _SHOWN
    rows += [f"  and {more} more: report.pairs()"] if more > 0 else []
    size = f"Outputs are of size {report.scale:.2g}; rounding would be up to {report.noise:.2g}."
    words = [*suggestion(report), _effort(report), size, *report.notes]
    return [*lines, *rows, report.heatmap(_SHORT_MAP), *map(_wrap, words)]


def suggestion(report: CausalityReport) -> list[str]:
    """What to look at, where the pattern of the leaking pairs tells."""
    measured = ~report.allowed & ~np.isnan(report.matrix)
    leaking = report.leaking()
    if report.joint or not leaking.any():
        return []
    ahead = np.subtract.outer(*[-np.arange(len(leaking))] * 2)
    steps = np.unique(ahead[leaking])
    if len(steps) == 1 and leaking.sum() > max(2, (measured & (ahead == steps[0])).sum() / 2):
        return [_one_step(int(steps[0]), report.kind)]
    changes = report.matrix[measured]
    if (changes > 0).mean() < 0.9 or np.median(changes) < 0.01 * changes.max():
        return []
    if report.kind == "independent":
        return [
            "All pairs leak alike: look for statistics over the batch (a norm over its axis, "
            "BatchNorm in training) or a layer that lacks its jax.vmap over examples."
        ]
    return [
        "All pairs leak alike: look for a norm, mean or softmax over the sequence axis, a layer "
        "that lacks its jax.vmap over positions, or a missing mask."
    ]


def _one_step(step: int, kind: str) -> str:
    if step == 0:
        return (
            "Every leak is of the output's own input: look for inputs that are not shifted by one, "
            "or for a mask that lets the diagonal through."
        )
    if kind == "independent":
        where = f"{abs(step)} {'later' if step > 0 else 'earlier'}"
        return f"Every leak reaches the example {where}: look for a roll or a shift of the batch."
    return f"Every leak reaches {step} ahead: look for a mask or a shift off by {step}."


def _title(report: CausalityReport) -> str:
    """Of the heat map."""
    if not report.leak:
        return report.status + " (grey: not measured)" * bool(np.isnan(report.matrix).any())
    count = len(report.pairs())
    pairs = "pair" if count == 1 else "pairs"
    return f"leak: {count} forbidden {pairs} (red)"


def _effort(report: CausalityReport) -> str:
    what = "examples kept" if report.kind == "independent" else "splits"
    return (
        f"Tried {len(report.splits)} of {report.possible_splits} {what} with {report.edits} "
        "edited inputs."
    )


def _wrap(sentence: str) -> str:
    return textwrap.fill(sentence, 92)
