"""The one differentiable operation behind every layer of this package.

    y = (x - mean) * rstd * weight + bias,    rstd = 1 / sqrt(variance + eps)

with mean and variance over all entries of one example: those under a mask left out, those on
other devices counted in. In the order of the file: the statistics, the forward, the backward, the
way from the backward to forward mode, the plain reference, the entry. `again`, `apart`,
`in_one_pass` and `settled` change no y: `_lowering.py` says what they are for.
"""

import functools as ft
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from .._checks import check_broadcast, check_eps, check_floating
from .._real import Number
from ._lowering import again, apart, in_one_pass, rounded_product, settled
from ._plain import is_plain
from ._rounded import rounded_to

Example = Float[Array, "*shape"]
Broadcastable = Float[Array, "..."]
Mask = Bool[Array, "..."]  # of the rank of x, and broadcasts to its shape


class Segments(NamedTuple):
    """In the place of a mask, of x (tokens, groups, *rest): which segment each token is of."""

    ids: Int[Array, "tokens *ones"]  # with the rank of x
    mask: Mask


Where = Mask | Segments


class _Spec(NamedTuple):
    """What is known before any array comes; hashable, so that traces are cached on it."""

    eps: float
    centre: bool
    axis_name: Hashable | None
    bias_shape: tuple[int, ...] | None
    live: tuple[bool, ...] = (True, True, True)  # Whether x, weight, bias have a derivative.
    # To what is rounded, if to anything: what is normalised, and each result behind it.
    rounds: tuple[Any, Any] = (None, None)
    num_segments: int | None = None  # With them each mean is one of each token's segment.


class _Residuals(NamedTuple):
    """What the backward keeps: x in its own dtype, at most three scalars, the weight, the mask."""

    x: Example
    weight: Broadcastable | None
    where: Where | None
    origin: Array | None
    d: Array | None
    rstd: Array


class _Pass(NamedTuple):
    """What the backward reads in one pass over an example: x and g cast up, and the residuals."""

    x: Example
    g: Example
    weight: Broadcastable | None
    where: Where | None
    origin: Array | None
    d: Array | None
    rstd: Array

    def xc(self) -> Example:
        return _centred(self.x, self.where, self.origin, self.d)

    def gw(self) -> Example:
        if self.weight is None:
            return self.g
        gw = self.g * self.weight
        # That of a token by itself is its own mean, and nothing is left if both are rounded alike.
        return rounded_product(gw) if isinstance(self.where, Segments) else gw

    def again(self, dtype) -> "_Pass":
        x, g, *rest = self
        return _Pass(again(x, dtype), again(g, dtype), *jax.tree.map(again, rest))


def _mean(
    spec: _Spec, a: Example, where: Where | None, settle: bool = False, of_nothing: int = 0
) -> Array:
    """Over what `where` lets through, on all devices of `axis_name`; `of_nothing` if it is none."""
    if isinstance(where, Segments):
        return _mean_of_segments(spec, a, where, of_nothing)
    total = jnp.sum(a, where=where)
    if settle:
        total = settled(total)
    count = a.size if where is None else _count(a, where)
    if spec.axis_name is not None:
        total, count = jax.lax.psum((total, count), spec.axis_name)
    if where is None:
        return divided(total, count)
    mean = divided(total, jnp.maximum(count, 1))
    return mean if of_nothing == 0 else jnp.where(count == 0, of_nothing, mean)


def _mean_of_segments(spec: _Spec, a: Example, where: Segments, of_nothing: int) -> Array:
    """Of the segment of each token: one number a token and group, with the rank of a.

    A token is added after the other, so that the sum over a million would lose three digits, and
    sums of a thousand at most are added up. What the tokens differ from the mean is summed as well,
    and loses as much of less.
    """
    rest = range(2, a.ndim)
    in_token = lambda a, dtype=None: a.sum(rest, dtype, keepdims=True)
    # Of groups that share a mask once: XLA adds up constants while it compiles, a minute for 4e6.
    alike = math.prod(a.shape[2:]) // max(math.prod(where.mask.shape[2:]), 1)
    counts = in_token(where.mask, a.dtype) * alike
    total = _sum_by_segment(spec, where.ids.reshape(-1))
    own, count = in_token(_only(where, a)), total(counts)
    of = lambda sums: divided(sums, jnp.broadcast_to(jnp.maximum(count, 1), sums.shape))
    tokens = lambda of_segments: of_segments[where.ids.reshape(-1)]
    mean = of(total(own))
    mean += of(total(own - counts * tokens(mean)))
    return tokens(mean if of_nothing == 0 else jnp.where(count == 0, of_nothing, mean))


