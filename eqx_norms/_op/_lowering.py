"""What the op asks of a compiler, lowered as each platform needs it: identities, and fewer passes.

Forward and backward are some passes over x. What two of them share, a cast or x - origin, XLA for
CPU computes once and stores in float32, unless it is kept from seeing it. The figures are from
jax 0.10.2 and two cores; `python -m benchmarks` has them all. XLA for GPU and TPU fuse passes of
their own accord: what is done for them is `in_one_pass`, and a barrier in `apart` and in `grouped`.
(With those of a CPU a gradient of [LayerNorm, matmul, tanh] layers takes 1.13 of eqx.nn's cycles on
a TPU v5e in float32, 1.38 in bfloat16, by the compiler's estimate; without, 1.00.
`benchmarks/NOTES.md` has more.)

They are primitives because a function in `jax.numpy` is traced before anybody knows which platform
it is compiled for. Tangents pass them untouched, in the dtype of the array; what a backward asks of
its cotangent is asked again when it is transposed twice, as reverse mode does.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval as pe
from jaxtyping import Array, Float, PyTree

from ._plain import is_plain

Example = Float[Array, "*shape"]
MARKS: list[Primitive] = []


def _barrier(arrays: PyTree) -> PyTree:
    return jax.lax.optimization_barrier(arrays)


def _primitive(name: str, several: bool = False) -> Primitive:
    primitive = Primitive(f"eqx_norms_{name}")
    primitive.multiple_results = several
    MARKS.append(primitive)
    return primitive


def _identity(name: str, **platforms: Callable) -> Primitive:
    """Of one array; `platforms` says which function to compile in its place, and where."""
    marked, transposed = _primitive(name), _primitive(f"{name}_transposed")
    for primitive, other in (marked, transposed), (transposed, marked):
        _define(primitive)
        ad.deflinear2(primitive, lambda g, _, other=other, **how: [other.bind(g, **how)])
    ad.primitive_jvps[marked] = lambda a, t, **how: (marked.bind(*a, **how), *t)
    for platform, function in platforms.items():
        rule = mlir.lower_fun(function, multiple_results=False)
        mlir.register_lowering(marked, rule, platform=platform)
    return marked


def _define(primitive: Primitive) -> None:
    primitive.def_impl(lambda a, **how: a)
    primitive.def_abstract_eval(lambda a, **how: a)
    mlir.register_lowering(primitive, lambda context, a, **how: [a])
    batching.primitive_batchers[primitive] = lambda a, axis, **how: (
        primitive.bind(*a, **how),
        *axis,
    )


def _barrier_around(a: Array, *, dtype) -> Array:
    """In `dtype`, except for float16, which is cast up once, before the first.

    XLA for CPU takes a cast from bfloat16 into the sum behind it, and one from float16 it stores,
    for each sum anew. (4096 x 768, forward and backward: .36 of eqx.nn's time, else .75.)
    """
    if dtype == jnp.bfloat16 and a.dtype == jnp.float32:
        return _barrier(a.astype(dtype)).astype(a.dtype)
    return _barrier(a)


_again_p = _identity("again", cpu=_barrier_around)
# A forward by itself, of 4096 examples or more, XLA for CPU makes one fusion of. In jax 0.10 it
# does so in spite of barriers, in 0.11 and 0.12 they would take twice the time.
_BARRIERS_LET_FUSE = jax.__version_info__ < (0, 11)


def again(a: Array, dtype=None, alone: bool = False) -> Array:
    """The same values, to be read by one more pass: `dtype`, if given, holds them without a loss.

    `alone`: in a forward by itself. (2048 x 4096 bfloat16: the forward takes .29 of eqx.nn's time
    with it, 1.2 without; forward and backward .60 and 1.03, and no temporaries instead of 12 bytes
    an element.)
    """
    if is_plain() or (alone and not _BARRIERS_LET_FUSE):
        return a
    return _again_p.bind(a, dtype=jnp.dtype(dtype or a.dtype))


def mapped_first(arrays: Iterable, axes: Iterable[int | None]) -> list[Array]:
    """For a batching rule: the mapped axis in front, in those too that are not mapped."""
    pairs = list(zip(arrays, axes, strict=True))
    (size,) = {a.shape[axis] for a, axis in pairs if axis is not None}
    return [
        jnp.broadcast_to(a, (size, *a.shape)) if axis is None else jnp.moveaxis(a, axis, 0)
        for a, axis in pairs
    ]


def _as_they_came(x, origin, d, var, *weight, **how):
    return [origin, d, var]


def _in_one_pass(x: Array, origin: Array, *others: Array, rank: int, **how) -> list[Array]:
    """Of examples that are the last `rank` axes of x."""
    first, dtype = x.ndim - rank, origin.dtype
    shape, splits = x.shape[first:], jax.typeof(x).sharding.spec[first:]
    # Of what a mesh with explicit sharding has in parts no entry can be taken.
    if 0 in shape or any(split is not None for split in splits):
        return _as_they_came(x, origin, *others)
    origin = _middle_of_three(x, shape).astype(dtype)
    axes = tuple(range(first, x.ndim))
    xo = x.astype(dtype) - jnp.expand_dims(origin, axes)
    d, square = jnp.mean(xo, axes), jnp.mean(jnp.square(xo), axes)
    # Where both overflow var is infinite, and y 0, as without this.
    of_mean = jnp.minimum(jnp.square(d), jnp.full((), jnp.finfo(dtype).max, dtype))
    return [origin, d, jnp.maximum(square - of_mean, 0)]


def _middle_of_three(x: Array, shape: tuple[int, ...]) -> Array:
    """Of the entries at a quarter, a half and three quarters of each axis of `shape`."""
    batch = x.shape[: x.ndim - len(shape)]

    def entry(quarter: int) -> Array:
        at = [n * quarter // 4 for n in shape]
        ends = [0] * len(batch) + at, [*batch, *(i + 1 for i in at)]
        return jax.lax.slice(x, *ends).reshape(batch)

    a, b, c = map(entry, (1, 2, 3))
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _in_one_pass_on_cuda(x: Array, *others: Array, kept: bool, dweight: bool, own: bool, rank: int):
    summed = dweight and not own and x.dtype.itemsize == 2
    better = summed if kept else own and rank > 1
    return (_in_one_pass if better else _as_they_came)(x, *others, rank=rank)


def _map_moments(arrays, axes, *, own: bool, **how):
    """The weight, if there is one, is the last: here only to tell whether it is mapped with x."""
    own |= any(axis is not None for axis in axes[4:])
    arrays, axes = arrays[:4], axes[:4]
    mapped = any(axis is not None for axis in axes)
    arrays = mapped_first(arrays, axes) if mapped else arrays
    return _moments_p.bind(*arrays, own=own, **how), [0 if mapped else None] * 3


_moments_p = _primitive("moments", several=True)
_moments_p.def_impl(_as_they_came)
_moments_p.def_abstract_eval(_as_they_came)
for _platform, _function in (
    (None, _as_they_came),
    ("tpu", _in_one_pass),
    ("cuda", _in_one_pass_on_cuda),
):
    _rule = mlir.lower_fun(_function, multiple_results=True)
    mlir.register_lowering(_moments_p, _rule, platform=_platform)
batching.primitive_batchers[_moments_p] = _map_moments
# The weight may be what JAX does not know yet, as where a function linear in it is transposed.
pe.custom_partial_eval_rules[_moments_p] = lambda trace, *arrays, **how: (
    trace.default_process_primitive(_moments_p, arrays[:4], how)
)
# Those of `moments` have the right derivatives: the same functions of x.
ad.primitive_jvps[_moments_p] = lambda arrays, tangents, **how: (
    _moments_p.bind(*arrays, **how),
    tangents[1:4],
)


def in_one_pass(
    x: Example, *moments: Array | None, weight: Array | None, kept: bool, dweight: bool
) -> list:
    """`origin, d, var` as they came, or from one pass over x; the mean is `origin + d` in both.

    XLA for TPU makes a pass over x of each sum that waits for another, and none of a few entries.
    About one of these no sum waits: var = mean((x - origin)^2) - d^2. Compiled for a v5e, 4096 x
    768 in float32, a forward takes .67 of eqx.nn's cycles, and 1.29 by the sums that came; forward
    and backward .69 and 1.00.

    On an H100 a kernel of rows makes all sums of a forward by itself, and would not about an entry
    (1.5 of eqx.nn's bytes for 1.00), but not those of groups with several axes (.75 for 1.25). In a
    gradient, six layers of [norm, matmul, tanh], it is .85 for .95 in bfloat16, but in float32 1.07
    for 1.00, and with weights of each example's own, as of groups, 1.13 for 1.00. Where no
    `dweight` is asked for, a kernel of rows makes all of dx (two bfloat16 layers: 1.05 for 1.00).

    A constant row has var = 0 exactly: the origin is an entry of it. Elsewhere var is rounded as a
    number 1 + (d / sigma)^2 times its size: hence the middle of three, as one may be an outlier. If
    two of them are, digits are lost (`docs/precision.md` has how many).
    """
    if is_plain():
        return list(moments)
    weights = [] if weight is None else [weight]
    how = {"rank": x.ndim, "kept": kept, "dweight": dweight, "own": False}
    return _moments_p.bind(x, *moments, *weights, **how)


# One barrier around all: one for each would be as the forward's, and merged with them.
def _barrier_around_all(*arrays: Array, **how) -> list[Array]:
    return list(_barrier(arrays))


def _barrier_on_cuda(*arrays: Array, centred: bool, dx: bool) -> list[Array]:
    half = arrays[0].dtype.itemsize == 2
    gains = not centred and (arrays[0].dtype == jnp.float32 if dx else half)
    return list(_barrier(arrays) if gains else arrays)


_apart_p = _primitive("apart", several=True)
_apart_p.def_impl(lambda *arrays, **how: list(arrays))
_apart_p.def_abstract_eval(lambda *arrays, **how: list(arrays))
mlir.register_lowering(_apart_p, lambda context, *arrays, **how: list(arrays))
mlir.register_lowering(_apart_p, mlir.lower_fun(_barrier_around_all), platform="cpu")
mlir.register_lowering(_apart_p, mlir.lower_fun(_barrier_on_cuda), platform="cuda")
batching.primitive_batchers[_apart_p] = lambda arrays, axes, **how: (
    _apart_p.bind(*arrays, **how),
    axes,
)
ad.primitive_jvps[_apart_p] = lambda arrays, tangents, **how: (
    _apart_p.bind(*arrays, **how),
    tangents,
)


def apart(x: Example, *others: PyTree, centred: bool, dx: bool) -> tuple:
    """What the backward keeps, x first, of which it computes again what the forward has.

    On a CPU, without it, XLA sees that both share xc, and keeps that in float32 from the one to the
    other: the memory that the rule is here to save.

    Compiled for an H100, six layers of [norm, matmul, tanh], 8192 x 1024: with it, the gradient
    moves .88 of eqx.nn's bytes for RMSNorm in float32, without 1.00; in bfloat16 1.00 in both, and
    a layer by itself 1.33 and 1.00. For LayerNorm it is 1.20 and 1.00 in float32, .85 in both in
    bfloat16, for GroupNorm in bfloat16 1.27 and 1.00. So it is there for the first alone.
    (`python -m benchmarks.accelerators` has it as it is.) Without `dx`, as where x is data, y and
    dweight share xhat, which XLA then stores in float32 (RMSNorm in bfloat16, two layers: 1.13 for
    1.00 with the barrier; in float32 it is .90 without, .94 with).
    """
    leaves, structure = jax.tree.flatten((x, *others))
    return jax.tree.unflatten(structure, _apart_p.bind(*leaves, centred=centred, dx=dx))


def _to_float32(total: Array) -> Array:
    if total.dtype != jnp.float32:
        return total
    return jax.lax.reduce_precision(total, exponent_bits=8, mantissa_bits=23)


_settled_p = _identity("settled", cpu=_to_float32)


def settled(total: Array) -> Array:
    """A sum that is used by later passes, as a result of its own.

    The operation is void: XLA for CPU would fuse the division behind it into the pass, and
    then, if rows are many and short, store all that is summed. (65536 x 256 float32: the statistics
    take 5 ms with it, 33 without. Not for a forward by itself, which is one fusion to the end.)
    """
    return _settled_p.bind(total)


def _clamped(product: Array) -> Array:
    most = jnp.full((), jnp.finfo(product.dtype).max, product.dtype)
    return jax.lax.clamp(-most, product, most)


_rounded_product_p = _identity("rounded_product", cpu=_clamped)


def rounded_product(product: Array) -> Array:
    """A product that is rounded before anything is added to it.

    XLA for CPU computes a product and the sum behind it in one operation, an FMA, without a
    rounding in between. A clamp keeps them apart; barriers and `reduce_precision` are gone by then.
    """
    return product if is_plain() else _rounded_product_p.bind(product)


# In jax 0.12 it does not: two layers take .80 of eqx.nn's cycles, and .90 with the barrier.
_STORES_WHAT_IS_SUBTRACTED = jax.__version_info__ < (0, 11)


def _barrier_if_kept(y: Array, *, kept: bool) -> Array:
    return _barrier(y) if kept and _STORES_WHAT_IS_SUBTRACTED else y


def _kept(y: Array) -> Array:
    return _grouped_p.bind(y, kept=True)


_grouped_p = _primitive("grouped")
_define(_grouped_p)
_rule = mlir.lower_fun(_barrier_if_kept, multiple_results=False)
mlir.register_lowering(_grouped_p, _rule, platform="tpu")
# What is differentiated is what a backward follows; and its cotangents are reshaped as y is.
ad.deflinear2(_grouped_p, lambda g, _, kept: [_kept(g)])
ad.primitive_jvps[_grouped_p] = lambda y, tangents, kept: (_kept(*y), _kept(*tangents))


def grouped(y: Array) -> Array:
    """What is to be reshaped from groups to channels.

    Of features, XLA for TPU moves the reshape in front of the norm, and in jax 0.10.2 then stores
    what is subtracted and rstd at the size of x. (Compiled for a v6e, the gradient of six layers of
    [norm, matmul, tanh] takes 1.57 of eqx.nn's cycles in float32, and .54 with the barrier. Of
    images, forward and backward by itself, it is .78 and .94: none there, nor in a forward alone.)
    """
    features = y.ndim == 2
    return _grouped_p.bind(y, kept=False) if features and not is_plain() else y
