"""How dependencies pass through each operation of JAX: a table from primitive to rule.

A rule takes what is known of the operands and gives what is known of the results. It may claim
less than is true, never more: an operation that is not in the table connects everything with
everything. All bounds are of exact arithmetic, widened outward by far more than a rounding.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from ._known import (
    ANY,
    Known,
    bounds_of,
    either,
    everything,
    is_real,
    known,
    packed,
    spread,
    union,
    unpacked,
)

Rule = Callable[..., list[Known]]
RULES: dict[str, Rule] = {}

# exp and the like are exactly 0 below, in every dtype (float64: -745, exp2 -1075).
_UNDERFLOW = -1100.0
# A number of this size or more, negative, in a sum or a select is a mask.
LARGE = 1e4


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
    return [known(var.aval, spread(row, var.aval.shape)) for var in eqn.outvars]


# Entry by entry. `_BOUNDS` has those whose results have bounds that masks need.


def _elementwise(context, eqn, *operands: Known) -> list[Known]:
    aval = eqn.outvars[0].aval
    bounds = _BOUNDS.get(eqn.primitive.name)
    low, high = (None, None) if bounds is None else bounds(context, eqn, *operands)
    parts = [_to_shape(x, aval.shape) for x in operands]
    return [known(aval, union(aval.shape, *parts), low, high)]


def _to_shape(x: Known, shape: tuple[int, ...]) -> Known:
    """Scalars and axes of size 1, which some operations take beside arrays, at full size."""
    if x.shape == shape or x.reads is None:
        return x
    reads = np.broadcast_to(x.reads, (*shape, x.reads.shape[-1]))
    return Known(shape, x.dtype, reads, x.low, x.high)


for _name in (
    "abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil "
    "clamp clz complex conj convert_element_type copy copy_p cos cosh device_put digamma eq "
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


@rule("optimization_barrier", "stop_gradient")
@rule("eqx_norms_again", "eqx_norms_apart", "eqx_norms_grouped", "eqx_norms_settled")
def _each(context, eqn, *operands):
    """Identities, the norms' own included."""
    return list(operands)


@rule("eqx_norms_moments")
def _moments(context, eqn, x, origin, d, var, *weight):
    """Of all of x: an entry or the mean, the distance from there to the mean, and the variance."""
    origin, d = (known(m, m.reads) for m in (origin, d))
    return [origin, d, var]


@rule("mul")
def _mul(context, eqn, a, b):
    """What is multiplied by zero is not read: inputs are finite."""
    aval = eqn.outvars[0].aval
    parts = []
    for x, other in ((a, b), (b, a)):
        x = _to_shape(x, aval.shape)
        parts.append(x if other.zero is None else _without(x, other.zero))
    low, high = _product(a, b) if is_real(aval.dtype) else (None, None)
    return [known(aval, union(aval.shape, *parts), low, high)]


@rule("add", "add_any", "sub")
def _sum(context, eqn, a, b):
    """What is added to minus infinity is not read: inputs are finite."""
    aval = eqn.outvars[0].aval
    low, high = _sum_bounds(context, eqn, a, b)
    parts = []
    for x, other in ((a, b), (b, a)):
        endless = (other.low == other.high) & np.isinf(other.low)
        finite = np.isfinite(x.low) & np.isfinite(x.high)
        x = _to_shape(x, aval.shape)
        parts.append(_without(x, endless & finite) if np.any(endless & finite) else x)
    return [known(aval, union(aval.shape, *parts), low, high)]


@rule("div")
def _div(context, eqn, a, b):
    """0 / b is 0 or NaN, and which of them only b decides."""
    aval = eqn.outvars[0].aval
    low, high = bounds_of(aval.dtype)
    if jnp.issubdtype(aval.dtype, jnp.floating):
        if b.bounded and b.reads is None and (b.low == b.high).all() and (b.low != 0).all():
            low, high = _product(a, Known(b.shape, b.dtype, None, 1 / b.low, 1 / b.high))
        elif a.zero is not None:
            low, high = np.where(a.zero, 0, -ANY), np.where(a.zero, 0, ANY)
    parts = [_to_shape(x, aval.shape) for x in (a, b)]
    return [known(aval, union(aval.shape, *parts), low, high)]


