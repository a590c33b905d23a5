"""Every layer under every transformation of `transformations.py`.

Oracle: the plain reference, which JAX differentiates by itself, under the same transformation, in
float64. Inputs are float32 numbers, so that every dtype is given the same ones.
"""

import functools as ft
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.jet import jet
from jax.experimental.sparse import sparsify
from slow import few
from transformations import MODULE_TRANSFORMATIONS, TRANSFORMATIONS, Arrays, Case

from eqx_norms import (
    CumulativeNorm,
    GroupNorm,
    LayerNorm,
    RMSNorm,
    SegmentNorm,
    cumulative_norm,
    group_norm,
    layer_norm,
    normalize_reference,
    rms_norm,
    segment_norm,
)

# In ulps, of the largest entry of each array: some thirty roundings, magnified by the derivatives
# of 1 / sigma, where six normal entries hardly ever have a sigma below 0.2. Found: 4.
ULPS = 100
# The steps of an ODE are chosen from errors, which magnifies roundings again. Found: 1600.
ODE_ULPS = 100_000


GROUPS = 2


def our_rms_norm(x, weight, bias):
    return rms_norm(x, weight, bias)


def reference_rms_norm(x, weight, bias):
    return normalize_reference(x, weight, bias, centre=False)


class Reference(eqx.Module):
    f: Callable = eqx.field(static=True)
    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return self.f(x, self.weight, self.bias)


def make_case(layer, ours, reference, **shapes):
    def our_module(weight, bias):
        where = lambda module: (module.weight, module.bias)
        return eqx.tree_at(where, layer(weight.shape[-1]), (weight, bias))

    return Case(ours, reference, our_module, ft.partial(Reference, reference), **shapes)


CASE = make_case(LayerNorm, layer_norm, normalize_reference, shape=(6,), param_shape=(6,))
IDS = np.array([1, 0, 1, 1])


def our_segment_norm(x, weight, bias):
    return segment_norm(x, IDS, weight, bias, num_segments=2)


def reference_segment_norm(x, weight, bias):
    first, second = (normalize_reference(x[IDS == i], weight, bias) for i in range(2))
    return jnp.concatenate([second[:1], first, second[1:]])


# All kinds at once, for each case is a program: all steps so far, a decay, a window.
FORGETFUL = {}, {"decay": 0.5}, {"window": 2}


def our_cumulative_norms(x, weight, bias):
    return sum(cumulative_norm(x, weight, bias, **how) for how in FORGETFUL)


def reference_cumulative_norms(x, weight, bias):
    def fading(x):
        share = 0.5 ** jnp.arange(len(x) - 1.0, -1, -1, dtype=x.dtype)[:, None]
        mean = lambda a: (share * a).sum() / (share.sum() * x.shape[1])
        xc = x - mean(x)
        y = xc * jax.lax.rsqrt(mean(jnp.square(xc)) + 1e-5)
        y = y if weight is None else y * weight[None]
        return y if bias is None else y + bias[None]

    def at(t):
        since = lambda s: normalize_reference(x[s : t + 1], weight, bias)[-1]
        return since(0) + fading(x[: t + 1])[-1] + since(max(t - 1, 0))

    return jnp.stack([at(t) for t in range(len(x))])


class Cumulative(eqx.Module):
    norms: list[CumulativeNorm]
    weight: jax.Array
    bias: jax.Array

    def __init__(self, channels):
        self.norms = [
            CumulativeNorm(channels, channelwise_affine=False, **how) for how in FORGETFUL
        ]
        self.weight = self.bias = jnp.zeros(channels)

    def __call__(self, x):
        y = sum(norm(x) for norm in self.norms)
        return y * self.weight[None] + 3 * self.bias[None]


# With a mask and without, at once.
MASK = np.array([[True, False], [True, True], [False, False], [False, True]]).repeat(3, 1)


def our_group_norms(x, weight, bias):
    masked = group_norm(x, GROUPS, weight, bias, where=MASK)
    return group_norm(x, GROUPS, weight, bias) + masked


