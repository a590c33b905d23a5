"""How dependencies pass through each operation of JAX: a table from primitive to rule.

A rule takes what is known of the operands and gives what is known of the results. It may claim
less than is true, never more: an operation that is not in the table connects everything with
everything.

What bounds there are hold in every compilation. Of integers they come from what moves or picks
numbers and from nothing that computes and may wrap; of floats they are widened by what rounding,
underflow and flushing to zero may do in their dtype.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ._known import (
    ANY,
    WHOLE,
    Known,
    bounds_of,
    either,
    everything,
    is_real,
    known,
    packed,
    spread,
    tiny,
    union,
    unknown,
    unpacked,
)

Rule = Callable[..., list[Known]]
RULES: dict[str, Rule] = {}

# exp and the like are exactly 0 below, in every dtype (float64: -745, exp2 -1075).
_UNDERFLOW = -1100.0


def rule(*names: str):
    """Enters a function of (context, equation, operands) in the table."""

    def enter(fn: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, fn))
        return fn

    return enter


# A draw reads the whole key, and the other functions run a loop until every entry has converged:
# an entry's last bits depend on how long the others take.
_WHOLE = (
    "random_bits random_fold_in random_gamma random_seed random_split random_unwrap random_wrap "
    "rng_bit_generator rng_uniform igamma igammac igamma_grad_a regularized_incomplete_beta"
)


@rule(*_WHOLE.split())
def connect_all(context, eqn, *operands: Known) -> list[Known]:
    """Every entry of every result reads what any entry of any operand reads."""
    row = everything(*operands)
    avals = [var.aval for var in eqn.outvars]
    return [_of(aval, spread(row, aval.shape), *operands) for aval in avals]


def _of(aval, reads, *operands: Known) -> Known:
    """A result without bounds: of finite numbers it is finite, else it may be anything."""
    if all(x.finite.all() for x in operands):
        return known(aval, reads)
    none = reads is None or not reads.any()
    return unknown(aval.shape, aval.dtype, None if none else reads)


# Entry by entry. `_BOUNDS` has those whose results have bounds that masks need.


def _elementwise(context, eqn, *operands: Known) -> list[Known]:
    aval = eqn.outvars[0].aval
    bounds = _BOUNDS.get(eqn.primitive.name)
    low, high = (None, None) if bounds is None else bounds(eqn, *operands)
    parts = [_to_shape(x, aval.shape) for x in operands]
    return [_entries(aval, union(aval.shape, *parts), low, high, *operands)]


def _entries(aval, reads, low, high, *operands: Known) -> Known:
    """A result entry by entry. Without bounds what is made of finite numbers is finite; what is
    made of what may be NaN may be NaN.
    """
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        if low is None:
            low, high = bounds_of(aval.dtype)
            open_ended = functools.reduce(np.logical_or, [~x.finite for x in operands])
        else:
            open_ended = functools.reduce(np.logical_or, [x.unsure for x in operands])
        if np.any(open_ended):
            low, high = np.where(open_ended, -np.inf, low), np.where(open_ended, np.inf, high)
    return known(aval, reads, low, high)


def _to_shape(x: Known, shape: tuple[int, ...]) -> Known:
    """Scalars and axes of size 1, which some operations take beside arrays, at full size."""
    if x.shape == shape or x.reads is None:
        return x
    reads = np.broadcast_to(x.reads, (*shape, x.reads.shape[-1]))
    return Known(shape, x.dtype, reads, x.low, x.high)


for _name in (
    "abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp clz complex conj convert_element_type copy copy_p cos cosh digamma eq "
    "erf erf_inv erfc expm1 floor ge gt imag integer_pow is_finite le "
    "lgamma log log1p lt max min name ne neg nextafter not or polygamma "
    "population_count pow real reduce_precision rem round rsqrt "
    "sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt "
    "square tan tanh xor zeta log2 one_minus_square threefry2x32"
).split():
    RULES[_name] = _elementwise


@rule("exp", "exp2", "logistic")
def _exp(context, eqn, x):
    """Exactly 0 where it underflows, whatever the number below."""
    (out,) = _elementwise(context, eqn, x)
    underflows = np.broadcast_to((out.high == 0) & (x.low != x.high), out.shape)
    return [_without(out, underflows)] if out.reads is not None and underflows.any() else [out]


@rule("bitcast_convert_type")
def _bits(context, eqn, x):
    """Entry by entry, unless an entry becomes several or several one."""
    same = x.shape == eqn.outvars[0].aval.shape
    return _elementwise(context, eqn, x) if same else connect_all(context, eqn, x)


@rule("optimization_barrier", "stop_gradient", "device_put")
@rule("eqx_norms_again", "eqx_norms_apart", "eqx_norms_grouped", "eqx_norms_settled")
def _each(context, eqn, *operands):
    """Identities, the norms' own included."""
    return list(operands)


