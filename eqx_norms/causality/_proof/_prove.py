"""Proof from the structure: where no chain of operations leads from an input to an output.

The traced function is gone through once, with the inputs that every entry of every intermediate
result may read in place of its value. What this says holds for every finite input of this shape
and any finite values of the floating-point parameters, as long as no intermediate value becomes
infinite or NaN but by what the program makes of its own constants.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from ..._jaxprs import called, first_ref, is_foreign, opened, scan_counts
from .._edits import is_mask
from .._inputs import place
from .._lines import line_of
from ._exact import exact
from ._flow import RULES, connect_all, select
from ._known import (
    Known,
    constant,
    either,
    free,
    known,
    packed,
    parameter,
    union,
    unknown,
    unpacked,
)
from ._masks import LARGE, Meeting, assumed

# As many words of 64 inputs at a time as keep the largest intermediate result below this.
_BYTES = 2**28
# A loop is gone through step by step up to so many equations, else to a fixed point.
_STEPS = 50_000
_MASKS = ("masks",)  # in the place of an equation's path


@dataclasses.dataclass
class Context:
    """What one pass through a function has besides its values.

    - `assume_bounded`: whether scores that meet a mask of a large number are below a tenth of it.
    - `cut`: the equations, by their path, whose results are taken to read nothing. With `_MASKS` in
        it, floats of zeros and ones that the function holds are taken for what they are.
    - `float_masks`: what these are, in words.
    - `zeros_cut`: whether what is multiplied by zero is not read.
    - `signs`: for each equation that tells 0 from -0 what its operands read where no zero cuts.
    - `meetings`: where scores meet masks, `used` those that something was concluded from.
    - `held`: the numbers that are parameters wherever they stand in the program.
    - `opaque`: names of what is not in the table; `platforms`: what was asked for.
    - `looking`: whether to look for what may be to blame: `merging` are then the equations that
        bring inputs together, `moving` the others, by path, each with its line.
    - `calls`: the equations that the present one is inside of.
    """

    assume_bounded: bool
    cut: frozenset = frozenset()
    zeros_cut: bool = True
    signs: dict = dataclasses.field(default_factory=dict)
    meetings: dict[Any, Meeting] = dataclasses.field(default_factory=dict)
    used: set = dataclasses.field(default_factory=set)
    held: frozenset = frozenset()
    opaque: set = dataclasses.field(default_factory=set)
    platforms: set = dataclasses.field(default_factory=set)
    looking: bool = False
    merging: dict = dataclasses.field(default_factory=dict)
    moving: dict = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)
    float_masks: set = dataclasses.field(default_factory=set)

    def of_array(self, const: Any) -> Known:
        """What is known of an array that the function holds."""
        if not (jnp.issubdtype(jnp.result_type(const), jnp.floating) and _is_mask(const)):
            return parameter(const, LARGE)
        self.float_masks.add(f"{jnp.result_type(const)} of shape {jnp.shape(const)}")
        return constant(const) if _MASKS in self.cut else parameter(const, LARGE)

    def line(self, eqn: jex.JaxprEqn) -> str:
        return line_of([*self.calls, eqn])

    def meet(self, path, new: Meeting) -> None:
        """Of a loop's steps, each of which may meet another mask, the strictest."""
        old = self.meetings.get((path, new.operand), new)
        limit, where = min(old.limit, new.limit), old.where | new.where
        self.meetings[path, new.operand] = dataclasses.replace(new, limit=limit, where=where)


def _is_mask(const: Any) -> bool:
    return jnp.ndim(const) > 0 and is_mask(np.asarray(const), alone=True)


