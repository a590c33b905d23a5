"""The operation over what has come so far: statistics of step t over all entries of steps 0 to t.

    y_t = (x_t - mean_t) * rstd_t * weight + bias,    rstd_t = 1 / sqrt(variance_t + eps)

or over as much of them as a decay or a window leaves: `_reach.py` has all that is one number a
step. x has the shape (time, groups, *rest), and each group is by itself. Nothing here subtracts two
large sums: `docs/backward.md` derives it. The order of the file is that of `_normalize.py`; below
it is the same one step at a time.
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
    _Pass,
    _Residuals,
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
from ._reach import (
    Counts,
    Reach,
    Statistics,
    Step,
    counts_of,
    mean_of,
    pinned,
    share_kept,
    statistics,
    sums_behind,
)

Example = Float[Array, "time groups *rest"]
Mask = Bool[Array, "..."]  # of the rank of x, and broadcasts to its shape


class _Spec(NamedTuple):
    """What is known before any array comes; hashable, so that traces are cached on it."""

    eps: float
    bias_shape: tuple[int, ...] | None
    reach: Reach = Reach()
    live: tuple[bool, ...] = (True, True, True)  # Whether x, weight, bias have a derivative.


def _counts(x: Example, where: Mask | None, reach: Reach) -> Counts:
    if where is None and reach == Reach():
        # As floats: there may be more entries than an int32 can count.
        size, shape = math.prod(x.shape[2:]), (-1,) + (1,) * (x.ndim - 1)
        so_far = jnp.arange(1, 1 + len(x), dtype=compute_dtype(x)).reshape(shape) * size
        return Counts(jnp.full_like(so_far, size), so_far, so_far - size)
    return counts_of(_own(x, where), compute_dtype(x), reach)


def _own(x: Example, where: Mask | None) -> Array:
    where = jnp.ones((len(x),) + (1,) * (x.ndim - 1), bool) if where is None else where
    own = where.sum(range(2, x.ndim), jnp.int32, keepdims=True)
    own = own * (math.prod(x.shape[2:]) // max(math.prod(where.shape[2:]), 1))
    return jnp.broadcast_to(own, (len(x), *own.shape[1:]))


def _in_step(a: Example) -> Step:
    return a.sum(range(2, a.ndim), keepdims=True)


def _centred(x: Example, where: Mask | None, origin: Step, d: Step) -> Example:
    return _only(where, (x - origin) - d)


def _forward(spec: _Spec, x: Example, weight, bias, where, kept: bool = True):
    """`(y, residuals)`: x and three numbers a step. The mean is `origin + d`, both of each step."""

    def next_pass(wide: Array, *others: Array) -> list[Array]:
        first = again(wide, x.dtype, alone=not kept)
        return [first, *(again(a, alone=not kept) for a in others)]

    counts = _counts(x, where, spec.reach)
    wide = _only(where, _to_compute_dtype(x))

    # Of each step, in two parts. y is the same for any origin, so that origins have no derivative.
    a = _near_mean(wide, counts)
    wide, read_a = next_pass(wide, a)
    b = mean_of(_in_step(_only(where, wide - read_a)), counts.own)
    wide, read_a, read_b = next_pass(wide, a, b)
    w = _in_step(jnp.square(_centred(wide, where, read_a, read_b)))

    so_far, origin, d, square = statistics(counts, spec.reach, a, b, w)
    # Of nothing it is 1: with eps=0 rstd would be infinite, and 0 * rstd no number.
    var = jnp.where(so_far == 0, 1, mean_of(square, so_far))
    rstd = jax.lax.rsqrt(var + spec.eps)

    # The backward tells a step from its own mean where that of its window may be far from it.
    about = (origin, d) if spec.reach.window is None else (a, b)
    residuals = _Residuals(x, weight, where, *about, rstd)
    wide, origin, d, rstd = next_pass(wide, origin, d, rstd)
    y = _centred(wide, where, origin, d) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return _only(where, y), residuals


def _near_mean(wide: Example, counts: Counts) -> Step:
    """Of each step, as an origin."""
    return pinned(jax.lax.stop_gradient(mean_of(_in_step(wide), counts.own)))


def _backward(spec: _Spec, residuals: _Residuals, g: Example):
    """`(dx, dweight, dbias)` for the cotangent g of y. With gw = g * weight, n_t entries so far,

    k_t = rstd_t^3 * sum(gw_t * xc_t) / n_t,    v_t = rstd_t * sum(gw_t) / n_t
    dx_s = rstd_s * gw_s - sum of (x_s - mean_t) * k_t + v_t,    dweight = g * xhat,    dbias = g

    where the sum is over the steps t from s on that reach back to it. With a decay they weigh
    their terms by what step s weighs at step t.
    """
    x, weight, where, origin, d, rstd = apart(*residuals, centred=True, dx=spec.live[0])
    dtype, counts = x.dtype, _counts(x, where, spec.reach)
    x, g = _only(where, _to_compute_dtype(x)), _only(where, g)
    d, rstd = _recalled(spec.reach, x, where, origin, d, rstd)
    about = origin, d
    if spec.reach.window is not None:
        _, origin, d, _ = statistics(counts, spec.reach, *about, jnp.zeros_like(d))
    dbias = None if spec.bias_shape is None else _sum_to(spec.bias_shape, g)

    read = _Pass(x, g, weight, where, origin, d, rstd).again(dtype)
    mean_gw = mean_of(_in_step(read.gw()), counts.so_far)
    read = read.again(dtype)
    # One factor at a time: rstd**3 would underflow.
    k = mean_of(_in_step(read.gw() * read.xc()), counts.so_far)
    k = rstd * (rstd * (rstd * k))
    read = read.again(dtype)
    # What is owed to the step itself stands apart: its parts may be large, and cancel.
    from_k, shift = sums_behind(counts, spec.reach, about, (origin, d), k, rstd * mean_gw)

    read = read.again(dtype)
    own = read.rstd * (read.gw() - mean_gw) - read.xc() * k
    dx = own - (_centred(read.x, where, *map(again, about)) * from_k + shift)

    read = read.again(dtype)
    dweight = None
    if weight is not None:
        xhat = read.xc() * read.rstd
        dweight = _sum_to(weight.shape, _only(where, read.g * xhat))
    return _only(where, dx).astype(dtype), dweight, dbias


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recalled(reach: Reach, x: Example, where, origin, d, rstd):
    """`(d, rstd)` as they were kept, with the derivative that they have in the x beside them.

    As in `_normalize.py`. All sums over x are of one step, about its own mean.
    """
    return d, rstd


@_recalled.defjvp
def _recalled_jvp(reach, primals, tangents):
    x, where, *_ = primals
    counts, dx = _counts(x, where, reach), _only(where, tangents[0])
    a = _near_mean(x, counts)
    b = mean_of(_in_step(_only(where, x - a)), counts.own)
    db = mean_of(_in_step(dx), counts.own)
    dw = 2 * _in_step(_centred(x, where, a, b) * dx)
    moments = lambda b, w: statistics(counts, reach, a, b, w)[2:]  # linear in w
    _, (dd, dsquare) = jax.jvp(moments, (b, jnp.zeros_like(b)), (db, dw))
    d, rstd = _recalled(reach, *primals)
    drstd = -rstd * (rstd * (rstd * mean_of(dsquare / 2, counts.so_far)))
    return (d, rstd), (dd if reach.window is None else db, drstd)


_cumulative = in_both_modes(_forward, _backward)


def normalize_so_far(
    x: Example,
    weight: Array | None = None,
    bias: Array | None = None,
    where: Mask | None = None,
    *,
    eps: float,
    reach: Reach,
) -> Example:
    """What the layer calls: x of shape (time, groups, *rest), parameters that broadcast to it."""
    x = as_jax_has_it(x)
    weight, bias = fit(x, weight, bias)
    if where is not None:
        where = where & True  # As in `normalize`.
    spec = _Spec(eps, None if bias is None else bias.shape, reach)
    forward = lambda *args: _forward(*args, kept=False)[0]
    op = forward if is_plain() else _cumulative
    return op(spec, *together(x, weight, bias, where)).astype(x.dtype)


class CumulativeState(NamedTuple):
    """What has come so far, one number a group; a pytree, of 20 bytes a group in float32.

    With a decay, of 24: there the number of entries is what they weigh, in two parts. With a window
    it is this, but for `m2_rest`, of each of the last `window - 1` steps by itself.

    The mean is `mean + mean_rest`, and the sum of squares about it `m2 + m2_rest`: of a million
    steps one float would have lost the last of every three digits.
    """

    entries: Array
    mean: Array
    mean_rest: Array
    m2: Array
    m2_rest: Array | None = None
    entries_rest: Array | None = None


_MOST = jnp.iinfo(jnp.int32).max


def no_steps(groups: int, dtype, reach: Reach) -> CumulativeState:
    shape = (groups,) if reach.window is None else (reach.window - 1, groups)
    zeros = jnp.zeros(shape, dtype)
    if reach.decay is not None:
        return CumulativeState(*[zeros] * 6)
    rest = zeros if reach.window is None else None
    return CumulativeState(zeros.astype(jnp.int32), zeros, zeros, zeros, rest)


def normalize_chunk(
    x: Example,
    state: CumulativeState,
    weight: Array | None = None,
    bias: Array | None = None,
    where: Mask | None = None,
    *,
    eps: float,
    reach: Reach,
) -> tuple[Example, CumulativeState]:
    """`normalize_so_far` of the next steps of a stream, and the state behind them."""
    x = as_jax_has_it(x)
    weight, bias = fit(x, weight, bias)
    wide, own = _only(where, _to_compute_dtype(x)), _own(x, where)
    count = own.astype(wide.dtype)
    a = pinned(mean_of(_in_step(wide), count))
    b = mean_of(_in_step(_only(where, wide - a)), count)
    w = _in_step(jnp.square(_centred(wide, where, a, b)))

    steps = [jnp.broadcast_to(v, w.shape).reshape(w.shape[:2]) for v in (own, a, b, w)]
    if reach.window is None:
        state, found = jax.lax.scan(ft.partial(_grown, reach.decay), state, tuple(steps))
    else:
        state, found = _slid(reach, state, steps)
    so_far, origin, d, square = (v.reshape(w.shape) for v in found)

    var = jnp.where(so_far == 0, 1, mean_of(square, so_far))
    y = _centred(wide, where, origin, d) * jax.lax.rsqrt(var + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return _only(where, y).astype(x.dtype), state


def _slid(reach: Reach, state: CumulativeState, steps) -> tuple[CumulativeState, Statistics]:
    """The last steps, which the next ones will see, and the statistics in the window of each."""
    assert reach.window is not None
    steps = [jnp.concatenate(pair) for pair in zip(state[:4], steps, strict=True)]
    own, *each = steps
    found = statistics(counts_of(own, each[0].dtype, reach), reach, *each)
    seen = reach.window - 1
    state = CumulativeState(*(v[len(v) - seen :] for v in steps))
    return state, Statistics(*(v[seen:] for v in found))


def _grown(decay: float | None, state: CumulativeState, step) -> tuple[CumulativeState, Statistics]:
    """Welford's algorithm, in two parts."""
    own, a, b, w = step
    count, mean, mean_rest, m2, m2_rest, count_rest = state
    assert m2_rest is not None  # `init_state` of such a layer has it.
    float_of = lambda n: n.astype(a.dtype)
    if decay is None:
        # At the most that can be counted, the oldest is forgotten as fast as the new comes.
        before = jnp.minimum(count, _MOST - own)
        entries, entries_rest = before + own, None
        n, kept = float_of(entries), float_of(before) / float_of(jnp.maximum(count, 1))
        kept = jnp.where(count == 0, 1, kept)
    else:
        assert count_rest is not None
        kept = share_kept(float_of(own), decay)
        before = pinned(kept * (count + count_rest))
        entries, entries_rest = _aged(count, count_rest, float_of(own), kept)
        n = entries + entries_rest

    mean = jnp.where(count == 0, a, mean)
    apart_by = (a - mean) + (b - mean_rest)
    share = divided(float_of(own), jnp.maximum(n, 1))
    mean, mean_rest = _sum_and_rest(mean, mean_rest + pinned(share * apart_by))
    between = pinned(float_of(before) * share * jnp.square(apart_by))
    m2, m2_rest = _aged(m2, m2_rest, w + between, kept)
    state = CumulativeState(entries, mean, mean_rest, m2, m2_rest, entries_rest)
    return state, Statistics(n, mean, mean_rest, m2 + m2_rest)


def _aged(a: Array, rest: Array, new: Array, kept: Array) -> tuple[Array, Array]:
    """`kept * (a + rest) + new`, in two parts again.

    Taking off what is lost rounds that alone. Of the product a rounding would stay, and near the
    end of its way a sum of 1 / (1 - decay) steps would no longer move.
    """
    return _sum_and_rest(a, kept * rest + (new - pinned((1 - kept) * a)))


def _sum_and_rest(a: Array, b: Array) -> tuple[Array, Array]:
    """`a + b` as the float nearest to it, and by how much that misses (Knuth's TwoSum)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)
