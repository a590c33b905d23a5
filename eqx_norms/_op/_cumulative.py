"""The operation over what has come so far: statistics of step t over all entries of steps 0 to t.

    y_t = (x_t - mean_t) * rstd_t * weight + bias,    rstd_t = 1 / sqrt(variance_t + eps)

With a decay each step weighs that share of what the next step weighs; a step of which nothing
counts ages none. x has the shape (time, groups, *rest), and each group is by itself. Nothing here
subtracts two large sums: `docs/backward.md` derives it. The order of the file is that of
`_normalize.py`; below it is the same one step at a time.
"""

import functools as ft
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._lowering import again, apart
from ._normalize import (
    _only,
    _sum_to,
    _to_compute_dtype,
    as_jax_has_it,
    compute_dtype,
    divided,
    fit,
    in_both_modes,
    together,
)
from ._plain import is_plain

Example = Float[Array, "time groups *rest"]
Step = Float[Array, "time #groups *ones"]  # One number a step and group, with the rank of x.
Mask = Bool[Array, "..."]  # of the rank of x, and broadcasts to its shape


class _Spec(NamedTuple):
    """What is known before any array comes; hashable, so that traces are cached on it."""

    eps: float
    bias_shape: tuple[int, ...] | None
    decay: float | None = None
    live: tuple[bool, ...] = (True, True, True)  # Whether x, weight, bias have a derivative.


class _Residuals(NamedTuple):
    """What the backward keeps: x in its own dtype, three numbers a step, the weight, the mask."""

    x: Example
    weight: Array | None
    where: Mask | None
    origin: Step
    d: Step
    rstd: Step


class _Pass(NamedTuple):
    """What the backward reads in one pass over x: x and g cast up, and the residuals."""

    x: Example
    g: Example
    weight: Array | None
    where: Mask | None
    origin: Step
    d: Step
    rstd: Step

    def xc(self) -> Example:
        return _centred(self.x, self.where, self.origin, self.d)

    def gw(self) -> Example:
        return self.g if self.weight is None else self.g * self.weight

    def again(self, dtype) -> "_Pass":
        x, g, *rest = self
        return _Pass(again(x, dtype), again(g, dtype), *jax.tree.map(again, rest))


class _Counts(NamedTuple):
    """How many entries count: in each step, up to it, and before it.

    With a decay, what they weigh, and the share that each step keeps of the steps before it.
    """

    own: Array
    so_far: Array
    before: Array
    kept: Array | None = None


def _counts(x: Example, where: Mask | None, decay: float | None) -> _Counts:
    size, shape = math.prod(x.shape[2:]), (-1,) + (1,) * (x.ndim - 1)
    if decay is not None:
        own = _own(x, where).astype(compute_dtype(x))
        kept = _share_kept(own, decay)
        so_far = _so_far(own, kept)
        return _Counts(own, so_far, _pinned(_found(so_far, kept)), kept)
    if where is None:
        # As floats: there may be more entries than an int32 can count.
        so_far = jnp.arange(1, 1 + len(x), dtype=compute_dtype(x)).reshape(shape) * size
        return _Counts(jnp.full_like(so_far, size), so_far, so_far - size)
    own = _own(x, where)
    so_far = jnp.cumsum(own, 0)
    return _Counts(*(a.astype(compute_dtype(x)) for a in (own, so_far, so_far - own)))