def reference_group_norms(x, weight, bias):
    def of_group(x, where):
        xc = x - jnp.mean(x, where=where)
        return xc * jax.lax.rsqrt(jnp.mean(jnp.square(xc), where=where) + 1e-5)

    def at(where):
        split = lambda a: a.reshape(GROUPS, -1, *a.shape[1:])
        y = jax.vmap(of_group)(split(x), split(where)).reshape(x.shape)
        y = y if weight is None else y * weight[:, None]
        return jnp.where(where, y if bias is None else y + bias[:, None], 0)

    return at(np.ones_like(MASK)) + at(MASK)


class GroupNorms(GroupNorm):
    def __call__(self, x):
        return super().__call__(x) + super().__call__(x, where=MASK)


class Segmented(eqx.Module):
    norm: SegmentNorm
    weight: jax.Array
    bias: jax.Array

    def __init__(self, channels):
        self.norm = SegmentNorm(channels, channelwise_affine=False)
        self.weight = self.bias = jnp.zeros(channels)

    def __call__(self, x):
        y = self.norm(x, IDS, num_segments=2)
        return y * self.weight[None] + self.bias[None]


PARTIAL = {"shape": (4, 6), "param_shape": (6,)}
OTHER_CASES = {
    "CumulativeNorm": make_case(
        Cumulative, our_cumulative_norms, reference_cumulative_norms, **PARTIAL
    ),
    "SegmentNorm": make_case(Segmented, our_segment_norm, reference_segment_norm, **PARTIAL),
    "RMSNorm": make_case(RMSNorm, our_rms_norm, reference_rms_norm, shape=(6,), param_shape=(6,)),
    "GroupNorm": make_case(
        ft.partial(GroupNorms, GROUPS),
        our_group_norms,
        reference_group_norms,
        shape=(4, 6),
        param_shape=(4,),
    ),
}

NAMES = [*TRANSFORMATIONS, *MODULE_TRANSFORMATIONS]

# Seconds each, and near to others here, to test_mesh_types.py or to test_lowering.py.
COSTLY = (
    *("odeint_grad", "export_with_symbolic_batch", "export_serialised_to_second_order"),
    *("export_of_grad", "sharded_jit_over_features", "explicit_sharding_over_features"),
    *("sharded_jit_over_batch", "jacrev_of_jacfwd", "filter_hessian", "cond_of_batch_grad"),
    *("jvp_of_shard_map_check_vma_False", "shard_map_of_grad_check_vma_False"),
    *("grad_of_shard_map_check_vma_False", "shard_map_of_weights_check_vma_False"),
    *("checkpoint_saving_nothing", "scan_checkpoint_grad", "reverse_over_forward"),
    *("gauss_newton_product", "laplacian", "value_and_grad_of_batch", "jvp_of_jvp"),
    *("export", "explicit_sharding_over_batch", "grad_of_grad", "cond_grad", "checkpoint_hvp"),
)
assert {*COSTLY} <= {*NAMES}

# These say themselves what is jitted: they place arrays on a mesh, or serialise a function.
PLACES_ITSELF = ("sharded_jit", "explicit_sharding", "export")


def run(name, case, dtype, *, ours, jit=True):
    """The outputs of a transformation, as numpy arrays."""
    if name in TRANSFORMATIONS:
        f = case.ours if ours else case.reference
        transform = lambda a: TRANSFORMATIONS[name](f, a)
    else:
        module = case.our_module if ours else case.reference_module
        make = lambda a: module(a.weight, a.bias)
        transform = lambda a: MODULE_TRANSFORMATIONS[name](make(a), a)
    # One compilation, in place of one for each operation of a derivative.
    if jit and not name.startswith(PLACES_ITSELF):
        transform = jax.jit(transform)
    outputs = transform(Arrays(case, dtype))
    # Structures hold the class of a module, so only the order of the arrays is compared.
    return [np.asarray(leaf) for leaf in jax.tree.leaves(outputs)]


@ft.cache
def expected(name, case):
    with jax.enable_x64(True):
        arrays = run(name, case, jnp.float64, ours=False)
    # Else there would be nothing to get wrong.
    assert arrays and any(np.abs(array).max() > 0.01 for array in arrays)
    return arrays


