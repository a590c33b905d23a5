"""The programs, as a function and the shapes of its arguments: nothing here computes."""

import functools as ft
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P, SingleDeviceSharding

from .._cases import GROUPS
from .._rivals import Norm, example_shape, make, norm_of
from ._cases import AXIS_NAME, LAYER_WORKS, NO_NORM, SPLIT_OVER, Case, Split, layers_of
from ._devices import devices


def program(case: Case) -> tuple[Callable, tuple]:
    """The function that `case` speaks of, and its arguments, on the device."""
    function, args = _layer(case) if case.work in LAYER_WORKS else _model(case)
    place = SingleDeviceSharding(devices(case.platform)[0])
    return function, jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args
    )


def _shapes(tree, *leading: int):
    """Of arrays, or of as many as `leading` says, stacked."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((*leading, *a.shape), a.dtype), tree)


# ---- One layer


def _layer(case: Case):
    rows, n = case.shape
    # Parameters do not depend on how many rows there are; GroupNorm asks for a multiple of 32.
    norm = make(case.library, case.layer, GROUPS, n, case.dtype)
    x = jax.ShapeDtypeStruct(example_shape(case.layer, rows, n, norm.channels_last), case.dtype)
    if case.work == "forward":
        return norm.apply, (_shapes(norm.params), x)
    return ft.partial(_forward_and_backward, norm.apply), (_shapes(norm.params), x, x)


def _forward_and_backward(apply, params, x, g):
    y, vjp = jax.vjp(apply, params, x)
    return y, vjp(g)


# ---- Models


def _tanh_layer(norm, x, scale, matrix):
    return jnp.tanh(norm.apply(scale, x) @ matrix)


def _mlp_block(norm, x, scale, up, down):
    return x + jax.nn.gelu(norm.apply(scale, x) @ up) @ down


def _model(case: Case):
    """The gradient, by all that is not fixed, of the sum of squares of what comes out."""
    rows, n = case.shape
    if case.library == NO_NORM:
        norm = Norm((), lambda params, x: x, tuple)
    else:  # Of each row; GroupNorm takes its features in groups.
        norm = norm_of(case.library, case.layer, (1, n), case.dtype)
    block, widths = (_tanh_layer, (n, n)) if "tanh" in case.work else (_mlp_block, (n, 4 * n, n))
    block = ft.partial(block, norm)
    if "checkpoint" in case.work:
        block = jax.checkpoint(block)
    matrices = [jax.ShapeDtypeStruct(shape, case.dtype) for shape in itertools.pairwise(widths)]
    params, depth = (_shapes(norm.params), *matrices), layers_of(case.work)
    through, params = (
        (_scanned, _shapes(params, depth)) if "scan" in case.work else (_unrolled, [params] * depth)
    )

    def loss(params, x):
        return jnp.sum(jnp.square(through(block, params, x).astype(jnp.float32)))

    x = jax.ShapeDtypeStruct((rows, n), case.dtype)
    if "norms fixed" in case.work:
        scales, matrices = [own[:1] for own in params], [own[1:] for own in params]
        both = lambda matrices, scales: [(*a, *b) for a, b in zip(scales, matrices, strict=True)]
        of_matrices = lambda matrices, scales, x: loss(both(matrices, scales), x)
        return jax.grad(of_matrices), (matrices, scales, x)
    return jax.grad(loss, 0 if "x fixed" in case.work else (0, 1)), (params, x)


def _unrolled(block, params, x):
    for own in params:
        x = block(x, *own)
    return x


def _scanned(block, params, x):
    return jax.lax.scan(lambda x, own: (block(x, *own), None), x, params)[0]


# ---- Split over devices


def split_program(case: Split) -> tuple[Callable, tuple]:
    """Forward and backward of a LayerNorm in float32, every result split as what it belongs to."""
    rows, n = case.shape
    mesh = jax.sharding.Mesh(np.array(devices(case.platform, SPLIT_OVER)), ("d",))
    spec, of_params = (P("d"), P()) if case.split == "batch" else (P(None, "d"), P("d"))
    if case.library == AXIS_NAME:
        norm = _in_parts(n, mesh)
    else:
        norm = make(case.library, "LayerNorm", 1, n, jnp.float32)
    put = lambda a, spec: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
    x = put(jax.ShapeDtypeStruct((rows, n), jnp.float32), spec)
    params = jax.tree.map(lambda a: put(a, of_params), norm.params)

    def function(params, x, g):
        y, (dparams, dx) = _forward_and_backward(norm.apply, params, x, g)
        like = lambda a, spec: jax.lax.with_sharding_constraint(a, NamedSharding(mesh, spec))
        return like(y, spec), jax.tree.map(lambda a: like(a, of_params), dparams), like(dx, spec)

    return function, (params, x, x)


def _in_parts(n: int, mesh) -> Norm:
    import equinox as eqx

    import eqx_norms

    part = eqx_norms.LayerNorm(n // SPLIT_OVER, axis_name="d")
    whole = jax.tree.map(lambda a: jnp.tile(a, SPLIT_OVER), eqx.filter(part, eqx.is_array))

    def apply(params, x):
        on_part = lambda params, x: jax.vmap(eqx.combine(params, part))(x)
        specs = P("d"), P(None, "d")
        return jax.shard_map(on_part, mesh=mesh, in_specs=specs, out_specs=specs[1])(params, x)

    return Norm(whole, apply, tuple)
