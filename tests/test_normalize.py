"""The op: accuracy against float64 numpy, derivatives against the plain reference in float64."""

import functools as ft
import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, seed
from oracles import assert_alike, assert_close, assert_rounded_once, exact_norm, terms, ulps
from refused import refused
from slow import few

from eqx_norms import LayerNorm, group_norm, layer_norm, normalize_reference, rms_norm

SIZES = (1, 2, 3, 17, 127, 768, 1023, 4096)
OFFSETS = (0, 1e2, 1e4, 1e6)
SCALES = (1e-6, 1e-3, 1e3, 1e6, 1e9, 1e12, 1e15)
ROWS = 32


NORMS = {"layer_norm": layer_norm, "rms_norm": rms_norm}


@ft.partial(jax.jit, static_argnames="norm")
def value_and_vjp(x, weight, bias, g, norm="layer_norm"):
    y, vjp = jax.vjp(jax.vmap(NORMS[norm], (0, None, None)), x, weight, bias)
    return y, *vjp(g)


EPS, EPS64 = 2.0**-23, 2.0**-52


def draw(n, rows=ROWS):
    """x, weight, bias, and a random cotangent: a constant one cancels in a norm."""
    rng = np.random.default_rng(seed(0))
    x = rng.normal(size=(rows, n))
    weight, bias = rng.normal(size=(2, n)) + 1
    return x, *(a.astype(np.float32) for a in (weight, bias, rng.normal(size=(rows, n))))


def check(norm, x, weight, bias, g, *, margin=1.0):
    """Against float64 numpy, in units of what each entry is the sum of; see `oracles.ulps`."""
    got = value_and_vjp(x, weight, bias, g, norm)
    assert all(a.dtype == x.dtype for a in got)
    args, centre = (x, weight, bias, g), norm == "layer_norm"
    want, size = (f(*args, centre=centre) for f in (exact_norm, terms))
    assert_close(got, want, size, max(x.shape), margin=margin)


def check_float32(norm, x, *rest):
    check(norm, x.astype(np.float32), *rest)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", few(SIZES, (1, 17, 768)))