def check(name, case, dtype, **kwargs):
    want = expected(name, case)
    got = run(name, case, dtype, ours=True, **kwargs)
    assert len(got) == len(want)
    ulps = ODE_ULPS if name == "odeint_grad" else ULPS
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        # Some are nothing but zeros: the second derivative in the bias.
        scale = np.abs(other).max() or 1.0
        assert np.abs(one - other).max() <= ulps * jnp.finfo(dtype).eps * scale


@pytest.mark.parametrize("name", few(NAMES, {*NAMES} - {*COSTLY}))
def test_float32(name):
    check(name, CASE, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_float64(name):
    with jax.enable_x64(True):
        check(name, CASE, jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", OTHER_CASES.values(), ids=OTHER_CASES)
def test_float64_of_the_family(name, case):
    """All go through the same rule, or one that is made as it is."""
    with jax.enable_x64(True):
        check(name, case, jnp.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_float32_in_64_bit_mode(name):
    """No constant, count or mean turns an array into float64."""
    with jax.enable_x64(True):
        check(name, CASE, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_debug_nans(name):
    """No NaN on the way either, such as the 0 * inf of a branch that is masked later.

    So without an outer `jax.jit`, of which only the results are looked at.
    """
    expected(name, CASE)
    with jax.debug_nans(True):
        check(name, CASE, jnp.float32, jit=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_disable_jit(name):
    expected(name, CASE)
    with jax.disable_jit():
        check(name, CASE, jnp.float32, jit=False)


@pytest.mark.parametrize("f", [LayerNorm(CASE.shape), jax.nn.relu], ids=["LayerNorm", "relu"])
def test_jet_raises(f):
    """The documented exception: jet mistakes every custom rule, JAX's own `relu` included.

    Once `relu` passes here, JAX has mended it, and the docs have a sentence too many.
    """
    a = Arrays(CASE, jnp.float32)
    series = [a.dx[0], a.dx[1]]
    with pytest.raises(jax.errors.UnexpectedTracerError, match="wrapped in a JetTracer"):
        jet(lambda x: f(x), (a.x[0],), (series,))


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "checkpoint"])
def test_jet_raises_inside(wrap):
    """Whatever it says there, which depends on the version, it does not give a wrong answer."""
    a = Arrays(CASE, jnp.float32)
    with pytest.raises((jax.errors.UnexpectedTracerError, AttributeError, KeyError)):
        jet(wrap(lambda x: layer_norm(x)), (a.x[0],), ([a.dx[0], a.dx[1]],))


@pytest.mark.slow
def test_jet_of_the_reference():
    """Oracle: two nested jvp, the second derivative along the path x + t u + t^2 v / 2."""
    with jax.enable_x64(True):
        a = Arrays(CASE, jnp.float64)
        x, u, v = a.x[0], a.dx[0], a.dx[1]
        f = lambda x: normalize_reference(x, a.weight, a.bias)
        y, (first, second) = jet(f, (x,), ([u, v],))
        path = lambda t: f(x + t * u + t * t * v / 2)
        velocity = lambda t: jax.jvp(path, (t,), (jnp.ones_like(t),))
        (y0, first0), (_, second0) = jax.jvp(velocity, (jnp.zeros(()),), (jnp.ones(()),))
    for got, want in [(y, y0), (first, first0), (second, second0)]:
        # A few ulp of float64.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())


@pytest.mark.parametrize("f", [LayerNorm(CASE.shape), jax.nn.relu], ids=["LayerNorm", "relu"])
def test_sparsify_raises(f):
    """As with jet: a documented exception, and one that JAX makes of every custom rule."""
    with pytest.raises(KeyError, match="subfuns"):
        sparsify(lambda x: f(x))(jnp.ones(CASE.shape))


def test_sparsify_of_the_reference():
    x = Arrays(CASE, jnp.float32).x[0]
    got = sparsify(normalize_reference)(x)
    np.testing.assert_allclose(got, normalize_reference(x), rtol=1e-6)
