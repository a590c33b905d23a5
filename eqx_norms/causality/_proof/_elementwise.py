"""Entry by entry: what an entry reads of its operands' entries, and the bounds of its number."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from . import _reads as r
from ._flow import connect_all, finite_as, rule
from ._known import (
    ANY,
    WHOLE,
    Bounds,
    Known,
    all_read,
    bounds_of,
    is_real,
    known,
    tiny,
    together,
)
from ._labels import Labels, mask
from ._reads import Reads

# exp and the like are exactly 0 below, in every dtype (float64: -745, exp2 -1075).
_UNDERFLOW = -1100.0

# `_BOUNDS` has those whose results have bounds that masks need.
_NAMES = (
    "abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz "
    "complex conj convert_element_type copy copy_p cos cosh digamma eq eq_to erf erf_inv erfc "
    "expm1 floor ge gt imag integer_pow is_finite le le_to lgamma log log1p log2 lt lt_to max min "
    "mulhi name ne neg nextafter not one_minus_square or polygamma polynomial population_count pow "
    "real reduce_precision rem round rsqrt sharding_constraint shift_left shift_right_arithmetic "
    "shift_right_logical sign sin sinh sqrt square tan tanh threefry2x32 xor zeta"
)


# Of operands that are all the same along an axis, so are the results of these.
ENTRY_BY_ENTRY = (*_NAMES.split(), *"exp exp2 logistic mul add add_any sub div select_n".split())


@rule(*_NAMES.split())
def _elementwise(context, eqn, *operands: Known) -> list[Known]:
    """Scalars and axes of size 1, which some operations take beside arrays, included."""
    ndim = len(eqn.outvars[0].aval.shape)
    reads = all_read(ndim, *operands)
    bounds = _BOUNDS.get(eqn.primitive.name)
    if bounds is None and all(x.finite for x in operands):
        return [known(var.aval, reads) for var in eqn.outvars]
    labels, parts = together(ndim, *operands)
    low, high = (None, None) if bounds is None else bounds(eqn, *parts)
    return [_entries(var.aval, reads, labels, low, high, *parts) for var in eqn.outvars]


def _entries(aval, reads: Reads, labels: Labels, low, high, *parts: Bounds) -> Known:
    """A result entry by entry. Without bounds what is made of finite numbers is finite; what is
    made of what may be NaN may be NaN.
    """
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        if low is None:
            low, high = bounds_of(aval.dtype)
            open_ended = functools.reduce(np.logical_or, [~x.finite for x in parts])
        else:
            open_ended = functools.reduce(np.logical_or, [x.unsure for x in parts])
        low, high = np.where(open_ended, -np.inf, low), np.where(open_ended, np.inf, high)
    return known(aval, reads, labels, low, high)


@rule("exp", "exp2", "logistic")
def _exp(context, eqn, x):
    """Exactly 0 where it underflows, whatever the number below."""
    (out,) = _elementwise(context, eqn, x)
    if out.reads is None or not (out.high == 0).any():
        return [out]
    labels, (new, old) = together(len(out.shape), out, x)
    underflows = (new.high == 0) & (old.low != old.high)
    return [without(out, labels, underflows)]


def without(x: Known, labels: Labels, flags: np.ndarray) -> Known:
    """Reads nothing where a label has a flag."""
    reads = r.without(x.reads, mask(labels, flags))
    return Known(x.shape, x.dtype, reads, x.labels, x.low, x.high)


@rule("bitcast_convert_type")
def _bits(context, eqn, x):
    """Entry by entry, unless an entry becomes several or several one."""
    same = x.shape == eqn.outvars[0].aval.shape
    return _elementwise(context, eqn, x) if same else connect_all(context, eqn, x)


@rule("optimization_barrier", "stop_gradient", "device_put", "reshard", "layout_constraint")
@rule("stage", "random_clone")
@rule("eqx_norms_again", "eqx_norms_apart", "eqx_norms_grouped", "eqx_norms_settled")
def _each(context, eqn, *operands):
    """Identities, the norms' own included."""
    return list(operands)