@rule("select_n")
def _select(context, eqn, which, *cases):
    """Where the predicate is a constant, the case it chooses; else any, and the predicate."""
    aval = eqn.outvars[0].aval
    if is_real(aval.dtype):
        cases = context.bounded_beside_masks(cases)
    which = _to_shape(which, aval.shape)
    settled = np.broadcast_to(which.low == which.high, aval.shape)
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
    return [known(aval, reads, low, high)]


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
        x = _to_shape(x, aval.shape)
        loses = x.high < other.low if largest else x.low > other.high
        if x.reads is not None and np.any(loses):
            x = _without(x, np.broadcast_to(loses, aval.shape))
        parts.append(x)
    return [known(aval, union(aval.shape, *parts), pick(a.low, b.low), pick(a.high, b.high))]


def _without(x: Known, where: np.ndarray) -> Known:
    """Reads nothing there."""
    if x.reads is None:
        return x
    where = np.broadcast_to(where, x.shape)
    return Known(x.shape, x.dtype, np.where(where[..., None], np.uint64(0), x.reads), x.low, x.high)


# Bounds


def _outward(low, high, dtype):
    """Rounded outward, and finite where only overflow could have made it infinite."""
    if not jnp.issubdtype(dtype, jnp.floating):
        least, most = bounds_of(dtype)
        wraps = (low < least) | (high > most)
        return np.where(wraps, least, low), np.where(wraps, most, high)
    with np.errstate(all="ignore"):
        wide = low - np.abs(low) / 64, high + np.abs(high) / 64
    return tuple(
        np.where(np.isfinite(end), np.clip(out, -ANY, ANY), end)
        for end, out in zip((low, high), wide, strict=True)
    )


def _finite(low, high, *operands: Known):
    """A sum or product of finite numbers is taken to be finite."""
    finite = np.bool_(True)
    for x in operands:
        finite = finite & np.isfinite(x.low) & np.isfinite(x.high)
    low = np.where(np.isnan(low), -np.inf, np.where(finite, np.clip(low, -ANY, ANY), low))
    high = np.where(np.isnan(high), np.inf, high)
    return low, np.where(finite, np.clip(high, -ANY, ANY), high)


def _sum_bounds(context, eqn, a, b):
    aval = eqn.outvars[0].aval
    if not is_real(aval.dtype):
        return None, None
    if jnp.issubdtype(aval.dtype, jnp.floating):
        if eqn.primitive.name == "sub":
            (negative,) = context.bounded_beside_masks((_negative(b),), beside=(a,))
            (a,) = context.bounded_beside_masks((a,), beside=(negative,))
            b = _negative(negative)
        else:
            a, b = context.bounded_beside_masks((a, b))
    with np.errstate(all="ignore"):
        if eqn.primitive.name == "sub":
            b = _negative(b)
        both = np.asarray(a.low + b.low), np.asarray(a.high + b.high)
        return _outward(*_finite(*both, a, b), aval.dtype)


def _negative(x: Known) -> Known:
    return Known(x.shape, x.dtype, x.reads, -x.high, -x.low)


def _product(a: Known, b: Known):
    with np.errstate(all="ignore"):
        ends = [np.asarray(x * y) for x in (a.low, a.high) for y in (b.low, b.high)]
        # 0 * inf: a zero end of one factor is a zero, and an infinite other is not finite.
        ends = [np.where(np.isnan(end), 0, end) for end in ends]
        low, high = np.minimum.reduce(ends), np.maximum.reduce(ends)
    zero = ((a.low == 0) & (a.high == 0)) | ((b.low == 0) & (b.high == 0))
    low, high = _outward(*_finite(low, high, a, b), a.dtype)
    return np.where(zero, 0, low), np.where(zero, 0, high)


def _exp_bounds(context, eqn, x):
    """0 where it underflows in every dtype."""
    with np.errstate(all="ignore"):
        low, high = (np.where(end < _UNDERFLOW, 0, np.exp(end)) for end in (x.low, x.high))
    high = np.where(np.isinf(x.high), high, np.clip(high, 0, ANY / 2))
    return low * 0, np.where(high == 0, 0, high * (1 + 1 / 64))


def _logistic_bounds(context, eqn, x):
    return np.zeros_like(x.low), np.where(x.high < _UNDERFLOW, 0.0, 1.0)


