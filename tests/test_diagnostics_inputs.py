"""What submodules are given, as `capture(..., inputs=True)` hands it out.

Oracle: the same network by hand; the derivatives of shifts that are added to what goes in.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax.ad_checkpoint import checkpoint_name
from refused import refused

from eqx_norms.diagnostics import Watch, capture, capture_grads

LINEAR = eqx.nn.Linear


class Net(eqx.Module):
    """Two layers, the second of them called twice, with functions in between."""

    one: LINEAR
    two: LINEAR

    def __call__(self, x):
        return self.two(jnp.sin(self.two(jnp.tanh(self.one(x)))))


@pytest.fixture
def net_and_x(x64, getkey):
    return Net(LINEAR(3, 3, key=getkey()), LINEAR(3, 3, key=getkey())), normal(getkey(), (4, 3))


def by_hand(net, x, shifts=(0.0, 0.0, 0.0)):
    """What goes into each call, and what comes out at the end."""
    first = x + shifts[0]
    second = jnp.tanh(net.one(first)) + shifts[1]
    third = jnp.sin(net.two(second)) + shifts[2]
    return (first, second, third), net.two(third)


KEYS = "one:in", "two:in", "two:in#1"


def loss(net, x):
    return jnp.sum(jnp.sin(jax.vmap(net)(x)))


def test_inputs_their_derivatives_and_what_stands_in_for_them(net_and_x):
    net, x = net_and_x
    run = eqx.filter_jit(lambda net, x: capture_grads(loss, net, x, where=LINEAR, inputs=True))
    _, values, grads, _ = run(net, x)
    assert {*values} == {*KEYS, "one", "two", "two#1"}
    expected, _ = jax.vmap(lambda x: by_hand(net, x))(x)
    shifted = lambda shifts, x: jnp.sum(jnp.sin(by_hand(net, x, shifts)[1]))
    slopes = jax.vmap(jax.grad(shifted), (None, 0))((jnp.zeros(3),) * 3, x)
    for key, value, slope in zip(KEYS, expected, slopes, strict=True):
        np.testing.assert_allclose(values[key], value, rtol=1e-12)
        np.testing.assert_allclose(grads[key], slope, rtol=1e-9, atol=1e-12)
    forward = lambda net, x: jax.vmap(net)(x)
    replace = {"two:in#1": lambda value: value / 2}
    out, _ = capture(forward, net, x, where=LINEAR, inputs=True, replace=replace)
    np.testing.assert_allclose(out, jax.vmap(net.two)(expected[2] / 2), rtol=1e-12)
    with refused(ValueError, "'two:in#2'", "'two:in#1'"):
        capture(forward, net, x, where=LINEAR, inputs=True, replace={"two:in#2": x})


@pytest.mark.slow
def test_a_local_learning_rule(net_and_x):
    """Hebb's: what went in times what came out, in each step of a scan, as one asked for it."""
    net, x = net_and_x
    fn = lambda net, x: jax.lax.scan(lambda h, x: (jnp.tanh(net.one(h + x)),) * 2, x[0], x)[1]
    out, values = capture(fn, net, x, where=LINEAR, inputs=True)
    updates = jnp.einsum("ti,tj->ij", values["one"], values["one:in"])
    h, expected = x[0], 0.0
    for row in x:
        expected += np.outer(net.one(h + row), h + row)
        h = jnp.tanh(net.one(h + row))
    np.testing.assert_allclose(updates, expected, rtol=1e-9)
    np.testing.assert_allclose(out[-1], h, rtol=1e-9)


@pytest.mark.slow
def test_several_arguments_and_none(getkey):
    attention = eqx.nn.MultiheadAttention(2, 4, key=getkey())
    x = normal(getkey(), (5, 4))
    mask = jnp.tri(5, dtype=bool)
    fn = lambda attention, x, mask: attention(x, 2 * x, 3 * x, mask=mask)
    _, values = capture(fn, attention, x, mask, where=eqx.nn.MultiheadAttention, inputs=True)
    for value, expected in zip(values[":in"], (x, 2 * x, 3 * x, mask), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    closure = lambda linear: linear(x[0])  # of floats that are not traced
    linear = LINEAR(4, 4, key=getkey())
    np.testing.assert_array_equal(
        capture(closure, linear, where=LINEAR, inputs=True)[1][":in"], x[0]
    )


@pytest.mark.slow
def test_watch_of_names(getkey):
    """The figures of a named value are those of the submodule that returned it."""
    linear, x = LINEAR(3, 3, key=getkey()), normal(getkey(), (8, 3))
    named = lambda x: checkpoint_name(x, "hidden")
    loss = lambda linear, x: jnp.mean(jnp.tanh(named(jax.vmap(linear)(x))) ** 2)
    look = eqx.filter_jit(Watch(loss, where=LINEAR, names="hidden").measure)(linear, x)
    alone = Watch(loss, names="hidden").measure(linear, x)
    for of, of_alone in ((look.values, alone.values), (look.grads, alone.grads)):
        assert set(of) == {"", "hidden"} and set(of_alone) == {"hidden"}
        for name in of[""]:
            np.testing.assert_allclose(of["hidden"][name], of[""][name], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(of_alone["hidden"][name], of[""][name], rtol=1e-5, atol=1e-7)
