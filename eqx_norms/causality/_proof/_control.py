"""Loops and branches. `evaluate` is given, for they evaluate the programs that they hold."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ..._jaxprs import opened, scan_counts
from . import _reads as r
from ._elementwise import select
from ._known import (
    Known,
    all_read,
    chained,
    constant,
    free,
    full,
    known,
    moved,
    of_entries,
    together,
    unknown,
)

# A loop is gone through step by step up to so many equations, else to a fixed point.
_STEPS = 50_000


def scan(evaluate: Callable, context, eqn, operands: list[Known], path) -> list[Known]:
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


@dataclasses.dataclass(frozen=True)
class _Aval:
    shape: tuple[int, ...]
    dtype: Any


@_also_assumed
def _step(x: Known, i: int) -> Known:
    step = moved(x, _Aval(x.shape[1:], x.dtype), lambda a: a[i if len(a) > 1 else 0])
    return dataclasses.replace(step, value=None if x.value is None else x.value[i])


def _any_step(x: Known) -> Known:
    low, high = x.entries(x.low).min(0), x.entries(x.high).max(0)
    return of_entries(_Aval(x.shape[1:], x.dtype), r.reduced(x.reads, (0,)), low, high)


def _every_step(y: Known, length: int) -> Known:
    return moved(y, _Aval((length, *y.shape), y.dtype), lambda a: a[None])


@_also_assumed
def _stacked(rows: list[Known], aval: Any) -> Known:
    if not rows:
        return known(aval)
    stacked = chained(aval, rows, 0, stacked=True)
    value = None
    if all(row.value is not None for row in rows):
        value = jnp.stack([jnp.asarray(row.value) for row in rows])
    return dataclasses.replace(stacked, value=value)


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
    make = free if x.finite and y.finite else unknown
    return make(x.shape, x.dtype, r.union(x.reads, y.reads))


def _same(x: Known, y: Known) -> bool:
    return x.finite == y.finite and r.equal(x.reads, y.reads)


def loop(evaluate: Callable, context, eqn, operands: list[Known], path) -> list[Known]:
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
        if not holds.constant or budget < 0:
            break
        which = holds.low > 0
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
        rows = np.expand_dims(full(which, which.low > 0), _last(new, which))
        return constant(jnp.where(rows, new.value, old.value))
    return chosen


def _wide(x: Known, shape: tuple[int, ...]) -> Known:
    """With new axes at its end."""
    more = tuple(range(len(x.shape) - len(shape), 0))
    return moved(x, _Aval(shape, x.dtype), lambda a: np.expand_dims(a, more))


def _last(new: Known, which: Known) -> tuple[int, ...]:
    return tuple(range(len(which.shape) - len(new.shape), 0))


def _decided(x: Known, which: Known) -> Known:
    """Read besides what decides about its entries."""
    reads = _wide(which, x.shape).reads
    return x if reads is None else x.reading(lambda old: r.union(old, reads))


def branch(evaluate: Callable, context, eqn, operands: list[Known], path) -> list[Known]:
    """The branch, if it is known; else what any branch reads, and the choice."""
    which, *operands = operands
    branches = eqn.params["branches"]
    run = lambda i: evaluate(context, branches[i], operands, (*path, i))
    if which.constant:
        return run(int(np.clip(which.low[0], 0, len(branches) - 1)))
    results = [run(i) for i in range(len(branches))]
    return [_decided(_either(parts), which) for parts in zip(*results, strict=True)]


@_also_assumed
def _either(parts: Sequence[Known]) -> Known:
    shape, dtype = parts[0].shape, parts[0].dtype
    labels, bounds = together(len(shape), *parts)
    low = functools.reduce(np.minimum, [part.low for part in bounds])
    high = functools.reduce(np.maximum, [part.high for part in bounds])
    return known(_Aval(shape, dtype), all_read(len(shape), *parts), labels, low, high)