@rule("eqx_norms_moments")
def _moments(context, eqn, x, origin, d, var, *weight):
    """Of all of x: an entry or the mean, the distance from there to the mean, and the variance."""
    origin, d = (finite_as(m, m.reads, m) for m in (origin, d))
    return [origin, d, var]


@rule("mul")
def _mul(context, eqn, a, b):
    """What is multiplied by zero is not read, if it is finite, but by who asks for its sign."""
    aval = eqn.outvars[0].aval
    labels, (x, y) = together(len(aval.shape), a, b)
    cut = context.zeros_cut
    lost = (y.zero & x.finite & cut, x.zero & y.finite & cut)
    low, high = _product(x, y) if is_real(aval.dtype) else (None, None)
    return [_entries(aval, _all_but(aval, labels, (a, b), lost), labels, low, high, x, y)]


def _all_but(aval, labels: Labels, operands, lost) -> Reads:
    """What the operands read where they are not lost."""
    ndim = len(aval.shape)
    pairs = zip(operands, lost, strict=True)
    return r.union(*(r.without(r.wide(x.reads, ndim), mask(labels, gone)) for x, gone in pairs))


@rule("add", "add_any", "sub")
def _sum(context, eqn, a, b):
    """What is added to minus infinity is not read, if it is finite."""
    aval = eqn.outvars[0].aval
    labels, (x, y) = together(len(aval.shape), a, b)
    low = high = None
    if jnp.issubdtype(aval.dtype, jnp.floating):
        low, high = _sum_bounds(x, _minus(y) if eqn.primitive.name == "sub" else y)
    endless = lambda other: (other.low == other.high) & np.isinf(other.low)
    lost = (endless(y) & x.finite, endless(x) & y.finite)
    return [_entries(aval, _all_but(aval, labels, (a, b), lost), labels, low, high, x, y)]


@rule("div")
def _div(context, eqn, a, b):
    """0 / b is 0 or NaN, and which of them only b decides."""
    aval = eqn.outvars[0].aval
    labels, (x, y) = together(len(aval.shape), a, b)
    low = high = None
    if jnp.issubdtype(aval.dtype, jnp.floating):
        settled = (y.low == y.high) & y.finite & (y.low != 0)
        if b.reads is None and settled.all():
            with np.errstate(all="ignore"):
                low, high = _product(x, Bounds(b.dtype, 1 / y.low, 1 / y.high))
        elif x.zero.any():
            never = y.zero  # 0 / 0
            zero = x.zero & y.finite & ~never
            endless = never | ~x.finite | ~y.finite
            low, high = (
                np.where(zero, 0, np.where(endless, sign * np.inf, sign * ANY)) for sign in (-1, 1)
            )
    reads = all_read(len(aval.shape), a, b)
    return [_entries(aval, reads, labels, low, high, x, y)]


@rule("select_n")
def _select(context, eqn, which, *cases):
    """Where the predicate is a constant, the case it chooses; else any, and the predicate."""
    return [select(eqn.outvars[0].aval, which, *cases)]


def select(aval, which: Known, *cases: Known) -> Known:
    ndim = len(aval.shape)
    labels, (choice, *parts) = together(ndim, which, *cases)
    settled = choice.constant & (choice.low >= 0) & (choice.low < len(cases))
    reads = r.wide(which.reads, ndim)
    low, high = np.full(labels.count, np.inf), np.full(labels.count, -np.inf)
    for i, (case, part) in enumerate(zip(cases, parts, strict=True)):
        possible = ~settled | (choice.low == i)
        low = np.where(possible, np.minimum(low, part.low), low)
        high = np.where(possible, np.maximum(high, part.high), high)
        reads = r.union(reads, r.without(r.wide(case.reads, ndim), mask(labels, ~possible)))
    if is_real(aval.dtype):
        return known(aval, reads, labels, low, high)
    return finite_as(aval, reads, *cases)


