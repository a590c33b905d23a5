"""Two functions on the same inputs: rounding or a difference, as a second precision tells."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ..._processes import fetched
from ..._real import Real
from .._host import compiled, own_error, together
from .._lost import blame
from .._nudge import rounded_anew
from .._probe import placed
from .._widen import coarsest, float_constants, float_dtypes, is_key, opaque_parts, widen

_EPS32, _EPS64 = (float(np.finfo(dtype).eps) for dtype in (np.float32, np.float64))
_FLUSHED = float(np.finfo(np.float64).tiny)  # what is smaller may be 0 in one of the two
# Rounding shrinks 2**29-fold from float32 to float64, from coarser floats by more. Where it was
# small by luck, as it may be in a leaf of few entries, it seems to shrink by less.
_SHRINK = 2.0**23
# A constant may have been rounded in both, each time by half an eps, or by some more where it
# was computed from others.
_CONSTANTS = 4.0
# How much smaller a difference must be in a precision that would show it to be none.
_HIDDEN = 4.0
# In its own precision a function may lose up to so many eps of the largest entry, as long sums do,
# but no more than a share of it.
_LOST_EPS = 1024.0
_LOST_SHARE = 0.25
# And so many times as much as its outputs move when its inputs and constants do by half an ulp.
_CONDITION = 8.0
# Where 0 is exact, all that one has is rounding: it is no worse than what so much of the other is.
_CHANCE = 1024.0

Row = Sequence[Array | np.ndarray]  # an input, its leaves
Outputs = list[list[np.ndarray]]  # for each of K inputs its L leaves, floats as float64


class Gaps(NamedTuple):
    """How far apart two functions are at each of K inputs in each of L leaves of the output.

    - `size`: the largest difference of two entries; infinite where one alone is NaN or infinite.
    - `scale`: the largest finite magnitude among the entries that differ.
    """

    size: Float[np.ndarray, "K L"]
    scale: Float[np.ndarray, "K L"]


class Runs(NamedTuple):
    """The outputs of both functions in one precision, and how far rounding alone may go there."""

    one: Outputs
    two: Outputs
    gaps: Gaps
    limit: Float[np.ndarray, "K L"]
    eps: float

    @property
    def discrete(self) -> Bool[np.ndarray, " L"]:
        """Which leaves hold integers or bools."""
        return np.array([leaf.dtype.kind not in "fc" for leaf in self.one[0]])

    @property
    def ulps(self) -> float:
        """The largest finite difference of floats, in eps of the largest entry that differs."""
        size, scale = self.gaps
        told = np.isfinite(size) & (scale > 0) & ~self.discrete
        return float((size[told] / scale[told]).max(initial=0) / self.eps)


class Verdict(NamedTuple):
    """What the two functions are to each other, and at which inputs and leaves they are that.

    `exact` are the runs in float64, None where it was not asked; `judged` those that decided.
    """

    status: str
    where: Bool[np.ndarray, "K L"]
    own: Runs
    exact: Runs | None
    judged: Runs
    notes: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Judge:
    """Tells a difference of two traced functions from rounding.

    What float64 leaves of a difference is rounding if it is no larger than the sum of what can
    be measured of rounding there: `noise_ulps` eps of float64; a small part of what each function
    rounds in its own precision; `noise_ulps` times as far as the outputs move when inputs,
    constants and what is rounded on the way do by an eps; and what the rounding of constants that
    the two do not share may do.
    """

    one: jex.ClosedJaxpr
    two: jex.ClosedJaxpr
    rows: Sequence[Row]
    noise_ulps: Real
    confirm_x64: bool

    @property
    def eps(self) -> float:
        """That of the least precise float in the two."""
        return float(jnp.finfo(coarsest(self.one, self.two)).eps)

    def verdict(self) -> Verdict:
        """Runs both on every input, and again in float64 where they differ."""
        found, opaque = self._verdict(), self._opaque
        if found.exact is None or not opaque:
            return found
        # What a callback gave is not of float64, and must not be called so.
        note = f"{opaque} kept its own precision in the float64 re-run."
        return found._replace(exact=None, notes=[*found.notes, note])

    def _verdict(self) -> Verdict:
        own = self._runs(_own(self.one, self.rows), _own(self.two, self.rows), self.eps)
        changed = own.gaps.size > 0
        if not changed.any():
            return Verdict("same bits", changed, own, None, own)
        # No rounding: integers must be equal, and NaN where the other has none is a difference.
        broken = np.isinf(own.gaps.size) | (changed & own.discrete)
        large = broken | (own.gaps.size > own.limit)
        by_size = Verdict("different" if large.any() else "rounding", large, own, None, own)
        if not self.confirm_x64 or not float_dtypes(self.one) | float_dtypes(self.two):
            return by_size
        try:
            exact = self._in_float64(own)
        except Exception as error:  # what has no float64 form may raise what it likes
            error = own_error(error)
            reason = str(error).split("\n")[0]
            note = f"The float64 re-run failed ({type(error).__name__}: {reason})."
            unknown = by_size._replace(status="undecided", where=changed)
            return (by_size if large.any() else unknown)._replace(notes=(note,))
        exact, undecided, notes = self._tell(own, exact)
        above = exact.gaps.size > exact.limit
        if (broken & above).any():
            return Verdict("different", broken & above, own, exact, own, notes)
        different = above & ~undecided
        if different.any():
            return Verdict("different", different, own, exact, exact, notes)
        own, lost, why = self._lost(own, exact, broken)
        if lost.any():
            return Verdict("imprecise", lost, own, exact, own, why)
        notes = [*notes, *why]
        status = "undecided" if undecided.any() else "rounding"
        return Verdict(status, undecided, own, exact, exact if undecided.any() else own, notes)

    def _runs(self, one: Outputs, two: Outputs, eps: float) -> Runs:
        runs = Runs(one, two, found := gaps(one, two), found.scale, eps)
        return runs._replace(limit=np.where(runs.discrete, 0, self.noise_ulps * eps * found.scale))

    def _in_float64(self, own: Runs) -> Runs:
        exact = self._runs(_wide(self.one, self.rows), _wide(self.two, self.rows), _EPS64)
        shrunk = _rounding(self.one, self.rows, own.one, exact.one)
        shrunk += _rounding(self.two, self.rows, own.two, exact.two)
        return exact._replace(limit=exact.limit + shrunk / _SHRINK + _FLUSHED)

    def _tell(self, own: Runs, exact: Runs) -> tuple[Runs, Bool[np.ndarray, "K L"], Sequence[str]]:
        """With all that rounding may do, what float64 cannot decide, and why not."""
        doubtful = exact.gaps.size > exact.limit
        if not doubtful.any():
            return exact, doubtful, []
        chosen = np.flatnonzero(doubtful.any(1))
        moved = np.zeros_like(exact.limit)
        moved[chosen] = self._moved(chosen, exact)
        rounded = np.zeros_like(exact.limit)
        rounded[chosen] = self._rounded_constants(chosen, exact)
        limit = exact.limit + self.noise_ulps * moved + _CONSTANTS * rounded
        exact = exact._replace(limit=limit)
        undecided, notes = self._undecided(own, exact, doubtful, moved)
        if self._opaque:
            exact = exact._replace(limit=np.maximum(limit, self._reach(exact, moved)))
        return exact, undecided, notes

    @property
    def _opaque(self) -> str:
        """The names of what has no float64 form in the two."""
        return ", ".join(sorted(opaque_parts(self.one) | opaque_parts(self.two)))

    def _reach(self, exact: Runs, moved: Float[np.ndarray, "K L"]) -> Float[np.ndarray, "K L"]:
        """How far rounding in their own precision may take what has no other."""
        return self.noise_ulps * self.eps * np.maximum(exact.gaps.scale, moved / _EPS64)

    def _undecided(
        self,
        own: Runs,
        exact: Runs,
        doubtful: Bool[np.ndarray, "K L"],
        moved: Float[np.ndarray, "K L"],
    ) -> tuple[Bool[np.ndarray, "K L"], list[str]]:
        """The differences that float64 does not decide, and why not."""
        above = exact.gaps.size > exact.limit
        size, scale = exact.gaps
        notes = []
        blurred = doubtful & ~above & (scale > 0) & (self.noise_ulps * moved > _EPS32 * scale)
        if blurred.any():
            share = (moved[blurred] / scale[blurred]).max()
            notes += [
                "The functions are chaotic: an eps of float64 in inputs, constants and results on "
                f"the way moves outputs by up to {share:.2g} of their size, and so may rounding."
            ]
        behind = np.zeros_like(above)
        if self._opaque and above.any():
            behind = above & (size <= self._reach(exact, moved))
        if behind.any():
            notes += [f"The float64 re-run is not conclusive: {self._opaque} has no such form."]
        hidden = above & (_HIDDEN * np.maximum(own.gaps.size, self.eps * scale) < size)
        if hidden.any():
            notes += [
                "In float64 the two are further apart than in their own precision, which would "
                "show such a difference too. One may compute a table that the other was given, "
                "rounded. Compute it in both, or in neither."
            ]
        return blurred | behind | hidden, notes

    def _lost(
        self, own: Runs, exact: Runs, broken: Bool[np.ndarray, "K L"]
    ) -> tuple[Runs, Bool[np.ndarray, "K L"], list[str]]:
        """With what rounding may do in their own precision, where one of the two does more.

        So it does where it is further from itself in float64 than a small change of its inputs and
        constants would take it; or where it is so by the size of the outputs, and the other not.
        What is 0 in exact arithmetic has no size: there that of all outputs counts.
        """
        size, scale = own.gaps
        share = max(min(_LOST_EPS * self.eps, _LOST_SHARE), float(self.noise_ulps) * self.eps)
        far = broken | (size > share * scale)
        if self.eps <= _EPS64 or not far.any():
            return own, far & broken, []
        chosen = np.flatnonzero(far.any(1))
        errors, moves = (np.zeros((2, *size.shape)) for _ in range(2))
        both = (self.one, own.one, exact.one), (self.two, own.two, exact.two)
        for k, (closed, coarse, wide) in enumerate(both):
            of = lambda outs: [outs[row] for row in chosen]
            errors[k][chosen] = gaps(of(coarse), of(wide)).size
            moves[k][chosen] = gaps(of(wide), self._nudged_by_half_an_ulp(closed, chosen)).size
        zero, whole = _is_zero(own, exact)
        scale = np.where(zero, np.maximum(scale, whole), scale)
        limit = share * scale + _CONDITION * moves + np.where(zero, _CHANCE * errors.min(0), 0)
        alone = (size > scale / 2) & (errors.min(0) <= share * scale)
        lost = broken | (far & ((errors > limit).any(0) | alone))
        own = own._replace(limit=np.where(broken, 0, limit.max(0)))
        if not lost.any():
            return own, lost, [self._sensitive(size[far] / scale[far])]
        return own, lost, self._where_lost(lost, errors, exact)

    def _nudged_by_half_an_ulp(self, closed: jex.ClosedJaxpr, chosen: np.ndarray) -> Outputs:
        rng = np.random.default_rng(0)
        nudge = lambda value: _nudged(value, rng)
        lies = [getattr(leaf, "sharding", None) for leaf in self.rows[0]]
        with jax.enable_x64(True):
            rows = [list(map(placed, map(nudge, self.rows[k]), lies)) for k in chosen]
        return _wide(closed, rows, nudge)

    def _sensitive(self, shares: Float[np.ndarray, " far"]) -> str:
        return (
            f"They differ by {shares.max():.2g} of their size, and would differ about as much if "
            "inputs and constants moved by an ulp. These numbers are not precise enough to tell."
        )

    def _where_lost(
        self,
        lost: Bool[np.ndarray, "K L"],
        errors: Float[np.ndarray, "2 K L"],
        exact: Runs,
    ) -> list[str]:
        """Which of the two loses its precision, and at which operation."""
        row, leaf = np.unravel_index(np.where(lost, errors.max(0), -1).argmax(), lost.shape)
        worse = int(errors[1, row, leaf] > errors[0, row, leaf])
        name, closed = (("first", self.one), ("second", self.two))[worse]
        notes = [f"It is the {name} function that is off."]
        if exact.discrete[leaf]:
            why = "Integers differ where two scores nearly tie, or at a threshold, and rounding "
            return [*notes, f"{why}decides. Compare what they come from."]
        try:
            told = blame(closed, self.rows[int(row)], int(leaf), float(errors[worse, row, leaf]))
        except Exception:  # what cannot be run operation by operation may raise what it likes
            told = ""
        return [*notes, told] if told else notes

    def _moved(self, chosen: np.ndarray, exact: Runs) -> Float[np.ndarray, "C L"]:
        """How far the outputs of both move when inputs, constants, and what is rounded on the way
        do by an eps of float64.
        """
        rng = np.random.default_rng(0)
        nudge = lambda value: _nudged(value, rng, _EPS64)
        lies = [getattr(leaf, "sharding", None) for leaf in self.rows[0]]
        with jax.enable_x64(True):
            rows = [list(map(placed, map(nudge, self.rows[k]), lies)) for k in chosen]
        moved = lambda closed: _wide(closed, rows, nudge, watch=rounded_anew)
        one = gaps([exact.one[k] for k in chosen], moved(self.one)).size
        return one + gaps([exact.two[k] for k in chosen], moved(self.two)).size

    def _rounded_constants(self, chosen: np.ndarray, exact: Runs) -> Float[np.ndarray, "C L"]:
        """How far the outputs move when constants do by half an eps of their own dtype.

        A constant was rounded when the function was traced, and float64 does not undo that. But
        what both functions hold makes no difference.
        """
        total = np.zeros((len(chosen), exact.limit.shape[1]))
        rows, rng = [self.rows[k] for k in chosen], np.random.default_rng(0)
        both = (self.one, self.two, exact.one), (self.two, self.one, exact.two)
        for closed, other, before in both:
            constants = map(_as_float64, float_constants(other))
            held = np.concatenate([[0.0], *map(np.ravel, constants)])
            alone = lambda value, held=held: np.isin(fetched(value), held, invert=True)
            if any((alone(c) & ~_is_exact(c)).any() for c in float_constants(closed)):
                nudge = lambda value, alone=alone: _nudged(value, rng, where=alone(value))
                after = _wide(closed, rows, nudge)
                total += gaps([before[k] for k in chosen], after).size
        return total


def _is_zero(own: Runs, exact: Runs) -> tuple[Bool[np.ndarray, "K L"], Float[np.ndarray, "K 1"]]:
    """Which leaves are 0 in float64 up to its rounding, and the largest entry of all leaves."""
    size = np.array(
        [
            [max(map(_largest, leaves)) for leaves in zip(*row, strict=True)]
            for row in zip(exact.one, exact.two, strict=True)
        ]
    )
    return size * _SHRINK <= own.gaps.scale, size.max(1, keepdims=True, initial=0)


def _largest(leaf: np.ndarray) -> float:
    size = np.abs(leaf * 1.0)
    return float(size.max(initial=0, where=np.isfinite(size)))


def gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How far each entry of one output is from that of another, 0 where both are NaN."""
    if a.dtype.kind not in "fc":  # of two large integers the float difference may round to 0
        size = np.maximum(np.abs(a.astype(np.float64) - b.astype(np.float64)), 1)
        return np.where(a == b, 0, size)
    with np.errstate(invalid="ignore"):  # inf - inf
        size = np.abs(a - b)
    size = np.where(np.isnan(size), np.inf, size)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0, size)


