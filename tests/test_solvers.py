"""The norms inside differential equations, root finding and linear operators.

There forward mode meets transposes: an implicit step, a Newton step and the derivative of a root
take tangents of a norm, and transpose them. The oracle is the same program on eqx.nn's norms, in
float64; beside it the adjoints of one solve are compared with each other, derivatives of a root
with the implicit function theorem, and the matrix of an operator with float64 NumPy.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from draws import normal
from oracles import exact_norm

from eqx_norms import LayerNorm, RMSNorm, replace_norms

slow = pytest.mark.slow

SIZE, WIDTH = 4, 16
# Ours and theirs differ by roundings. A norm of 16 entries makes less than 2**6, each of half an
# ulp of its largest entry. Over a time of 1 an error of the field grows by exp(L), in a root by
# 1 / (1 - L / 4): by less than 2**4 for a Lipschitz constant L up to 2.7. A derivative adds a
# factor of the second derivatives over the first, for which another 2**4 is allowed.
TOLERANCE = 2**14 * np.finfo(np.float64).eps


@pytest.fixture(autouse=True)
def as_these_packages_have_it():
    """Float64; and they promote dtypes and ranks themselves."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        yield


class Field(eqx.Module):
    """A vector field with every norm in it."""

    up: eqx.nn.Linear
    norms: list[eqx.Module]
    down: eqx.nn.Linear

    def __init__(self, getkey):
        self.up = eqx.nn.Linear(SIZE, WIDTH, key=getkey())
        norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.RMSNorm(WIDTH), eqx.nn.GroupNorm(2, WIDTH)]
        scale = lambda p: 1 + normal(getkey(), p.shape) / 4 if eqx.is_array(p) else p
        self.norms = jax.tree.map(scale, norms)
        self.down = eqx.nn.Linear(WIDTH, SIZE, key=getkey())

    def __call__(self, y):
        h = self.up(y)
        return self.down(jnp.tanh(sum(norm(h) for norm in self.norms) / len(self.norms)))


@pytest.fixture
def both(getkey):
    """The field on our norms, the same on theirs."""
    theirs = Field(getkey)
    ours = replace_norms(theirs)
    assert all(type(norm).__module__.startswith("eqx_norms") for norm in ours.norms)
    return ours, theirs


def like(tree, getkey):
    """Arrays drawn anew."""
    return jax.tree.map(lambda p: normal(getkey(), p.shape), eqx.filter(tree, eqx.is_array))


def assert_close(got, want):
    """Leaf by leaf, relative to the largest entry of all."""
    got, want = (jax.tree.leaves(eqx.filter(tree, eqx.is_array_like)) for tree in (got, want))
    assert len(got) == len(want) > 0
    scale = max(np.abs(leaf).max() for leaf in want)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == jnp.float64
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * scale)


def assert_along(gradient, tangents, want):
    """That the gradient's product with the tangents is `want`, relative to its terms."""
    leaves = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (gradient, tangents))
    terms = jnp.concatenate([(one * other).ravel() for one, other in zip(*leaves, strict=True)])
    np.testing.assert_allclose(terms.sum(), want, rtol=0, atol=TOLERANCE * jnp.abs(terms).sum())


@eqx.filter_jit
def value_and_gradient(run, field, y, g):
    """`run(field, y)`, and the gradient of its product with `g` in `field` and `y`."""

    def objective(inputs):
        out = run(*inputs)
        return jnp.vdot(g, out), out

    (_, out), gradient = eqx.filter_value_and_grad(objective, has_aux=True)((field, y))
    return out, gradient


@eqx.filter_jit
def value_and_tangent(run, field, y, tangents):
    return eqx.filter_jvp(run, (field, y), tangents)


# ---- diffrax

TSIT5 = diffrax.Tsit5()


def solve(adjoint, solver=TSIT5):
    """`(field, y0)` to the solution at time 1, by steps of one size.

    Adaptive steps could be taken or refused by a rounding.
    """
    term = diffrax.ODETerm(lambda t, y, field: field(y))
    options = {"dt0": 0.1, "adjoint": adjoint, "max_steps": 16}

    def run(field, y0):
        return diffrax.diffeqsolve(term, solver, 0.0, 1.0, y0=y0, args=field, **options).ys[0]

    return run