@rule("eqx_norms_moments")
def _moments(context, eqn, x, origin, d, var, *weight):
    """Of all of x: an entry or the mean, the distance from there to the mean, and the variance."""
    origin, d = (_of(m, m.reads, m) for m in (origin, d))
    return [origin, d, var]


@rule("mul")
def _mul(context, eqn, a, b):
    """What is multiplied by zero is not read, if it is finite, but by who asks for its sign."""
    aval = eqn.outvars[0].aval
    parts = []
    for x, other in ((a, b), (b, a)):
        whole = _to_shape(x, aval.shape)
        cut = context.zeros_cut and other.zero is not None
        parts.append(_without(whole, other.zero & x.finite) if cut else whole)
    low, high = _product(a, b) if is_real(aval.dtype) else (None, None)
    return [_entries(aval, union(aval.shape, *parts), low, high, a, b)]


@rule("add", "add_any", "sub")
def _sum(context, eqn, a, b):
    """What is added to minus infinity is not read, if it is finite."""
    aval = eqn.outvars[0].aval
    low = high = None
    if jnp.issubdtype(aval.dtype, jnp.floating):
        low, high = _sum_bounds(a, negative(b) if eqn.primitive.name == "sub" else b)
    parts = []
    for x, other in ((a, b), (b, a)):
        lost = (other.low == other.high) & np.isinf(other.low) & x.finite
        x = _to_shape(x, aval.shape)
        parts.append(_without(x, lost) if np.any(lost) else x)
    return [_entries(aval, union(aval.shape, *parts), low, high, a, b)]


@rule("div")
def _div(context, eqn, a, b):
    """0 / b is 0 or NaN, and which of them only b decides."""
    aval = eqn.outvars[0].aval
    low = high = None
    if jnp.issubdtype(aval.dtype, jnp.floating):
        settled = (b.low == b.high) & b.finite & (b.low != 0)
        if b.reads is None and settled.all():
            with np.errstate(all="ignore"):
                low, high = 1 / b.low, 1 / b.high
            low, high = _product(a, Known(b.shape, b.dtype, None, low, high))
        elif a.zero is not None:
            never = (b.low == 0) & (b.high == 0)  # 0 / 0
            zero = (a.low == 0) & (a.high == 0) & b.finite & ~never
            endless = never | ~a.finite | ~b.finite
            low, high = (
                np.where(zero, 0, np.where(endless, sign * np.inf, sign * ANY)) for sign in (-1, 1)
            )
    parts = [_to_shape(x, aval.shape) for x in (a, b)]
    return [_entries(aval, union(aval.shape, *parts), low, high, a, b)]


@rule("select_n")
def _select(context, eqn, which, *cases):
    """Where the predicate is a constant, the case it chooses; else any, and the predicate."""
    return [select(eqn.outvars[0].aval, which, *cases)]