def gaps(one: Outputs, two: Outputs) -> Gaps:
    """Of every input and leaf the largest gap, and how large the entries are that differ."""
    size, scale = [], []
    for row in zip(one, two, strict=True):
        apart = [gap(a, b) for a, b in zip(*row, strict=True)]
        size.append([leaf.max(initial=0) for leaf in apart])
        scale.append([_scale(*leaf) for leaf in zip(*row, apart, strict=True)])
    return Gaps(np.array(size, np.float64), np.array(scale, np.float64))


def _scale(a: np.ndarray, b: np.ndarray, apart: np.ndarray) -> float:
    sizes = np.stack([np.abs(leaf * 1.0) for leaf in (a, b)])
    return sizes[:, apart > 0].max(initial=0, where=np.isfinite(sizes[:, apart > 0]))


def _own(closed: jex.ClosedJaxpr, rows: Sequence[Row]) -> Outputs:
    return _run(jex.jaxpr_as_fun(closed), closed, rows)


def _wide(
    closed: jex.ClosedJaxpr,
    rows: Sequence[Row],
    constant: Callable[[Any], Any] = lambda c: c,
    to: Any = np.float64,
    watch: Callable[..., Sequence[Array]] | None = None,
) -> Outputs:
    with jax.enable_x64(True), np.errstate(over="ignore"):  # a constant too large for float32
        return _run(widen(closed, to, constant, watch), closed, rows, to, constant)