def _sum_by_segment(spec: _Spec, ids: Array) -> Callable[[Array], Array]:
    """In stretches of a thousand tokens, as long as there are no more sums than tokens."""
    count = spec.num_segments
    assert count is not None
    stretches = max(min(len(ids) // 1000, len(ids) // count), 1)
    if stretches == 1:
        return lambda a: jax.ops.segment_sum(a, ids, count)
    ids = ids + count * (jnp.arange(len(ids), dtype=ids.dtype) * stretches // len(ids))

    def total(a: Array) -> Array:
        sums = jax.ops.segment_sum(a, ids, count * stretches)
        return sums.reshape(stretches, count, *a.shape[1:]).sum(0)

    return total


def _count(a: Example, where: Mask) -> Array:
    """How many entries of a a mask lets through that broadcasts to it."""
    return jnp.sum(where, dtype=a.dtype) * (a.size // max(where.size, 1))


def divided(a: Array, by) -> Array:
    """As `a / by`, without the check that `jax_error_checking_behavior_divide` adds to that.

    It writes to a reference, which no custom rule may do under `jax.jit`.
    """
    return jax.lax.div(a, jnp.asarray(by, a.dtype))


def _only(where: Where | None, a: Array) -> Array:
    """Zero where the mask is False, NaN or not, and in its derivative."""
    where = where.mask if isinstance(where, Segments) else where
    return a if where is None else jnp.where(where, a, 0)


def compute_dtype(x: Array):
    """Statistics are taken in float32, and in float64 for float64."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def _to_compute_dtype(x: Array) -> Array:
    return x.astype(compute_dtype(x))


def _centred(x: Example, where: Where | None, origin: Array | None, d: Array | None) -> Example:
    """`x - mean`, by two subtractions: `origin + d`, rounded, would have lost d again."""
    x = _only(where, x)
    x = x if origin is None else x - origin
    return x if d is None else x - d


def _forward(spec: _Spec, x: Example, weight, bias, where, kept: bool = True):
    """`(y, residuals)`. The mean is `origin + d`; `kept` says whether the backward will follow.

    A mean is off by an ulp of the largest entry, which at an offset of 1e6 is a tenth of the
    spread. So it only serves as the origin, and the mean of what is left, `d`, says by how much
    it missed. (mean(xc^2) - d^2 would save a pass and is wrong on constant rows, where it is the
    difference of two roundings: dx off by 2e-5 at 1e6, y NaN at 1e9. About an entry of x it is
    not: `in_one_pass`.)
    """

    def next_pass(x_wide, *scalars):
        scalars = (s if s is None else again(s, alone=not kept) for s in scalars)
        return again(x_wide, x.dtype, alone=not kept), *scalars

    origin = d = None
    read = _to_compute_dtype(x)
    if spec.centre:
        # y is the same for any origin, so the origin has no derivative; d has the mean's.
        xc = _centred(read, where, None, None)
        origin = jax.lax.stop_gradient(_mean(spec, xc, where, settle=kept))
        read, origin = next_pass(read, origin)
        d = _mean(spec, _centred(read, where, origin, None), where, settle=kept)
        read, origin, d = next_pass(read, origin, d)
    # Of nothing it is 1: with eps=0 rstd would be infinite, and 0 * rstd no number.
    square = jnp.square(_centred(read, where, origin, d))
    var = _mean(spec, square, where, settle=kept, of_nothing=1)
    if spec.centre and where is None and spec.axis_name is None:
        how = {"kept": kept, "dweight": spec.live[1]}
        origin, d, var = in_one_pass(x, origin, d, var, weight=weight, **how)
    rstd = jax.lax.rsqrt(var + spec.eps)

    residuals = _Residuals(x, weight, where, origin, d, rstd)
    read, origin, d = next_pass(read, origin, d)
    first, each = spec.rounds
    y = rounded_to(first, _centred(read, where, origin, d) * rstd)
    if weight is not None:
        y = rounded_to(each, y * weight)
    if bias is not None:
        y = rounded_to(each, y + bias)
    return _only(where, y), residuals


def _forward_alone(spec: _Spec, x: Example, weight, bias, where) -> Example:
    return _forward(spec, x, weight, bias, where, kept=False)[0]


def _backward(spec: _Spec, residuals: _Residuals, g: Example):
    """`(dx, dweight, dbias)` for the cotangent g of y. With gw = g * weight, xhat = xc * rstd,

        dx = rstd * (gw - mean(gw) - xhat * mean(gw * xhat)),    dweight = g * xhat,    dbias = g,

    the last two summed over what was broadcast, the first without mean(gw) if not centred.
    """
    # Of x in its own dtype each later use would round a derivative of this: it is cast up once.
    x, weight, where, origin, d, rstd = apart(*residuals, centred=spec.centre, dx=spec.live[0])
    dtype, x = x.dtype, _to_compute_dtype(x)
    d, rstd = _recalled(spec, x, where, origin, d, rstd)
    g = _only(where, g)
    dbias = None if spec.bias_shape is None else _sum_to(spec.bias_shape, g)

    read = _Pass(x, again(g, dtype), weight, where, origin, d, rstd)
    settle = dtype == jnp.float16
    mean_gw = None
    if spec.centre:
        mean_gw = _mean(spec, read.gw(), where, settle)
        read = read.again(dtype)
    # xhat * mean(gw * xhat) * rstd = xc * k. One factor at a time: rstd**3 would underflow.
    k = _mean(spec, read.gw() * read.xc(), where, settle)
    k = read.rstd * (read.rstd * (read.rstd * k))

    read = read.again(dtype)
    gw = read.gw()
    dx = read.rstd * (gw if mean_gw is None else gw - mean_gw) - read.xc() * k

    read = read.again(dtype)
    dweight = None
    if weight is not None:
        # Under the mask xhat is infinite where all that counts is alike, and eps is 0.
        dweight = _sum_to(weight.shape, _only(where, read.g * (read.xc() * read.rstd)))
    return _only(where, dx).astype(dtype), dweight, dbias


def _sum_to(shape: tuple[int, ...], a: Array) -> Array:
    """The transpose of broadcasting from `shape`, which has the rank of `a`."""
    return a.sum([i for i, n in enumerate(shape) if n != a.shape[i]], keepdims=True)


@ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _recalled(spec: _Spec, x: Example, where, origin, d, rstd):
    """`(d, rstd)` as they were kept, with the derivative that they have in the x beside them.

    So all that a derivative of the backward owes to x comes together in the compute dtype. By way
    of the forward a part of it would be rounded by itself, and the parts cancel.
    """
    return d, rstd


@_recalled.defjvp
def _recalled_jvp(spec: _Spec, primals, tangents):
    x, where, origin, *_ = primals
    d, rstd = _recalled(spec, *primals)
    dx = _only(where, tangents[0])
    drstd = _mean(spec, _centred(x, where, origin, d) * dx, where)
    drstd = -rstd * (rstd * (rstd * drstd))
    return (d, rstd), (None if d is None else _mean(spec, dx, where), drstd)


@ft.partial(jax.custom_vjp, nondiff_argnums=(0,))
def normalize_vjp(spec: _Spec, x: Example, weight, bias, where) -> Example:
    """The operation with its hand-written backward, in reverse mode alone."""
    return _forward_alone(spec, x, weight, bias, where)


normalize_vjp.defvjp(_forward, lambda *args: (*_backward(*args), None))


# A `jax.custom_vjp` refuses jvp, and with it jacfwd, linearize and Hessians. So the operation that
# the layers call is a `jax.custom_jvp` over the same two functions: its tangent map is the
# transpose of the backward, and reverse mode, transposing again, is back at the backward itself.
def in_both_modes(forward: Callable, backward: Callable) -> Callable:
    """The operation `op(spec, x, weight, bias, where)` of such a forward and backward."""

    @ft.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def op(spec, x, weight, bias, where):
        return forward(spec, x, weight, bias, where, kept=False)[0]

    @ft.partial(op.defjvp, symbolic_zeros=True)
    def _(spec, primals, tangents):
        *tangents, _ = tangents  # The mask has none.
        spec = spec._replace(live=tuple(_is_live(t) for t in tangents))
        y, residuals = forward(spec, *primals)
        # The backward has no eps of its own.
        remat3 = getattr(jax.config, "jax_remat3", False)
        tangent_map = _tangent_map(backward, spec._replace(eps=0.0), remat3)
        return y, tangent_map(residuals, _select(tangents, spec.live))

    return op


_normalize = in_both_modes(_forward, _backward)


def _select(values: Sequence, live: tuple[bool, ...]) -> list:
    return [value for value, on in zip(values, live, strict=True) if on]


def _is_live(tangent) -> bool:
    return not (tangent is None or isinstance(tangent, jax.custom_derivatives.SymbolicZero))


# JAX caches traces by function: so one function for each spec, not one for each call.
@ft.lru_cache(maxsize=64)
def _tangent_map(backward: Callable, spec: Any, remat3: bool):
    """The transpose of `backward`, from the tangents of those inputs that have one."""

    def tangent_map(residuals, tangents):
        def of_live(g):
            return _select(backward(spec, residuals, g), spec.live)

        like_g = _to_compute_dtype(residuals.x)
        (dy,) = jax.linear_transpose(of_live, like_g)(tangents)
        return dy

    if remat3:
        return tangent_map  # That checkpoint cannot be transposed.
    # Reverse mode would else save what the tangent map computes from x, in place of x.
    return jax.checkpoint(tangent_map, prevent_cse=False)


def normalize_reference(
    x: Example,
    weight: Broadcastable | None = None,
    bias: Broadcastable | None = None,
    *,
    eps: Number = 1e-5,
    centre: bool = True,
) -> Example:
    """The same function in plain `jax.numpy`, differentiated by JAX: the oracle of the tests.

    It keeps 12 bytes an element for the backward and loses digits at large offsets. For tools that
    cannot take a custom rule, [`eqx_norms.plain`][] gives the layers without one, and as exact.

    **Arguments:**

    - `x`: one example of any shape and of dtype float16, bfloat16, float32 or float64. It is
        normalised over all its entries.
    - `weight`, `bias`: arrays that broadcast to the shape of `x`, or `None`.
    - `eps`: added to the variance, inside the root.
    - `centre`: whether to subtract the mean. If not, this is RMSNorm.

    **Returns:**

    An array of the shape and dtype of `x`.

    **Raises:** `TypeError` and `ValueError` as [`eqx_norms.layer_norm`][] does.
    """
    check_floating("normalize_reference", x)
    check_broadcast("normalize_reference", x, weight=weight, bias=bias)
    eps = check_eps("normalize_reference", eps)
    x = as_jax_has_it(x)
    wide, weight, bias = _to_compute_dtype(x), *fit(x, weight, bias)
    xc = wide - wide.mean(keepdims=True) if centre else wide
    y = xc * jax.lax.rsqrt(jnp.square(xc).mean(keepdims=True) + eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return y.astype(x.dtype)


def normalize(
    x: Example,
    weight: Broadcastable | np.ndarray | None = None,
    bias: Broadcastable | np.ndarray | None = None,
    where: Mask | None = None,
    *,
    eps: float,
    centre: bool = True,
    unit_offset: bool = False,
    axis_name: Hashable | None = None,
    round_before_weight: bool = False,
    segments: Int[Array, "tokens"] | None = None,
    num_segments: int | None = None,
) -> Example:
    """What the layers call: `normalize_reference`, by the rule above.

    With segments x is of shape (tokens, groups, *rest), and each group of each segment is by
    itself; tokens of no segment are as if under the mask.
    """
    x = as_jax_has_it(x)
    dtype, rounds, of_weight = x.dtype, (None, None), None
    if round_before_weight:
        dtype, of_weight = _promoted(x, weight, bias), getattr(weight, "dtype", None)
        rounds = x.dtype, dtype
        x = x.astype(dtype) if dtype == jnp.float64 else x
    weight, bias = fit(x, weight, bias)
    if unit_offset and weight is not None:
        weight = rounded_to(of_weight, 1 + weight)
    if where is not None:
        # JAX stumbles over a NumPy constant that is mapped into a custom_jvp under jit, and masks
        # are often such constants. Any operation makes an array of it; XLA drops this one.
        where = where & True
    part = where if segments is None else _by_segment(x, where, segments, num_segments)
    bias_shape = None if bias is None else bias.shape
    spec = _Spec(eps, centre, axis_name, bias_shape, rounds=rounds, num_segments=num_segments)
    # JAX traces a custom rule when it differentiates, and a vmap may have named its axis, and gone,
    # long before. A mesh has not. So along a vmap JAX differentiates the forward, as any function.
    op = _normalize if _is_on_mesh(axis_name) and not is_plain() else _forward_alone
    y = op(spec, *together(x, weight, bias, part))
    # The cast stands outside the rule, whose cotangent is then wide as well: dbias is summed over
    # a batch in float32. (Cast inside, its error over 8192 rows of bfloat16 was 2%.)
    return y.astype(dtype)


def _promoted(*arrays: Array | np.ndarray | None):
    """The dtype of their product, as JAX has it by default; under strict promotion too."""
    dtypes = {as_jax_has_it(a).dtype for a in arrays if a is not None}
    wide, wider = jnp.dtype("float32"), jnp.dtype("float64")
    return dtypes.pop() if len(dtypes) == 1 else wider if wider in dtypes else wide


def _by_segment(x: Example, where: Mask | None, ids: Array, num_segments: Any) -> Segments:
    ids = (ids & -1).reshape((-1,) + (1,) * (x.ndim - 1))  # As with the mask.
    known = (ids >= 0) & (ids < num_segments)
    return Segments(jnp.where(known, ids, 0), known if where is None else known & where)


def as_jax_has_it(x: Any) -> Array:
    """Rules must be told the dtype that JAX would give x when asked for its own.

    For float64 from under `enable_x64`, used outside, that is float32, unless JAX was set to allow
    float64 to those who ask for it.
    """
    mode = getattr(jax.config, "jax_explicit_x64_dtypes", None)
    allowed = mode is not None and mode.name == "ALLOW"
    dtype = jax.typeof(x).dtype if allowed else jax.dtypes.canonicalize_dtype(x.dtype)
    return jnp.asarray(x).astype(dtype)


def fit(x: Example, *params: Array | np.ndarray | None) -> list[Array | None]:
    """The parameters in the dtype of the statistics, and with the rank of x."""
    rank = lambda p: jnp.asarray(p).reshape((1,) * (x.ndim - p.ndim) + p.shape)
    return [p if p is None else rank(p).astype(compute_dtype(x)) for p in params]


def _is_on_mesh(axis_name: Hashable | None) -> bool:
    """Whether it is an axis of `jax.shard_map`, and not of `jax.vmap`. `None` is on any mesh.

    A vmap may have the name of an axis of the mesh around it. One of the same size does no harm:
    JAX maps the sums of a rule traced late as well, and only its counts come from the mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    return all(
        name in mesh.manual_axes and jax.lax.axis_size(name) == mesh.shape[name]
        for name in names
        if name is not None
    )


def together(*arrays: Array | Segments | None) -> list[Any]:
    """Arrays of one rank, the first of the full shape: all are placed on a mesh as that one is.

    A rule's cotangents must have the types of its inputs, and dweight varies and is split as x is:
    over the axes of `jax.shard_map`, and over the axes of a mesh with explicit sharding. (Not x as
    a parameter is: a `jax.vmap` outside may have split the batch along that axis already.)
    """
    types = [jax.typeof(a) for a in jax.tree.leaves(arrays)]
    varying = frozenset().union(*(t.manual_axis_type.varying for t in types))
    shape, splits = types[0].shape, types[0].sharding.spec

    def place(a: Array) -> Array:
        t = jax.typeof(a)
        a = jax.lax.pcast(a, tuple(varying - t.manual_axis_type.varying), to="varying")
        axes = zip(splits, a.shape, shape, strict=True)
        spec = P(*(split if n == m else None for split, n, m in axes))
        return a if spec == t.sharding.spec else jax.sharding.reshard(a, spec)

    return jax.tree.map(place, list(arrays))
