"""Leak or rounding: reads the measured changes and, where they are small, asks float64."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from .._real import Real
from ._edits import Edit
from ._inputs import Problem
from ._probe import Changes, Probe, make_probe
from ._widen import float_dtypes, opaque_parts, widen

# Rounding shrinks 5e8-fold from float32 to float64, a leak not at all.
_SHRINK = 1000.0
_EPS64 = float(np.finfo(np.float64).eps)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the watched outputs say, and the probe in which to look closer.

    `leaks[e, t]` says whether output `t` leaked under edit `e`, `moved[e, t]` whether it changed
    at all, and `size[e, t]` by how much.
    """

    status: str
    leaks: Bool[np.ndarray, "E T"]
    moved: Bool[np.ndarray, "E T"]
    size: Float[np.ndarray, "E T"]
    worst: float
    scale: float
    noise: float
    probe: Probe
    notes: tuple[str, ...]


def function_eps(problem: Problem) -> float:
    """The eps of the least precise float in the function, wherever it stands.

    A float32 model that multiplies in bfloat16 rounds as bfloat16 does.
    """
    dtypes = float_dtypes(problem.closed) or {np.dtype(np.float32)}
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def judge(
    problem: Problem,
    probe: Probe,
    edits: Sequence[Edit],
    watch: Bool[np.ndarray, "E T"],
    noise_ulps: Real,
    confirm_x64: bool,
) -> Verdict:
    """Measures `edits` and decides about the outputs that `watch` says must not change."""
    changes = probe.measure(edits)
    _require_sane_baseline(edits, changes, noise_ulps)
    broke, notes = _breakage(edits, changes, watch)
    notes += _dtype_notes(problem)
    confirmable = confirm_x64 and probe.eps > _EPS64
    leaks, faint = _sort(changes, watch, broke, noise_ulps, confirmable)
    if leaks.any():
        return _verdict("leak", leaks, leaks, changes, probe, notes, noise_ulps)
    if not faint.any():
        return _verdict("clear", leaks, leaks, changes, probe, notes, noise_ulps)
    if not confirm_x64:
        notes += ["Changes below the noise level were not re-run in float64 (confirm_x64=False)."]
    if confirmable:
        wide = widened(problem, probe)
        leaks, wide_changes, note = confirm(problem, wide, edits, watch, faint, changes, noise_ulps)
        notes += note
        if leaks.any():
            notes += [
                "The change is below the noise level of the function's own precision, but does "
                "not shrink in float64: it is a leak. The figures here are those of float64."
            ]
            return _verdict("leak", leaks, leaks, wide_changes, wide, notes, noise_ulps)
    return _verdict("clear (float noise)", leaks, faint, changes, probe, notes, noise_ulps)


def judge_singles(
    problem: Problem,
    probe: Probe,
    edits: Sequence[Edit],
    watch: Bool[np.ndarray, "E T"],
    noise_ulps: Real,
    confirm_x64: bool,
) -> Float[np.ndarray, "E T"]:
    """The sizes of the changes, with those of watched outputs that are mere rounding set to 0."""
    changes = probe.measure(edits, "locating the leak")
    broke, _ = _breakage(edits, changes, watch, blind_ok=True)
    confirmable = confirm_x64 and probe.eps > _EPS64
    leaks, faint = _sort(changes, watch, broke, noise_ulps, confirmable)
    size = np.where(watch & ~leaks, 0.0, np.where(leaks & broke, np.inf, changes.size))
    if faint.any() and confirmable:
        wide = widened(problem, probe)
        leaks, changes, _ = confirm(problem, wide, edits, watch, faint, changes, noise_ulps)
        size = np.where(leaks, changes.size, size)
    return size


def _sort(changes: Changes, watch, broke, noise_ulps: Real, confirmable: bool):
    """Which watched changes are leaks, and which are yet to be told from rounding or overflow."""
    leaks = watch & (changes.ulps > noise_ulps)
    faint = watch & ~leaks & (changes.ulps > 0)
    return (leaks, faint | (broke & ~leaks)) if confirmable else (leaks | broke, faint & ~broke)


def widened(problem: Problem, probe: Probe) -> Probe:
    """The same probe in float64."""
    fn = widen(problem.closed)
    return make_probe(fn, probe.editor, probe.out_axes, _EPS64, probe.batch_size, wide=True)