def _convert_bounds(context, eqn, x):
    new = eqn.outvars[0].aval.dtype
    if not (is_real(eqn.outvars[0].aval.dtype) and is_real(x.dtype)):
        return None, None
    if new == jnp.bool_:
        point = x.low == x.high
        away = (x.low > 0) | (x.high < 0)
        return np.where(point, x.low != 0, away) * 1.0, np.where(point, x.low != 0, 1.0)
    if jnp.issubdtype(new, jnp.integer):
        low, high = np.trunc(x.low), np.trunc(x.high)
        least, most = bounds_of(new)
        fits = (low >= least) & (high <= most)
        return np.where(fits, low, least), np.where(fits, high, most)
    # A number beyond a narrower dtype is infinite there; "any finite" stays any finite.
    with np.errstate(all="ignore"):
        ends = (np.where(np.abs(end) == ANY, end, _rounded(end, new)) for end in (x.low, x.high))
        return tuple(ends)


def _rounded(end, dtype):
    return np.asarray(end).astype(dtype).astype(np.float64)


def _compare_bounds(context, eqn, a, b):
    """Decided by the bounds, of integers and bools: a float may be NaN."""
    if jnp.issubdtype(a.dtype, jnp.inexact) or not is_real(a.dtype):
        return 0.0, 1.0
    name = eqn.primitive.name
    less, more = a.high < b.low, a.low > b.high
    same = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    yes, no = {
        "lt": (less, (a.low >= b.high)),
        "le": (a.high <= b.low, more),
        "gt": (more, (a.high <= b.low)),
        "ge": (a.low >= b.high, less),
        "eq": (same, less | more),
        "ne": (less | more, same),
    }[name]
    return np.where(yes, 1.0, 0.0), np.where(no, 0.0, 1.0)


def _logic_bounds(context, eqn, *operands):
    if eqn.outvars[0].aval.dtype != jnp.bool_:
        return None, None
    if eqn.primitive.name == "not":
        (x,) = operands
        return 1 - x.high, 1 - x.low
    pick = np.minimum if eqn.primitive.name == "and" else np.maximum
    a, b = operands
    return pick(a.low, b.low), pick(a.high, b.high)


def _clamp_bounds(context, eqn, least, x, most):
    pick = lambda a, b, c: np.minimum(np.maximum(b, a), c)
    return pick(least.low, x.low, most.low), pick(least.high, x.high, most.high)


def _abs_bounds(context, eqn, x):
    if not is_real(x.dtype):
        return None, None
    across = (x.low < 0) & (x.high > 0)
    ends = np.abs(x.low), np.abs(x.high)
    return np.where(across, 0, np.minimum(*ends)), np.maximum(*ends)