def select(aval, which: Known, *cases: Known) -> Known:
    which = _to_shape(which, aval.shape)
    settled = np.broadcast_to((which.low == which.high) & (which.low < len(cases)), aval.shape)
    chosen = np.broadcast_to(which.low, aval.shape)
    reads = union(aval.shape, which)
    low, high = np.full(aval.shape, np.inf), np.full(aval.shape, -np.inf)
    for i, case in enumerate(cases):
        possible = ~settled | (chosen == i)
        low = np.where(possible, np.minimum(low, case.low), low)
        high = np.where(possible, np.maximum(high, case.high), high)
        if case.reads is not None:
            part = np.where(possible[..., None], case.reads, np.uint64(0))
            reads = either(reads, part)
    if is_real(aval.dtype):
        return known(aval, reads, low, high)
    return _of(aval, reads, *cases)


@rule("max", "min")
def _max(context, eqn, a, b):
    """An operand whose bounds say that it loses is not read."""
    aval = eqn.outvars[0].aval
    if not is_real(aval.dtype):
        return _elementwise(context, eqn, a, b)
    largest = eqn.primitive.name == "max"
    pick = np.maximum if largest else np.minimum
    parts = []
    for x, other in ((a, b), (b, a)):
        loses = x.high < other.low if largest else x.low > other.high
        x = _to_shape(x, aval.shape)
        if x.reads is not None and np.any(loses):
            x = _without(x, np.broadcast_to(loses, aval.shape))
        parts.append(x)
    bounds = pick(a.low, b.low), pick(a.high, b.high)
    return [_entries(aval, union(aval.shape, *parts), *bounds, a, b)]


def _without(x: Known, where: np.ndarray | np.bool_) -> Known:
    """Reads nothing there."""
    if x.reads is None:
        return x
    where = np.broadcast_to(where, x.shape)
    return Known(x.shape, x.dtype, np.where(where[..., None], np.uint64(0), x.reads), x.low, x.high)


# Bounds


def _outward(low, high, dtype, roundings: int = 1):
    """What rounding, underflow and flushing to zero make of exact bounds; finite ones stay so."""
    relative, absolute = (4 * roundings * float(a) for a in (jnp.finfo(dtype).eps, tiny(dtype)))
    with np.errstate(all="ignore"):
        wide = low - np.abs(low) * relative - absolute, high + np.abs(high) * relative + absolute
    return tuple(
        np.where(np.isfinite(end), np.clip(out, -ANY, ANY), end)
        for end, out in zip((low, high), wide, strict=True)
    )


def _finite(low, high, *operands: Known):
    """Of finite numbers the result is taken to be finite; what may be NaN has no bounds."""
    finite = functools.reduce(np.logical_and, [x.finite for x in operands])
    nan = np.isnan(low) | np.isnan(high)
    low, high = np.where(nan, -np.inf, low), np.where(nan, np.inf, high)
    return tuple(np.where(finite, np.clip(end, -ANY, ANY), end) for end in (low, high))


def _sum_bounds(a: Known, b: Known):
    with np.errstate(all="ignore"):
        low, high = np.asarray(a.low + b.low), np.asarray(a.high + b.high)
    low, high = _outward(*_finite(low, high, a, b), a.dtype)
    for x, other in ((a, b), (b, a)):
        zero = (x.low == 0) & (x.high == 0)
        low, high = np.where(zero, other.low, low), np.where(zero, other.high, high)
    return low, high


def negative(x: Known) -> Known:
    return Known(x.shape, x.dtype, x.reads, -x.high, -x.low)


def _product(a: Known, b: Known):
    """Of integers, which may wrap, only the zeros are known."""
    zero = ((a.low == 0) & (a.high == 0)) | ((b.low == 0) & (b.high == 0))
    zero = zero & a.finite & b.finite
    if not jnp.issubdtype(a.dtype, jnp.floating):
        least, most = bounds_of(a.dtype)
        return np.where(zero, 0, least), np.where(zero, 0, most)
    with np.errstate(all="ignore"):
        ends = [np.asarray(x * y) for x in (a.low, a.high) for y in (b.low, b.high)]
    low, high = np.minimum.reduce(ends), np.maximum.reduce(ends)  # NaN, of 0 * inf, stays NaN
    low, high = _outward(*_finite(low, high, a, b), a.dtype)
    return np.where(zero, 0, low), np.where(zero, 0, high)


