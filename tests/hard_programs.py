"""Random programs of an enemy: every dtype, and values that break bounds.

A program is a function of one array (T, D). Each step takes arrays that are there, of any dtype,
and makes one more of shape (T, D): zeros of both signs, the largest and smallest numbers, subnormal
ones, what makes NaN, integers that wrap, indices out of range, control flow in control flow.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

T, D = 4, 2
FLOATS = ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
INTS = ("int8", "int16", "int32", "uint8", "uint16", "uint32")
OTHERS = ("bool", "complex64")
WIDE = ("float64", "int64", "uint64")  # where they are on
STEPS = []


def step(fn):
    """Enters a function of (rng, pick): `pick()` is one of the arrays."""
    STEPS.append(fn)
    return fn


def dtypes():
    return (*FLOATS, *INTS, *OTHERS, *(WIDE if jax.config.jax_enable_x64 else ()))


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def is_int(x):
    return jnp.issubdtype(x.dtype, jnp.integer)


# Where narrower integers end.
_BORDERS = (127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)


def specials(dtype):
    """Numbers at the borders of a dtype."""
    if dtype == "bool":
        return np.array([False, True])
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        near = [0, 1, 2, 3, T - 1, T, info.max, info.min, info.max - 1, info.max // 2 + 1]
        near += [a for a in _BORDERS if a < info.max] + [info.min + 1]
        return np.array([*near, *([-1, -2, -T, info.min // 2] if info.min else [])], dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        parts = [0, -0.0, 1, -1, 1e-40, 3e38, 0.5]
        return np.array([complex(a, b) for a in parts for b in parts], dtype)
    info = jnp.finfo(dtype)
    sizes = [0, 1, 2, 3, 0.5, 0.1, 7, 30, info.max, info.smallest_normal, info.eps]
    normal = float(info.smallest_normal)
    sizes += [normal / 2, float(info.smallest_subnormal), 1.5 * normal, np.sqrt(normal)]
    sizes += [np.sqrt(float(info.max)), float(info.max) / 2, 1 + float(info.eps)]
    sizes += [a for a in (100.0, 1e4, 5e4, 1e9, 127.5, 255.9, 2.0**31) if a < info.max]
    return np.concatenate([np.array(sizes), -np.array(sizes)]).astype(dtype)


class Split(np.random.Generator):
    """Decides what a program is made of; `values` decides about the numbers in it."""

    def __init__(self, seed, values):
        super().__init__(np.random.PCG64(seed))
        self.values = np.random.default_rng([seed, values])


def values_of(rng):
    return getattr(rng, "values", rng)


def draw(rng, dtype, *shape):
    """Half of them special, half ordinary; each row has a share of its own."""
    rng, shape = values_of(rng), shape or (T, D)
    odd = rng.choice(specials(dtype), shape)
    with np.errstate(all="ignore"):
        if dtype == "bool":
            plain = rng.random(shape) < 0.5
        elif jnp.issubdtype(dtype, jnp.integer):
            plain = rng.integers(0, 6, shape).astype(dtype)
        else:
            plain = rng.normal(size=shape).astype(dtype)
    share = rng.choice([0.2, 0.5, 0.9], (len(odd), *[1] * (odd.ndim - 1)))
    return np.where(rng.random(shape) < share, odd, plain).astype(dtype)


def mask(rng, *shape):
    shape = shape or (T, D)
    kind = rng.integers(3)
    if kind == 0 and len(shape) == 2:
        return lax.broadcasted_iota(jnp.int32, shape, 0) >= lax.broadcasted_iota(
            jnp.int32, shape, 1
        )
    return jnp.asarray(values_of(rng).random(shape) < 0.5)


def constant(rng, dtype):
    """A scalar of the program, an array made there, or one that is held."""
    a, b = values_of(rng).choice(specials(dtype), 2)
    kind = rng.integers(4)
    literal = lambda v: lax.full((), v, dtype) if rng.random() < 0.5 else lax.full((T, D), v, dtype)
    if kind == 0:
        return jnp.broadcast_to(literal(a), (T, D))
    if kind == 1:
        endless = is_float(np.zeros((), dtype)) and rng.random() < 0.3
        b = -np.inf if endless and dtype not in ("float8_e4m3fn",) else b
        one, two = (jnp.broadcast_to(lax.full((), v, dtype), (T, D)) for v in (a, b))
        return jnp.where(mask(rng), one, two)
    return jnp.asarray(draw(rng, dtype))


def cast(rng, x, dtype):
    if x.dtype == dtype:
        return x
    if jnp.issubdtype(x.dtype, jnp.complexfloating) and dtype != "bool":
        x = x.real if rng.random() < 0.5 else x.imag
    return lax.convert_element_type(x, dtype)


def real(rng, x):
    return cast(rng, x, "float32") if not (is_float(x) or is_int(x)) else x


def other(rng, pick, like):
    """A second operand: another array, or a constant."""
    dtype = str(like.dtype)
    return constant(rng, dtype) if rng.random() < 0.5 else cast(rng, pick(), dtype)


def full(x):
    return jnp.resize(x.reshape(-1), (T, D)) if x.shape != (T, D) else x


def choose(rng, *names):
    return str(rng.choice(names))


OF_FLOATS = (
    "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf "
    "erf_inv erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic neg round rsqrt sign "
    "sin sinh sqrt square tan tanh"
).split()
OF_COMPLEX = (
    "abs acosh asinh atanh conj cos exp expm1 imag log log1p neg real sign sin sqrt".split()
)
OF_INTS = "abs clz neg not population_count sign square".split()
FLOAT_PAIRS = "add atan2 div max min mul nextafter pow rem sub".split()
INT_PAIRS = (
    "add and div max min mul or rem shift_left shift_right_arithmetic shift_right_logical sub xor"
).split()
WIDER = "digamma lgamma bessel_i0e bessel_i1e erf_inv atan2 nextafter".split()


def ranged(name, x):
    """In a dtype that the operation takes on a CPU."""
    small = str(x.dtype).startswith("float8")
    return x.astype("float32") if small or (name in WIDER and x.dtype != "float64") else x


@step
def unary(rng, pick):
    x = pick()
    if x.dtype == "bool":
        return lax.bitwise_not(x)
    if is_int(x):
        name = choose(rng, *OF_INTS)
        if name == "abs" and jnp.issubdtype(x.dtype, jnp.unsignedinteger):
            name = "neg"
        return getattr(lax, "bitwise_not" if name == "not" else name)(x)
    if is_float(x):
        name = choose(rng, *OF_FLOATS)
        return getattr(lax, name)(ranged(name, x))
    return getattr(lax, choose(rng, *OF_COMPLEX))(x)


@step
def binary(rng, pick):
    x = pick()
    if x.dtype == "bool":
        return getattr(lax, "bitwise_" + choose(rng, "and", "or", "xor"))(x, other(rng, pick, x))
    if is_int(x):
        name, y = choose(rng, *INT_PAIRS), other(rng, pick, x)
        name = "bitwise_" + name if name in ("and", "or", "xor") else name
        return getattr(lax, name)(*((x, y) if rng.random() < 0.5 else (y, x)))
    if is_float(x):
        name = choose(rng, *FLOAT_PAIRS)
        x = ranged(name, x)
        y = other(rng, pick, x)
        return getattr(lax, name)(*((x, y) if rng.random() < 0.5 else (y, x)))
    return getattr(lax, choose(rng, "add", "div", "mul", "pow", "sub"))(x, other(rng, pick, x))


@step
def times_zero(rng, pick):
    x = pick()
    if x.dtype == "bool":
        return x & mask(rng)
    if rng.random() < 0.3:
        return x * lax.full((), rng.choice(np.array([0, -0.0])), x.dtype)
    return x * mask(rng).astype(x.dtype)


@step
def compared(rng, pick):
    x = real(rng, pick())
    name = choose(rng, "lt", "le", "gt", "ge", "eq", "ne")
    found = getattr(lax, name)(x, other(rng, pick, x))
    if rng.random() < 0.3:
        found = found & mask(rng)
    a = pick()
    return found if rng.random() < 0.3 else jnp.where(found, a, other(rng, pick, a))


@step
def selected(rng, pick):
    x = pick()
    return jnp.where(mask(rng), x, other(rng, pick, x))


@step
def clamped(rng, pick):
    x = real(rng, pick())
    low, high = constant(rng, str(x.dtype)), other(rng, pick, x)
    return lax.clamp(low, x, high) if rng.random() < 0.5 else jnp.clip(x, low, high)


@step
def converted(rng, pick):
    return cast(rng, pick(), str(rng.choice(dtypes())))


@step
def bits(rng, pick):
    x = pick()
    sizes = {1: ("int8", "uint8"), 2: ("int16", "float16", "bfloat16")}
    sizes |= {4: ("int32", "uint32", "float32"), 8: ("int64", "float64")}
    if x.dtype == "bool" or jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.signbit(real(rng, x).astype("float32"))
    return lax.bitcast_convert_type(x, str(rng.choice(sizes[x.dtype.itemsize])))


@step
def signs(rng, pick):
    x = pick().real.astype("float32")
    y = other(rng, pick, x)
    kind = rng.integers(3)
    if kind == 0:
        return jnp.copysign(y, x)
    return lax.atan2(x, y) if kind == 1 else lax.complex(x, y)


@step
def taken(rng, pick):
    """By indices of any integer dtype, in every mode, many of them out of range."""
    x = pick()
    dtype = str(rng.choice([d for d in dtypes() if jnp.issubdtype(d, jnp.integer)]))
    known = rng.random() < 0.6
    where = jnp.asarray(draw(rng, dtype, T)) if known else cast(rng, pick(), dtype)[:, 0]
    mode = choose(rng, "clip", "fill", "promise_in_bounds")
    if mode == "promise_in_bounds":
        where = where % jnp.asarray(T, dtype)
    kind = rng.integers(6)
    if kind == 0:
        return jnp.take(x, where, 0, mode=choose(rng, "clip", "fill", "wrap"))
    if kind == 1:
        return x.at[where].get(mode=mode)
    update = other(rng, pick, x)
    if kind == 5:  # the rows or the columns are known
        steps = jnp.arange(T, dtype=dtype)
        places = (where, steps % D) if rng.random() < 0.5 else (steps, where)
        return x.at[places].set(update[:, 0], mode=mode if mode != "fill" else "drop")
    if kind == 2:
        return x.at[where].set(update, mode=mode if mode != "fill" else "drop")
    if kind == 3 and x.dtype != "bool":
        name = choose(rng, "add", "multiply", "min", "max") if is_float(x) or is_int(x) else "add"
        return getattr(x.at[where], name)(update, mode=mode if mode != "fill" else "drop")
    return x[where]


@step
def table(rng, pick):
    """A table that is known, read at a place that is not."""
    dtype = str(rng.choice(dtypes()))
    held = jnp.asarray(draw(rng, dtype, 3))
    if rng.random() < 0.5 and not jnp.issubdtype(dtype, jnp.inexact):
        held = jnp.asarray(rng.integers(0, 2, 3).astype(dtype))
    kind = str(rng.choice(INTS))
    return jnp.take(held, cast(rng, pick(), kind), mode=choose(rng, "clip", "fill", "wrap"))


@step
def dynamic(rng, pick):
    x = pick()
    dtype = str(rng.choice([d for d in dtypes() if jnp.issubdtype(d, jnp.integer)]))
    known = rng.random() < 0.5
    start = jnp.asarray(draw(rng, dtype, 1))[0] if known else cast(rng, pick(), dtype)[0, 0]
    zero = jnp.zeros((), start.dtype)
    cut = lax.dynamic_slice(x, (start, zero), (2, D))
    if rng.random() < 0.5:
        return jnp.concatenate([cut, cut])
    if rng.random() < 0.5:
        return lax.dynamic_update_slice(other(rng, pick, x), cut[:, :1], (zero, start))
    return lax.dynamic_update_slice(other(rng, pick, x), cut, (start, zero))


@step
def moved(rng, pick):
    x = pick()
    kind = rng.integers(7)
    if kind == 0:
        return x[::-1]
    if kind == 1:
        return jnp.roll(x, 1, 0)
    if kind == 2:
        return full(x.T)
    if kind == 3:
        return jnp.concatenate([x[1:], other(rng, pick, x)[:1]])
    if kind == 4:
        return lax.pad(x, constant(rng, str(x.dtype))[0, 0], [(1, -1, 0), (0, 0, 0)])
    if kind == 5:
        return jnp.broadcast_to(x[int(rng.integers(T))], (T, D))
    return jnp.concatenate([other(rng, pick, x)[:2], x[2:]])


@step
def reduced(rng, pick):
    x, axis = real(rng, pick()), int(rng.integers(2))
    if rng.random() < 0.5:
        x = jnp.where(mask(rng), x, constant(rng, str(x.dtype)))
    name = choose(rng, "max", "min", "sum", "prod", "argmax", "argmin", "any", "cumsum", "cummax")
    if name in ("cumsum", "cummax"):
        return getattr(lax, name)(x, axis=axis)
    if name == "any":
        x = x > 0
    if name in ("sum", "prod"):
        x = ranged(name, x)
    return jnp.broadcast_to(getattr(jnp, name)(x, axis, keepdims=True), (T, D))


@step
def ordered(rng, pick):
    x = real(rng, pick())
    return jnp.sort(x, int(rng.integers(2))) if rng.random() < 0.5 else jnp.argsort(x, 0)


@step
def product(rng, pick):
    x = cast(rng, pick(), choose(rng, "float32", "bfloat16", "float16", "int32"))
    if rng.random() < 0.7:
        return mask(rng, T, T).astype(x.dtype) @ x
    return (x @ other(rng, pick, x).T) @ x


@step
def attention(rng, pick):
    x = cast(rng, pick(), choose(rng, "float32", "bfloat16", "float16"))
    low = choose(rng, "-1e4", "-5e4", "-inf", "lowest", "-30")
    low = float(jnp.finfo(x.dtype).min) if low == "lowest" else float(low)
    scores, allowed = x @ x.T, mask(rng, T, T)
    kind = rng.integers(5)
    below = jnp.where(allowed, scores, jnp.asarray(low, x.dtype))
    added = scores + jnp.where(allowed, 0, low).astype(x.dtype)
    if kind == 0:
        return jax.nn.softmax(below) @ x
    if kind == 1:
        return jax.nn.softmax(added) @ x
    if kind == 2:
        return jnp.exp(added) @ x
    if kind == 3:
        return jnp.maximum(added, 0) @ x
    return jax.nn.softmax(scores, where=allowed) @ x


@step
def exponential(rng, pick):
    x = cast(rng, pick(), choose(rng, "float32", "bfloat16", "float16"))
    x = x + constant(rng, str(x.dtype)) if rng.random() < 0.5 else x
    return getattr(lax, choose(rng, "exp", "exp2", "logistic"))(x)


@step
def along(rng, pick):
    """Of an axis, what is not a mere reduction."""
    x, axis = real(rng, pick()), int(rng.integers(2))
    name = choose(rng, "cumprod", "cummin", "cumlogsumexp", "top_k", "sort", "window", "bitwise")
    if name == "bitwise":
        whole = x if is_int(x) else cast(rng, x, "int32")
        fn = {"and": jnp.bitwise_and, "or": jnp.bitwise_or, "xor": jnp.bitwise_xor}
        return jnp.broadcast_to(fn[choose(rng, *fn)].reduce(whole, 0)[None], (T, D))
    if name == "window":
        fn = choose(rng, "max", "min", "add")
        x = ranged(name, x)
        zero = {"max": _least(x.dtype), "min": _most(x.dtype), "add": 0}[fn]
        sizes = ((2, 1), (1, 1), [(1, 0), (0, 0)])
        return lax.reduce_window(x, np.asarray(zero, x.dtype), getattr(lax, fn), *sizes)
    if name == "top_k":
        return lax.top_k(ranged(name, x).T, T)[int(rng.integers(2))].T
    if name == "sort":
        return lax.sort((x, other(rng, pick, x)), dimension=axis, num_keys=1)[1]
    if name == "cumlogsumexp":
        x = cast(rng, x, "float32")
    return getattr(lax, name)(ranged(name, x), axis=axis, reverse=bool(rng.integers(2)))


def _least(dtype):
    return -np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _most(dtype):
    return np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


@step
def power(rng, pick):
    x = pick()
    x = cast(rng, x, "float32") if x.dtype == "bool" else x
    if is_float(x) and rng.random() < 0.5:
        return lax.reduce_precision(x, 5, int(rng.integers(2, 11)))
    if is_int(x):
        return lax.integer_pow(x, int(rng.integers(0, 5)))
    return lax.integer_pow(ranged("pow", x), int(rng.integers(-3, 6)))


@step
def convolved(rng, pick):
    """Along the positions, with the past alone or not, with zeros in the kernel."""
    x = cast(rng, pick(), choose(rng, "float32", "float16", "bfloat16"))
    kernel = jnp.where(mask(rng, 3, 1), 1, 0) if rng.random() < 0.5 else draw(rng, "float32", 3, 1)
    kernel = jnp.asarray(kernel).astype(x.dtype)[:, None]
    dims = ("NWC", "WIO", "NWC")
    pads = [(2, 0)] if rng.random() < 0.5 else [(1, 1)]
    return lax.conv_general_dilated(x.T[..., None], kernel, (1,), pads, dimension_numbers=dims)[
        ..., 0
    ].T


# Control flow, whose bodies are programs


def inner(rng, depth):
    """A program of one or two steps, the same at each call."""
    seed, numbers = int(rng.integers(2**31)), int(values_of(rng).integers(2**31))

    def run(*values):
        mine = Split(seed, numbers)
        return steps(mine, list(values), int(mine.integers(1, 3)), depth - 1)[-1]

    return run


def control(rng, pick, depth):
    x, y, body = pick(), pick(), inner(rng, depth)
    again = lambda a: cast(rng_of_casts(), body(a, y), str(x.dtype))
    kind = rng.integers(31) % 6
    if kind == 0:
        flag = cast(rng, pick(), "int32")[int(rng.integers(T)), 0]
        other_body = inner(rng, depth)
        two = lambda a: cast(rng_of_casts(), other_body(a), str(x.dtype))
        return lax.switch(flag, [again, two, lambda a: a], x)
    if kind == 1:
        return lax.fori_loop(0, int(rng.integers(1, 4)), lambda i, a: again(a), x)
    if kind == 2:
        stop = cast(rng, pick(), "int32")[0, 0] % 3
        return lax.fori_loop(0, stop, lambda i, a: again(a), x)
    if kind == 3:
        row = lambda c, r: (full(again(full(c)))[0].astype(c.dtype), full(again(full(r)))[0])
        return lax.scan(row, x[0], x, reverse=bool(rng.integers(2)))[1]
    if kind == 4:
        stops = jnp.asarray(rng.integers(0, 4, T), jnp.int32)
        stops = stops if rng.random() < 0.5 else cast(rng, pick(), "int32")[:, 0] % 4
        one = lambda n, r: lax.fori_loop(0, n, lambda i, a: full(again(full(a)))[0], r)
        return jax.vmap(one)(stops, x)
    if kind == 5:
        return jax.jit(again)(x)
    return jax.checkpoint(again)(x)


def rng_of_casts():
    return np.random.default_rng(0)


def steps(rng, values, count, depth, among=STEPS):
    pick = lambda: values[int(rng.integers(max(0, len(values) - 4), len(values)))]
    for _ in range(count):
        if depth and rng.random() < 0.15:
            value = control(rng, pick, depth)
        else:
            value = among[int(rng.integers(len(among)))](rng, pick)
        values.append(full(value))
    return values


def program(seed, dtype):
    """A function of one array (T, D) of `dtype`, which returns the result of each step."""

    def run(x):
        rng = np.random.default_rng(seed)
        with jax.numpy_dtype_promotion("standard"):
            return steps(rng, [x], int(rng.integers(6, 13)), 2)[1:]

    return run


# Short programs: something of which a bound is known, what is done with it, and what follows if the
# bound still holds. A wrong bound has no other way to be seen.


def bounded(rng, x, among):
    """One of two numbers, a range, zeros in places or a constant, of a real dtype."""
    dtype = choose(rng, *among)
    literal = lambda: lax.full((T, D), values_of(rng).choice(specials(dtype)), dtype)
    kind = rng.integers(5)
    if kind in (0, 1):
        one_of_two = jnp.where(
            real(rng, x) > other(rng, lambda: x, real(rng, x)), literal(), literal()
        )
        return one_of_two if kind == 0 else jnp.where(mask(rng), one_of_two, literal())
    if kind == 2 and dtype != "bool":
        ends = np.sort(values_of(rng).choice(specials(dtype), 2).astype(dtype))
        low, high = (lax.full((), end, dtype) for end in ends)
        return lax.clamp(low, cast(rng, x, dtype), high)
    if kind == 3:
        return jnp.where(mask(rng), cast(rng, x, dtype), literal())
    return constant(rng, dtype)


def whole(rng, pick):
    """Integers on their way round: what wraps at the ends, of both kinds and of every width."""
    x, name = pick(), choose(rng, *ROUND)
    x = x if is_int(x) else cast(rng, x, choose(rng, *of_kind(jnp.integer)))
    signed = jnp.issubdtype(x.dtype, jnp.signedinteger)
    if name in ("neg", "sign", "square", "bitwise_not") or (name == "abs" and signed):
        return getattr(lax, name)(x)
    if name in ("abs", "cast"):
        return cast(rng, x, choose(rng, *of_kind(jnp.integer), "float32", "float16", "bool"))
    if name == "integer_pow":
        return lax.integer_pow(x, int(rng.integers(2, 4)))
    if name == "clamp":
        ends = np.sort(values_of(rng).choice(specials(str(x.dtype)), 2))
        low, high = (lax.full((), end, x.dtype) for end in ends)
        return lax.clamp(low, x, high)
    y = other(rng, pick, x)
    return getattr(lax, name)(*((x, y) if rng.random() < 0.5 else (y, x)))


def small(rng, pick):
    """Floats beside zero: what underflows, is subnormal, or is flushed to zero."""
    x, name = pick(), choose(rng, *DOWN)
    x = x if is_float(x) else cast(rng, x, choose(rng, *of_kind(jnp.floating)))
    x = ranged(name, x)
    if name == "cast":
        return cast(rng, x, choose(rng, *of_kind(jnp.floating), "int8", "uint8", "bool"))
    if name == "reduce_precision":
        return lax.reduce_precision(x, int(rng.integers(2, 9)), int(rng.integers(1, 11)))
    if name in ("add", "div", "max", "min", "mul", "nextafter", "sub"):
        least = float(jnp.finfo(x.dtype).smallest_normal)
        sizes = least * np.array([0.0, 0.3, 0.75, 1, 1.5, 4, least**-0.5, least**-1])
        y = lax.full((T, D), values_of(rng).choice([*sizes, *-sizes]), x.dtype)
        y = jnp.where(mask(rng), y, jnp.ones_like(y)) if rng.random() < 0.3 else y
        y = other(rng, pick, x) if rng.random() < 0.3 else y
        return getattr(lax, name)(*((x, y) if rng.random() < 0.5 else (y, x)))
    return getattr(lax, name)(x)


ROUND = (
    "neg abs sign square bitwise_not integer_pow cast cast clamp add sub mul mul div rem max min "
    "shift_left shift_right_arithmetic shift_right_logical"
).split()
DOWN = (
    "abs neg sign exp exp2 expm1 logistic sqrt square tanh cast cast reduce_precision add sub mul "
    "mul mul div div max min nextafter"
).split()


def of_kind(kind):
    return [d for d in dtypes() if d != "bool" and jnp.issubdtype(d, kind)]


def decides(rng, b, x):
    """What x, or a constant, is where b is large, small, zero or in the way."""
    b = real(rng, b) if b.dtype != "bool" else b
    near = lambda: lax.full((T, D), values_of(rng).choice(specials(str(b.dtype))), b.dtype)
    kind = rng.integers(11)
    if kind in (0, 1) and b.dtype != "bool":
        found = getattr(lax, choose(rng, "lt", "le", "gt", "ge", "eq", "ne"))(b, near())
        return jnp.where(found, x, other(rng, lambda: x, x))
    if kind == 2 and b.dtype != "bool":
        return getattr(lax, choose(rng, "max", "min"))(cast(rng, x, str(b.dtype)), b)
    if kind == 3:
        return cast(rng, b, str(x.dtype)) * x if x.dtype != "bool" else cast(rng, b, "bool") & x
    if kind == 4:
        wide = cast(rng, b, choose(rng, "float32", "bfloat16", "float16"))
        return getattr(lax, choose(rng, "exp", "exp2", "logistic"))(wide) * cast(
            rng, x, str(wide.dtype)
        )
    if kind == 5:
        where = cast(rng, b, choose(rng, *INTS))
        return jnp.take(x, where[:, 0], 0, mode=choose(rng, "clip", "fill", "wrap"))
    if kind == 6 and b.dtype != "bool":
        rivals = jnp.where(mask(rng), b, cast(rng, x, str(b.dtype)))
        name = choose(rng, "max", "min", "argmax", "argmin")
        return jnp.broadcast_to(getattr(jnp, name)(rivals, 0, keepdims=True), (T, D))
    if kind == 8 and b.dtype != "bool":
        return cast(rng, lax.sign(b), str(x.dtype)) * x if x.dtype != "bool" else x & (b > 0)
    if kind == 9:
        start = cast(rng, b, choose(rng, *of_kind(jnp.integer)))[0, 0]
        return jnp.resize(lax.dynamic_slice(x, (start, jnp.zeros_like(start)), (2, D)), (T, D))
    if kind == 10:
        which = cast(rng, b, "int32")[int(rng.integers(T)), 0]
        return lax.switch(which, [lambda: x, lambda: jnp.zeros_like(x), lambda: jnp.roll(x, 1, 0)])
    return jnp.where(cast(rng, b, "bool"), x, other(rng, lambda: x, x))


# So many of them differ in their numbers alone, so that what runs is compiled once for all.
ALIKE = 8
# What computes bounds, more often than the rest.
BOUNDING = [unary, unary, binary, binary, converted, clamped, times_zero, reduced]


def short(seed, dtype):
    """As `program`: up to two steps between a bound and what it decides; one in four may loop.

    A third are of integers that wrap and a third of floats beside zero, of up to three steps.
    """

    def run(x):
        rng, kind = Split(seed // ALIKE, seed % ALIKE), seed // ALIKE % 3
        with jax.numpy_dtype_promotion("standard"):
            depth = 2 * (seed // ALIKE % 4 == 0)
            among = [BOUNDING * 6 + STEPS, [whole] * 6 + BOUNDING, [small] * 6 + BOUNDING][kind]
            real_ones = [d for d in dtypes() if d != "complex64"]
            of_dtypes = [real_ones, of_kind(jnp.integer), of_kind(jnp.floating)][kind]
            there = x[::-1]  # or what is lost of b is read of x
            b = [there] * (rng.random() < 0.25) + [bounded(rng, there, of_dtypes)]
            values = steps(rng, b, int(rng.integers(0, 3 + (kind > 0))), depth, among)
            return [*map(full, values[1:]), full(decides(rng, values[-1], x))]

    return run