_SAME = ("copy", "copy_p", "name", "device_put", "sharding_constraint")
_BOUNDS: dict[str, Callable] = {
    "neg": lambda context, eqn, x: (-x.high, -x.low) if is_real(x.dtype) else (None, None),
    **dict.fromkeys(("exp", "exp2"), _exp_bounds),
    "logistic": _logistic_bounds,
    "convert_element_type": _convert_bounds,
    "reduce_precision": lambda context, eqn, x: _outward(x.low, x.high, x.dtype),
    **dict.fromkeys(_SAME, lambda context, eqn, x: (x.low, x.high)),
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
        least, most = bounds_of(aval.dtype)
        low, high = np.where(outside, least, low), np.where(outside, most, high)
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
    fixed = [start.constant.all() for start in starts]
    places = [np.int32(s.low if ok else 0) for s, ok in zip(starts, fixed, strict=True)]
    x = _any_along(x, [axis for axis, ok in enumerate(fixed) if not ok])
    return [_also(_moved(eqn, _bind(eqn, *_numbers(x), *places), x), everything(*starts))]


@rule("dynamic_update_slice")
def _dynamic_update_slice(context, eqn, x, update, *starts):
    if not all(start.constant.all() for start in starts):
        return connect_all(context, eqn, x, update, *starts)
    where = [np.int32(start.low) for start in starts]
    return [_moved(eqn, _bind(eqn, *_numbers(x, update), *where), x, update)]


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
    constant = indices.constant.reshape(-1, indices.shape[-1]).all(0)
    unknown = [
        axis for axis, fixed in zip(dims.start_index_map, constant, strict=True) if not fixed
    ]
    places = np.where(constant, np.broadcast_to(indices.low, indices.shape), 0)
    sources = _bind(eqn, *_numbers(x), places.astype(np.int32), fill_value=-1)
    out = _moved(eqn, sources, _any_along(x, unknown))
    if unknown and jnp.issubdtype(x.dtype, jnp.floating):
        out = known(out, out.reads)  # an index outside may be filled with anything
    if indices.reads is None:
        return [out]
    rows = np.bitwise_or.reduce(indices.reads, -2)
    rows = np.expand_dims(rows, tuple(dims.offset_dims))
    return [_also(out, rows)]


@rule("scatter", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub")
def _scatter(context, eqn, x, indices, updates):
    """Where an update lands is asked of the gather that is its transpose."""
    if not indices.constant.all():
        return connect_all(context, eqn, x, indices, updates)
    dims = eqn.params["dimension_numbers"]
    single = {*dims.inserted_window_dims, *dims.operand_batching_dims}
    window = iter(updates.shape[i] for i in dims.update_window_dims)
    sizes = [1 if axis in single else next(window) for axis in range(len(x.shape))]
    landing = jax.lax.gather(
        jnp.asarray(_numbers(x)[0]),
        jnp.asarray(np.broadcast_to(indices.low, indices.shape), jnp.int32),
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
        return [known(eqn.outvars[0].aval)]
    reads = np.zeros((math.prod(x.shape), words[0]), np.uint64)
    if x.reads is not None:
        reads |= x.reads.reshape(reads.shape)
    if eqn.primitive.name == "scatter" and eqn.params["update_jaxpr"] is None:
        reads[landing[inside]] = 0  # overwritten
    if updates.reads is not None:
        np.bitwise_or.at(reads, landing[inside], updates.reads.reshape(-1, words[0])[inside])
    return [known(eqn.outvars[0].aval, reads.reshape(*x.shape, -1))]


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
    return [known(aval, reads, low, high)]


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
    if name == "reduce_max":
        return low.max(axes), high.max(axes)
    if name == "reduce_min":
        return low.min(axes), high.min(axes)
    if name == "reduce_sum":
        with np.errstate(all="ignore"):
            ends = low.sum(axes), high.sum(axes)
            finite = np.isfinite(low).all(axes) & np.isfinite(high).all(axes)
        clipped = (np.where(finite, np.clip(end, -ANY, ANY), end) for end in ends)
        low, high = clipped
        nan = np.isnan(low) | np.isnan(high)
        return _outward(np.where(nan, -np.inf, low), np.where(nan, np.inf, high), x.dtype)
    return None, None


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
    return [known(eqn.outvars[0].aval, reads)]


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
    return [
        known(
            v.aval,
            None if reads is None else np.broadcast_to(reads, (*v.aval.shape, reads.shape[-1])),
        )
        for v in eqn.outvars
    ]


# Products and windows


@rule("dot_general")
def _dot_general(context, eqn, a, b):
    """Row and column, but for products with zero."""
    (ca, cb), (ba, bb) = eqn.params["dimension_numbers"]
    aval = eqn.outvars[0].aval
    left, right = _matrices(a, ca, ba), _matrices(b, cb, bb)
    reads = either(_half(left[0], right[1]), _half(right[0], left[1], turned=True))
    if reads is not None:
        batch = tuple(a.shape[i] for i in ba)
        rows = tuple(n for i, n in enumerate(a.shape) if i not in (*ca, *ba))
        columns = tuple(n for i, n in enumerate(b.shape) if i not in (*cb, *bb))
        shape = (math.prod(batch), math.prod(rows), math.prod(columns))
        reads = np.broadcast_to(reads, (*shape, reads.shape[-1]))
        reads = reads.reshape(*batch, *rows, *columns, -1)
    return [known(aval, reads)]


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
    ones = jnp.asarray(np.ones(kernel.shape) if kernel.zero is None else ~kernel.zero, jnp.float32)
    settings = dict(preferred_element_type=None, precision=None)
    reads = _each_bit(x, lambda bits: eqn.primitive.bind(bits, ones, **{**eqn.params, **settings}))
    return [_also(known(eqn.outvars[0].aval, reads), row)]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _window(context, eqn, x):
    largest = jex.primitives.reduce_window_max_p
    reads = _each_bit(x, lambda bits: largest.bind(bits, **eqn.params))
    return [known(eqn.outvars[0].aval, reads)]


def _each_bit(x: Known, fn: Callable):
    if x.reads is None:
        return None
    bits = np.moveaxis(unpacked(x.reads).astype(np.float32), -1, 0)
    hit = np.asarray(jax.lax.map(fn, jnp.asarray(bits))) > 0
    return packed(np.ascontiguousarray(np.moveaxis(hit, 0, -1)))