def _exp_bounds(eqn, x):
    """0 where it underflows in every dtype."""
    power = np.exp if eqn.primitive.name == "exp" else np.exp2
    if not is_real(x.dtype):
        return None, None
    with np.errstate(all="ignore"):
        high = power(x.high)
    high = np.where(np.isinf(x.high), high, np.clip(high, 0, ANY))
    high = _outward(high, high, x.dtype)[1]
    return np.zeros_like(x.low), np.where(x.high < _UNDERFLOW, 0, high)


def _logistic_bounds(eqn, x):
    if not is_real(x.dtype):
        return None, None
    most = _outward(1.0, 1.0, x.dtype)[1]
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
        low, high = _outward(x.low, x.high, new)
    low = np.where(overflows, ends[0], np.where(exact[0], x.low, low))
    return low, np.where(overflows, ends[1], np.where(exact[1], x.high, high))


def _rounded(end, dtype):
    return np.asarray(end).astype(dtype).astype(np.float64)


def _flushed(x: Known):
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


# Entries that only move: the operation itself, on their numbers, says where each came from.


def _moved(eqn, sources: np.ndarray, *operands: Known) -> Known:
    """Each entry of the result is one of an operand: that in this place, counted through all, or,
    where the place is -1, one from outside.
    """
    aval = eqn.outvars[0].aval if not isinstance(eqn, _Aval) else eqn
    outside = sources < 0
    low, high = (_taken(sources, [getattr(x, end) for x in operands], operands) for end in _ENDS)
    if outside.any():
        filled = unknown(aval.shape, aval.dtype)
        low, high = np.where(outside, filled.low, low), np.where(outside, filled.high, high)
    words = [x.reads.shape[-1] for x in operands if x.reads is not None]
    if not words:
        return known(aval, None, low, high)
    rows = [
        np.zeros((math.prod(x.shape), words[0]), np.uint64)
        if x.reads is None
        else x.reads.reshape(-1, words[0])
        for x in operands
    ]
    reads = (rows[0] if len(rows) == 1 else np.concatenate(rows))[sources]
    if outside.any():
        reads = np.where(outside[..., None], np.uint64(0), reads)
    return known(aval, reads, low, high)