def _own(x: Example, where: Mask | None) -> Array:
    where = jnp.ones((len(x),) + (1,) * (x.ndim - 1), bool) if where is None else where
    own = where.sum(range(2, x.ndim), jnp.int32, keepdims=True)
    own = own * (math.prod(x.shape[2:]) // max(math.prod(where.shape[2:]), 1))
    return jnp.broadcast_to(own, (len(x), *own.shape[1:]))


def _share_kept(own: Array, decay: float) -> Array:
    return jnp.where(own > 0, jnp.asarray(decay, own.dtype), 1)


def _in_step(a: Example) -> Step:
    return a.sum(range(2, a.ndim), keepdims=True)


def _so_far(a: Step, kept: Array | None = None) -> Step:
    """The sum over all steps up to each, of which each keeps its share of those before."""
    return jnp.cumsum(a, 0) if kept is None else _decayed(kept, a)


def _found(so_far: Step, kept: Array | None) -> Step:
    """What each step finds of the sum over those before it."""
    return _one_before(so_far) if kept is None else kept * _one_before(so_far)


def _from_later(a: Step, kept: Array | None) -> Step:
    """The sum over all steps behind each: the transpose of `_so_far`, less the step itself."""
    if kept is None:
        return _one_later(jax.lax.cumsum(a, 0, reverse=True))
    return _one_later(kept * _decayed(_one_later(kept)[::-1], a[::-1])[::-1])


def _decayed(kept: Array, a: Step) -> Step:
    """S_t = kept_t * S_(t-1) + a_t, in log2(time) rounds."""

    def both(one, other):
        return other[0] * one[0], other[0] * one[1] + other[1]

    return jax.lax.associative_scan(both, (kept, a))[1]


def _one_before(a: Step) -> Step:
    return jnp.concatenate([jnp.zeros_like(a[:1]), a[:-1]])


def _one_later(a: Step) -> Step:
    return jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])


def _pinned(product: Array) -> Array:
    """A product, or quotient, that is rounded for all who read it.

    XLA for CPU computes a number once for each fusion that reads it, and in some of them a product
    and the sum behind it without a rounding in between (an FMA). Another origin by an ulp here than
    there, and d is the wrong rest: at 1e6 y was off by 1. A clamp stands in between and alters no
    number; barriers and `reduce_precision` are gone by then.
    """
    most = jnp.finfo(product.dtype).max
    return jax.lax.clamp(-most, product, most)


def _mean(total: Step, count: Array) -> Step:
    return divided(total, jnp.broadcast_to(jnp.maximum(count, 1), total.shape))


def _centred(x: Example, where: Mask | None, origin: Step, d: Step) -> Example:
    return _only(where, (x - origin) - d)


def _moves(x: Example, where: Mask | None, origin: Step, d: Step, counts: _Counts) -> Step:
    """By how much each step moves the mean; 0 for the first, which has no mean before it."""
    from_mean = _in_step(_centred(x, where, _one_before(origin), _one_before(d)))
    return jnp.where(counts.before == 0, 0, _mean(from_mean, counts.so_far))


def _forward(spec: _Spec, x: Example, weight, bias, where, kept: bool = True):
    """`(y, residuals)`. The mean is `origin + d`, both of each step.

    A sum of x by itself would be off by ulps of x, and one about the first step by ulps of how far
    the mean has come since. So these make the origins alone. n_t d_t, by which they miss, grows
    from step to step by what x_t differs from the new origin, and by n_(t-1) times how far that has
    moved; it is a cumulative sum of small numbers. So is that of the squares, none of them
    negative: of the step's own about its own mean, and, of all before, what the mean has moved.
    """

    def next_pass(wide: Array, *others: Array) -> list[Array]:
        first = again(wide, x.dtype, alone=not kept)
        return [first, *(again(a, alone=not kept) for a in others)]

    counts = _counts(x, where, spec.decay)
    so_far = ft.partial(_so_far, kept=counts.kept)
    wide = _only(where, _to_compute_dtype(x))

    # Of each step, in two parts. y is the same for any origin, so that origins have no derivative.
    a = _pinned(jax.lax.stop_gradient(_mean(_in_step(wide), counts.own)))
    wide, read_a = next_pass(wide, a)
    b = _mean(_in_step(_only(where, wide - read_a)), counts.own)
    wide, read_a, read_b = next_pass(wide, a, b)
    w = _in_step(jnp.square(_centred(wide, where, read_a, read_b)))

    if where is None:
        first = a[:1]
    else:  # Of one number that is not 0 the sum is exact.
        first = _so_far(jnp.where((counts.before == 0) & (counts.own > 0), a, 0))
    since = _mean(so_far(counts.own * ((a - first) + b)), counts.so_far)
    origin = first + _pinned(jax.lax.stop_gradient(since))
    moved = jnp.where(counts.before == 0, 0, _one_before(origin) - origin)
    d = _mean(so_far(counts.own * ((a - origin) + b) + counts.before * moved), counts.so_far)

    apart_by = (a - _one_before(origin)) + (b - _one_before(d))
    between = counts.own * _mean(counts.before, counts.so_far) * jnp.square(apart_by)
    square = so_far(w + jnp.where(counts.before == 0, 0, between))
    # Of nothing it is 1: with eps=0 rstd would be infinite, and 0 * rstd no number.
    var = jnp.where(counts.so_far == 0, 1, _mean(square, counts.so_far))
    rstd = jax.lax.rsqrt(var + spec.eps)

    residuals = _Residuals(x, weight, where, origin, d, rstd)
    wide, origin, d, rstd = next_pass(wide, origin, d, rstd)
    y = _centred(wide, where, origin, d) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return _only(where, y), residuals


