"""Leak or rounding: reads the measured changes and asks a second precision which they are."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from .._real import Real
from ._edits import Edit, Editor, nothing
from ._host import in_batches, one_by_one, own_error
from ._inputs import Problem
from ._lost import blame
from ._nudge import Shaken, beside, constants_beside
from ._probe import Changes, Probe, make_probe
from ._widen import coarsest, float_dtypes, is_quantised, opaque_parts, widen

# Rounding shrinks 5e8-fold from float32 to float64, a leak not at all.
_SHRINK = 1000.0
_EPS64 = float(np.finfo(np.float64).eps)
# Of the size of the outputs: what float64 says to be rounding is not passed over without a word.
_LARGE = 0.25
# What two numbers that tie are moved apart by, relative to the input: in float64, where FFTs of
# edits a hundred times as large round by 1e-13 of it; and in the function's own precision, in eps.
_APART, _APART_EPS = 2.0**-20, 16.0
_CHAOTIC = 2.0**12  # how many eps an eps of the inputs is, at least
_NUDGES = 7  # with the unedited input a batch of 8
# What x is moved by to draw rounding anew, relative to it, and of what comes of that how many times
# as large a leak is: of itself it moves by so much, but for how steep it is.
_ANEW, _ABOVE = 2.0**-10, 4.0


class Findings(NamedTuple):
    """What the outputs say that were asked about.

    - `changes`: as measured, but infinite where the output is no longer finite.
    - `exact`: the same in float64, for the edits that were run there.
    - `leaks[e, t]`: the change of output `t` under edit `e` is no rounding.
    - `undecided[e, t]`: nothing tells what it is.
    - `notes`: why not, in sentences.
    """

    changes: Changes
    exact: Changes
    leaks: Bool[np.ndarray, "E T"]
    undecided: Bool[np.ndarray, "E T"]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the watched outputs say, and in which precision to look closer.

    `leaks[e, t]` says whether output `t` leaked under edit `e`, `undecided[e, t]` whether that
    cannot be told, `moved[e, t]` whether it changed at all, and `size[e, t]` by how much.
    """

    status: str
    leaks: Bool[np.ndarray, "E T"]
    undecided: Bool[np.ndarray, "E T"]
    moved: Bool[np.ndarray, "E T"]
    size: Float[np.ndarray, "E T"]
    worst: float
    scale: float
    noise: float
    in_float64: bool
    notes: tuple[str, ...]


def function_eps(problem: Problem) -> float:
    """The eps of the least precise float in the function."""
    return float(jnp.finfo(coarsest(problem.closed)).eps)


