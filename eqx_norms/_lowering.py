"""What the op asks of a compiler: identities, lowered as each platform needs them.

Forward and backward are some passes over x. What two of them share, a cast or x - origin, XLA for
CPU computes once and stores in float32, unless it is kept from seeing it. The figures are from
jax 0.10.2 and two cores; `python -m benchmarks` has them all. XLA for GPU and TPU fuse passes of
their own accord: nothing of this is done there, but for one barrier in `apart`. (With barriers a
gradient of [LayerNorm, matmul, tanh] layers takes 1.13 of eqx.nn's cycles on a TPU v5e in float32,
1.38 in bfloat16, by the compiler's estimate; without, 1.00. `benchmarks/NOTES.md` has more.)

They are primitives because a function in `jax.numpy` is traced before anybody knows which platform
it is compiled for. Tangents pass them untouched, in the dtype of the array; what a backward asks of
its cotangent is asked again when it is transposed twice, as reverse mode does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, PyTree

Example = Float[Array, "*shape"]


def _barrier(arrays: PyTree) -> PyTree:
    return jax.lax.optimization_barrier(arrays)


def _identity(name: str, **platforms: Callable) -> Primitive:
    """Of one array; `platforms` says which function to compile in its place, and where."""
    marked, transposed = Primitive(f"eqx_norms_{name}"), Primitive(f"eqx_norms_{name}_transposed")
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
    """In `dtype`, but for float16, which is cast up once, before the first.

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
    if alone and not _BARRIERS_LET_FUSE:
        return a
    return _again_p.bind(a, dtype=jnp.dtype(dtype or a.dtype))


# One barrier around all: one for each would be as the forward's, and merged with them.
def _barrier_around_all(*arrays: Array, centred: bool) -> list[Array]:
    return list(_barrier(arrays))


def _barrier_on_cuda(*arrays: Array, centred: bool) -> list[Array]:
    return list(arrays if centred and arrays[0].dtype == jnp.float32 else _barrier(arrays))


_apart_p = Primitive("eqx_norms_apart")
_apart_p.multiple_results = True
_apart_p.def_impl(lambda *arrays, centred: list(arrays))
_apart_p.def_abstract_eval(lambda *arrays, centred: list(arrays))
mlir.register_lowering(_apart_p, lambda context, *arrays, centred: list(arrays))
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


def apart(x: Example, *others: PyTree, centred: bool) -> tuple:
    """What the backward keeps, x first, of which it computes again what the forward has.

    On a CPU, without it, XLA sees that both share xc, and keeps that in float32 from the one to the
    other: the memory that the rule is here to save.

    Compiled for an H100, six layers of [norm, matmul, tanh], 8192 x 1024: with it, the gradient
    moves .95 of eqx.nn's bytes for LayerNorm in bfloat16 and .88 for RMSNorm in float32, without
    1.04 and 1.00. For LayerNorm in float32 it is 1.20 with it, and 1.00 without: none there.
    (`python -m benchmarks.accelerators` has it as it is.)
    """
    leaves, structure = jax.tree.flatten((x, *others))
    return jax.tree.unflatten(structure, _apart_p.bind(*leaves, centred=centred))


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