def _run(fn: Callable, closed: jex.ClosedJaxpr, rows: Sequence[Row], *how: Any) -> Outputs:
    """`fn` evaluates `closed`; `how`, in another precision and with other constants."""
    if (run := together(closed, *how)) is not None:
        outs = run([np.stack([*map(fetched, leaf)]) for leaf in zip(*rows, strict=True)])
        return [host(row) for row in zip(*outs, strict=True)]
    run = compiled(fn, closed)
    return [host(run(*row)) for row in rows]


def host(leaves: Sequence[np.ndarray | Array]) -> list[np.ndarray]:
    """NumPy arrays of the same values, of floats as float64."""
    return [_as_float64(fetched(leaf)) for leaf in leaves]


def _as_float64(values: np.ndarray) -> np.ndarray:
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return values
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)


def _rounding(closed, rows: Sequence[Row], own: Outputs, exact: Outputs) -> np.ndarray:
    """How far a function is from itself in float64, or one of float64 from itself in float32."""
    if coarsest(closed) == np.float64:
        own = _wide(closed, rows, to=np.float32)
    apart = [map(gap, *row) for row in zip(own, exact, strict=True)]
    finite = [[leaf[np.isfinite(leaf)].max(initial=0) for leaf in row] for row in apart]
    return np.array(finite, np.float64)