class TestFloat32:
    @pytest.mark.parametrize("offset", OFFSETS)
    def test_offsets(self, n, norm, offset):
        x, *rest = draw(n)
        check_float32(norm, x + offset, *rest)

    # 1e9 and 1e15: mean(xc^2) - d^2 was negative there, and the layer NaN.
    @pytest.mark.parametrize("offset", (*OFFSETS, 1e9, 1e15))
    def test_constant_rows(self, n, norm, offset):
        x, *rest = draw(n)
        check_float32(norm, np.broadcast_to((x[:, :1] + 3) * (offset or 1), x.shape), *rest)

    @pytest.mark.parametrize("scale", SCALES)
    def test_scales(self, n, norm, scale):
        x, *rest = draw(n)
        check_float32(norm, x * scale, *rest)

    def test_outliers(self, n, norm):
        """One entry far away, as the massive activations of transformers: the mean is theirs."""
        x, *rest = draw(n)
        x[:, n // 2] += 1e4
        check_float32(norm, x, *rest)


def test_close_pairs():
    """At n = 2 dx is r * (gw - mean - xhat * mean): what is left when terms of size r * gw cancel.

    So its error is a few ulps of the terms, not of the difference.
    """
    x, *rest = draw(2, rows=512)
    check_float32("layer_norm", x * 1e-2, *rest)


@ft.cache
def xla_casts_to(dtype):
    """XLA for CPUs has no cast to float16 below AVX: "Symbols not found: [ __truncsfhf2 ]"."""
    try:
        jax.jit(lambda x: x.astype(dtype))(jnp.ones(1)).block_until_ready()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.mark.parametrize("n", few((17, 768, 4096), (17, 4096)))
@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
@pytest.mark.parametrize("offset", (0, 10, 1000))
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_rounded_once(n, dtype, offset, norm):
    """The result is the exact one rounded, but where float32 rounded across a tie."""
    if not xla_casts_to(dtype):
        pytest.skip(f"on this processor XLA fails at a plain x.astype({dtype!r})")
    x, weight, bias, g = draw(n, rows=64)
    x, g = jnp.asarray(x + offset, dtype), jnp.asarray(g, dtype)
    y, dx, dweight, dbias = value_and_vjp(x, weight, bias, g, norm)
    args, centre = (x, weight, bias, g), norm == "layer_norm"
    want, size = (f(*args, centre=centre) for f in (exact_norm, terms))
    assert y.dtype == dx.dtype == dtype and dweight.dtype == dbias.dtype == jnp.float32
    assert_rounded_once(y, want.y, ulps(n) * EPS * size.y)
    assert_rounded_once(dx, want.dx, ulps(n) * EPS * size.dx)
    for sums, exact, of in ((dweight, want.dweight, size.dweight), (dbias, want.dbias, size.dbias)):
        assert (np.abs(sums - exact) <= ulps(max(x.shape)) * EPS * of).all()


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("norm", NORMS)
def test_float64_stays_float64(offset, norm):
    with jax.enable_x64(True):
        x, *rest = (jnp.asarray(a, jnp.float64) for a in draw(127))
        # The oracle is in float64 as well, and may be as wrong.
        check(norm, x + offset, *rest, margin=2)


@pytest.mark.parametrize("weight_dtype", ("float16", "bfloat16", "float32"))
def test_parameters_of_any_dtype_are_summed_in_float32(weight_dtype):
    """dweight of a bfloat16 weight is the float32 sum over the batch, rounded once."""
    x, weight, bias, g = draw(17, rows=4096)
    weight, bias = jnp.asarray(weight, weight_dtype), jnp.asarray(bias, weight_dtype)
    x = x.astype(np.float32)
    got = value_and_vjp(x, weight, bias, g)
    want, size = (f(x, weight, bias, g) for f in (exact_norm, terms))
    assert got[2].dtype == got[3].dtype == weight_dtype
    rounding = float(jnp.finfo(weight_dtype).eps) / 2
    for a, b, of in zip(got[2:], want[2:], size[2:], strict=True):
        error = np.abs(np.asarray(a, np.float64) - b)
        assert (error <= ulps(len(x)) * EPS * of + rounding * np.abs(b)).all()


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_nan_and_inf_propagate_within_their_example(bad):
    x, weight, bias, g = draw(17)
    x = x.astype(np.float32)
    clean = value_and_vjp(x, weight, bias, g)
    x[3, 5] = bad
    y, dx, *_ = value_and_vjp(x, weight, bias, g)
    assert np.isnan(y[3]).all() and np.isnan(dx[3]).all()
    others = np.arange(ROWS) != 3
    # The same program, and the same numbers in these rows.
    assert np.array_equal(y[others], clean[0][others])
    assert np.array_equal(dx[others], clean[1][others])


@pytest.mark.slow
def test_every_layout_is_as_exact():
    """XLA sums down columns, and in unjitted code, in other orders than along rows."""
    x, weight, bias, g = draw(4096)
    x = (x + 1e6).astype(np.float32)
    want, size = (f(x, weight, bias, g).y for f in (exact_norm, terms))
    x, weight, bias = map(jnp.asarray, (x, weight, bias))
    norm = lambda x: layer_norm(x, weight, bias)
    columns = jax.jit(jax.vmap(norm, in_axes=1, out_axes=1))(
        jnp.asarray(np.ascontiguousarray(x.T))
    ).T
    for y in (columns, jax.vmap(norm)(x), jnp.stack([norm(row) for row in x[:4]])):
        assert (np.abs(y - want[: len(y)]) <= ulps(4096) * EPS * size[: len(y)]).all()


# Derivatives, against the plain reference differentiated by JAX, all in float64.


BOTH = (True, True)
CASES = [
    *(((5,), (5,), present, 2) for present in it.product((True, False), repeat=2)),
    ((4, 3), (4, 1), BOTH, 2),
    ((2, 1, 3), (3,), BOTH, 2),
    ((1,), (1,), BOTH, 2),
    ((2, 3), (2, 3), BOTH, 3),
]


@pytest.mark.slow
@pytest.mark.parametrize("shape, param_shape, present, order", CASES)
@pytest.mark.parametrize("norm", NORMS)
def test_derivatives_of_each_order(x64, getkey, norm, shape, param_shape, present, order):
    """d/dt^order of <y(p + t * tangent), cotangent>, in every order of forward and reverse."""
    params = [normal(getkey(), shape)]
    params += [normal(getkey(), param_shape) if on else None for on in present]
    tangents = [p if p is None else normal(getkey(), p.shape) for p in params]
    g = normal(getkey(), shape)

    def along(norm):
        def f(t):
            at = [p if p is None else p + t * dp for p, dp in zip(params, tangents, strict=True)]
            return jnp.vdot(norm(*at, eps=1e-2), g)

        return f

    def derivatives(norm):
        modes = [
            m for k in range(1, order + 1) for m in it.product((jax.grad, jax.jacfwd), repeat=k)
        ]
        fs = [ft.reduce(lambda f, mode: mode(f), m, along(norm)) for m in modes]
        return jax.jit(lambda t: [f(t) for f in fs])(0.3)

    reference = ft.partial(normalize_reference, centre=norm == "layer_norm")
    got, want = derivatives(NORMS[norm]), derivatives(reference)
    # Some hundred float64 roundings of derivatives up to 1e3, by this eps: 1e-11, and to spare.
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_jacobian_is_the_closed_form(x64, getkey):
    """(N * delta_ij - 1 - y_i * y_j) / (N * sigma), without eps; Ba et al. 2016, section 5."""
    n = 7
    x = normal(getkey(), (n,))
    y = layer_norm(x, eps=0.0)
    want = (n * jnp.eye(n) - 1 - y[:, None] * y[None, :]) / (n * jnp.std(x))
    for jacobian in (jax.jacrev, jax.jacfwd):
        got = jax.jit(jacobian(ft.partial(layer_norm, eps=0.0)))(x)
        atol = 2 * ulps(n) * EPS64 * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.slow
def test_jacobian_rows_sum_to_zero_and_gradients_flow_all_the_same(x64, getkey):
    """Shifting x leaves y as it is, so each row of the Jacobian sums to zero.

    That says that a constant *tangent* is mapped to zero, and, the Jacobian being symmetric, a
    constant *cotangent*. It does not say that no gradient flows: any other cotangent comes back.
    """
    x = normal(getkey(), (7,))
    jacobian = jax.jit(jax.jacrev(layer_norm))(x)
    # What cancels is as large as this.
    atol = 2 * ulps(7) * EPS64 * np.abs(jacobian).sum(1).max()
    np.testing.assert_allclose(jacobian.sum(1), 0, atol=atol)
    _, vjp = jax.vjp(layer_norm, x)
    np.testing.assert_allclose(vjp(jnp.ones(7))[0], 0, atol=atol)
    g = normal(getkey(), (7,))
    (dx,) = vjp(g)
    np.testing.assert_allclose(dx, g @ jacobian, atol=atol * np.abs(g).max())
    # Five of seven dimensions of a random g: hardly ever less than this.
    assert jnp.linalg.norm(dx) > 0.01 * jnp.linalg.norm(g)


@pytest.mark.slow
def test_mean_and_sigma_are_no_constants(x64, getkey):
    """The frequent slip dx = g * rstd, with the statistics held fixed, is another vector."""
    x, g = normal(getkey(), (2, 7))
    dx = jax.vjp(layer_norm, x)[1](g)[0]
    slip = g / jnp.sqrt(jnp.var(x) + 1e-5)
    y = layer_norm(x)
    # Two of seven dimensions of a random vector: hardly ever less than this.
    assert jnp.linalg.norm(slip - dx) > 1e-3 * jnp.linalg.norm(dx)
    # Right is what is left of it when its parts along 1 and along y are taken out.
    rest = slip - slip.mean() - y * (slip @ y) / 7
    (atol,) = 2 * ulps(7) * EPS64 * terms(x[None], np.ones(7), 0, g[None]).dx
    assert (np.abs(dx - rest) <= atol).all()


@pytest.mark.slow
def test_statistics_of_constant_rows_have_their_third_derivative(x64):
    """var has its minimum on a constant row, where jnp.maximum(var, 0) would halve the slope."""
    x = jnp.full((4,), 2.0)
    third = lambda f: jax.jit(jax.jacfwd(jax.jacfwd(jax.jacrev(ft.partial(f, eps=1e-2)))))(x)
    want = third(normalize_reference)
    assert jnp.abs(want).max() > 1
    np.testing.assert_allclose(third(layer_norm), want, rtol=1e-9, atol=1e-9)


def test_biased_variance_with_eps_inside_the_root():
    x = jnp.array([1.0, 2.0, 3.0, 6.0])
    # mean 3, squares 4 1 0 9: variance 14 / 4, not 14 / 3.
    np.testing.assert_allclose(layer_norm(x, eps=0.5), (x - 3) / 2, rtol=ulps(4) * EPS)
    assert not np.allclose(layer_norm(x, eps=0.5), (x - 3) / (3.5**0.5 + 0.5), rtol=1e-2)
    layer = LayerNorm(4, eps=0.5)
    np.testing.assert_allclose(layer(x), layer_norm(x, eps=0.5), rtol=2 * ulps(4) * EPS)


def test_reference_is_the_definition(x64, getkey):
    """The oracle itself: in float64, against numpy."""
    x, weight, bias, g = (np.asarray(normal(getkey(), (7,))) for _ in range(4))
    rows = jax.vmap(normalize_reference, (0, None, None))
    y, vjp = jax.vjp(rows, *map(jnp.asarray, (x[None], weight, bias)))
    got = y, *vjp(jnp.asarray(g)[None])
    want, size = (f(x[None], weight, bias, g[None]) for f in (exact_norm, terms))
    assert_close(got, want, size, 7, margin=2)
    rms = normalize_reference(jnp.asarray(x), centre=False)
    np.testing.assert_allclose(
        rms, x / np.sqrt((x**2).mean() + 1e-5), rtol=2 * ulps(7) * EPS64, atol=0
    )


@pytest.mark.slow
def test_parameters_that_only_some_examples_share(getkey):
    """Weight and bias mapped with x, as in an ensemble, take gradients of their own."""
    x, weight, bias, g = normal(getkey(), (4, 3, 5))
    y, vjp = jax.vjp(jax.jit(jax.vmap(layer_norm)), x, weight, bias)
    got = y, *vjp(g)
    for i in range(3):
        args = x[i : i + 1], weight[i], bias[i], g[i : i + 1]
        y, dx, dweight, dbias = (a[i] for a in got)
        assert_close((y[None], dx[None], dweight, dbias), exact_norm(*args), terms(*args), 5)


@pytest.mark.slow
def test_filter_grad_of_a_frozen_layer(getkey):
    """With the parameters partitioned away nothing but x takes a gradient."""
    layer = LayerNorm(5)
    x, g = normal(getkey(), (2, 5))
    alone = jax.jit(jax.grad(lambda x: jnp.vdot(layer(x), g)))(x)
    both = eqx.filter_jit(eqx.filter_grad(lambda xl: jnp.vdot(xl[1](xl[0]), g)))((x, layer))
    args = x[None], np.ones(5), np.zeros(5), g[None]
    want, size = exact_norm(*args), terms(*args)
    for dx in (alone, both[0]):
        got = layer(x)[None], dx[None], both[1].weight, both[1].bias
        assert_close(got, want, size, 5)


@pytest.mark.slow
@pytest.mark.parametrize("f", [layer_norm, rms_norm, lambda x: group_norm(x, 2)])
def test_float64_made_in_64_bit_mode_and_used_outside(f):
    """To JAX it is float32 from there on, without a warning, but for the type of its gradient."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(seed(0)).normal(size=8))
    assert x.dtype == jnp.float64 and f(x).dtype == jnp.float32
    loss = lambda x: f(x)[0]
    dx, want = jax.grad(loss)(x), jax.grad(loss)(jnp.asarray(np.float32(x)))
    assert dx.dtype == jnp.float64
    np.testing.assert_array_equal(dx, want)


@pytest.fixture
def explicit_x64():
    """JAX takes float64 for granted where it was asked for, and makes none by itself."""
    jax.config.update("jax_explicit_x64_dtypes", "allow")
    yield
    jax.config.update("jax_explicit_x64_dtypes", "warn")


EVERY_NORM = {
    **NORMS,
    "pallas": ft.partial(layer_norm, implementation="pallas"),
    "group_norm": lambda x, weight: group_norm(x, 2, weight),
    "reference": normalize_reference,
}


@pytest.mark.parametrize("name", few(EVERY_NORM, ("layer_norm",)))
def test_float64_that_was_asked_for_stays_float64(name, explicit_x64):
    """It came back as float32: at this offset all entries are then alike, and y is 0."""
    norm = EVERY_NORM[name]
    x, g, weight = np.random.default_rng(seed(0)).normal(size=(3, 8))
    run = jax.jit(lambda x, weight, g: (lambda y, vjp: (y, *vjp(g)))(*jax.vjp(norm, x, weight)))
    args = [jnp.asarray(a, dtype=jnp.float64) for a in (x + 1e9, weight, g)]
    got = run(*args)
    with jax.enable_x64(True):
        want = run(*args)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float64
        # The same operations; with entries of 1e9, of which each of RMSNorm's terms has the size.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
    spread = np.std(np.asarray(got[0]) / weight)
    assert spread > (1e-11 if norm is rms_norm else 0.01)


@pytest.mark.parametrize("name", few(EVERY_NORM, ("layer_norm", "pallas")))
def test_transposed_in_the_weight(name, getkey):
    """Without a bias y is linear in it, which `jax.linear_transpose` and lineax make use of."""
    x, weight, g = normal(getkey(), (3, 6))
    f = lambda weight: EVERY_NORM[name](x, weight)
    for way in (f, jax.jit(f), jax.checkpoint(f)):
        (got,) = jax.linear_transpose(way, weight)(g)
        assert_alike(got, jax.vjp(f, weight)[1](g)[0], 6)


@pytest.mark.slow
@pytest.mark.parametrize("norm", (layer_norm, EVERY_NORM["pallas"]))
def test_transposed_in_weights(norm, getkey):
    """Of a batch, of an ensemble, and of weight and bias together."""
    x, weights, g = normal(getkey(), (3, 4, 6))
    together = lambda params: norm(x[0], *params)
    each = lambda weights: jax.vmap(norm)(x, weights)
    for_all = lambda weight: jax.vmap(norm, (0, None))(x, weight)
    params = tuple(weights[:2])
    for f, arg, ct in ((each, weights, g), (for_all, weights[0], g), (together, params, g[0])):
        got, want = jax.linear_transpose(f, arg)(ct), jax.vjp(f, arg)[1](ct)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_alike(a, b, 6)


@pytest.mark.slow
def test_lineax_transposes_it(x64, getkey):
    import lineax

    x, weight, g = normal(getkey(), (3, 6))
    operator = lineax.FunctionLinearOperator(lambda w: layer_norm(x, w), jax.typeof(weight))
    assert_alike(operator.T.mv(g), g * layer_norm(x), 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_NORM)
def test_where_jax_checks_divisions(name):
    """JAX's own check writes to a reference, which no custom rule may do under jit."""
    x = jnp.arange(6.0)
    loss = lambda x: jnp.sum(EVERY_NORM[name](x, jnp.ones(6)) ** 3)
    jax.config.update("jax_error_checking_behavior_divide", "raise")
    try:
        jax.jit(jax.vmap(jax.value_and_grad(loss)))(jnp.stack([x, x]))
        jax.jit(jax.value_and_grad(loss))(x)
    finally:
        jax.config.update("jax_error_checking_behavior_divide", "ignore")


@pytest.mark.slow
def test_another_checkpoint_switched_on_later():
    """Traces are kept: one with the checkpoint of before cannot be transposed by the new one."""
    gradient = lambda: jax.grad(lambda x: jnp.sum(layer_norm(x) ** 3))(jnp.arange(5.0))
    want = gradient()
    if not hasattr(jax.config, "jax_remat3"):
        pytest.skip("this JAX has no other checkpoint")
    jax.config.update("jax_remat3", True)
    try:
        assert_alike(gradient(), want, 5)
    finally:
        jax.config.update("jax_remat3", False)


@pytest.mark.parametrize("bad", ([1.0, 2.0], np.arange(3), np.ones(3, complex)))
def test_the_reference_checks_its_input(bad):
    with refused(TypeError, "`normalize_reference` normalises real floating-point arrays"):
        normalize_reference(bad)


def test_the_reference_checks_its_parameters():
    with refused(ValueError, "needs a weight that broadcasts"):
        normalize_reference(jnp.ones(3), jnp.ones((2, 3)))
    with refused(ValueError, "finite number"):
        normalize_reference(jnp.ones(3), eps=-1.0)