@dataclasses.dataclass(frozen=True)
class Judge:
    """Tells leaks from rounding by running the function in two precisions.

    The second is float64, or float32 for a function of float64. Where there is none, size must
    do, and what size cannot tell stays undecided.
    """

    problem: Problem
    probe: Probe
    noise_ulps: Real
    confirm_x64: bool

    def verdict(self, edits: Sequence[Edit], watch: Bool[np.ndarray, "E T"]) -> Verdict:
        """Measures `edits` and decides about the outputs that `watch` says must not change."""
        changes = self.probe.measure(edits)
        require_sane_baseline(self.problem, edits, changes, self.noise_ulps)
        found = self.tell(edits, watch, changes, blind_ok=False)
        notes = [*found.notes, *_dtype_notes(self.problem)]
        moved = changes.ulps > 0
        status, shown = _status(found, watch & moved)
        loud = found.changes.ulps > self.noise_ulps
        in_float64 = status == "leak" and not (found.leaks & loud).any()
        if in_float64:
            notes += [
                "The change is below the noise level of the function's own precision, but does "
                "not shrink in float64: it is a leak. The figures here are those of float64."
            ]
        if status == "leak":
            changes = found.exact if in_float64 else found.changes
        worst = np.unravel_index(np.where(shown, changes.ulps, -1).argmax(), shown.shape)
        there = bool(shown[worst])
        scale = float(changes.scale[worst]) if there else 0.0
        return Verdict(
            status=status,
            leaks=found.leaks,
            undecided=found.undecided,
            moved=moved,
            size=changes.size,
            worst=float(changes.size[worst]) if there else 0.0,
            scale=scale,
            noise=float(self.noise_ulps) * (_EPS64 if in_float64 else self.probe.eps) * scale,
            in_float64=in_float64,
            notes=tuple(notes),
        )

    def tell(
        self,
        edits: Sequence[Edit],
        watch: Bool[np.ndarray, "E T"],
        changes: Changes,
        blind_ok: bool = True,
    ) -> Findings:
        """What the changes of the watched outputs are."""
        broke, notes = self._breakage(edits, changes, watch, blind_ok)
        changes = _as_infinite(changes, broke)
        loud = watch & (changes.ulps > self.noise_ulps)
        large = watch & (self.beyond_rounding(changes) > 0)
        doubtful = watch & (changes.ulps > 0)
        if self._is_exact:
            doubtful = loud | (watch & self._beyond_usual(changes))
        none = np.zeros_like(watch)
        if not doubtful.any() or not float_dtypes(self.problem.closed):
            return Findings(changes, changes, doubtful, none, notes)
        by_size = Findings(changes, changes, large, doubtful & ~large, notes)
        if not self.confirm_x64:
            notes += [
                "Changes below the noise level were not re-run in float64 (confirm_x64=False)."
            ]
            return by_size._replace(undecided=loud & ~large)
        try:
            exact, coarse, leaks = self._confirm(edits, watch, doubtful, changes)
        except Exception as error:  # what has no float64 form may raise what it likes
            notes += [self._failed(error)]
            return by_size
        names = ", ".join(sorted(opaque_parts(self.problem.closed))) if leaks.any() else ""
        if names:
            notes += [f"The {self._other} re-run is not conclusive: {names} has no such form."]
            return by_size._replace(leaks=leaks & large, undecided=leaks & ~large)
        vague, more = none, []
        if leaks.any():
            drawn = self._redrawn(edits, watch, leaks, exact, coarse)
            certain, vague, more = self._certain(edits, leaks & ~drawn, exact)
            more += [_REDRAWN] * bool(drawn.any() and not certain.any())
            leaks, vague = certain, vague | drawn
        # Beside a leak, what else is lost is no news; beside noise of float64 it proves nothing.
        explain = not (leaks | vague).any()
        rest = watch & ~leaks & ~vague & ~exact.broken
        lost, why = self._lost(edits, rest, changes, explain)
        return Findings(changes, exact, leaks, vague | lost, [*notes, *more, *why])

    def _redrawn(
        self,
        edits: Sequence[Edit],
        watch: Bool[np.ndarray, "E T"],
        leaks: Bool[np.ndarray, "E T"],
        exact: Changes,
        coarse: Changes,
    ) -> Bool[np.ndarray, "E T"]:
        """The leaks that may be rounding of float64: none where one is as large in both precisions.

        Where values are so large that the lesser precision is lost altogether, rounding of float64
        is not as much smaller as else. But at an x beside this one it is drawn anew; and where it
        swallows numbers, outputs no longer move with x.
        """
        if 2 * exact.size[leaks].max(initial=0) >= coarse.size[watch].max():
            return np.zeros_like(leaks)
        probe = self.probe if self._is_exact else self._second
        probes = [probe, *(self._drawn_anew(probe, seed) for seed in (1, 2, 3))]
        rows = np.flatnonzero(leaks.any(1))
        scales = np.array([probe.editor.size(edits[row]) for row in rows.tolist()])
        varied = []
        for some in (rows[k : k + _NUDGES] for k in range(0, len(rows), _NUDGES)):
            outs = [each.outputs([edits[0], *(edits[row] for row in some)]) for each in probes]
            leaves = zip(zip(*outs, strict=True), probe.out_axes, strict=True)
            varied += [[_varies(leaf, axis, watch[some]) for leaf, axis in leaves]]
        drawn = leaks.copy()
        for leaf in zip(*varied, strict=True):
            change, varies, moves = map(np.concatenate, zip(*leaf, strict=True))
            # Where numbers are swallowed a change varies by no more than the output moves.
            most = np.minimum(change, np.where(moves > 0, moves, np.inf))
            drawn[rows] &= most <= _ABOVE * _pooled(varies, scales)
        return drawn

    def _drawn_anew(self, probe: Probe, seed: int) -> Probe:
        """The function at an x beside this one; or one beside it, as tokens have no such x."""
        if any(leaf.ids is None for leaf in probe.editor.leaves):
            return dataclasses.replace(probe, editor=beside(probe.editor, _ANEW, seed, wide=True))
        fn = widen(self.problem.closed, np.float64, *constants_beside(_ANEW, seed))
        of_probe = probe.editor, probe.out_axes, probe.eps, probe.batch_size
        return make_probe(fn, *of_probe, np.float64, one_by_one(fn, self.problem.closed))

    def _certain(
        self, edits: Sequence[Edit], leaks: Bool[np.ndarray, "E T"], exact: Changes
    ) -> tuple[Bool[np.ndarray, "E T"], Bool[np.ndarray, "E T"], list[str]]:
        """The leaks that are neither chaos nor ties, what may be one of these, and remarks.

        Chaos makes what float64 rounds as large as the values: then outputs move as far when `x`
        does by an eps. A tie is decided by rounding in any precision, but only at this very `x`.
        """
        probe = self.probe if self._is_exact else self._second
        chaos = leaks & (exact.size <= self._chaos(probe) * exact.hidden)
        notes = [
            "The function is chaotic: an eps of float64 in x moves outputs by thousands of that, "
            "so that rounding may do as much. Check fewer steps of it."
        ] * bool(chaos.any())
        leaks = leaks & ~chaos
        editor = beside(probe.editor, _APART, wide=True)
        rows = np.flatnonzero(leaks.any(1))
        for some in (rows[k : k + _NUDGES] for k in range(0, len(rows), _NUDGES)):
            again = _at(editor, probe, [edits[0], *(edits[row] for row in some)])
            enough = np.minimum(exact.ulps[some], 1 / _EPS64) / _SHRINK
            if (leaks[some] & ((again.ulps > enough) | again.broken)).any():
                return leaks, chaos, notes
        # What ties in the edited x ties in x, and jumps there; a leak that takes numbers of its own
        # to show, as those of these edits, does not.
        tied = leaks & (exact.size <= 2 * _shaken(probe, _APART).size.max(initial=0))
        tie = (
            "In float64 too outputs changed, but not at an x that is moved by a millionth of its "
            "size: there values tie, and rounding decides. Pass an x without round numbers."
        )
        return leaks & ~tied, tied | chaos, notes + [tie] * bool(tied.any())

    def _chaos(self, probe: Probe) -> float:
        """How far rounding moves outputs in float64 if any is chaotic; of floats alone.

        The largest of all, for one may be lucky. Where values are quantised, what an eps moves by a
        step of the grid is a tie, and no chaos.
        """
        if any(map(is_quantised, float_dtypes(self.problem.closed))):
            return 0.0
        moved = _shaken(probe, _EPS64)
        chaotic = (moved.ulps > _CHAOTIC) & np.isfinite(moved.ulps)
        return float(self.noise_ulps * moved.size.max(initial=0, where=chaotic))

    def _lost(
        self,
        edits: Sequence[Edit],
        watch: Bool[np.ndarray, "E T"],
        changes: Changes,
        explain: bool,
    ) -> tuple[Bool[np.ndarray, "E T"], list[str]]:
        """What float64 does not show, and is as large as outputs are in their own precision.

        But for near ties, which are ties at this `x` alone.
        """
        large = watch & self._beyond_usual(changes)
        if not large.any():
            return large, []
        if (
            self._is_exact
        ):  # beside outputs that are larger by eps of float32 it is no leak for sure
            return large, [_REDRAWN] * explain
        largest = np.where(large, changes.size, 0).max(1)
        some = np.argsort(-largest, kind="stable")[: min(_NUDGES, np.count_nonzero(largest))]
        kept = large[some]
        for seed in (1, 2):
            editor = beside(self.probe.editor, min(_APART_EPS * self.probe.eps, 0.125), seed)
            again = _at(editor, self.probe, [edits[0], *(edits[row] for row in some)])
            kept = kept & (self._beyond_usual(again) | again.broken)
        if not explain:
            return large & kept.any(), []
        most = float((changes.size[large] / _usual(changes)[large]).max())
        dtype = coarsest(self.problem.closed)
        what = f"change by {most:.2g} of their size" if most < np.inf else "become infinite or NaN"
        said = f"In {dtype} outputs {what}, and in float64 they do not"
        if not kept.any():
            return large & False, [f"{said}, nor at an x beside this one: values nearly tie."]
        cure = "Smaller scales= keep to inputs like x"
        if most < np.inf:
            enough = math.ceil(most / self.probe.eps)
            cure += f"; noise_ulps={enough} takes it for rounding"
        return large, [
            f"{said}. In exact arithmetic this is no leak, and in {dtype} it is one.",
            *self._blamed(edits[some[0]], float(largest[some[0]])),
            f"{cure}.",
        ]

    def _beyond_usual(self, changes: Changes) -> Bool[np.ndarray, "E T"]:
        """Whether a change is as large as outputs are that nothing was edited for."""
        share = max(_LARGE, float(self.noise_ulps) * self.probe.eps)
        return changes.size > share * _usual(changes)

    def _blamed(self, edit: Edit, error: float) -> list[str]:
        try:
            told = blame(self.problem.closed, self.probe.editor.apply(edit), 0, error)
        except Exception:  # what cannot be run operation by operation may raise what it likes
            told = ""
        return [told] * bool(told)

    def beyond_rounding(self, changes: Changes) -> Float[np.ndarray, "E T"]:
        """The size of a change; 0 if it may be the rounding of numbers that an edit made large."""
        return np.where(changes.ulps > self.noise_ulps * changes.hidden, changes.size, 0)

    def second_look(
        self, edits: Sequence[Edit]
    ) -> tuple[Float[np.ndarray, "E T"] | None, list[str]]:
        """The same in float64, for edits whose changes may be hidden by rounding, and remarks.

        None if there is nothing more precise.
        """
        if self._is_exact or not self.confirm_x64:
            return None, []
        try:
            return self.beyond_rounding(self._measure_again(edits)), []
        except Exception as error:  # what has no float64 form may raise what it likes
            return None, [self._failed(error)]

    def _breakage(self, edits, changes: Changes, watch, blind_ok: bool):
        zeros = np.array([self.probe.editor.zeros(edit) for edit in edits])
        return _breakage(self.problem, edits, changes, watch, blind_ok, zeros)

    def _measure_again(self, edits: Sequence[Edit]) -> Changes:
        """In the second precision."""
        with np.errstate(over="ignore"):  # a constant too large for float32
            found = self._second.measure(edits, "second precision")
        if found.broken[0].any():
            raise FloatingPointError("the output for the unedited x is not finite there")
        return found

    def _failed(self, error: Exception) -> str:
        error = own_error(error)
        reason = str(error).split("\n")[0]
        return f"The {self._other} re-run failed ({type(error).__name__}: {reason})."

    def _confirm(self, edits, watch, doubtful, changes: Changes):
        """The changes in float64, in the lesser precision, and which doubtful ones are leaks.

        A leak is more than `noise_ulps` eps of float64, and more than rounding can be there: a
        thousandth of what it is in the lesser precision, the difference of the two. One eps
        of the lesser precision is enough in any case.
        """
        chosen = np.flatnonzero(doubtful.any(1))
        rows = [edits[0], *(edits[row] for row in chosen)]
        found = self._measure_again(rows)
        second = Changes(*(_scatter(values[1:], chosen, len(edits)) for values in found))
        second = _as_infinite(second, self._breakage(edits, second, watch, blind_ok=True)[0])
        exact, coarse = (changes, second) if self._is_exact else (second, changes)
        coarse_eps = max(self.probe.eps, self._second.eps)
        with np.errstate(invalid="ignore"):  # inf - inf
            rounding = np.abs(coarse.ulps * coarse_eps - exact.ulps * _EPS64)
        # The largest of each edit: all outputs pass through the same sums, and one may be lucky.
        rounding = np.where(watch, np.nan_to_num(rounding, posinf=np.inf), 0).max(1, keepdims=True)
        limit = np.minimum(rounding / _SHRINK, coarse_eps)
        leaks = exact.ulps * _EPS64 > np.maximum(limit, self.noise_ulps * _EPS64)
        return exact, coarse, doubtful & leaks

    def probe_of(self, verdict: Verdict) -> Probe:
        """The one whose figures the verdict shows."""
        return self._second if verdict.in_float64 else self.probe

    @property
    def _is_exact(self) -> bool:
        """Whether the function is one of float64 to begin with."""
        return self.probe.eps <= _EPS64

    @property
    def _other(self) -> str:
        """The second precision."""
        return "float32" if self._is_exact else "float64"

    @functools.cached_property
    def _second(self) -> Probe:
        """The probe in the second precision."""
        fn, eps = widen(self.problem.closed, self._other), float(np.finfo(self._other).eps)
        of_probe = self.probe.editor, self.probe.out_axes, eps, self.probe.batch_size
        beside = in_batches(fn, self.problem.closed, self._other)
        return make_probe(fn, *of_probe, self._other, beside)