def _backward(spec: _Spec, residuals: _Residuals, g: Example):
    """`(dx, dweight, dbias)` for the cotangent g of y. With gw = g * weight, n_t entries so far,

    k_s = rstd_s^3 * sum(gw_s * xc_s) / n_s,    scale_t = sum over s >= t of k_s
    shift_t = sum over s >= t of rstd_s * sum(gw_s) / n_s
            - sum over s > t of (mean_s - mean_(s-1)) * scale_s
    dx_t = rstd_t * gw_t - xc_t * scale_t - shift_t,    dweight = g * xhat,    dbias = g.

    With a decay each sum over s weighs its terms by what step t weighs at step s.
    """
    x, weight, where, origin, d, rstd = apart(*residuals, centred=True, dx=spec.live[0])
    dtype, counts = x.dtype, _counts(x, where, spec.decay)
    x, g = _only(where, _to_compute_dtype(x)), _only(where, g)
    d, rstd = _recalled(spec.decay, x, where, origin, d, rstd)
    dbias = None if spec.bias_shape is None else _sum_to(spec.bias_shape, g)

    read = _Pass(x, g, weight, where, origin, d, rstd).again(dtype)
    mean_gw = _mean(_in_step(read.gw()), counts.so_far)
    read = read.again(dtype)
    # One factor at a time: rstd**3 would underflow.
    k = _mean(_in_step(read.gw() * read.xc()), counts.so_far)
    k = rstd * (rstd * (rstd * k))
    read = read.again(dtype)
    moves = _moves(read.x, where, origin, d, counts)
    # What is owed to the step itself stands apart: its parts may be large, and cancel.
    from_later = _from_later(k, counts.kept)
    shift = _from_later(rstd * mean_gw - moves * (from_later + k), counts.kept)

    read = read.again(dtype)
    xc = read.xc()
    dx = (read.rstd * (read.gw() - mean_gw) - xc * k) - (xc * from_later + shift)

    read = read.again(dtype)
    dweight = None
    if weight is not None:
        xhat = read.xc() * read.rstd
        dweight = _sum_to(weight.shape, _only(where, read.g * xhat))
    return _only(where, dx).astype(dtype), dweight, dbias


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recalled(decay: float | None, x: Example, where, origin, d, rstd):
    """`(d, rstd)` as they were kept, with the derivative that they have in the x beside them.

    As in `_normalize.py`. The sum of (x_s - mean_t) dx_s over s <= t is had without cancellation:
    each step adds its own about its own mean, and takes off the move of the mean for all before.
    """
    return d, rstd


@_recalled.defjvp
def _recalled_jvp(decay, primals, tangents):
    x, where, origin, d, rstd = primals
    counts, dx = _counts(x, where, decay), _only(where, tangents[0])
    total = _so_far(_in_step(dx), counts.kept)
    before = _found(total, counts.kept)
    own = _in_step(_centred(x, where, origin, d) * dx)
    product = _so_far(own - _moves(x, where, origin, d, counts) * before, counts.kept)
    drstd = -rstd * (rstd * (rstd * _mean(product, counts.so_far)))
    return (d, rstd), (_mean(total, counts.so_far), drstd)


_cumulative = in_both_modes(_forward, _backward)


def normalize_so_far(
    x: Example,
    weight: Array | None = None,
    bias: Array | None = None,
    where: Mask | None = None,
    *,
    eps: float,
    decay: float | None = None,
) -> Example:
    """What the layer calls: x of shape (time, groups, *rest), parameters that broadcast to it."""
    x = as_jax_has_it(x)
    weight, bias = fit(x, weight, bias)
    if where is not None:
        where = where & True  # As in `normalize`.
    spec = _Spec(eps, None if bias is None else bias.shape, decay)
    forward = lambda *args: _forward(*args, kept=False)[0]
    op = forward if is_plain() else _cumulative
    return op(spec, *together(x, weight, bias, where)).astype(x.dtype)


