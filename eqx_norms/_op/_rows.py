"""The op over a batch of examples: what the layers call, and a kernel where one can run.

A kernel wants many examples at once, and a layer sees one, mapped by any nest of `jax.vmap`, in a
backward as in a forward. So `implementation="kernel"` is three primitives over `x` of shape
`(*batch, *shape)` and up to two parameters that broadcast to it, axis by axis, in the dtype of the
statistics:

    forward   (x, *params)                     -> y
    tangent   (dx, *dparams, x, *params)       -> dy                linear in dx and dparams
    backward  (g, x, *params)                  -> (dx, *dparams)    linear in g

The last two are each other's transpose: forward mode is the tangent, reverse mode transposes it.
A `jax.vmap` only adds an axis to the batch, and to the parameters one of size 1, so that the
dweight of a backward is the sum over it; unless parameters are mapped too, or the backward itself,
which then owes one dweight for each. What is evaluated, compiled where there is no kernel, and
differentiated once more, is `normalize`, mapped over the batch, and its derivatives.
"""

import functools as ft
import itertools
from collections.abc import Callable, Hashable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jaxtyping import Array, Bool, Float

from ._form import Batch, Form, Param
from ._lowering import mapped_first
from ._normalize import as_jax_has_it, fit, normalize, together
from ._plain import is_plain


def normalize_by(
    implementation: str,
    x: Float[Array, "*shape"],
    weight: Float[Array | np.ndarray, "..."] | None,
    bias: Float[Array | np.ndarray, "..."] | None,
    where: Bool[Array, "..."] | None = None,
    *,
    eps: float,
    centre: bool = True,
    unit_offset: bool = False,
    axis_name: Hashable | None = None,
    round_before_weight: bool = False,
) -> Float[Array, "*shape"]:
    """`normalize`, or with "kernel" the primitives, for what the kernels know."""
    special = where is not None or axis_name is not None or _is_explicit(x, weight, bias)
    if implementation == "xla" or special or round_before_weight or is_plain():
        norm = ft.partial(normalize, eps=eps, centre=centre, unit_offset=unit_offset)
        options = {"axis_name": axis_name, "round_before_weight": round_before_weight}
        return norm(x, weight, bias, where, **options)
    x = as_jax_has_it(x)
    weight, bias = fit(x, weight, bias)
    if unit_offset and weight is not None:
        weight = 1 + weight
    params = [p for p in (weight, bias) if p is not None]
    shape = jnp.broadcast_shapes(*(p.shape for p in params))
    # One for each entry, or for each channel, of which the others are runs.
    shared = sum(size == 1 for size in shape)
    if shape != x.shape[: x.ndim - shared] + (1,) * shared:
        shape = x.shape
    params = [jnp.broadcast_to(p, shape) for p in params]
    form = Form(eps, centre, weight is not None, bias is not None, x.ndim)
    return forward_p.bind(*together(x, *params), form=form)


def _is_explicit(*arrays: Array | np.ndarray | None) -> bool:
    """Whether JAX's types say how they are sharded, as those of the primitives do not."""
    meshes = [jax.typeof(a).sharding.mesh for a in arrays if a is not None]
    return any(AxisType.Explicit in mesh.axis_types for mesh in meshes)


def _forward(x: Batch, *params: Param, form: Form) -> Batch:
    def f(x, *params):
        weight, bias = form.named(params)
        return normalize(x, weight, bias, eps=form.eps, centre=form.centre)

    batch = x.shape[: x.ndim - form.rank]
    for axis, size in reversed([*enumerate(batch)]):
        f = jax.vmap(f, (0, *(0 if p.shape[axis] == size else None for p in params)))
    shared = lambda p: [axis for axis, size in enumerate(batch) if p.shape[axis] != size]
    return f(x, *(p.squeeze(shared(p)) for p in params))


def _tangent(*args: Array, form: Form) -> Batch:
    tangents, primals = _halves(args)
    return jax.jvp(ft.partial(_forward, form=form), primals, tangents)[1]


def _backward(g: Batch, *primals: Array, form: Form) -> list[Array]:
    return list(jax.vjp(ft.partial(_forward, form=form), *primals)[1](g))