def _nudged(
    value: Any, rng: np.random.Generator, by: float | None = None, where: Any = True
) -> Any:
    """`value` in float64, each entry up or down by `by` of its size, by default by half an ulp.

    That is half an eps of its size, and more below the smallest normal number.
    """
    if is_key(value) or not jnp.issubdtype((values := fetched(value)).dtype, jnp.inexact):
        return value
    limits, exact = jnp.finfo(values.dtype), _as_float64(values)
    own = np.where(exact == 0, 1, np.abs(exact))
    half_ulp = np.maximum(float(limits.eps), float(limits.smallest_subnormal) / own) / 2
    moves = rng.choice([-1, 1], size=values.shape)
    size = half_ulp if by is None else by
    return np.asarray(exact * (1 + np.where(where & ~_is_exact(values), moves * size, 0)))


def _is_exact(values: np.ndarray) -> np.ndarray:
    """Which numbers were hardly rounded: short ones, as 0.5, and those of an array of integers.

    None below the smallest normal number, where all are short.
    """
    limits, exact = jnp.finfo(values.dtype), _as_float64(values)
    parts = np.stack([np.real(exact), np.imag(exact)])
    whole = parts == np.round(parts)
    shifted = np.ldexp(np.frexp(parts)[0], (limits.nmant + 1) // 2)
    normal = (parts == 0) | (np.abs(parts) >= float(limits.tiny))
    return np.asarray(((normal & (shifted == np.round(shifted))) | whole.all()).all(0))