class _Aval:
    """A shape and a dtype."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = tuple(shape), dtype


_ENDS = ("low", "high")


def _taken(sources, ends, operands):
    if all(np.ndim(end) == 0 for end in ends) and len({float(end) for end in ends}) == 1:
        return ends[0]
    flat = [
        np.broadcast_to(end, x.shape).reshape(-1) for end, x in zip(ends, operands, strict=True)
    ]
    return np.concatenate(flat)[sources]


def _numbers(*operands: Known) -> list[np.ndarray]:
    """The places of all entries of all operands, numbered through."""
    sizes = [math.prod(x.shape) for x in operands]
    starts = np.cumsum([0, *sizes])
    return [
        np.arange(start, start + size, dtype=np.int32).reshape(x.shape)
        for start, size, x in zip(starts, sizes, operands, strict=False)
    ]


def _bind(eqn, *args, **changed) -> np.ndarray:
    params = eqn.primitive.get_bind_params({**eqn.params, **changed})
    return np.asarray(eqn.primitive.bind(*map(jnp.asarray, args), **params))


_NUMPY_MOVES: dict[str, Callable] = {
    "reshape": lambda a, p: a.reshape(p["new_sizes"]),
    "squeeze": lambda a, p: a.squeeze(p["dimensions"]),
    "tile": lambda a, p: np.tile(a, p["reps"]),
    "transpose": lambda a, p: a.transpose(p["permutation"]),
    "rev": lambda a, p: np.flip(a, p["dimensions"]),
    "slice": lambda a, p: a[
        tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [None] * a.ndim))
    ],
    "broadcast_in_dim": lambda a, p: np.broadcast_to(
        np.expand_dims(
            a, [i for i in range(len(p["shape"])) if i not in p["broadcast_dimensions"]]
        ),
        p["shape"],
    ),
}


MOVES = (*_NUMPY_MOVES, *"concatenate dynamic_slice dynamic_update_slice gather pad split".split())


@rule(*_NUMPY_MOVES)
def _move(context, eqn, x, *_):
    return [_moved(eqn, _NUMPY_MOVES[eqn.primitive.name](*_numbers(x), eqn.params), x)]


@rule("concatenate")
def _concatenate(context, eqn, *operands):
    return [_moved(eqn, np.concatenate(_numbers(*operands), eqn.params["dimension"]), *operands)]


@rule("split")
def _split(context, eqn, x):
    (numbers,) = _numbers(x)
    borders = np.cumsum(eqn.params["sizes"])[:-1]
    parts = np.split(numbers, borders, eqn.params["axis"])
    return [_moved(_Aval(part.shape, x.dtype), part, x) for part in parts]


@rule("pad")
def _pad(context, eqn, x, padding):
    numbers, place = _numbers(x, padding)
    return [_moved(eqn, _bind(eqn, numbers, place), x, padding)]


@rule("dynamic_slice")
def _dynamic_slice(context, eqn, x, *starts):
    """Where an index along an axis is not a constant, every entry along it may be meant."""
    fixed = [_settled(start).all() for start in starts]
    places = [
        _place(s) if ok else np.zeros((), s.dtype) for s, ok in zip(starts, fixed, strict=True)
    ]
    x = _any_along(x, [axis for axis, ok in enumerate(fixed) if not ok])
    return [_also(_moved(eqn, _bind(eqn, *_numbers(x), *places), x), everything(*starts))]


@rule("dynamic_update_slice")
def _dynamic_update_slice(context, eqn, x, update, *starts):
    if not all(_settled(start).all() for start in starts):
        return connect_all(context, eqn, x, update, *starts)
    where = list(map(_place, starts))
    return [_moved(eqn, _bind(eqn, *_numbers(x, update), *where), x, update)]


def _place(start: Known) -> np.ndarray:
    """An index that is known, in its own dtype: each has its own range."""
    return np.broadcast_to(start.low, start.shape).astype(start.dtype)


def _settled(index: Known) -> np.ndarray | np.bool_:
    """Where an index is known, and means the same to every compiler: those of XLA take a large
    unsigned one for a negative number in one place and not in the other.
    """
    return index.constant & (index.high <= largest_index(index.dtype))


def largest_index(dtype) -> int:
    """That of the signed integers of this size, of 32 bits at most."""
    return 2 ** min(8 * np.dtype(dtype).itemsize - 1, 31) - 1


def _any_along(x: Known, axes: Sequence[int]) -> Known:
    """Every entry along the axes reads what any of them reads."""
    if not axes:
        return x
    axes = tuple(axes)
    reads = x.reads
    if reads is not None:
        reads = np.broadcast_to(np.bitwise_or.reduce(reads, axes, keepdims=True), reads.shape)
    low = np.broadcast_to(np.broadcast_to(x.low, x.shape).min(axes, keepdims=True), x.shape)
    high = np.broadcast_to(np.broadcast_to(x.high, x.shape).max(axes, keepdims=True), x.shape)
    return Known(x.shape, x.dtype, reads, low, high)


def _also(x: Known, reads) -> Known:
    """Reads these inputs besides; `reads` broadcasts to the entries of x."""
    if reads is None:
        return x
    reads = np.broadcast_to(reads, (*x.shape, reads.shape[-1]))
    return known(x, either(x.reads, reads), x.low, x.high)


@rule("gather")
def _gather(context, eqn, x, indices):
    """Along an axis whose index is not a constant, all entries; the rows of the index besides."""
    dims = eqn.params["dimension_numbers"]
    constant = np.atleast_1d(_settled(indices).reshape(-1, indices.shape[-1]).all(0))
    unknown = [
        axis for axis, fixed in zip(dims.start_index_map, constant, strict=True) if not fixed
    ]
    places = np.where(constant, np.broadcast_to(indices.low, indices.shape), 0)
    sources = _bind(eqn, *_numbers(x), places.astype(indices.dtype), fill_value=-1)
    out = _moved(eqn, sources, _any_along(x, unknown))
    if unknown and "FILL" in str(eqn.params["mode"]):
        # With NaN, or with the largest integer; a NaN that depends on the input is excepted.
        out = _of(eqn.outvars[0].aval, out.reads, out)
    if indices.reads is None:
        return [out]
    rows = np.bitwise_or.reduce(indices.reads, -2)
    rows = np.expand_dims(rows, tuple(dims.offset_dims))
    return [_also(out, rows)]


@rule("scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub")
def _scatter(context, eqn, x, indices, updates):
    """Where an update lands is asked of the gather that is its transpose."""
    if not _settled(indices).all():
        return connect_all(context, eqn, x, indices, updates)
    dims = eqn.params["dimension_numbers"]
    single = {*dims.inserted_window_dims, *dims.operand_batching_dims}
    window = iter(updates.shape[i] for i in dims.update_window_dims)
    sizes = [1 if axis in single else next(window) for axis in range(len(x.shape))]
    landing = jax.lax.gather(
        jnp.asarray(_numbers(x)[0]),
        jnp.asarray(_place(indices)),
        jax.lax.GatherDimensionNumbers(
            offset_dims=dims.update_window_dims,
            collapsed_slice_dims=dims.inserted_window_dims,
            start_index_map=dims.scatter_dims_to_operand_dims,
            operand_batching_dims=dims.operand_batching_dims,
            start_indices_batching_dims=dims.scatter_indices_batching_dims,
        ),
        slice_sizes=tuple(sizes),
        mode="clip" if "CLIP" in str(eqn.params["mode"]) else "fill",
        fill_value=-1,
    )
    landing = np.asarray(landing).reshape(-1)
    inside = landing >= 0
    words = [a.reads.shape[-1] for a in (x, updates) if a.reads is not None]
    if not words:
        return [_of(eqn.outvars[0].aval, None, x, updates)]
    reads = np.zeros((math.prod(x.shape), words[0]), np.uint64)
    if x.reads is not None:
        reads |= x.reads.reshape(reads.shape)
    if eqn.primitive.name == "scatter" and eqn.params["update_jaxpr"] is None:
        reads[landing[inside]] = 0  # overwritten
    if updates.reads is not None:
        np.bitwise_or.at(reads, landing[inside], updates.reads.reshape(-1, words[0])[inside])
    return [_of(eqn.outvars[0].aval, reads.reshape(*x.shape, -1), x, updates)]


# Along an axis


@rule(
    "reduce_sum", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "reduce_max", "reduce_min"
)
def _reduce(context, eqn, x):
    """Every entry that is reduced; of a maximum, those that may be the largest."""
    aval, axes, name = eqn.outvars[0].aval, _axes(eqn), eqn.primitive.name
    x = _contenders(x, axes, name)
    reads = None if x.reads is None else np.bitwise_or.reduce(x.reads, axes)
    low, high = _reduced_bounds(x, axes, name)
    return [_of(aval, reads, x) if low is None else known(aval, reads, low, high)]


def _axes(eqn) -> tuple[int, ...]:
    """NumPy's integers, as `vmap` leaves them, included."""
    return tuple(map(int, eqn.params["axes"]))