@rule("max", "min")
def _max(context, eqn, a, b):
    """An operand whose bounds say that it loses is not read."""
    aval = eqn.outvars[0].aval
    if not is_real(aval.dtype):
        return _elementwise(context, eqn, a, b)
    labels, (x, y) = together(len(aval.shape), a, b)
    largest = eqn.primitive.name == "max"
    pick = np.maximum if largest else np.minimum
    loses = lambda x, other: x.high < other.low if largest else x.low > other.high
    reads = _all_but(aval, labels, (a, b), (loses(x, y), loses(y, x)))
    low, high = pick(x.low, y.low), pick(x.high, y.high)
    return [_entries(aval, reads, labels, low, high, x, y)]


# Bounds


def outward(low, high, dtype, roundings: int = 1):
    """What rounding, underflow and flushing to zero make of exact bounds; finite ones stay so."""
    relative, absolute = (4 * roundings * float(a) for a in (jnp.finfo(dtype).eps, tiny(dtype)))
    with np.errstate(all="ignore"):
        wide = low - np.abs(low) * relative - absolute, high + np.abs(high) * relative + absolute
    return tuple(
        np.where(np.isfinite(end), np.clip(out, -ANY, ANY), end)
        for end, out in zip((low, high), wide, strict=True)
    )


def within(low, high, *operands: Bounds):
    """Of finite numbers the result is taken to be finite; what may be NaN has no bounds."""
    finite = functools.reduce(np.logical_and, [x.finite for x in operands])
    nan = np.isnan(low) | np.isnan(high)
    low, high = np.where(nan, -np.inf, low), np.where(nan, np.inf, high)
    return tuple(np.where(finite, np.clip(end, -ANY, ANY), end) for end in (low, high))


def _sum_bounds(a: Bounds, b: Bounds):
    """A number that a mask of minus infinity may hide is still finite where it is not hidden."""
    with np.errstate(all="ignore"):
        low, high = np.asarray(a.low + b.low), np.asarray(a.high + b.high)
    low, high = (
        np.where(np.isfinite(x) & np.isfinite(y), np.clip(end, -ANY, ANY), end)
        for end, x, y in ((low, a.low, b.low), (high, a.high, b.high))
    )
    low, high = outward(*within(low, high, a, b), a.dtype)
    for x, other in ((a, b), (b, a)):
        low, high = np.where(x.zero, other.low, low), np.where(x.zero, other.high, high)
    return low, high


def _minus(x: Bounds) -> Bounds:
    return Bounds(x.dtype, -x.high, -x.low)


def negative(x: Known) -> Known:
    return Known(x.shape, x.dtype, x.reads, x.labels, -x.high, -x.low)


def _product(a: Bounds, b: Bounds):
    """Of integers, which may wrap, only the zeros are known."""
    zero = (a.zero | b.zero) & a.finite & b.finite
    if not jnp.issubdtype(a.dtype, jnp.floating):
        least, most = bounds_of(a.dtype)
        return np.where(zero, 0, least), np.where(zero, 0, most)
    with np.errstate(all="ignore"):
        ends = [np.asarray(x * y) for x in (a.low, a.high) for y in (b.low, b.high)]
    low, high = np.minimum.reduce(ends), np.maximum.reduce(ends)  # NaN, of 0 * inf, stays NaN
    low, high = outward(*within(low, high, a, b), a.dtype)
    return np.where(zero, 0, low), np.where(zero, 0, high)


def _exp_bounds(eqn, x):
    """0 where it underflows in every dtype."""
    power = np.exp if eqn.primitive.name == "exp" else np.exp2
    if not is_real(x.dtype):
        return None, None
    with np.errstate(all="ignore"):
        high = power(x.high)
    high = np.where(np.isinf(x.high), high, np.clip(high, 0, ANY))
    high = outward(high, high, x.dtype)[1]
    return np.zeros_like(x.low), np.where(x.high < _UNDERFLOW, 0, high)


def _logistic_bounds(eqn, x):
    if not is_real(x.dtype):
        return None, None
    most = outward(1.0, 1.0, x.dtype)[1]
    return np.zeros_like(x.low), np.where(x.high < _UNDERFLOW, 0.0, most)