def evaluate(context: Context, closed: Any, args: Sequence[Known], path=()) -> list[Known]:
    """What is known of the results of a jaxpr, from what is known of its arguments."""
    jaxpr = opened(closed)
    consts = [context.of_array(const) for const in getattr(closed, "consts", ())]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not _literal(v)}
    last |= dict.fromkeys((v for v in jaxpr.outvars if not _literal(v)), len(jaxpr.eqns))

    def read(atom):
        return _scalar(context, atom.val) if _literal(atom) else values[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        for atom in set(filter(lambda a: not _literal(a), eqn.invars)):
            if last[atom] == i:
                del values[atom]
        results = _equation(context, eqn, operands, (*path, i))
        values.update((v, x) for v, x in zip(eqn.outvars, results, strict=True) if v in last)
    return [read(atom) for atom in jaxpr.outvars]


def _literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def _equation(context: Context, eqn: jex.JaxprEqn, operands: list[Known], path) -> list[Known]:
    name = eqn.primitive.name.replace("-", "_")
    inner = called(eqn)
    if name in _CONTROL or inner is not None:
        context.calls.append(eqn)
        if name in _CONTROL:
            results = _CONTROL[name](context, eqn, operands, path)
        else:
            results = evaluate(context, inner, operands, path)
        context.calls.pop()
    else:
        if name == "platform_index":
            context.platforms.add(jax.default_backend())
        signed = _tells_zeros_apart(eqn, operands)
        if signed:
            operands = _with_signs(context, operands, path)
        computed = _computed(eqn, operands)
        settled = [x for x in computed or () if x is not None]
        if computed is not None and len(settled) == len(computed):
            return settled
        if name not in RULES:
            context.opaque.add(name)
        results = RULES.get(name, connect_all)(context, eqn, *operands)
        if computed is not None:
            results = list(map(_where_finite, results, _bound(eqn, operands)))
        if context.assume_bounded:
            results = assumed(context, eqn, operands, results, path)
        if context.looking:
            merges = _merges(operands, results)
            group = context.merging if merges else context.moving
            group.setdefault(path, (eqn, context.line(eqn)))
            if merges:  # What comes later is judged as if this did not.
                return [x.reading(lambda _: None) for x in results]
    if path in context.cut:
        results = [x.reading(lambda _: None) for x in results]
    return results


def _scalar(context: Context, value: Any) -> Known:
    """A number in the program; a parameter, if it equals one that the function holds."""
    if np.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        dtype = jnp.result_type(value)
        if any(np.asarray(held).astype(dtype) == value for held in context.held):
            return parameter(value, LARGE)
    return constant(value)


# What tells 0 from -0, which a product with zero does not: of complex numbers, at their branch
# cuts; bits; and the angle.
_BRANCHES = "acos acosh asin asinh atan atanh cbrt log log1p log2 pow rsqrt sign sqrt tan tanh"


def _tells_zeros_apart(eqn: jex.JaxprEqn, operands: Sequence[Known]) -> bool:
    name = eqn.primitive.name
    kinds = [x.dtype for x in operands if x.value is None]
    is_complex = any(jnp.issubdtype(kind, jnp.complexfloating) for kind in kinds)
    is_float = any(jnp.issubdtype(kind, jnp.inexact) for kind in kinds)
    return is_float and (
        name in ("atan2", "bitcast_convert_type") or (is_complex and name in _BRANCHES.split())
    )


def _with_signs(context: Context, operands: list[Known], path) -> list[Known]:
    """What decides the signs of zeros is read as well; a pass in which no zero cuts finds it."""
    if not context.zeros_cut:
        found = [x.reads for x in operands]
        old = context.signs.get(path, found)
        context.signs[path] = [either(a, b) for a, b in zip(old, found, strict=True)]
        return operands
    rows = context.signs.setdefault(path, [None] * len(operands))
    both = zip(operands, rows, strict=True)
    return [x.reading(lambda old, row=row: either(old, row)) for x, row in both]


def _merges(operands: Sequence[Known], results: Sequence[Known]) -> bool:
    """Whether an entry of the results reads together what no entry of some operand does."""
    rows = lambda x: set(np.unique(x.reads)) if x.reads is not None else set()
    found = set().union(*map(rows, results)) - {0}
    return any(x.reads is not None and not found <= rows(x) for x in operands)


def _computed(eqn: jex.JaxprEqn, operands: Sequence[Known]) -> list[Known | None] | None:
    """The results of constants: `None` in the place of one that another compilation may round
    otherwise. `None` where not all operands are known.
    """
    if not all(x.value is not None for x in operands) or eqn.effects or is_foreign(eqn):
        return None
    outs = _bound(eqn, operands)
    args = [x.value for x in operands]
    return [constant(out) if exact(eqn, args, out) else None for out in outs]


def _bound(eqn: jex.JaxprEqn, operands: Sequence[Known]) -> list[Any]:
    args = [jnp.asarray(x.value) for x in operands]
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return outs if eqn.primitive.multiple_results else [outs]


def _where_finite(x: Known, value: Any) -> Known:
    """What was computed shows where the result of constants is no number."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    finite = np.isfinite(np.asarray(value))
    low, high = np.where(finite, x.low, -np.inf), np.where(finite, x.high, np.inf)
    return dataclasses.replace(x, low=low, high=high)


# Loops and branches


def _scan(context: Context, eqn, operands: list[Known], path) -> list[Known]:
    """Step by step, so that a carry is known by position; a very long loop to a fixed point."""
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    held, carried = scan_counts(eqn)
    consts, carry, xs = operands[:held], operands[held : held + carried], operands[held + carried :]
    if length * _size(body) > _STEPS:
        xs = [_any_step(x) for x in xs]
        carry, outs = _to_fixed_point(
            carry, lambda carry: evaluate(context, body, [*consts, *carry, *xs], path)
        )
        ys = [_every_step(y, length) for y in outs[carried:]]
        return [*carry, *ys]
    rows = []
    for i in range(length)[:: -1 if eqn.params["reverse"] else 1]:
        steps = [_step(x, i) for x in xs]
        outs = evaluate(context, body, [*consts, *carry, *steps], path)
        carry, row = outs[:carried], outs[carried:]
        rows.append(row)
    rows = rows[:: -1 if eqn.params["reverse"] else 1]
    avals = [v.aval for v in eqn.outvars[carried:]]
    ys = [_stacked([row[k] for row in rows], aval) for k, aval in enumerate(avals)]
    return [*carry, *ys]


def _size(closed: Any) -> int:
    """How many equations there are, those of a loop once for each step."""
    eqns = opened(closed).eqns
    return len(eqns) + sum(
        _size(inner) * eqn.params.get("length", 1)
        for eqn in eqns
        for inner in jex.jaxprs_in_params(eqn.params)
    )


def _also_assumed(fn: Callable[..., Known]) -> Callable[..., Known]:
    """Applies a function of what is known to what is known under the assumption as well."""

    @functools.wraps(fn)
    def both(xs, *args):
        parts = xs if isinstance(xs, Sequence) else [xs]
        result = fn(xs, *args)
        if all(x.assumed is None for x in parts):
            return result
        twins = [x.assumed or x for x in parts]
        twin = fn(twins if isinstance(xs, Sequence) else twins[0], *args)
        rests_on = frozenset().union(*(x.rests_on for x in twins))
        twin = dataclasses.replace(twin, rests_on=rests_on)
        return dataclasses.replace(result, assumed=twin)

    return both


@_also_assumed
def _step(x: Known, i: int) -> Known:
    row = lambda a: a[i] if np.ndim(a) == len(x.shape) else a
    reads = None if x.reads is None or not x.reads[i].any() else x.reads[i]
    value = None if x.value is None else x.value[i]
    return Known(x.shape[1:], x.dtype, reads, row(x.low), row(x.high), value)


def _any_step(x: Known) -> Known:
    reads = None if x.reads is None else np.bitwise_or.reduce(x.reads, 0)
    ends = [np.broadcast_to(end, x.shape) for end in (x.low, x.high)]
    return Known(x.shape[1:], x.dtype, reads, ends[0].min(0), ends[1].max(0))


def _every_step(y: Known, length: int) -> Known:
    reads = None if y.reads is None else np.broadcast_to(y.reads, (length, *y.reads.shape))
    return Known((length, *y.shape), y.dtype, reads, y.low, y.high)


@_also_assumed
def _stacked(rows: list[Known], aval: Any) -> Known:
    if not rows:
        return known(aval)
    words = [row.reads.shape[-1] for row in rows if row.reads is not None]
    reads = None
    if words:
        none = np.zeros((*rows[0].shape, words[0]), np.uint64)
        reads = np.stack([none if row.reads is None else row.reads for row in rows])
    stacked = lambda end: np.stack([np.broadcast_to(getattr(row, end), row.shape) for row in rows])
    value = None
    if all(row.value is not None for row in rows):
        value = jnp.stack([jnp.asarray(row.value) for row in rows])
    return Known(aval.shape, aval.dtype, reads, stacked("low"), stacked("high"), value)


def _to_fixed_point(carry: list[Known], step) -> tuple[list[Known], list[Known]]:
    """The carry joined with its results until it no longer reads more; no bounds survive, but
    that all is finite.
    """
    carry = [_loose(x, x) for x in carry]
    while True:
        outs = step(carry)
        joined = [_loose(x, y) for x, y in zip(carry, outs, strict=False)]
        if all(_same(x, y) for x, y in zip(carry, joined, strict=True)):
            return carry, outs
        carry = joined


def _loose(x: Known, y: Known) -> Known:
    """What reads as both do; finite if both are."""
    finite = x.finite.all() and y.finite.all()
    return (free if finite else unknown)(x.shape, x.dtype, either(x.reads, y.reads))


def _same(x: Known, y: Known) -> bool:
    if (x.reads is None) != (y.reads is None) or x.finite.all() != y.finite.all():
        return False
    return x.reads is None or y.reads is None or np.array_equal(x.reads, y.reads)


def _while(context: Context, eqn, operands: list[Known], path) -> list[Known]:
    """As often as the condition is known to hold; where it is not, to a fixed point.

    Under `vmap` the condition is an array, and a loop of its own in each of its entries.
    """
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    a, b = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test_consts, body_consts, carry = operands[:a], operands[a : a + b], operands[a + b :]

    def once(carry, which=None):
        outs = evaluate(context, body, [*body_consts, *carry], (*path, 1))
        if which is None:
            return outs
        return [_chosen(which, new, old) for new, old in zip(outs, carry, strict=True)]

    budget = _STEPS
    while True:
        (holds,) = evaluate(context, test, [*test_consts, *carry], (*path, 0))
        budget -= _size(body) + 1
        if not holds.constant.all() or budget < 0:
            break
        which = np.broadcast_to(holds.low > 0, holds.shape)
        if not which.any():
            return carry
        carry = once(carry, None if which.all() else holds)

    def step(carry):
        (holds,) = evaluate(context, test, [*test_consts, *carry], (*path, 0))
        return [_decided(x, holds) for x in once(carry)]

    return [_decided(x, holds) for x in _to_fixed_point(carry, step)[0]]


def _chosen(which: Known, new: Known, old: Known) -> Known:
    chosen = select(new, _wide(which, new.shape), old, new)
    if chosen.value is None and new.value is not None and old.value is not None:
        rows = np.expand_dims(which.low > 0, _last(len(new.shape) - len(which.shape)))
        return constant(jnp.where(rows, new.value, old.value))
    return chosen


def _wide(x: Known, shape: tuple[int, ...]) -> Known:
    """With new axes at its end."""
    more = len(shape) - len(x.shape)
    ends = [
        np.broadcast_to(np.expand_dims(np.broadcast_to(end, x.shape), _last(more)), shape)
        for end in (x.low, x.high)
    ]
    reads = x.reads
    if reads is not None:
        where = tuple(range(len(x.shape), len(shape)))
        reads = np.broadcast_to(np.expand_dims(reads, where), (*shape, reads.shape[-1]))
    return Known(shape, x.dtype, reads, ends[0], ends[1])


def _last(count: int) -> tuple[int, ...]:
    return tuple(range(-count, 0))


def _decided(x: Known, which: Known) -> Known:
    """Read besides what decides about its entries."""
    reads = _wide(which, x.shape).reads
    return x if reads is None else x.reading(lambda old: either(old, reads))


def _cond(context: Context, eqn, operands: list[Known], path) -> list[Known]:
    """The branch, if it is known; else what any branch reads, and the choice."""
    which, *operands = operands
    branches = eqn.params["branches"]
    run = lambda i: evaluate(context, branches[i], operands, (*path, i))
    if which.constant.all():
        return run(int(np.clip(which.low, 0, len(branches) - 1)))
    results = [run(i) for i in range(len(branches))]
    return [_decided(_either(parts), which) for parts in zip(*results, strict=True)]


@_also_assumed
def _either(parts: Sequence[Known]) -> Known:
    shape, dtype = parts[0].shape, parts[0].dtype
    low = functools.reduce(np.minimum, [part.low for part in parts])
    high = functools.reduce(np.maximum, [part.high for part in parts])
    return Known(shape, dtype, union(shape, *parts), low, high)


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond}


# The question


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the structure of a function says.

    - `holds`: no forbidden pair is connected.
    - `connected`: `connected[t, j]`, whether a chain of operations leads from input j to output t.
    - `assumptions`: what else has to hold, in sentences.
    - `obstacles`: what connects forbidden pairs, in sentences.
    - `meetings`: what was assumed of scores, by path; `confirmed` says whether it is so.
    """

    holds: bool
    connected: Bool[np.ndarray, "T_out T_in"]
    assumptions: tuple[str, ...]
    obstacles: tuple[str, ...]
    meetings: dict[Any, Meeting] = dataclasses.field(default_factory=dict)

    def confirmed(self, sizes: Float[np.ndarray, "E M"]) -> "Proof":
        """What is left of it, given how large the scores of each meeting are in its limit."""
        largest = np.where(np.isnan(sizes), np.inf, sizes).max(0)
        if (largest < 1).all():
            return self
        broken = [
            f"In {meeting.line} scores that meet a mask of {-10 * meeting.limit:.2g} are of size "
            f"{size * meeting.limit:.2g}, on x or an edit of it. A proof takes them to be below "
            f"{meeting.limit:.2g}."
            for meeting, size in zip(self.meetings.values(), largest, strict=True)
            if not size < 1
        ]
        return dataclasses.replace(
            self, holds=False, assumptions=(), obstacles=tuple(dict.fromkeys(broken)), meetings={}
        )


@dataclasses.dataclass(frozen=True)
class Question:
    """A traced function, its input, and where positions lie in them; if along several axes, how
    long those of the output were. `held` are the numbers that count as parameters.
    """

    closed: Any
    leaves: Sequence[Any]
    in_axes: Sequence[int]
    out_axes: Sequence[int]
    out_lengths: Sequence[int] = ()
    held: frozenset = frozenset()

    def connected(self, context: Context, columns=None) -> Bool[np.ndarray, "T_out columns"]:
        """Whether a chain of operations leads from input `columns[k]` to output t."""
        length = np.shape(self.leaves[0])[self.in_axes[0]]
        columns = np.arange(length) if columns is None else np.asarray(columns)
        words = max(1, min(-(-len(columns) // 64), _BYTES // (8 * _largest(self.closed))))
        context.held = self.held
        parts = []
        for start in range(0, len(columns), 64 * words):
            chosen = columns[start : start + 64 * words]
            pairs = zip(self.leaves, self.in_axes, strict=True)
            args = [_input(x, axis, chosen) for x, axis in pairs]
            outs = self._outputs(context, args)
            parts.append(_by_position(outs, self.out_axes, len(chosen)))
        return np.concatenate(parts, 1)

    def _outputs(self, context: Context, args: Sequence[Known]) -> list[Known]:
        context.signs = {}
        outs = evaluate(context, self.closed, args)
        if not context.signs:
            return outs
        strict = Context(context.assume_bounded, context.cut, zeros_cut=False, held=self.held)
        evaluate(strict, self.closed, args)
        context.signs = strict.signs
        return evaluate(context, self.closed, args)


def prove(
    question: Question, allowed: Bool[np.ndarray, "T_out T_in"], assume_bounded: bool
) -> Proof:
    """Whether no chain of operations leads from an input to an output that must not read it."""
    if (ref := first_ref(question.closed)) is not None:
        return _without_rule_for_refs(ref, allowed)
    context = Context(assume_bounded=False)
    found = question.connected(context)
    if assume_bounded and (found & ~allowed).any():
        context = Context(assume_bounded=True)
        found = question.connected(context)
    if (found & ~allowed).any():
        return Proof(False, found, (), _obstacles(question, context, found & ~allowed))
    meetings = {name: context.meetings[name] for name in context.used}
    return Proof(True, found, _assumptions(context, meetings), (), meetings)


def _without_rule_for_refs(eqn: jex.JaxprEqn, allowed) -> Proof:
    return Proof(
        False,
        np.ones(allowed.shape, bool),
        (),
        (
            f"`{eqn.primitive.name}` in {line_of([eqn])} makes or uses a Ref. The proof does not "
            "follow what is written there, and takes every output to read every input.",
        ),
    )


def _assumptions(context: Context, meetings: dict[Any, Meeting]) -> tuple[str, ...]:
    scores = [
        f"Scores that meet a mask of {-10 * limit:.2g} are below {limit:.2g} in size."
        for limit in sorted(meeting.limit for meeting in meetings.values())
    ]
    platforms = [
        f"The function asks for its platform (lax.platform_dependent): this holds on {name}."
        for name in sorted(context.platforms)
    ]
    return tuple(dict.fromkeys([*scores, *platforms]))


def _obstacles(question: Question, context: Context, forbidden) -> tuple[str, ...]:
    """A smallest set of operations without which nothing forbidden is connected."""
    columns = np.flatnonzero(forbidden.any(0))[:64]
    allowed = ~forbidden[:, columns]
    look = Context(context.assume_bounded, looking=True)
    question.connected(look, columns)

    def holds(cut) -> bool:
        trial = Context(context.assume_bounded, frozenset(cut))
        return not (question.connected(trial, columns) & ~allowed).any()

    candidates = [_MASKS] * bool(look.float_masks) + list(look.merging)
    if not holds(candidates):
        candidates += list(look.moving)
    if not holds(candidates):
        return ("The output is the input, moved.",)
    equations = {**look.moving, **look.merging}
    blamed = _smallest(holds, candidates)
    lines = []
    for path in blamed:
        if path == _MASKS:
            lines += map(_of_a_mask, sorted(look.float_masks))
            continue
        trial = Context(context.assume_bounded, frozenset(set(blamed) - {path}))
        reached = (question.connected(trial, columns) & ~allowed).any(1)
        eqn, line = equations[path]
        outputs = [place(t, question.out_lengths) for t in np.flatnonzero(reached)]
        lines.append(_sentence(eqn, line, outputs, context.opaque))
    return tuple(dict.fromkeys(lines))


def _smallest(holds, candidates: list, base: tuple = ()) -> list:
    """QuickXplain (Junker 2004): a set with `holds` from which nothing can be left out."""
    if len(candidates) == 1:
        return candidates
    half = len(candidates) // 2
    first, second = candidates[:half], candidates[half:]
    needed = [] if holds([*base, *first]) else _smallest(holds, second, (*base, *first))
    rest = [] if needed and holds([*base, *needed]) else _smallest(holds, first, (*base, *needed))
    return [*rest, *needed]


def _sentence(eqn: jex.JaxprEqn, line: str, outputs, opaque) -> str:
    which = f"outputs {outputs[0]} to {outputs[-1]}" if len(outputs) > 1 else f"output {outputs[0]}"
    why = ", which the proof has no rule for," if eqn.primitive.name in opaque else ""
    return f"`{eqn.primitive.name}`{why} in {line} connects {which} with what must not be read."


def _of_a_mask(what: str) -> str:
    return (
        f"An array of zeros and ones that fn holds, {what}, counts as a parameter, which may be "
        "any number. If it is a mask, as Flax's make_causal_mask returns, make it one of bools "
        "outside fn: mask > 0."
    )


def _input(leaf: Any, axis: int, columns: np.ndarray) -> Known:
    """Position `columns[k]` of the axis reads bit k."""
    shape, words = np.shape(leaf), -(-len(columns) // 64)
    bits = np.zeros((shape[axis], words * 64), np.uint8)
    bits[columns, np.arange(len(columns))] = 1
    rows = packed(bits).reshape(*(-1 if i == axis else 1 for i in range(len(shape))), words)
    reads = np.broadcast_to(rows, (*shape, words))
    return free(shape, leaf.dtype, reads)


def _by_position(outs: Sequence[Known], out_axes, count: int) -> Bool[np.ndarray, "T columns"]:
    found = np.zeros((outs[0].shape[out_axes[0]], count), bool)
    for out, axis in zip(outs, out_axes, strict=True):
        if out.reads is not None:
            rows = np.moveaxis(out.reads, axis, 0).reshape(len(found), -1, out.reads.shape[-1])
            row = np.bitwise_or.reduce(rows, 1)
            found |= unpacked(row)[:, :count] > 0
    return found


def _largest(closed: Any) -> int:
    jaxpr = opened(closed)
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [_largest(inner) for inner in jex.subjaxprs(jaxpr)]
    return max([1, *sizes, *inner])