def _contenders(x: Known, axes: tuple[int, ...], name: str) -> Known:
    if (
        x.reads is None
        or name not in ("reduce_max", "reduce_min", "argmax", "argmin")
        or not is_real(x.dtype)
    ):
        return x
    low, high = np.broadcast_to(x.low, x.shape), np.broadcast_to(x.high, x.shape)
    if "max" in name:
        loses = high < low.max(axes, keepdims=True)
    else:
        loses = low > high.min(axes, keepdims=True)
    return _without(x, loses)


def _reduced_bounds(x: Known, axes: tuple[int, ...], name: str):
    if not is_real(x.dtype):
        return None, None
    low, high = np.broadcast_to(x.low, x.shape), np.broadcast_to(x.high, x.shape)
    if name in ("reduce_max", "reduce_min"):
        pick = np.max if name == "reduce_max" else np.min
        nan = np.broadcast_to(x.unsure, x.shape).any(axes)
        return np.where(nan, -np.inf, pick(low, axes)), np.where(nan, np.inf, pick(high, axes))
    if name == "reduce_sum" and jnp.issubdtype(x.dtype, jnp.floating):
        zero = ((low == 0) & (high == 0)).all(axes)
        with np.errstate(all="ignore"):
            size = np.maximum(np.abs(low), np.abs(high)).sum(axes)
            ends = low.sum(axes), high.sum(axes)
            count = math.prod(x.shape[axis] for axis in axes)
            slack = size - _outward(size, size, x.dtype, max(count, 1))[0]
            ends = ends[0] - slack, ends[1] + slack
        low, high = _all_along(low, axes), _all_along(high, axes)
        whole = Known(size.shape, x.dtype, None, low, high)
        return tuple(np.where(zero, 0, end) for end in _finite(*ends, whole))
    return None, None


