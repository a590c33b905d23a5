"""The one differentiable operation behind every layer of this package.

    y = (x - mean) * rstd * weight + bias,    rstd = 1 / sqrt(variance + eps)

with mean and variance over all entries of one example: those under a mask left out, those on
other devices counted in. In the order of the file: the statistics, the forward, the backward, what
keeps XLA from storing more than they ask for, the way from the backward to forward mode, the plain
reference, the entry.
"""

import functools as ft
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ._real import Real

Example = Float[Array, "*shape"]
Broadcastable = Float[Array, "..."]
Mask = Bool[Array, "*shape"]


class _Spec(NamedTuple):
    """What is known before any array comes; hashable, so that traces are cached on it."""

    eps: float
    centre: bool
    axis_name: Hashable | None
    bias_shape: tuple[int, ...] | None


class _Residuals(NamedTuple):
    """What the backward keeps: x in its own dtype, at most three scalars, the weight, the mask."""

    x: Example
    weight: Broadcastable | None
    where: Mask | None
    origin: Array | None
    d: Array | None
    rstd: Array

    def xc(self) -> Example:
        return _centred(self.x, self.where, self.origin, self.d)

    def weighted(self, g: Example) -> Example:
        g = _to_compute_dtype(g)
        return g if self.weight is None else g * self.weight


def _mean(spec: _Spec, a: Example, where: Mask | None, settle: bool = False) -> Array:
    """Over what `where` lets through, on all devices of `axis_name`; 0 if that is nothing."""
    total = jnp.sum(a, where=where)
    if settle:
        total = _settled(total)
    count = a.size if where is None else jnp.sum(where, dtype=a.dtype)
    if spec.axis_name is not None:
        total, count = jax.lax.psum((total, count), spec.axis_name)
    return total / (count if where is None else jnp.maximum(count, 1))


def _only(where: Mask | None, a: Array) -> Array:
    """Zero where the mask is False, NaN or not, and in its derivative."""
    return a if where is None else jnp.where(where, a, 0)