_REDRAWN = (
    "In float64 too outputs changed, but the numbers inside are so large that this may be "
    "rounding. Smaller scales= keep to inputs like x."
)


def _usual(changes: Changes) -> Float[np.ndarray, "E T"]:
    """The size of outputs: what edits make large is no measure of what they leave alone."""
    return np.where(changes.unedited > 0, changes.unedited, changes.scale)


def _varies(
    outs: Sequence[Shaped[np.ndarray, "..."]], axis: int, watch: Bool[np.ndarray, "E T"]
) -> tuple[Float[np.ndarray, "E T"], Float[np.ndarray, "E T"], Float[np.ndarray, "E T"]]:
    """How far edits change an output array, what that varies by beside `x`, and how far it moves.

    `outs` are those at `x` and at each input beside it: of it unedited, and of its edits.
    """
    length = watch.shape[1]
    first, *others = (np.moveaxis(out, axis + 1, 1).reshape(len(out), length, -1) for out in outs)
    size = lambda values: np.nan_to_num(np.abs(values), nan=0, posinf=np.inf).max(-1, initial=0)
    with np.errstate(invalid="ignore"):  # inf - inf
        change = first[1:] - first[0]
        varies = np.max([size(out[1:] - out[0] - change) for out in others], axis=0)
        moves = np.max([size(out[0] - first[0]) for out in others], axis=0)
    return size(change), np.where(watch, varies, 0), np.broadcast_to(moves, watch.shape)