def _all_along(end, axes):
    """Finite where all along the axes are."""
    return np.where(np.isfinite(end).all(axes), 0, np.inf)


@rule("argmax", "argmin")
def _argmax(context, eqn, x):
    axes = _axes(eqn)
    x = _contenders(x, axes, eqn.primitive.name)
    reads = None if x.reads is None else np.bitwise_or.reduce(x.reads, axes)
    return [known(eqn.outvars[0].aval, reads, 0, x.shape[axes[0]] - 1)]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(context, eqn, x):
    """What came before, along the axis."""
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]
    reads = x.reads
    if reads is not None:
        turn = lambda a: np.flip(a, axis) if reverse else a
        reads = turn(np.bitwise_or.accumulate(turn(reads), axis))
    return [_of(eqn.outvars[0].aval, reads, x)]


_ALONG: dict[str, Callable[[dict], tuple[int, ...]]] = {
    "sort": lambda p: (p["dimension"],),
    "top_k": lambda p: (p.get("axis", -1),),
    "approx_top_k": lambda p: (p["reduction_dimension"],),
    "fft": lambda p: tuple(range(-len(p["fft_lengths"]), 0)),
}


@rule(*_ALONG)
def _along(context, eqn, *operands):
    """All along an axis, or the axes, of all operands."""
    shape = operands[0].shape
    axes = tuple(axis % len(shape) for axis in _ALONG[eqn.primitive.name](eqn.params))
    reads = union(shape, *operands)
    if reads is not None:
        reads = np.bitwise_or.reduce(reads, axes, keepdims=True)
    avals = [var.aval for var in eqn.outvars]
    return [_of(aval, _broadcast(reads, aval.shape), *operands) for aval in avals]


def _broadcast(reads, shape: tuple[int, ...]):
    return None if reads is None else np.broadcast_to(reads, (*shape, reads.shape[-1]))


# Products and windows