class CumulativeState(NamedTuple):
    """What has come so far, one number a group; a pytree, of 20 bytes a group in float32.

    With a decay, of 24: there the number of entries is what they weigh, in two parts.

    The mean is `mean + mean_rest`, and the sum of squares about it `m2 + m2_rest`: of a million
    steps one float would have lost the last of every three digits.
    """

    entries: Array
    mean: Array
    mean_rest: Array
    m2: Array
    m2_rest: Array
    entries_rest: Array | None = None


_MOST = jnp.iinfo(jnp.int32).max


def no_steps(groups: int, dtype, decay: float | None = None) -> CumulativeState:
    zeros = jnp.zeros(groups, dtype)
    entries = jnp.zeros(groups, jnp.int32) if decay is None else zeros
    rest = None if decay is None else zeros
    return CumulativeState(entries, zeros, zeros, zeros, zeros, rest)


def _aged(a: Array, rest: Array, new: Array, kept: Array) -> tuple[Array, Array]:
    """`kept * (a + rest) + new`, in two parts again.

    Taking off what is lost rounds that alone. Of the product a rounding would stay, and near the
    end of its way a sum of 1 / (1 - decay) steps would no longer move.
    """
    return _sum_and_rest(a, kept * rest + (new - _pinned((1 - kept) * a)))


def _sum_and_rest(a: Array, b: Array) -> tuple[Array, Array]:
    """`a + b` as the float nearest to it, and by how much that misses (Knuth's TwoSum)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def normalize_step(
    x: Array,
    state: CumulativeState,
    weight: Array | None = None,
    bias: Array | None = None,
    where: Mask | None = None,
    *,
    eps: float,
    decay: float | None = None,
) -> tuple[Array, CumulativeState]:
    """One step of `normalize_so_far`, x of shape (groups, *rest): Welford's, in two parts."""
    x = as_jax_has_it(x)
    weight, bias = fit(x, weight, bias)
    wide = _only(where, _to_compute_dtype(x))
    alone = (-1,) + (1,) * (x.ndim - 1)
    count, mean, mean_rest, m2, m2_rest = (a.reshape(alone) for a in state[:5])
    total = lambda a: a.sum(range(1, a.ndim), keepdims=True)
    counted = jnp.ones_like(wide, bool) if where is None else jnp.broadcast_to(where, x.shape)
    own = total(counted.astype(jnp.int32))
    float_of = lambda n: n.astype(wide.dtype)
    if decay is None:
        # At the most that can be counted, the oldest is forgotten as fast as the new comes.
        before = jnp.minimum(count, _MOST - own)
        entries, entries_rest = before + own, None
        n, kept = float_of(entries), float_of(before) / float_of(jnp.maximum(count, 1))
        kept = jnp.where(count == 0, 1, kept)
    else:
        kept = _share_kept(float_of(own), decay)
        assert state.entries_rest is not None  # `init_state` of such a layer has it.
        count_rest = state.entries_rest.reshape(alone)
        before = _pinned(kept * (count + count_rest))
        entries, entries_rest = _aged(count, count_rest, float_of(own), kept)
        n = entries + entries_rest

    a = _pinned(divided(total(wide), float_of(jnp.maximum(own, 1))))
    b = divided(total(_only(where, wide - a)), float_of(jnp.maximum(own, 1)))
    w = total(jnp.square(_centred(wide, where, a, b)))

    mean = jnp.where(count == 0, a, mean)
    apart_by = (a - mean) + (b - mean_rest)
    share = divided(float_of(own), jnp.maximum(n, 1))
    mean, mean_rest = _sum_and_rest(mean, mean_rest + _pinned(share * apart_by))
    between = _pinned(float_of(before) * share * jnp.square(apart_by))
    m2, m2_rest = _aged(m2, m2_rest, w + between, kept)

    var = jnp.where(n == 0, 1, divided(m2 + m2_rest, jnp.maximum(n, 1)))
    y = _centred(wide, where, mean, mean_rest) * jax.lax.rsqrt(var + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    new = CumulativeState(entries, mean, mean_rest, m2, m2_rest, entries_rest)
    return _only(where, y).astype(x.dtype), jax.tree.map(jnp.ravel, new)