def _pooled(
    noise: Float[np.ndarray, "E T"], scales: Float[np.ndarray, " E"]
) -> Float[np.ndarray, "E T"]:
    """The noise of edits of the same scale, taken together: of each one or the other is lucky.

    As one number for each scale, times one for each output.
    """
    largest = noise.max(0)
    with np.errstate(invalid="ignore"):  # 0 / 0, and where all is infinite
        share = np.nan_to_num(noise / largest, nan=0).max(1)
    pooled = np.array([share[scales == scale].max() for scale in scales])
    return np.where(largest > 0, pooled[:, None] * largest, 0)


def _shaken(probe: Probe, by: float) -> Changes:
    """What outputs do when the unedited x is moved by so much of its size, several times."""
    editor = Shaken(**vars(probe.editor), by=by)
    return _at(editor, probe, [nothing(editor)._replace(seed=k) for k in range(_NUDGES + 1)])


def _at(editor: Editor, probe: Probe, edits: Sequence[Edit]) -> Changes:
    """What edits do to the inputs of another editor, the first of them left out."""
    found = dataclasses.replace(probe, editor=editor).measure(edits, "nudged inputs")
    return Changes(*(values[1:] for values in found))


def _status(found: Findings, changed) -> tuple[str, Bool[np.ndarray, "E T"]]:
    """In a word, and the changes among which the worst is looked for."""
    if found.leaks.any():
        return "leak", found.leaks
    if found.undecided.any():
        return "undecided", found.undecided
    return "clear (float noise)" if changed.any() else "clear", changed


