"""How far back the statistics of a step reach, and sums over that: one number a step and group.

Over all steps so far; over them with a decay, so that each step weighs that share of what the next
one weighs, but that a step of which nothing counts ages none; or over a window of the last steps.
Nothing here subtracts two large sums. All arrays have time first.

A window has two ends, and to take off what leaves it would lose digits. So time is cut into blocks
as long as the window. What it covers is the end of one block and the beginning of the next, and
both are sums so far, the first from behind (van Herk's way to take a maximum).
"""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ._normalize import divided

Step = Float[Array, "time #groups *ones"]  # One number a step and group.
Mean = tuple[Step, Step]  # in two parts


class Reach(NamedTuple):
    decay: float | None = None
    window: int | None = None


class Counts(NamedTuple):
    """How many entries count: in each step, up to it, and before it.

    With a decay, what they weigh, and the share that each step keeps of the steps before it.
    """

    own: Array
    so_far: Array
    before: Array
    kept: Array | None = None


class Statistics(NamedTuple):
    """Of so many entries the mean, `origin + d`, and the sum of squares about it."""

    entries: Array
    origin: Step
    d: Step
    square: Step


def counts_of(own: Array, dtype, reach: Reach) -> Counts:
    if reach.decay is None:
        so_far = jnp.cumsum(own, 0)
        if reach.window is not None:  # Of integers the difference is exact.
            so_far = so_far - _shifted(so_far, reach.window)
        return Counts(*(a.astype(dtype) for a in (own, so_far, so_far - own)))
    own = own.astype(dtype)
    kept = share_kept(own, reach.decay)
    so_far = _so_far(own, kept)
    return Counts(own, so_far, pinned(_found(so_far, kept)), kept)


def share_kept(own: Array, decay: float) -> Array:
    return jnp.where(own > 0, jnp.asarray(decay, own.dtype), 1)


def pinned(product: Array) -> Array:
    """A product, or quotient, that is rounded for all who read it.

    XLA for CPU computes a number once for each fusion that reads it, and in some of them a product
    and the sum behind it without a rounding in between (an FMA). Another origin by an ulp here than
    there, and d is the wrong rest: at 1e6 y was off by 1. A clamp stands in between and alters no
    number; barriers and `reduce_precision` are gone by then.
    """
    most = jnp.full((), jnp.finfo(product.dtype).max, product.dtype)
    return jax.lax.clamp(-most, product, most)


def mean_of(total: Step, count: Array) -> Step:
    return divided(total, jnp.broadcast_to(jnp.maximum(count, 1), total.shape))


def statistics(counts: Counts, reach: Reach, a: Step, b: Step, w: Step) -> Statistics:
    """From the mean `a + b` of each step by itself, and its sum of squares w about that."""
    if reach.window is None:
        return _statistics_so_far(counts, a, b, w)
    beginning, end = _two_ends(_in_blocks((counts.own, a, b, w), reach.window))
    found = _merged(beginning, jax.tree.map(_one_block_before, end))
    return _in_line(found, len(a))


def _statistics_so_far(counts: Counts, a: Step, b: Step, w: Step) -> Statistics:
    """A sum of x is off by ulps of x, and one about the first step by ulps of how far the mean has
    come since. So these make the origins alone. n_t d_t, by which they miss, grows
    from step to step by what x_t differs from the new origin, and by n_(t-1) times how far that has
    moved; it is a cumulative sum of small numbers. So is that of the squares, none of them
    negative: of the step's own about its own mean, and, of all before, what the mean has moved.
    """
    so_far = lambda v: _so_far(v, counts.kept)
    # Of one number that is not 0 the sum is exact.
    first = _so_far(jnp.where((counts.before == 0) & (counts.own > 0), a, 0))
    since = mean_of(so_far(counts.own * ((a - first) + b)), counts.so_far)
    origin = first + pinned(jax.lax.stop_gradient(since))
    moved = jnp.where(counts.before == 0, 0, _one_before(origin) - origin)
    d = mean_of(so_far(counts.own * ((a - origin) + b) + counts.before * moved), counts.so_far)

    apart_by = (a - _one_before(origin)) + (b - _one_before(d))
    between = counts.own * mean_of(counts.before, counts.so_far) * jnp.square(apart_by)
    square = so_far(w + jnp.where(counts.before == 0, 0, between))
    return Statistics(counts.so_far, origin, d, square)


def _merged(one: Statistics, other: Statistics) -> Statistics:
    """Of both together (Chan's formula, of means in two parts)."""
    count = one.entries + other.entries
    apart_by = (other.origin - one.origin) + (other.d - one.d)
    share = mean_of(other.entries, count)
    origin = one.origin + pinned(jax.lax.stop_gradient(share * apart_by))
    from_origin = lambda s: s.entries * ((s.origin - origin) + s.d)
    d = mean_of(from_origin(one) + from_origin(other), count)
    both = (one.entries > 0) & (other.entries > 0)
    between = jnp.where(both, one.entries * share * jnp.square(apart_by), 0)
    return Statistics(count, origin, d, one.square + other.square + between)