def confirm(
    problem: Problem,
    wide: Probe,
    edits: Sequence[Edit],
    watch: Bool[np.ndarray, "E T"],
    faint: Bool[np.ndarray, "E T"],
    changes: Changes,
    noise_ulps: Real,
) -> tuple[Bool[np.ndarray, "E T"], Changes, list[str]]:
    """Which of the `faint` changes float64 shows to be leaks, and what it measured."""
    none = np.zeros_like(faint)
    rows = np.flatnonzero(faint.any(1)).tolist()
    try:
        found = wide.measure([edits[0], *(edits[row] for row in rows)], "float64 re-run")
    except Exception as error:  # an operation without a float64 form may raise what it likes
        reason = str(error).split("\n")[0]
        return none, changes, [f"The float64 re-run failed ({type(error).__name__}: {reason})."]
    wide_changes = Changes(*(_scatter(values[1:], rows, len(edits)) for values in found))
    broke, _ = _breakage(edits, wide_changes, watch, blind_ok=True)
    wide_changes = wide_changes._replace(
        size=np.where(broke, np.inf, wide_changes.size),
        ulps=np.where(broke, np.inf, wide_changes.ulps),
    )
    leaks = faint & (wide_changes.size > changes.size / _SHRINK)
    leaks &= wide_changes.ulps > noise_ulps
    opaque = opaque_parts(problem.closed)
    if leaks.any() and opaque:
        names = ", ".join(sorted(opaque))
        note = f"Changes below the noise level count as rounding: {names} has no float64 form."
        return none, changes, [note]
    return leaks, wide_changes, []


def _scatter(values: np.ndarray, rows: list[int], count: int) -> np.ndarray:
    out = np.zeros((count, values.shape[1]), values.dtype)
    out[rows] = values
    return out


def _verdict(status, leaks, shown, changes: Changes, probe, notes, noise_ulps) -> Verdict:
    """`shown` are the changes among which the worst is looked for."""
    worst = np.unravel_index(np.where(shown, changes.ulps, -1).argmax(), shown.shape)
    there = bool(shown[worst])
    return Verdict(
        status=status,
        leaks=leaks,
        moved=changes.ulps > 0,
        size=changes.size,
        worst=float(changes.size[worst]) if there else 0.0,
        scale=float(changes.scale[worst]) if there else 0.0,
        noise=noise_ulps * probe.eps * float(changes.scale[worst]) if there else 0.0,
        probe=probe,
        notes=tuple(notes),
    )


def _breakage(
    edits: Sequence[Edit], changes: Changes, watch, blind_ok: bool = False
) -> tuple[Bool[np.ndarray, "E T"], list[str]]:
    """The watched outputs that became NaN or infinite although no edited output did.

    If edited outputs broke as well, the edit left the domain of the model, and 0 * inf in a
    masked sum is no leak.
    """
    spoiled = (changes.broken & ~watch).any(1, keepdims=True)
    tested = watch & np.array([[edit.where.any()] for edit in edits])
    blind = tested.any(0) & ~(tested & ~(changes.broken & spoiled)).any(0)
    if blind.any() and not blind_ok:
        raise ValueError(
            f"every edit made output {int(blind.argmax())} NaN or infinite, so that nothing can "
            "be said about it; pass smaller scales=, such as (0.1, 1.)"
        )
    count = int(spoiled.sum())
    notes = [f"{count} edits overflowed inside the function and say less; try smaller scales=."]
    return changes.broken & watch & ~spoiled, notes if count else []


def _require_sane_baseline(edits: Sequence[Edit], changes: Changes, noise_ulps: Real) -> None:
    empty = np.array([not edit.where.any() for edit in edits])
    if changes.broken[empty].any():
        position = int(changes.broken[empty].any(0).argmax())
        raise ValueError(
            f"fn must return finite numbers on the unedited x, but output {position} holds NaN "
            "or inf; a comparison with those says nothing"
        )
    if (changes.ulps[empty] > noise_ulps).any():
        raise ValueError(DIFFERS_FROM_ITSELF)


DIFFERS_FROM_ITSELF = (
    "fn gives different outputs for the same x, so that no comparison can be trusted; if it "
    "draws random numbers (dropout), pass a fixed key: lambda x: model(x, key=jax.random.key(0)); "
    "if it reads or writes global state, freeze it or switch it to inference mode"
)


def _dtype_notes(problem: Problem) -> list[str]:
    names = sorted(str(dtype) for dtype in float_dtypes(problem.closed))
    if len(names) < 2:
        return []
    return [
        f"The function casts inside: it computes in {' and '.join(names)}. The noise level is "
        "that of the least precise; a float64 re-run replaces them all."
    ]