def _scatter(values: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    out = np.zeros((count, values.shape[1]), values.dtype)
    out[rows] = values
    return out


def _as_infinite(changes: Changes, broke: Bool[np.ndarray, "E T"]) -> Changes:
    size, ulps = (np.where(broke, np.inf, values) for values in (changes.size, changes.ulps))
    return changes._replace(size=size, ulps=ulps)


def _breakage(
    problem: Problem, edits: Sequence[Edit], changes: Changes, watch, blind_ok: bool, zeros
) -> tuple[Bool[np.ndarray, "E T"], list[str]]:
    """The watched outputs that became NaN or infinite although no edited output did.

    If edited outputs broke as well, the edit left the domain of the model, and 0 * inf in a
    masked sum is no leak. `zeros` are the edits to zero, which may all leave it, as of a logarithm.
    """
    spoiled = (changes.broken & ~watch).any(1, keepdims=True)
    tested = watch & np.array([[edit.where.any()] for edit in edits]) & ~zeros[:, None]
    blind = tested.any(0) & ~(tested & ~(changes.broken & spoiled)).any(0)
    if blind.any() and not blind_ok:
        raise ValueError(
            f"every edit made output {problem.output(blind.argmax())} NaN or infinite, so that "
            "nothing can be said about it; pass smaller scales=, such as (0.1, 1.)"
        )
    count = int((spoiled[:, 0] & ~zeros).sum())
    notes = [f"{count} edits overflowed inside the function and say less; try smaller scales=."]
    notes = notes * bool(count)
    if (spoiled[:, 0] & zeros).any():
        notes += ["Zeros in the place of x made outputs NaN or infinite, and say less."]
    return changes.broken & watch & ~spoiled, notes


def require_sane_baseline(
    problem: Problem, edits: Sequence[Edit], changes: Changes, noise_ulps: Real
) -> None:
    """Refuses a function that is not finite, or not the same again, on the unedited input."""
    empty = np.array([not edit.where.any() for edit in edits])
    if changes.broken[empty].any():
        position = problem.output(changes.broken[empty].any(0).argmax())
        raise ValueError(
            f"fn must return finite numbers on the unedited x, but output {position} holds NaN "
            "or inf; a comparison with those says nothing. If it is the -inf of masked logits, "
            "put a number there: lambda x: jnp.nan_to_num(fn(x), neginf=0.0). If it is a softmax "
            "of a row that is all -inf, look for a mask that hides a whole row, as one that is the "
            "other way round does"
        )
    if (changes.ulps[empty] > noise_ulps).any():
        raise ValueError(DIFFERS_FROM_ITSELF)


DIFFERS_FROM_ITSELF = (
    "fn gives different outputs for the same x, so that no comparison can be trusted; if it "
    "draws random numbers (dropout), pass a fixed key: lambda x: model(x, key=jax.random.key(0)); "
    "if it reads or writes global state, freeze it or switch it to inference mode; if it has "
    "batch_axis=, leave that out, for an example may read another"
)


def _dtype_notes(problem: Problem) -> list[str]:
    names = sorted(str(dtype) for dtype in float_dtypes(problem.closed))
    if len(names) < 2:
        return []
    return [
        f"The function casts inside: it computes in {' and '.join(names)}. The noise level is "
        "that of the least precise. float8 and float4 do not count: their casts are taken for "
        "quantisation and kept, and a float64 re-run replaces the others."
    ]
