"""What a check found, in numbers, in words and as a picture."""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ._plot import block_max, heat_map
from ._positions import Positions
from ._suggest import of_the_rule, suggestions

_SHORT_MAP = 32
_SHOWN = 5


class Pair(NamedTuple):
    """`output` changed by `change` when `input` was edited.

    Positions are numbers, or tuples of numbers along several axes.
    """

    output: int | tuple[int, ...]
    input: int | tuple[int, ...]
    change: float


@dataclasses.dataclass(frozen=True)
class CausalityReport:
    """What a check found. `print(report)` says it in words.

    **Fields:**

    - `leak`: whether an output was seen to read an input that it must not read.
    - `blind`: whether an output did not read an input that it must read.
    - `status`: a string, one of these. `assert_causal` raises on `"leak"`, `"undecided"` and
        `"blind"`.
        - `"clear"`: not a bit changed.
        - `"clear (float noise)"`: what changed is rounding.
        - `"leak"`: an output reads an input that it must not read.
        - `"undecided"`: outputs changed that must not, and nothing can tell why.
        - `"blind"`: neither of these two, but some outputs that must change did not.
        - `"proved"`: outputs cannot change, if a proof was asked for.
    - `matrix`: `matrix[t, j]` is the largest absolute change of output `t` when input `j` alone
        was edited, over all edits tried. It is NaN where that was not measured. A check that finds
        nothing does not need to edit inputs one by one. Then a forbidden pair that the edits
        covered has 0, and the rest has NaN, like outputs that are undecided. A pair that a proof
        found unconnected has 0 too. `dependency_matrix` measures every pair. A change that was
        taken for rounding is 0 in a forbidden cell, and in a required cell if it was too small in
        float64 as well.
    - `allowed`: `allowed[t, j]` says whether output `t` may read input `j`.
    - `required`: `required[t, j]` says whether it must. It is None if that was not asked.
    - `worst`: the change, as an absolute number, of an output that should not have changed, where
        it is largest relative to its noise level. 0 if there was none.
    - `scale`: the largest magnitude of the output during the edit that gave `worst`.
    - `noise`: the noise level there, `noise_ulps * eps * scale`, with the eps of the least
        precise dtype found in the function, except float8 and float4. If the function can run in
        float64, that decides both above and below this level.
    - `splits`: the splits (or the examples kept) that were tried. For another rule, the first
        output of every distinct row of `allowed` that was tried.
    - `possible_splits`: how many there are. After a proof was tried, how many it leaves open.
    - `edits`: how many edited inputs were run to find out.
    - `joint`: the leak shows only if several inputs are edited together. Then `matrix` holds one
        entry for every such output, in the first forbidden column of the smallest edit that still
        changes it.
    - `notes`: remarks, in sentences.
    - `kind`: `"causal"`, `"strictly causal"`, `"independent"`, or `"reads"` for any other rule.
    - `outputs`, `inputs`: what the positions are called: `lengths` along the axes, and `labels`.
    - `assumptions`: what a proof takes for granted beside finite numbers, in sentences. What it
        says of scores was so on x and on every edit.
    - `obstacles`: what stood in the way of a proof that was asked for: each operation, the line
        that traced to it, and the outputs that it connects.
    - `pointwise`: no output was found to read another position, although some may, so the test
        shows nothing about a model that should. It is always `False` for `assert_independent`, and
        where `required` was asked.
    - `names`: the names of the arrays of `x` in which edits replaced something.
    - `arrays`: if `x` has several arrays, those that leak when they alone are edited, each with its
        part of `matrix`, for up to 32 of the inputs that leak.
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
    outputs: Positions
    inputs: Positions
    blind: bool = False
    required: Bool[np.ndarray, "T_out T_in"] | None = None
    assumptions: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()
    pointwise: bool = False
    names: tuple[str, ...] = ()
    arrays: Mapping[str, Float[np.ndarray, "T_out T_in"]] = dataclasses.field(default_factory=dict)

    def pairs(self) -> list[Pair]:
        """The leaking (output, input, change) triples, the largest change first."""
        return sorted(self._pairs(self.leaking()), key=lambda pair: -pair.change)

    def unread(self) -> list[Pair]:
        """The (output, input, 0) triples of what must be read and is not."""
        return self._pairs(self.missing())

    def _pairs(self, mask: Bool[np.ndarray, "T_out T_in"]) -> list[Pair]:
        named = lambda t, j: (self.outputs.index(t), self.inputs.index(j))
        return [Pair(*named(t, j), float(self.matrix[t, j])) for t, j in np.argwhere(mask)]

    def heatmap(self, width: int = 64) -> str:
        """The matrix as characters: a row for every output, a column for every input.

        Above `width` positions a character stands for a block, and shows the worst of it. Labels of
        one letter stand above the columns.
        """
        block = -(-max(self.matrix.shape) // width)
        cells = np.select(
            [self.leaking(), self.missing(), np.isnan(self.matrix), self.matrix == 0],
            [np.int8(4), np.int8(3), np.int8(0), np.int8(1)],
            default=np.int8(2),
        )
        cells = block_max(cells, block)
        rows = ["".join("-.o!X"[cell] for cell in row) for row in cells]
        marks = [self.outputs.mark(t * block) for t in range(len(rows))]
        letters = self.inputs.labels or ()
        if block == 1 and letters and all(len(letter) == 1 for letter in letters):
            rows, marks = ["".join(letters), *rows], ["", *marks]
        margin = max(map(len, marks))
        lines = [f"  {mark:>{margin}}  {row}" for mark, row in zip(marks, rows, strict=True)]
        words = ("- not measured", ". no effect", "o reads it, and may")
        words += ("! does not read it, and must", "X reads it, and must not")
        legend = ", ".join(words[cell] for cell in (4, 3, 2, 1, 0) if (cells == cell).any())
        each = f", a character for {block} positions" if block > 1 else ""
        return "\n".join([f"  output by input{each}: {legend}", *lines])

    def plot(self, ax=None):
        """Draws the matrix as a heat map and returns the matplotlib axes.

        **Arguments:**

        - `ax`: the matplotlib axes to draw on; by default a new figure.

        Needs matplotlib: `pip install "eqx-norms[plot]"`.
        """
        noun = "example" if self.kind == "independent" else "position"
        return heat_map(self, title=_title(self), noun=noun, ax=ax)

    def __str__(self) -> str:
        others = {
            "proved": _proved_lines,
            "leak": _leak_lines,
            "undecided": _undecided_lines,
            "blind": _blind_lines,
        }
        return "\n".join(others.get(self.status, _clear_lines)(self))

    def leaking(self) -> Bool[np.ndarray, "T_out T_in"]:
        """Where `matrix` has a leak."""
        return ~self.allowed & (self.matrix > 0)

    def missing(self) -> Bool[np.ndarray, "T_out T_in"]:
        """Where `matrix` has nothing, and must have."""
        if self.required is None:
            return np.zeros(self.allowed.shape, bool)
        return self.required & (self.matrix == 0)


_READS = {
    "causal": "an output reads a later position",
    "strictly causal": "an output reads its own or a later position",
    "independent": "an output reads another example",
    "reads": "an output reads an input that it must not",
}
_READS_NOT = {
    "causal": "no output reads a later position",
    "strictly causal": "no output reads its own or a later position",
    "independent": "no output reads another example",
    "reads": "no output reads an input that it must not",
}
_BLIND = "an output does not read an input that it must"

_UNDECIDED = (
    "What can decide: float64 (confirm_x64=True, the default), on an fn without callbacks and "
    "kernels or with plain JAX forms of them; smaller scales=, such as (1.,), which round less; or "
    "size alone, by confirm_x64=False, which takes changes below the noise level for rounding, "
    "and noise_ulps=, which moves that level."
)


def _proved_lines(report: CausalityReport) -> list[str]:
    scope = (
        "For every finite input of this shape and any finite values of the floating-point "
        "parameters, as long as no intermediate value becomes infinite or NaN (what the program "
        "makes of its own constants, such as a mask of -inf, aside)."
    )
    return [
        f"proved: {_READS_NOT[report.kind]}.",
        *map(_wrap, [scope, *report.assumptions]),
        _asked(report),
        *map(_wrap, report.notes),
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
    lines += [_asked(report), _effort(report)]
    return [*lines, *map(_wrap, [*report.notes, *_unproved(report)])]


def _undecided_lines(report: CausalityReport) -> list[str]:
    return [
        f"undecided: {_READS[report.kind]}, or what changed is rounding; nothing tells which.",
        _asked(report),
        f"Largest change {report.worst:.2g}: outputs are of size {report.scale:.2g}, the noise "
        f"level is {report.noise:.2g}.",
        *map(_wrap, [*report.notes, *_unproved(report), _UNDECIDED]),
        _effort(report),
        *_also_blind(report),
    ]


def _leak_lines(report: CausalityReport) -> list[str]:
    count = int(report.leaking().sum())
    lines = [f"leak: {_READS[report.kind]}.", _asked(report)]
    if report.joint:
        lines.append(
            "No input does it alone: only edits of several inputs together change these outputs "
            "(a capacity, a count or a threshold?)."
        )
    else:
        measured = int((~report.allowed & ~np.isnan(report.matrix)).sum())
        lines.append(f"{count} of {measured} forbidden pairs, the largest change first:")
    others = ""
    if report.joint:
        others = " and others" if report.kind in ("independent", "reads") else " and later"
    size = f"Outputs are of size {report.scale:.2g}; rounding would be up to {report.noise:.2g}."
    lines[1:1] = map(_wrap, of_the_rule(report))  # to be read first
    words = [*_by_array(report), *suggestions(report), _effort(report), size, *report.notes]
    rows = _rows(report, report.leaking(), "report.pairs()", others)
    also = _also_blind(report)
    return [*lines, *rows, *also, report.heatmap(_SHORT_MAP), *map(_wrap, words)]


def _by_array(report: CausalityReport) -> list[str]:
    """Which arrays of several leak, and what to do if one may be read at any time."""
    if len(report.names) < 2:
        return []
    told = lambda names: " and ".join(map(repr, names))
    leaking, others = [*report.arrays], [n for n in report.names if n not in report.arrays]
    if not leaking:
        return [f"No array leaks alone, only {told(others)} edited together."]
    if not others:
        return [f"Each array of x leaks when it alone is edited: {told(leaking)}."]
    leaks = "leaks" if len(leaking) == 1 else "leak"
    fixed = repr(leaking[0]) if len(leaking) == 1 else str(tuple(leaking))
    return [
        f"Only {told(leaking)} {leaks}; {told(others)} {'does' if len(others) == 1 else 'do'} not. "
        f"What may be read at every step, as a calendar may, is named as such: fixed={fixed}."
    ]


def _blind_lines(report: CausalityReport) -> list[str]:
    words = [*suggestions(report), *report.notes, *report.assumptions, *_unproved(report)]
    effort = [_effort(report)] if report.edits else []
    return [
        f"blind: {_BLIND}.",
        _asked(report),
        *_missing_rows(report),
        report.heatmap(_SHORT_MAP),
        *map(_wrap, [*words, *effort]),
    ]


def _also_blind(report: CausalityReport) -> list[str]:
    return [f"And blind: {_BLIND}.", *_missing_rows(report)] if report.blind else []


def _missing_rows(report: CausalityReport) -> list[str]:
    missing = report.missing()
    measured = int((report.required & ~np.isnan(report.matrix)).sum())
    return [
        f"{missing.sum()} of {measured} required pairs that were measured:",
        *_rows(report, missing, "report.unread()"),
    ]


def _rows(report: CausalityReport, mask: np.ndarray, method: str, others: str = "") -> list[str]:
    """The first of some pairs, those of the largest change."""
    pairs = np.argwhere(mask)
    changes = report.matrix[mask]
    first = np.argsort(-changes, kind="stable")[:_SHOWN]
    of = lambda t, j: [repr(name) for name, part in report.arrays.items() if part[t, j] > 0]
    rows = [
        f"  output {report.outputs.name(t)} <- input {report.inputs.name(j)}{others}"
        + (f" of {', '.join(of(t, j))}" if of(t, j) else "")
        + (f"   {change:.2g}" if change else "")
        for (t, j), change in zip(pairs[first], changes[first], strict=True)
    ]
    more = len(pairs) - _SHOWN
    return rows + ([f"  and {more} more: {method}"] if more > 0 else [])


def _title(report: CausalityReport) -> str:
    """Of the heat map."""
    found = [_counted(report.leaking(), "forbidden", "red")] if report.leak else []
    found += [_counted(report.missing(), "required", "yellow")] if report.blind else []
    if report.status in ("leak", "blind"):
        return f"{report.status}: {' and '.join(found)}"
    return report.status + " (grey: not measured)" * bool(np.isnan(report.matrix).any())


def _counted(mask: np.ndarray, which: str, colour: str) -> str:
    count = int(mask.sum())
    return f"{count} {which} {'pair' if count == 1 else 'pairs'} ({colour})"


def _asked(report: CausalityReport) -> str:
    inputs, outputs = str(report.inputs), str(report.outputs)
    return f"Asked of {inputs}" + (f"; output {outputs}." if outputs != inputs else ".")


def _effort(report: CausalityReport) -> str:
    what = {"independent": "examples kept", "reads": "distinct rows of the rule"}
    return (
        f"Tried {len(report.splits)} of {report.possible_splits} "
        f"{what.get(report.kind, 'splits')} with {report.edits} edited inputs."
    )


def _wrap(sentence: str) -> str:
    return textwrap.fill(sentence, 92)