@slow
@pytest.mark.parametrize(
    "adjoint",
    [diffrax.RecursiveCheckpointAdjoint(), diffrax.DirectAdjoint(), diffrax.BacksolveAdjoint()],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_gradient_of_a_differential_equation(adjoint, both, getkey):
    y0, g = normal(getkey(), (2, SIZE))
    got, want = (value_and_gradient(solve(adjoint), field, y0, g) for field in both)
    assert_close(got, want)


@pytest.mark.slow
def test_tangent_of_a_differential_equation(both, getkey):
    (ours, theirs), y0 = both, normal(getkey(), (SIZE,))
    run, tangents = solve(diffrax.ForwardMode()), like((theirs, y0), getkey)
    got = value_and_tangent(run, ours, y0, replace_norms(tangents))
    assert_close(got, value_and_tangent(run, theirs, y0, tangents))


@slow
def test_adjoints_of_the_same_steps_agree(both, getkey):
    """One number by three of them; backsolve is another discretisation."""
    (ours, _), (y0, g) = both, normal(getkey(), (2, SIZE))
    tangents = like((ours, y0), getkey)
    _, tangent = value_and_tangent(solve(diffrax.ForwardMode()), ours, y0, tangents)
    for adjoint in (diffrax.DirectAdjoint(), diffrax.RecursiveCheckpointAdjoint()):
        _, gradient = value_and_gradient(solve(adjoint), ours, y0, g)
        assert_along(gradient, tangents, jnp.vdot(g, tangent))


@slow
def test_implicit_steps(both, getkey):
    """They take the field's Jacobian, and the derivative of a root that was found with it."""
    y0, g = normal(getkey(), (2, SIZE))
    run = solve(diffrax.RecursiveCheckpointAdjoint(), diffrax.ImplicitEuler(root_finder=NEWTON))
    got, want = (value_and_gradient(run, field, y0, g) for field in both)
    assert_close(got, want)


# ---- optimistix

# The last step before they stop is below the tolerance, and leaves the order of its square.
NEWTON = optx.Newton(rtol=1e-9, atol=1e-9)
DOGLEG = optx.Dogleg(rtol=1e-9, atol=1e-9)
LEVENBERG_MARQUARDT = optx.LevenbergMarquardt(rtol=1e-9, atol=1e-9)


def residual(y, args):
    field, shift = args
    return y - shift - field(y) / 4


@eqx.filter_jit
def implicit_gradient(y, args, g):
    """By the implicit function theorem: where residual(y, args) is 0, J dy = -d residual."""
    adjoint = jnp.linalg.solve(jax.jacfwd(residual)(y, args).T, g)
    return eqx.filter_grad(lambda args: -adjoint @ residual(y, args))(args)


@pytest.mark.slow
@pytest.mark.parametrize(
    "find, solver",
    [
        (optx.root_find, NEWTON),
        (optx.root_find, DOGLEG),
        (optx.least_squares, LEVENBERG_MARQUARDT),
    ],
    ids=["Newton", "Dogleg", "LevenbergMarquardt"],
)
def test_derivatives_of_a_root(find, solver, both, getkey):
    (ours, theirs), (shift, g) = both, normal(getkey(), (2, SIZE))
    run = lambda field, shift: find(residual, solver, jnp.zeros(SIZE), (field, shift)).value
    y, gradient = value_and_gradient(run, ours, shift, g)
    assert_close(y - residual(y, (theirs, shift)), y)

    want = implicit_gradient(y, (theirs, shift), g)
    assert_close(gradient, want)
    tangents = like((theirs, shift), getkey)
    _, tangent = value_and_tangent(run, ours, shift, replace_norms(tangents))
    assert_along(want, tangents, jnp.vdot(g, tangent))


# ---- lineax


@slow
@pytest.mark.parametrize("jac", ["fwd", "bwd"])
@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_operator_of_a_norm(norm, jac, getkey):
    norm, (x, v) = norm(WIDTH), normal(getkey(), (2, WIDTH))
    norm = eqx.tree_at(lambda n: n.weight, norm, normal(getkey(), (WIDTH,)))
    # A row of the Jacobian for each unit cotangent, by the formulas of float64 NumPy.
    centre = isinstance(norm, LayerNorm)
    xs = np.tile(x, (WIDTH, 1))
    want = exact_norm(xs, norm.weight, norm.bias, np.eye(WIDTH), centre=centre, eps=norm.eps).dx

    operator = lx.JacobianLinearOperator(lambda x, _: norm(x), x, jac=jac)
    for one in (operator, lx.linearise(operator)):
        assert_close(one.as_matrix(), want)
        assert_close(one.mv(v), want @ v)
        assert_close(one.T.as_matrix(), want.T)
        assert_close(one.T.mv(v), want.T @ v)


@slow
def test_linear_solve_by_products_alone(both, getkey):
    """GMRES asks for an operator's products, its gradient for those of the transpose."""
    (ours, theirs), (y, b, g) = both, normal(getkey(), (3, SIZE))
    solver = lx.GMRES(rtol=1e-13, atol=1e-13)  # Reached after 4 products, and below the bound.

    def run(field, b):
        operator = lx.JacobianLinearOperator(residual, y, (field, b))
        return lx.linear_solve(lx.linearise(operator), b, solver).value

    got = value_and_gradient(run, ours, b, g)
    assert_close(got, value_and_gradient(run, theirs, b, g))
    assert_close(got[0], np.linalg.solve(jax.jacfwd(residual)(y, (theirs, b)), b))
