"""What a comparison of two functions found, in numbers and in words."""

import dataclasses
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import PyTree

from ._compare import Verdict, gap

Number = bool | int | float | complex


@dataclasses.dataclass(frozen=True)
class SameReport:
    """What a comparison of two functions found. `print(report)` says it in words.

    **Fields:**

    - `status`: a string, one of these. `assert_same` raises on the last three.
        - `"same bits"`: all values are equal.
        - `"rounding"`: what differs is rounding.
        - `"imprecise"`: the two are the same in exact arithmetic, and one of them is off in its own
            precision.
        - `"different"`: the two differ by more than rounding.
        - `"undecided"`: the two differ, and nothing can tell why.
    - `leaf`: the path of the output array that the next fields are about. It is the array that
        shows the status best, and `""` if the output is one array. If all bits are the same, this
        and the next fields are None.
    - `index`: where in that array the two differ most.
    - `values`: the values of the first and the second function there, in their own precision.
    - `exact`: the same values in float64, or None if they were not computed.
    - `position`: the first position along `axis` at which entries of `leaf` differ, by more than
        rounding if that is the status. None if `leaf` has no such axis.
    - `difference`: how far apart the two are at `index`, in float64 if that decided.
    - `limit`: how far rounding may take them there, as far as it was measured.
    - `x`: the input at which they differ so.
    - `seen`: the numbers of all inputs at which the status shows, 0 for the `x` that was given.
    - `inputs`: how many inputs were run.
    - `ulps`: the largest difference of floats in their own precision, over all inputs and arrays,
        in eps of `dtype` times the largest magnitude that differs.
    - `ulps64`: the same in float64, in eps of float64, or None if it was not computed.
    - `dtype`: the name of the least precise float in the two functions, except float8 and float4.
    - `axis`: as it was given.
    - `notes`: remarks, in sentences.
    """

    status: str
    leaf: str | None
    index: tuple[int, ...] | None
    values: tuple[Number, Number] | None
    exact: tuple[Number, Number] | None
    position: int | None
    difference: float
    limit: float
    x: PyTree
    seen: tuple[int, ...]
    inputs: int
    ulps: float
    ulps64: float | None
    dtype: str
    axis: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        edits = self.inputs - 1
        tried = f"x and {edits} edit{'s' * (edits > 1)} of it" if edits else "x alone"
        says = _SAYS[self.status].format(dtype=self.dtype)
        lines = [f"{self.status}: the two functions {says}, tried on {tried}."]
        if self.status != "same bits":
            lines += [_entry(self), *_how_far(self)]
        if self.status in ("different", "imprecise", "undecided"):
            lines += [*_position(self), _seen(self)]
        return "\n".join(textwrap.fill(line, 92) for line in [*lines, *self.notes])


_SAYS = {
    "same bits": "give equal values",
    "rounding": "are the same up to rounding",
    "different": "differ by more than rounding",
    "imprecise": "are the same in exact arithmetic, and different in {dtype}",
    "undecided": "differ, and nothing tells whether that is rounding",
}


def make_report(
    verdict: Verdict, dtype: str, inputs: Sequence[PyTree], outputs: Sequence[str], axis: int
) -> SameReport:
    """The report of a verdict on `inputs`; `outputs` are the paths of the output's arrays."""
    own, exact = verdict.own, verdict.exact
    report = SameReport(
        status=verdict.status,
        leaf=None,
        index=None,
        values=None,
        exact=None,
        position=None,
        difference=0.0,
        limit=0.0,
        x=inputs[0],
        seen=tuple(map(int, np.flatnonzero(verdict.where.any(1)))),
        inputs=len(inputs),
        ulps=own.ulps,
        ulps64=None if exact is None else exact.ulps,
        dtype=dtype,
        axis=axis,
        notes=tuple(verdict.notes),
    )
    if verdict.status == "same bits":
        return report
    judged = verdict.judged
    row, leaf = _worst(verdict)
    limit = float(judged.limit[row, leaf])
    apart = gap(judged.one[row][leaf], judged.two[row][leaf])
    index = tuple(map(int, np.unravel_index(apart.argmax(), apart.shape)))
    at = lambda runs: (runs.one[row][leaf][index].item(), runs.two[row][leaf][index].item())
    return dataclasses.replace(
        report,
        leaf=outputs[leaf],
        index=index,
        values=at(own),
        exact=None if exact is None else at(exact),
        position=_first(apart > (limit if verdict.where[row, leaf] else 0), axis),
        difference=float(apart[index]),
        limit=limit,
        x=inputs[row],
    )


def _worst(verdict: Verdict) -> tuple[int, int]:
    """The input and the array in which most speaks for the status; `x` itself if it does at all."""
    size, limit = verdict.judged.gaps.size, verdict.judged.limit
    where = verdict.where if verdict.where.any() else size > 0
    with np.errstate(divide="ignore", invalid="ignore"):  # by 0, of integers; 0 / 0 is not asked
        excess = np.where(where, size / limit, -1)
    row = 0 if where[0].any() else int(excess.max(1).argmax())
    return row, int(excess[row].argmax())


def _first(differs: np.ndarray, axis: int) -> int | None:
    if not -differs.ndim <= axis < differs.ndim:
        return None
    others = tuple(i for i in range(differs.ndim) if i != axis % differs.ndim)
    return int(differs.any(others).argmax())


def _entry(report: SameReport) -> str:
    assert report.index is not None and report.values is not None
    name = f"Output {report.leaf!r}" if report.leaf else "Output"
    at = f"[{', '.join(map(str, report.index))}]" if report.index else ""
    own = _both(*report.values)
    wide = own if report.exact is None else _both(*report.exact)
    return f"{name}{at} is {own}" + (f", in float64 {wide}." if wide != own else ".")


def _both(one: Number, two: Number) -> str:
    """With as many digits as it takes to tell them apart."""
    for digits in (6, 9, 12, 17):
        texts = [str(v) if isinstance(v, int) else f"{v:.{digits}g}" for v in (one, two)]
        if texts[0] != texts[1]:
            break
    return " and ".join(texts)


def _how_far(report: SameReport) -> list[str]:
    if report.status in ("different", "imprecise"):
        if not np.isfinite(report.difference) or not report.limit:
            return []  # NaN, or integers
        wide = report.exact is not None and report.status == "different"
        limit = f"{report.limit:.2g}" + " in float64" * wide
        return [f"The difference is {report.difference:.2g}; rounding may be up to {limit}."]
    wide = "" if report.ulps64 is None else f"; in float64 {report.ulps64:.2g} eps of that"
    return [f"Largest difference: {report.ulps:.2g} eps of {report.dtype}{wide}."]


def _position(report: SameReport) -> list[str]:
    if report.position is None:
        return []
    return [f"The first that differ are at position {report.position} along axis {report.axis}."]


def _seen(report: SameReport) -> str:
    edits = sum(number > 0 for number in report.seen)
    given = ["x"] if 0 in report.seen else []
    return f"Seen at {' and '.join([*given, f'{edits} of {report.inputs - 1} edits'])}."
