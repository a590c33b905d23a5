"""Every transformation that a layer must survive, as a table: a name, and a small function.

An entry of `TRANSFORMATIONS` takes `f`, where `f(x, weight, bias)` treats one example, and fixed
random arrays `a`, and returns a pytree of arrays. An entry of `MODULE_TRANSFORMATIONS` takes
instead of `f` an `equinox.Module` with the leaves `weight` and `bias`. Whoever runs the table runs
an entry twice, on a layer and on its plain reference, and compares.
"""

import dataclasses
import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from draws import seed
from jax.experimental.ode import odeint
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer beside its reference, each as a function and as a module.

    The batch must be a multiple of 8, and the last axis of an example even, to be sharded.
    """

    ours: Callable  # (x, weight, bias) -> y
    reference: Callable
    our_module: Callable  # (weight, bias) -> a module, called on x
    reference_module: Callable
    shape: tuple[int, ...]
    param_shape: tuple[int, ...]
    batch: int = 8


class Arrays(eqx.Module):
    """Random arrays: a batch of examples, parameters, a tangent for each, a cotangent of y."""

    x: jax.Array
    dx: jax.Array
    g: jax.Array
    weight: jax.Array
    bias: jax.Array
    dweight: jax.Array
    dbias: jax.Array
    weights: jax.Array  # An ensemble: one set of parameters for each example.
    biases: jax.Array

    def __init__(self, case: Case, dtype):
        rng = np.random.default_rng(seed(20240607))
        # Drawn in float32, so that every dtype from there on is given the same numbers.
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)
        self.x, self.dx, self.g = (draw(case.batch, *case.shape) for _ in range(3))
        self.weight, self.bias, self.dweight, self.dbias = (
            draw(*case.param_shape) for _ in range(4)
        )
        self.weights, self.biases = (draw(case.batch, *case.param_shape) for _ in range(2))

    @property
    def one(self):
        return self.x[0], self.weight, self.bias

    @property
    def done(self):
        return self.dx[0], self.dweight, self.dbias

    @property
    def all(self):
        return self.x, self.weight, self.bias

    @property
    def dall(self):
        return self.dx, self.dweight, self.dbias


TRANSFORMATIONS: dict[str, Callable] = {}
MODULE_TRANSFORMATIONS: dict[str, Callable] = {}


def _add(transform, table=TRANSFORMATIONS):
    table[transform.__name__.strip("_")] = transform
    return transform


_add_module = ft.partial(_add, table=MODULE_TRANSFORMATIONS)

_args = (0, 1, 2)


def _loss(f, g):
    """The sine gives second derivatives in every pair of arguments; g, a random cotangent."""
    return lambda *args: jnp.sum(g * jnp.sin(f(*args)))


def _batched(f):
    return jax.vmap(f, (0, None, None))


def _gradient(f, g):
    return jax.grad(_loss(f, g), _args)


def _hvp(f, a):
    """Forward over reverse."""
    return jax.jvp(_gradient(f, a.g[0]), a.one, a.done)


# First the plain ones.


@_add
def _jit(f, a):
    return jax.jit(f)(*a.one)


@_add
def _vmap(f, a):
    return _batched(f)(*a.all)


@_add
def _nested_vmap(f, a):
    pairs = lambda x: x.reshape(2, -1, *x.shape[1:])
    return jax.vmap(_batched(f), (0, None, None))(pairs(a.x), a.weight, a.bias)


@_add
def _vmap_out_axes(f, a):
    return jax.vmap(f, (-1, None, None), -1)(jnp.moveaxis(a.x, 0, -1), a.weight, a.bias)


@_add
def _vmap_weights(f, a):
    return jax.vmap(f, (None, 0, 0))(a.x[0], a.weights, a.biases)


@_add
def _vmap_weights_grad(f, a):
    ensemble = jax.vmap(_batched(f), (None, 0, 0))
    g = a.g[:, None] + a.dx[None]
    return _gradient(ensemble, g)(a.x, a.weights, a.biases)


@_add
def _grad(f, a):
    return _gradient(f, a.g[0])(*a.one)


@_add
def _value_and_grad_of_batch(f, a):
    return jax.value_and_grad(_loss(_batched(f), a.g), _args)(*a.all)


@_add
def _vjp(f, a):
    y, pullback = jax.vjp(_batched(f), *a.all)
    return y, pullback(a.g)


@_add
def _grad_of_weight_alone(f, a):
    return jax.grad(_loss(_batched(f), a.g), 1)(*a.all)


@_add
def _grad_of_bias_alone(f, a):
    return jax.grad(_loss(_batched(f), a.g), 2)(*a.all)


@_add
def _grad_without_bias(f, a):
    return jax.grad(lambda x, weight: _loss(f, a.g[0])(x, weight, None), (0, 1))(*a.one[:2])


@_add
def _grad_without_weight(f, a):
    return jax.grad(lambda x, bias: _loss(f, a.g[0])(x, None, bias), (0, 1))(a.x[0], a.bias)


@_add
def _per_example_grad(f, a):
    one = lambda x, weight, bias, g: _gradient(f, g)(x, weight, bias)
    return jax.vmap(one, (0, None, None, 0))(*a.all, a.g)


@_add
def _grad_of_grad(f, a):
    inner = _gradient(f, a.g[0])
    along = lambda *args: sum(map(jnp.vdot, inner(*args), a.done))
    return jax.grad(along, _args)(*a.one)


@_add
def _jvp(f, a):
    return jax.jvp(_batched(f), a.all, a.dall)


@_add
def _jvp_of_weight_alone(f, a):
    return jax.jvp(lambda weight: f(a.x[0], weight, a.bias), (a.weight,), (a.dweight,))


@_add
def _jvp_of_jit(f, a):
    return jax.jvp(jax.jit(f), a.one, a.done)


@_add
def _jvp_of_jvp(f, a):
    first = lambda *args: jax.jvp(f, args, a.done)
    return jax.jvp(first, a.one, (a.dx[1], a.weights[0], a.biases[0]))


@_add
def _jacfwd(f, a):
    return jax.jacfwd(f, _args)(*a.one)


@_add
def _jacrev(f, a):
    return jax.jacrev(f, _args)(*a.one)


@_add
def _hessian(f, a):
    return jax.hessian(_loss(f, a.g[0]), _args)(*a.one)


@_add
def _jacrev_of_jacfwd(f, a):
    return jax.jacrev(jax.jacfwd(f, _args))(*a.one)


@_add
def _linearize(f, a):
    y, tangent_map = jax.linearize(f, *a.one)
    return y, tangent_map(*a.done)


@_add
def _transpose_of_linearize(f, a):
    _, tangent_map = jax.linearize(f, *a.one)
    return jax.linear_transpose(tangent_map, *a.one)(a.g[0])


# Second order, as it is used.


@_add
def _forward_over_reverse(f, a):
    return _hvp(f, a)


@_add
def _reverse_over_forward(f, a):
    along = lambda *args: jax.jvp(_loss(f, a.g[0]), args, a.done)[1]
    return jax.grad(along, _args)(*a.one)


@_add
def _laplacian(f, a):
    """Of each output: the trace of its Hessian in x."""
    x, weight, bias = a.one

    def second(v):
        once = lambda x: jax.jvp(lambda x: f(x, weight, bias), (x,), (v,))[1]
        return jax.jvp(once, (x,), (v,))[1]

    basis = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    return jnp.sum(jax.vmap(second)(basis), 0)


@_add
def _gauss_newton_product(f, a):
    """J^T H J v, with H the Hessian of the loss in y."""
    y, dy = jax.jvp(_batched(f), a.all, a.dall)
    hessian_dy = jax.jvp(jax.grad(lambda y: jnp.sum(a.g * jnp.sin(y))), (y,), (dy,))[1]
    return jax.vjp(_batched(f), *a.all)[1](hessian_dy)


# Checkpoint and control flow.


@_add
def _checkpoint_grad(f, a):
    return _gradient(jax.checkpoint(_batched(f)), a.g)(*a.all)


@_add
def _checkpoint_jvp(f, a):
    return jax.jvp(jax.checkpoint(_batched(f)), a.all, a.dall)


@_add
def _checkpoint_hvp(f, a):
    return _hvp(jax.checkpoint(f), a)


@_add
def _checkpoint_saving_nothing(f, a):
    deep = lambda x, weight, bias: jnp.tanh(f(jnp.sin(f(x, weight, bias)), weight, bias))
    nothing = jax.checkpoint_policies.nothing_saveable
    return _gradient(jax.checkpoint(deep, policy=nothing), a.g[0])(*a.one)


def _scanned(f):
    """A residual stream, layers with parameters of their own."""

    def run(x, weights, biases):
        def step(x, params):
            y = f(x, *params)
            return x + y, jnp.sin(y)

        return jax.lax.scan(step, x, (weights, biases))

    return run


def _scan_arrays(a):
    return a.x[0], a.weights[:3], a.biases[:3]


def _scan_loss(f, a):
    run = _scanned(f)

    def loss(*args):
        x, ys = run(*args)
        return jnp.sum(a.g[0] * x) + jnp.sum(a.g[1:4] * ys)

    return loss


@_add
def _scan(f, a):
    return _scanned(f)(*_scan_arrays(a))


@_add
def _scan_grad(f, a):
    return jax.grad(_scan_loss(f, a), _args)(*_scan_arrays(a))


@_add
def _scan_jvp(f, a):
    tangents = a.dx[0], a.weights[3:6], a.biases[3:6]
    return jax.jvp(_scanned(f), _scan_arrays(a), tangents)


@_add
def _scan_checkpoint_grad(f, a):
    return jax.grad(_scan_loss(jax.checkpoint(f), a), _args)(*_scan_arrays(a))


@_add
def _while_loop_jvp(f, a):
    def run(x, weight, bias):
        step = lambda carry: (carry[0] + 1, carry[1] + f(carry[1], weight, bias))
        return jax.lax.while_loop(lambda carry: carry[0] < 3, step, (0, x))[1]

    return jax.jvp(run, a.one, a.done)


@_add
def _cond_grad(f, a):
    def run(x, weight, bias):
        other = lambda x: f(2 * x, weight, bias) + x
        return jax.lax.cond(x.ravel()[0] > 0, lambda x: f(x, weight, bias), other, x)

    # One example for each branch.
    up, down = (a.x[0].at[(0,) * a.x[0].ndim].set(sign) for sign in (0.7, -0.7))
    return [_gradient(run, a.g[0])(x, a.weight, a.bias) for x in (up, down)]


@_add
def _cond_of_batch_grad(f, a):
    """Under vmap a cond is a select, and both branches run."""

    def run(x, weight, bias):
        return jax.lax.cond(x.ravel()[0] > 0, lambda x: f(x, weight, bias), jnp.sin, x)

    return _gradient(_batched(run), a.g)(*a.all)


@_add
def _odeint_grad(f, a):
    def solve(x, weight, bias):
        field = lambda x, t, weight, bias: f(x, weight, bias) - x * t
        # Loose, so that float32 meets it as well; both sides take the same steps.
        times = jnp.array([0.0, 0.5], x.dtype)
        return odeint(field, x, times, weight, bias, rtol=1e-2, atol=1e-2, mxstep=100)

    return jax.value_and_grad(_loss(solve, a.g[:2]), _args)(*a.one)


# Sharding, over eight host devices.


def _mesh(*sizes, axis_type=AxisType.Auto):
    names = ("batch", "features")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes))


_replicated = P("batch"), P(), P()


def _add_shard_map(transform):
    for check_vma in (True, False):
        shard = ft.partial(jax.shard_map, mesh=_mesh(8), check_vma=check_vma)
        entry = ft.partial(transform, shard, check_vma)
        TRANSFORMATIONS[f"{transform.__name__.strip('_')}_check_vma_{check_vma}"] = entry


@_add_shard_map
def _shard_map(shard, check_vma, f, a):
    return shard(_batched(f), in_specs=_replicated, out_specs=P("batch"))(*a.all)


@_add_shard_map
def _grad_of_shard_map(shard, check_vma, f, a):
    sharded = shard(_batched(f), in_specs=_replicated, out_specs=P("batch"))
    return _gradient(sharded, a.g)(*a.all)


@_add_shard_map
def _shard_map_of_grad(shard, check_vma, f, a):
    def local(x, weight, bias, g):
        dx, dweight, dbias = _gradient(_batched(f), g)(x, weight, bias)
        if not check_vma:  # Then the sum over devices is left to the caller.
            dweight, dbias = jax.lax.psum((dweight, dbias), "batch")
        return dx, dweight, dbias

    sharded = shard(local, in_specs=(*_replicated, P("batch")), out_specs=_replicated)
    return sharded(*a.all, a.g)


@_add_shard_map
def _jvp_of_shard_map(shard, check_vma, f, a):
    sharded = shard(_batched(f), in_specs=_replicated, out_specs=P("batch"))
    return jax.jvp(sharded, a.all, a.dall)


@_add_shard_map
def _shard_map_of_jvp(shard, check_vma, f, a):
    local = lambda args, tangents: jax.jvp(_batched(f), args, tangents)
    sharded = shard(local, in_specs=(_replicated, _replicated), out_specs=P("batch"))
    return sharded(a.all, a.dall)


@_add_shard_map
def _shard_map_of_weights(shard, check_vma, f, a):
    """The example is replicated and the parameters are not."""
    specs = P(), P("batch"), P("batch")
    sharded = shard(jax.vmap(f, (None, 0, 0)), in_specs=specs, out_specs=P("batch"))
    return _gradient(sharded, a.g)(a.x[0], a.weights, a.biases)


def _place(mesh, a, *axes):
    """Examples, parameters and cotangent on the mesh; parameters by feature if they have them."""
    by_feature = "features" in axes
    free = [None] * (a.x.ndim - 2)
    x = P("batch", *free, "features") if by_feature else P("batch")
    same = a.weight.shape == a.x.shape[1:]
    param = P(*free, "features") if by_feature and same else P()
    specs = x, param, param, x
    return [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip((*a.all, a.g), specs, strict=True)
    ]


def _values_grads_tangents(f, x, weight, bias, g, tangents):
    args = x, weight, bias
    value, grads = jax.value_and_grad(_loss(_batched(f), g), _args)(*args)
    return value, grads, jax.jvp(_batched(f), args, tangents)[1]


def _on_mesh(f, a, mesh, *axes):
    x, weight, bias, g = _place(mesh, a, *axes)
    args = x, weight, bias
    run = jax.jit(ft.partial(_values_grads_tangents, f))
    # Tangents must be sharded as their primals; any random ones do.
    tangents = tuple(jnp.cos(3 * arg) for arg in args)
    return run(*args, g, tangents)


@_add
def _sharded_jit_over_batch(f, a):
    return _on_mesh(f, a, _mesh(8), "batch")


@_add
def _sharded_jit_over_features(f, a):
    return _on_mesh(f, a, _mesh(4, 2), "batch", "features")


@_add
def _explicit_sharding_over_batch(f, a):
    mesh = _mesh(8, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        return _on_mesh(f, a, mesh, "batch")


@_add
def _explicit_sharding_over_features(f, a):
    mesh = _mesh(4, 2, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        return _on_mesh(f, a, mesh, "batch", "features")


# Export. (The vjp of an export gives the cotangents of the arguments, from these and y's.)


@_add
def _export(f, a):
    exported = jax.export.export(jax.jit(_batched(f)))(*a.all)
    return _run_to_second_order(exported, a)


def _run_to_second_order(exported, a):
    gradient = exported.vjp()
    cotangents = gradient.call(*a.all, a.g)
    return exported.call(*a.all), cotangents, gradient.vjp().call(*a.all, a.g, *a.dall)


@_add
def _export_serialised_to_second_order(f, a):
    exported = jax.export.export(jax.jit(_batched(f)))(*a.all)
    loaded = jax.export.deserialize(exported.serialize(vjp_order=2))
    return _run_to_second_order(loaded, a)


@_add
def _export_with_symbolic_batch(f, a):
    (b,) = jax.export.symbolic_shape("b")
    x = jax.ShapeDtypeStruct((b, *a.x.shape[1:]), a.x.dtype)
    exported = jax.export.export(jax.jit(_batched(f)))(x, a.weight, a.bias)
    three = exported.call(a.x[:3], a.weight, a.bias)
    return three, _run_to_second_order(exported, a)


@_add
def _export_of_grad(f, a):
    gradient = jax.jit(_gradient(_batched(f), a.g))
    return jax.export.export(gradient)(*a.all).call(*a.all)


# Equinox, on a module.


def _arrays_of(tree):
    return eqx.filter(tree, eqx.is_array)


@_add_module
def _filter_jit(module, a):
    return eqx.filter_jit(lambda module, x: jax.vmap(module)(x))(module, a.x)


@_add_module
def _filter_grad(module, a):
    gradient = eqx.filter_grad(lambda module: _loss(jax.vmap(module), a.g)(a.x))(module)
    return _arrays_of(gradient)


@_add_module
def _filter_jit_of_filter_value_and_grad(module, a):
    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def step(args):
        module, x = args
        return _loss(jax.vmap(module), a.g)(x)

    return _arrays_of(step((module, a.x)))


@_add_module
def _filter_vmap(module, a):
    return eqx.filter_vmap(module)(a.x)


@_add_module
def _filter_vmap_of_ensemble(module, a):
    """A stack of modules, one for each example."""
    where = lambda module: (module.weight, module.bias)
    ensemble = eqx.tree_at(where, module, (a.weights, a.biases))
    return eqx.filter_vmap(lambda module, x: module(x))(ensemble, a.x)


@_add_module
def _filter_jvp(module, a):
    tangent = eqx.filter(module, eqx.is_array)
    tangent = eqx.tree_at(lambda m: (m.weight, m.bias), tangent, (a.dweight, a.dbias))
    return eqx.filter_jvp(lambda m, x: m(x), (module, a.x[0]), (tangent, a.dx[0]))


@_add_module
def _filter_vjp(module, a):
    y, pullback = eqx.filter_vjp(lambda m, x: jax.vmap(m)(x), module, a.x)
    return _arrays_of((y, pullback(a.g)))


@_add_module
def _filter_hessian(module, a):
    return eqx.filter_hessian(_loss(module, a.g[0]))(a.x[0])


@_add_module
def _filter_jacfwd(module, a):
    return eqx.filter_jacfwd(module)(a.x[0])


@_add_module
def _filter_jacrev(module, a):
    return eqx.filter_jacrev(module)(a.x[0])


@_add_module
def _filter_checkpoint(module, a):
    layer = eqx.filter_checkpoint(module)
    return eqx.filter_grad(lambda x: _loss(layer, a.g[0])(x))(a.x[0])


@_add_module
def _filter_checkpoint_of_module_grad(module, a):
    def loss(args):
        module, x = args
        return _loss(eqx.filter_checkpoint(lambda m, x: jax.vmap(m)(x)), a.g)(module, x)

    return _arrays_of(eqx.filter_grad(loss)((module, a.x)))