def _compute_dtype(x: Array):
    """Statistics are taken in float32, and in float64 for float64."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _to_compute_dtype(x: Array) -> Array:
    return x.astype(_compute_dtype(x))


def _centred(x: Example, where: Mask | None, origin: Array | None, d: Array | None) -> Example:
    """`x - mean`, by two subtractions: `origin + d`, rounded, would have lost d again."""
    x = _only(where, _to_compute_dtype(x))
    x = x if origin is None else x - origin
    return x if d is None else x - d


def _forward(spec: _Spec, x: Example, weight, bias, where, kept: bool = True):
    """`(y, residuals)`. The mean is `origin + d`; `kept` says whether the backward will follow.

    A mean is off by an ulp of the largest entry, which at an offset of 1e6 is a tenth of the
    spread. So it only serves as the origin, and the mean of what is left, `d`, says by how much
    it missed. (mean(xc^2) - d^2 would save a pass and is wrong on constant rows, where it is the
    difference of two roundings: dx off by 2e-5 at 1e6, y NaN at 1e9.)
    """
    again = _again if kept or _BARRIERS_LET_FUSE else lambda *arrays: arrays
    origin = d = None
    read = x.astype(_read_dtype(x))
    if spec.centre:
        # y is the same for any origin, so the origin has no derivative; d has the mean's.
        xc = _centred(read, where, None, None)
        origin = jax.lax.stop_gradient(_mean(spec, xc, where, settle=kept))
        read, origin = again(read, origin)
        d = _mean(spec, _centred(read, where, origin, None), where, settle=kept)
        read, origin, d = again(read, origin, d)
    var = _mean(spec, jnp.square(_centred(read, where, origin, d)), where, settle=kept)
    rstd = jax.lax.rsqrt(var + spec.eps)

    residuals = _Residuals(x, weight, where, origin, d, rstd)
    read, origin, d = again(read, origin, d)
    y = _centred(read, where, origin, d) * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return _only(where, y), residuals


def _backward(spec: _Spec, residuals: _Residuals, g: Example):
    """`(dx, dweight, dbias)` for the cotangent g of y. With gw = g * weight, xhat = xc * rstd,

        dx = rstd * (gw - mean(gw) - xhat * mean(gw * xhat)),    dweight = g * xhat,    dbias = g,

    the last two summed over what was broadcast, the first without mean(gw) if not centred.
    """
    # Without it, XLA sees that forward and backward share xc, and keeps that in float32 from the
    # one to the other: the memory that this rule is here to save. One barrier around all, since
    # one for each would be as the forward's, and merged with them. But g has its own: the
    # backward must stay linear in it.
    residuals = jax.lax.optimization_barrier(residuals)
    where, dtype = residuals.where, residuals.x.dtype
    g = _only(where, g)
    dbias = None if spec.bias_shape is None else _sum_to(spec.bias_shape, g)

    # g was cast up from the dtype of x on its way here: nothing is lost but bytes.
    read = _read_dtype(residuals.x)
    residuals, g = residuals._replace(x=residuals.x.astype(read)), g.astype(read)
    g = jax.lax.optimization_barrier(g)
    settle = read != dtype
    mean_gw = None
    if spec.centre:
        mean_gw = _mean(spec, residuals.weighted(g), where, settle)
        residuals, g = _again(residuals, g)
    # xhat * mean(gw * xhat) * rstd = xc * k. One factor at a time: rstd**3 would underflow.
    k = _mean(spec, residuals.weighted(g) * residuals.xc(), where, settle)
    k = residuals.rstd * (residuals.rstd * (residuals.rstd * k))

    residuals, g = _again(residuals, g)
    gw = residuals.weighted(g)
    dx = residuals.rstd * (gw if mean_gw is None else gw - mean_gw) - residuals.xc() * k

    residuals, g = _again(residuals, g)
    dweight = None
    if residuals.weight is not None:
        xhat = residuals.xc() * residuals.rstd
        dweight = _sum_to(residuals.weight.shape, _to_compute_dtype(g) * xhat)
    return _only(where, dx).astype(dtype), dweight, dbias


def _sum_to(shape: tuple[int, ...], a: Array) -> Array:
    """The transpose of broadcasting from `shape`, which has the rank of `a`."""
    return a.sum([i for i, n in enumerate(shape) if n != a.shape[i]], keepdims=True)


# Forward and backward are some passes over x. What two of them share, a cast or x - origin, XLA for
# CPU computes once and stores in float32, unless it is kept from seeing it. The figures are from
# jax 0.10.2 and two cores; `python -m benchmarks` has them all. XLA for GPU fuses passes of its
# own accord and was not measured, so nothing of this is done there.


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


# A forward by itself, of 4096 examples or more, XLA for CPU makes one fusion of. In jax 0.10 it
# does so in spite of barriers, in 0.11 and 0.12 they would take twice the time.
_BARRIERS_LET_FUSE = jax.__version_info__ < (0, 11)


def _again(*arrays: Any) -> tuple:
    """The same values, to be read by one more pass.

    (2048 x 4096 bfloat16: the forward takes .29 of eqx.nn's time with it, 1.2 without; forward and
    backward .60 and 1.03, and no temporaries instead of 12 bytes an element.)
    """
    return jax.tree.map(jax.lax.optimization_barrier, arrays) if _on_cpu() else arrays


def _read_dtype(x: Array):
    """What the passes read: x as it is, but float16 cast up once.

    XLA for CPU takes a cast from bfloat16 into the sum behind it, and one from float16 it stores,
    for each sum anew. (4096 x 768, forward and backward: .36 of eqx.nn's time, else .75.)
    """
    return jnp.float32 if x.dtype == jnp.float16 and _on_cpu() else x.dtype


def _settled(total: Array) -> Array:
    """A sum that is used by later passes, as a result of its own.

    The operation is void: XLA for CPU would fuse the division behind it into the pass, and
    then, if rows are many and short, store all that is summed. (65536 x 256 float32: the statistics
    take 5 ms with it, 33 without. Not for a forward by itself, which is one fusion to the end.)
    """
    void = _on_cpu() and total.dtype == jnp.float32
    return jax.lax.reduce_precision(total, exponent_bits=8, mantissa_bits=23) if void else total


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalize_vjp(spec: _Spec, x: Example, weight, bias, where) -> Example:
    """The operation with its hand-written backward, in reverse mode alone."""
    return _forward(spec, x, weight, bias, where, kept=False)[0]


normalize_vjp.defvjp(_forward, lambda *args: (*_backward(*args), None))


# A `jax.custom_vjp` refuses jvp, and with it jacfwd, linearize and Hessians. So the operation that
# the layers call is a `jax.custom_jvp` over the same two functions: its tangent map is the
# transpose of the backward, and reverse mode, transposing again, is back at the backward itself.
@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(spec: _Spec, x: Example, weight, bias, where) -> Example:
    return _forward(spec, x, weight, bias, where, kept=False)[0]


@ft.partial(_normalize.defjvp, symbolic_zeros=True)
def _normalize_jvp(spec: _Spec, primals, tangents):
    y, residuals = _forward(spec, *primals)
    *tangents, _ = tangents  # The mask has none.
    live = tuple(_is_live(t) for t in tangents)
    return y, _tangent_map(spec, live)(residuals, _select(tangents, live))


def _select(values: Sequence, live: tuple[bool, ...]) -> list:
    return [value for value, on in zip(values, live, strict=True) if on]


def _is_live(tangent) -> bool:
    return not (tangent is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero))


@ft.cache  # JAX caches traces by function: one function for each spec, not one for each call.
def _tangent_map(spec: _Spec, live: tuple[bool, ...]):
    """The transpose of `_backward`, from the tangents of those inputs that have one."""

    def tangent_map(residuals: _Residuals, tangents):
        def backward(g):
            return _select(_backward(spec, residuals, g), live)

        g = jax.eval_shape(_to_compute_dtype, residuals.x)
        (dy,) = jax.linear_transpose(backward, g)(tangents)
        return dy

    if getattr(jax.config, "jax_remat3", False):
        return tangent_map  # That checkpoint cannot be transposed.
    # Reverse mode would else save what the tangent map computes from x, in place of x.
    return jax.checkpoint(tangent_map, prevent_cse=False)


def normalize_reference(
    x: Example,
    weight: Broadcastable | None = None,
    bias: Broadcastable | None = None,
    *,
    eps: Real = 1e-5,
    centre: bool = True,
) -> Example:
    """The same function in plain `jax.numpy`, differentiated by JAX: the oracle of the tests.

    It keeps 12 bytes an element for the backward and loses digits at large offsets. Use it where
    a custom rule cannot go, as in `jax.experimental.jet`.

    **Arguments:**

    - `x`: one example of any shape, floating point; normalised over all its entries.
    - `weight`, `bias`: arrays that broadcast to the shape of `x`, or `None`.
    - `eps`: added to the variance, inside the root.
    - `centre`: whether to subtract the mean; without, this is RMSNorm.

    **Returns:**

    An array of the shape and dtype of `x`.
    """
    wide, weight, bias = _to_compute_dtype(x), *_fit(x, weight, bias)
    xc = wide - wide.mean(keepdims=True) if centre else wide
    y = xc * jax.lax.rsqrt(jnp.square(xc).mean(keepdims=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.astype(x.dtype)


def normalize(
    x: Example,
    weight: Broadcastable | None = None,
    bias: Broadcastable | None = None,
    where: Mask | None = None,
    *,
    eps: float,
    centre: bool = True,
    unit_offset: bool = False,
    axis_name: Hashable | None = None,
) -> Example:
    """What the layers call: `normalize_reference`, by the rule above."""
    weight, bias = _fit(x, weight, bias)
    if unit_offset and weight is not None:
        weight = 1 + weight
    if where is not None:
        # JAX stumbles over a NumPy constant that is mapped into a custom_jvp under jit, and masks
        # are often such constants. Any operation makes an array of it; XLA drops this one.
        where = where & True
    spec = _Spec(eps, centre, axis_name, None if bias is None else bias.shape)
    y = _normalize(spec, *_vary_together(x, weight, bias, where))
    # The cast stands outside the rule, whose cotangent is then wide as well: dbias is summed over
    # a batch in float32. (Cast inside, its error over 8192 rows of bfloat16 was 2%.)
    return y.astype(x.dtype)


def _fit(x: Example, *params: Array | None) -> list[Array | None]:
    """The parameters in the dtype of the statistics, and with the rank of x."""
    rank = lambda p: p.reshape((1,) * (x.ndim - p.ndim) + p.shape)
    return [p if p is None else rank(p).astype(_compute_dtype(x)) for p in params]


def _vary_together(*arrays: Array | None):
    """Under `jax.shard_map`, lets all arrays vary over the mesh axes that any varies over.

    A rule's cotangents must have the types of its inputs, and dweight varies as x does.
    """
    varying = lambda a: jax.typeof(a).manual_axis_type.varying
    axes = frozenset().union(*map(varying, jax.tree.leaves(arrays)))
    return jax.tree.map(lambda a: jax.lax.pcast(a, tuple(axes - varying(a)), to="varying"), arrays)