def _convert_bounds(eqn, x):
    new = eqn.outvars[0].aval.dtype
    if not (is_real(new) and is_real(x.dtype)):
        return None, None
    if new == jnp.bool_:
        low, high = _flushed(x)
        point = x.low == x.high
        away = (low > 0) | (high < 0)
        return np.where(point, x.low != 0, away) * 1.0, np.where(point, x.low != 0, 1.0)
    if jnp.issubdtype(new, jnp.integer):
        low, high = np.trunc(x.low), np.trunc(x.high)
        least, most = bounds_of(new)
        fits = (low >= least) & (high <= most) & (np.maximum(-low, high) <= WHOLE)
        return np.where(fits, low, least), np.where(fits, high, most)
    # A number beyond a narrower dtype is infinite there; "any finite" stays any finite.
    with np.errstate(all="ignore"):
        ends = [_rounded(end, new) for end in (x.low, x.high)]
        normal = [(end == 0) | (np.abs(end) >= tiny(new)) for end in ends]
        exact = [
            ok & (end == old) for end, old, ok in zip(ends, (x.low, x.high), normal, strict=True)
        ]
        overflows = (x.low == x.high) & np.isinf(ends[0])
        low, high = outward(x.low, x.high, new)
    low = np.where(overflows, ends[0], np.where(exact[0], x.low, low))
    return low, np.where(overflows, ends[1], np.where(exact[1], x.high, high))


def _rounded(end, dtype):
    return np.asarray(end).astype(dtype).astype(np.float64)


def _flushed(x: Bounds):
    """The bounds where a subnormal number may count as zero."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x.low, x.high
    least = tiny(x.dtype)
    low = np.where((x.low > 0) & (x.low < least), 0, x.low)
    return low, np.where((x.high < 0) & (x.high > -least), 0, x.high)


def _compare_bounds(eqn, a, b):
    """Decided by the bounds, which what may be NaN has none of."""
    if not is_real(a.dtype):
        return 0.0, 1.0
    (low, high), (other_low, other_high) = _flushed(a), _flushed(b)
    less, more = high < other_low, low > other_high
    same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    not_more, not_less = high <= other_low, low >= other_high
    yes, no = {
        "lt": (less, not_less),
        "le": (not_more, more),
        "gt": (more, not_more),
        "ge": (not_less, less),
        "eq": (same, less | more),
        "ne": (less | more, same),
    }[eqn.primitive.name]
    return np.where(yes, 1.0, 0.0), np.where(no, 0.0, 1.0)


def _logic_bounds(eqn, *operands):
    if eqn.outvars[0].aval.dtype != jnp.bool_:
        return None, None
    if eqn.primitive.name == "not":
        (x,) = operands
        return 1 - x.high, 1 - x.low
    pick = np.minimum if eqn.primitive.name == "and" else np.maximum
    a, b = operands
    return pick(a.low, b.low), pick(a.high, b.high)


def _clamp_bounds(eqn, least, x, most):
    pick = lambda a, b, c: np.minimum(np.maximum(b, a), c)
    return pick(least.low, x.low, most.low), pick(least.high, x.high, most.high)


def _abs_bounds(eqn, x):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None, None
    across = (x.low < 0) & (x.high > 0)
    ends = np.abs(x.low), np.abs(x.high)
    return np.where(across, 0, np.minimum(*ends)), np.maximum(*ends)


def _neg_bounds(eqn, x):
    return (-x.high, -x.low) if jnp.issubdtype(x.dtype, jnp.floating) else (None, None)


_SAME = ("copy", "copy_p", "name", "sharding_constraint")
_BOUNDS: dict[str, Callable] = {
    "neg": _neg_bounds,
    **dict.fromkeys(("exp", "exp2"), _exp_bounds),
    "logistic": _logistic_bounds,
    "convert_element_type": _convert_bounds,
    **dict.fromkeys(_SAME, lambda eqn, x: (x.low, x.high)),
    "clamp": _clamp_bounds,
    "abs": _abs_bounds,
    **dict.fromkeys(("and", "or", "not"), _logic_bounds),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), _compare_bounds),
}