def _halves(args: Sequence) -> tuple[Sequence, Sequence]:
    return args[: len(args) // 2], args[len(args) // 2 :]


def _primitive(name: str, formula: Callable, batch: Callable, several: bool = False) -> Primitive:
    """With all but its derivatives; `batch` says which operands have a batch."""
    primitive = Primitive(f"eqx_norms_{name}")
    primitive.multiple_results = several
    primitive.def_impl(formula)
    mlir.register_lowering(primitive, mlir.lower_fun(formula, multiple_results=several))
    batching.primitive_batchers[primitive] = ft.partial(_batch, primitive, formula, batch)
    return primitive


def _batch(primitive: Primitive, formula: Callable, batch: Callable, args, axes, *, form: Form):
    has_batch = batch(len(args))
    mapped = [axis is not None for axis in axes]
    if not any(itertools.compress(mapped, has_batch)):
        # Of one x by several weights, the statistics are made once.
        out = jax.vmap(ft.partial(formula, form=form), axes)(*args)
        return out, [0] * len(out) if primitive.multiple_results else 0
    several = primitive is backward_p or any(
        is_mapped and not has for is_mapped, has in zip(mapped, has_batch, strict=True)
    )
    first = mapped_first(args, axes)
    if not several:
        first = [
            f if has else jnp.expand_dims(a, 0)
            for f, a, has in zip(first, args, has_batch, strict=True)
        ]
    out = primitive.bind(*first, form=form)
    return out, [0] * len(out) if primitive.multiple_results else 0


forward_p = _primitive("forward", _forward, lambda count: [i == 0 for i in range(count)])
tangent_p = _primitive(
    "tangent", _tangent, lambda count: [i in (0, count // 2) for i in range(count)]
)
backward_p = _primitive(
    "backward", _backward, lambda count: [i in (0, 1) for i in range(count)], several=True
)
PRIMITIVES = forward_p, tangent_p, backward_p
forward_p.def_abstract_eval(lambda x, *params, form: x)
tangent_p.def_abstract_eval(lambda dx, *others, form: dx)
backward_p.def_abstract_eval(lambda g, x, *params, form: [x, *params])


def _lower_to_kernel(name: str, plain, platform: str, context, *operands, form: Form):
    # Imported here, for it takes as long as the rest of the package, and few need it.
    from . import _kernels

    x, *params = context.avals_in[len(context.avals_in) - 1 - form.weight - form.bias :]
    # JAX does not promise that an exported Triton kernel can be read back, and those for CPUs are
    # of this process.
    exported = platform != "tpu" and context.module_context.lowering_parameters.for_export
    one = _is_on_one_device(context)
    if exported or not one or not _kernels.exists_for(x, params, form, platform):
        return plain(context, *operands, form=form)
    kernel = ft.partial(getattr(_kernels, name), form=form, platform=platform)
    several = name == "backward"
    return mlir.lower_fun(kernel, multiple_results=several)(context, *operands)


def _is_on_one_device(context: mlir.LoweringRuleContext) -> bool:
    """By itself, or by `jax.shard_map` over all axes: XLA cannot split a kernel over several."""
    where = context.module_context.axis_context
    if isinstance(where, mlir.SPMDAxisContext):
        return {*where.manual_axes} == {*where.mesh.axis_names}
    return isinstance(where, mlir.ShardingContext) and where.num_devices == 1


for _platform in ("cpu", "cuda", "tpu"):
    for _p, _formula in ((forward_p, _forward), (backward_p, _backward)):
        _name = _formula.__name__.strip("_")
        _plain = mlir.lower_fun(_formula, multiple_results=_p.multiple_results)
        _rule = ft.partial(_lower_to_kernel, _name, _plain, _platform)
        mlir.register_lowering(_p, _rule, platform=_platform)


def _instantiated(tangents: Sequence) -> tuple[Array, ...]:
    return tuple(ad.instantiate_zeros(t) for t in tangents)


def _all_zero(tangents: Sequence) -> bool:
    return all(type(t) is ad.Zero for t in tangents)


def _forward_jvp(primals, tangents, *, form):
    y = forward_p.bind(*primals, form=form)
    return y, tangent_p.bind(*_instantiated(tangents), *primals, form=form)


def _tangent_jvp(args, dots, *, form):
    (linear, primals), (of_linear, of_primals) = _halves(args), _halves(dots)
    terms = []
    if not _all_zero(of_linear):
        terms.append(tangent_p.bind(*_instantiated(of_linear), *primals, form=form))
    if not _all_zero(of_primals):
        f = lambda *primals: _tangent(*linear, *primals, form=form)
        terms.append(jax.jvp(f, tuple(primals), _instantiated(of_primals))[1])
    return tangent_p.bind(*args, form=form), sum(terms[1:], terms[0])


def _backward_jvp(args, dots, *, form):
    (g, *primals), (of_g, *of_primals) = args, dots
    terms = []
    if not _all_zero([of_g]):
        terms.append(backward_p.bind(ad.instantiate_zeros(of_g), *primals, form=form))
    if not _all_zero(of_primals):
        f = lambda *primals: _backward(g, *primals, form=form)
        terms.append(jax.jvp(f, tuple(primals), _instantiated(of_primals))[1])
    return backward_p.bind(*args, form=form), [sum(t[1:], t[0]) for t in zip(*terms, strict=True)]


def _tangent_transpose(g, *args, form):
    linear, primals = _halves(args)
    cotangents = backward_p.bind(g, *primals, form=form)
    wanted = [ad.is_undefined_primal(a) for a in linear]
    return [
        *(c if want else None for c, want in zip(cotangents, wanted, strict=True)),
        *(None for _ in primals),
    ]


def _forward_transpose(g, x, *params, form):
    """In the parameters, of which y is a linear function."""
    # Of what is not known only the shape matters: dweight is the same for any weight.
    known = [
        jnp.ones(p.aval.shape, p.aval.dtype) if ad.is_undefined_primal(p) else p for p in params
    ]
    _, *cotangents = backward_p.bind(g, x, *known, form=form)
    wanted = [ad.is_undefined_primal(p) for p in params]
    return [None, *(c if want else None for c, want in zip(cotangents, wanted, strict=True))]


def _backward_transpose(cotangents, g, *primals, form):
    dg = tangent_p.bind(*_instantiated(cotangents), *primals, form=form)
    return [dg, *(None for _ in primals)]


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_transposes[forward_p] = _forward_transpose
ad.primitive_transposes[tangent_p] = _tangent_transpose
ad.primitive_transposes[backward_p] = _backward_transpose