@rule("dot_general")
def _dot_general(context, eqn, a, b):
    """Row and column, but for products of what is finite with zero."""
    (ca, cb), (ba, bb) = eqn.params["dimension_numbers"]
    aval = eqn.outvars[0].aval
    left, right = _matrices(a, ca, ba), _matrices(b, cb, bb)
    cut = lambda x, zero: zero if context.zeros_cut and x.finite.all() else None
    reads = either(_half(left[0], cut(a, right[1])), _half(right[0], cut(b, left[1]), turned=True))
    if reads is not None:
        batch = tuple(a.shape[i] for i in ba)
        rows = tuple(n for i, n in enumerate(a.shape) if i not in (*ca, *ba))
        columns = tuple(n for i, n in enumerate(b.shape) if i not in (*cb, *bb))
        shape = (math.prod(batch), math.prod(rows), math.prod(columns))
        reads = np.broadcast_to(reads, (*shape, reads.shape[-1]))
        reads = reads.reshape(*batch, *rows, *columns, -1)
    return [_of(aval, reads, a, b)]


def _matrices(x: Known, contracted, batched):
    """The reads as (batch, free, contracted, words), and which entries are zero, likewise."""
    free = [i for i in range(len(x.shape)) if i not in (*contracted, *batched)]
    order = (*batched, *free, *contracted)
    size = lambda axes: math.prod(x.shape[i] for i in axes)
    shape = (size(batched), size(free), size(contracted))
    zero = None if x.zero is None else x.zero.transpose(order).reshape(shape)
    if x.reads is None:
        return None, zero
    return x.reads.transpose(*order, len(order)).reshape(*shape, -1), zero


def _half(reads, other_zero, turned=False):
    """What the result reads of one operand, as (batch, rows, columns, words), some of them 1."""
    if reads is None:
        return None
    if other_zero is None:
        part = np.bitwise_or.reduce(reads, 2)[:, :, None]
    else:
        part = _masked(reads, ~other_zero)
    return part.swapaxes(1, 2) if turned else part


def _masked(reads, nonzero):
    """For every free row of one operand and of the other, the union over what is not zero.

    As a product of matrices of zeros and ones, for NumPy has no faster union. Rows that read the
    same, as the features of a token do, are one row.
    """
    if reads.shape[1] > 1 and (reads == reads[:, :1]).all():
        reads = reads[:, :1]
    batch, rows, inner, words = reads.shape
    ones = unpacked(reads).astype(np.float32).transpose(0, 2, 1, 3).reshape(batch, inner, -1)
    hit = np.matmul(nonzero.astype(np.float32), ones) > 0
    hit = hit.reshape(batch, nonzero.shape[1], rows, words * 64)
    return packed(hit.transpose(0, 2, 1, 3))


@rule("conv_general_dilated")
def _convolution(context, eqn, x, kernel):
    """The operation itself on zeros and ones, for each input a run; a kernel of ones, but where it
    is zero.
    """
    row = everything(kernel)
    zero = kernel.zero if context.zeros_cut and x.finite.all() else None
    ones = jnp.asarray(np.ones(kernel.shape) if zero is None else ~zero, jnp.float32)
    settings = dict(preferred_element_type=None, precision=None)
    reads = _each_bit(x, lambda bits: eqn.primitive.bind(bits, ones, **{**eqn.params, **settings}))
    return [_also(_of(eqn.outvars[0].aval, reads, x, kernel), row)]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(context, eqn, x):
    largest = jex.primitives.reduce_window_max_p
    reads = _each_bit(x, lambda bits: largest.bind(bits, **eqn.params))
    return [_of(eqn.outvars[0].aval, reads, x)]


def _each_bit(x: Known, fn: Callable):
    if x.reads is None:
        return None
    bits = np.moveaxis(unpacked(x.reads).astype(np.float32), -1, 0)
    hit = np.asarray(jax.lax.map(fn, jnp.asarray(bits))) > 0
    return packed(np.ascontiguousarray(np.moveaxis(hit, 0, -1)))