def sums_behind(
    counts: Counts, reach: Reach, own: Mean, mean: Mean, k: Step, v: Step
) -> tuple[Step, Step]:
    """Over the steps t behind each step s that reach back to it, by what it weighs for them: the
    sum of k_t, and that of v_t + (own_s - mean_t) * k_t, where `own` is the mean of a step alone.

    Means of windows may jump, back and forth, while s is within all of them. So a window's mean is
    told from that of its part in one block, and these parts, one within the other, move as means
    so far do: never by much of the spread of the windows that they are in.
    """
    if reach.window is None:
        kept = None if counts.kept is None else _one_later(counts.kept)
        return _from_behind(_sums_before)(k, v, own, mean, kept)

    blocks = _in_blocks((counts.own, *own, jnp.zeros_like(k)), reach.window)
    beginning, end = ((part.origin, part.d) for part in _two_ends(blocks))
    own, mean, k, v = _in_blocks((own, mean, k, v), reach.window)
    told = lambda part, mean, k, v: v + k * _difference(part, mean)
    here = jax.vmap(_from_behind(_sums_before))(k, told(beginning, mean, k, v), own, beginning)
    mean, k, v = jax.tree.map(_one_block_behind, (mean, k, v))
    there = jax.vmap(_sums_so_far)(k, told(end, mean, k, v), own, end)
    return _in_line(jax.tree.map(jnp.add, here, there), len(counts.own))


def _sums_so_far(
    k: Step, v: Step, own: Mean, mean: Mean, kept: Array | None = None, before: bool = False
) -> tuple[Step, Step]:
    """The sums of `sums_behind`, over the steps up to each, or before it.

    The difference of two means is the sum of the moves in between. So a part of the second grows,
    with each step, by its move times the first.
    """
    sums = of_k, _ = _so_far(k, kept), _so_far(v, kept)
    move = _difference(mean, jax.tree.map(_one_before, mean))
    moved = _so_far(move * _found(of_k, kept), kept)
    of_k, of_v = (_found(a, kept) for a in sums) if before else sums
    return of_k, of_v + moved + _difference(own, mean) * of_k


_sums_before = ft.partial(_sums_so_far, before=True)


def _difference(one: Mean, other: Mean) -> Step:
    return (one[0] - other[0]) + (one[1] - other[1])


def _so_far(a: Step, kept: Array | None = None) -> Step:
    """The sum over all steps up to each, of which each keeps its share of those before."""
    return jnp.cumsum(a, 0) if kept is None else _decayed(kept, a)


def _found(so_far: Step, kept: Array | None) -> Step:
    """What each step finds of the sum over those before it."""
    return _one_before(so_far) if kept is None else kept * _one_before(so_far)


def _decayed(kept: Array, a: Step) -> Step:
    """S_t = kept_t * S_(t-1) + a_t, in log2(time) rounds."""

    def both(one, other):
        return other[0] * one[0], other[0] * one[1] + other[1]

    return jax.lax.associative_scan(both, (kept, a))[1]


def _one_before(a: Array) -> Array:
    return _shifted(a, 1)


def _one_later(a: Array) -> Array:
    return jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])


def _shifted(a: Array, steps: int) -> Array:
    steps = min(steps, len(a))
    return jnp.concatenate([jnp.zeros_like(a[:steps]), a[: len(a) - steps]])


def _from_behind(f: Callable) -> Callable:
    """f, which goes from a first step on, from the last step back."""
    flipped = lambda arrays: jax.tree.map(lambda a: jnp.flip(a, 0), arrays)
    return lambda *arrays: flipped(f(*flipped(arrays)))


def _in_blocks(arrays: Any, window: int) -> Any:
    """Time as (blocks, window), filled up with zeros."""

    def cut(a: Array) -> Array:
        size = min(window, max(len(a), 1))
        a = jnp.concatenate([a, jnp.zeros((-len(a) % size, *a.shape[1:]), a.dtype)])
        return a.reshape(-1, size, *a.shape[1:])

    return jax.tree.map(cut, arrays)


def _in_line(blocks: Any, steps: int) -> Any:
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:steps], blocks)


def _two_ends(blocks: Any) -> tuple[Statistics, Statistics]:
    """Of each block, from its first step up to each, and from each to its last step."""

    def so_far(own, a, b, w):
        counts = counts_of(own.astype(jnp.int32), a.dtype, Reach())
        return _statistics_so_far(counts, a, b, w)

    return jax.vmap(so_far)(*blocks), jax.vmap(_from_behind(so_far))(*blocks)


def _one_block_before(end: Array) -> Array:
    """For each step what its window covers of the block before: of the last of a block, nothing."""
    return jnp.concatenate([_one_before(end)[:, 1:], jnp.zeros_like(end[:, :1])], 1)


def _one_block_behind(a: Array) -> Array:
    """For the first step of that part what the step has whose window it is in."""
    return jnp.concatenate([jnp.zeros_like(a[:, :1]), _one_later(a)[:, :-1]], 1)
