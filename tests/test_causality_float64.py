"""The float64 re-run of a traced function.

The oracle is the same function called on float64 inputs, with every constant in it made
float64 by hand.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed
from slow import few

from eqx_norms.causality import _widen as widening

W = np.linspace(-1, 1, 12).astype(np.float32).reshape(4, 3)


def scan(x):
    step = lambda h, row: (jnp.tanh(h + row @ W[:3]), h.sum())
    return jax.lax.scan(step, jnp.zeros(3, x.dtype), x)


def while_loop(x):
    return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.sin(c[1])), (0, x))[1]


def scatter(x):
    return x.at[jnp.array([0, 0, 2])].add(x[:3]).at[1].max(0.5).at[2].multiply(0.25)


def convolution(x):
    return jax.lax.conv_general_dilated(
        x.T[None], x[:3, :3].T[..., None] + 0 * x[0, 0], (1,), "SAME"
    )


FUNCTIONS = {
    "scan": scan,
    "while": while_loop,
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "scatter": scatter,
    "convolution": convolution,
    "fft": lambda x: jnp.fft.irfft(jnp.fft.rfft(x, axis=0), 4, 0),
    "jit": jax.jit(jnp.exp),
    "checkpoint": jax.checkpoint(jnp.exp),
    "custom_jvp": jax.nn.gelu,
    "softmax": jax.nn.softmax,
    "sort and cumsum": lambda x: jnp.sort(x, 0).cumsum(0),
    "einsum": lambda x: jnp.einsum("ij,kj->ik", x, x, precision="highest"),
    "reduce_window": lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 1), (1, 1), "SAME"),
    "associative_scan": lambda x: jax.lax.associative_scan(jnp.multiply, x),
    "solve": lambda x: jnp.linalg.solve(x[:3] @ x[:3].T + jnp.eye(3, dtype=x.dtype), x[:3]),
    "gradient": jax.grad(lambda x: jnp.sum(jnp.tanh(x) ** 2)),
    "vmap": jax.vmap(lambda row: row / jnp.linalg.norm(row)),
    "complex": lambda x: jnp.abs(jax.lax.complex(x, x) ** 2),
}


# The others, which take longer to compile, are slow.
QUICK = ("jit", "custom_jvp", "while", "cond", "scatter", "vmap", "gradient")


@pytest.mark.parametrize("name", few(FUNCTIONS, QUICK))
def test_float64_form_equals_the_function_at_float64(name):
    fn = FUNCTIONS[name]
    x = normal(jr.key(seed(0)), (4, 3))
    closed = widening.trace(lambda x: jax.tree.leaves(fn(x)), [x])
    with jax.enable_x64(True):
        exact = x.astype(jnp.float64)
        got = jax.jit(widening.widen(closed))(exact)
        with jax.numpy_dtype_promotion("standard"):
            expected = jax.tree.leaves(jax.jit(fn)(exact))
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype == jnp.float64
            # gelu's constants were rounded to float32 when the trace was made.
            atol = 1e-6 if name == "custom_jvp" else 1e-13
            np.testing.assert_allclose(a, b, rtol=atol, atol=atol)


def test_casts_inside_are_widened():
    x = normal(jr.key(seed(0)), (4, 3))
    casts = lambda x: [x.astype(jnp.bfloat16).astype(jnp.float32) - x]
    closed = widening.trace(casts, [x])
    assert widening.float_dtypes(closed) == {np.dtype(jnp.bfloat16), np.dtype(jnp.float32)}
    assert np.abs(casts(x)[0]).max() > 0
    with jax.enable_x64(True):
        assert np.abs(widening.widen(closed)(x.astype(jnp.float64))[0]).max() == 0


def test_what_cannot_be_widened_is_named_and_keeps_its_dtype():
    shape = jax.ShapeDtypeStruct((3,), jnp.float32)

    def host(v):
        assert v.dtype == np.float32
        return v * 2

    closed = widening.trace(lambda x: [jax.pure_callback(host, shape, x)], [jnp.ones(3)])
    assert widening.opaque_parts(closed) == {"pure_callback"}
    with jax.enable_x64(True):
        (out,) = jax.jit(widening.widen(closed))(jnp.ones(3))
        assert out.dtype == jnp.float64 and np.array_equal(out, [2, 2, 2])


@pytest.mark.parametrize("inner", [False, True])
def test_traces_with_other_constants_differ(inner):
    rng = np.random.default_rng(seed(0))
    wrap = jax.jit if inner else lambda f: f

    def fn(x):
        noise = rng.random(3).astype(np.float32)
        return [wrap(lambda v: v * noise)(x)]

    fixed = lambda x: [wrap(lambda v: v * W[0])(x)]
    one, two = (widening.trace(fn, [jnp.ones(3)]) for _ in range(2))
    assert not widening.same_trace(one, two)
    one, two = (widening.trace(fixed, [jnp.ones(3)]) for _ in range(2))
    assert widening.same_trace(one, two)


# What lies between the input and the output


def host(x):
    """The identity, by way of a callback."""
    return jax.pure_callback(lambda v: v, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def carried(x, used):
    """Two sums over the rows, one of them through the callback."""
    step = lambda c, row: ((c[0] + row, c[1] + host(row)), None)
    return jax.lax.scan(step, (jnp.zeros(3), jnp.zeros(3)), x)[0][used]


def handed_on(x):
    """A carry that reaches the other one a step later, and only then the output."""
    step = lambda c, row: ((c[1], host(row)), c[0])
    return jax.lax.scan(step, (jnp.zeros(3), jnp.zeros(3)), x)[1]


def raises_by_number(x):
    return eqx.branched_error_if(x, x.max() > 1e30, x.argmax() % 2, ["too large", "far too large"])


def printed(x):
    jax.debug.callback(lambda v: None, x[0])
    return x


BETWEEN = {
    "used": (host, {"pure_callback"}),
    "unused": (lambda x: (host(x), x)[1], set()),
    "used in a jit": (lambda x: jax.jit(lambda x: (host(x), x))(x)[0], {"pure_callback"}),
    "unused in a jit": (lambda x: jax.jit(lambda x: (host(x), x))(x)[1], set()),
    "of no input": (lambda x: x + host(jnp.ones(3))[None], set()),
    "used carry": (lambda x: carried(x, 1), {"pure_callback"}),
    "unused carry": (lambda x: carried(x, 0), set()),
    "handed on": (handed_on, {"pure_callback"}),
    "in a branch": (lambda x: jax.lax.cond(x[0, 0] > 0, host, jnp.sin, x), {"pure_callback"}),
    "in a loop": (lambda x: jax.lax.fori_loop(0, 3, lambda _, x: host(x), x), {"pure_callback"}),
    "printed in a loop": (lambda x: jax.lax.fori_loop(0, 3, lambda _, x: printed(x), x), set()),
    "error_if": (lambda x: eqx.error_if(x, x.max() > 1e30, "too large"), set()),
    "error_if in a map": (
        lambda x: jax.lax.map(lambda row: eqx.error_if(row, row.max() > 1e30, "too large"), x),
        set(),
    ),
    "error_if by number": (raises_by_number, set()),
    "random floats": (lambda x: x + jr.normal(jr.key(0), x.shape), set()),
    "bits of the input": (
        lambda x: jax.lax.bitcast_convert_type(x, jnp.int32),
        {"bitcast_convert_type"},
    ),
    "a reduction of one's own": (
        lambda x: jax.lax.reduce_window(
            x, 0.0, lambda a, b: a + jnp.sin(b), (2, 1), (1, 1), "SAME"
        ),
        {"reduce_window"},
    ),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_only_what_lies_between_input_and_output_is_opaque(name):
    fn, expected = BETWEEN[name]
    closed = widening.trace(lambda x: [fn(x)], [jnp.ones((4, 3))])
    assert widening.opaque_parts(closed) == expected
    with jax.enable_x64(True):
        assert jax.eval_shape(widening.widen(closed), jnp.ones((4, 3)))[0].shape[-1] == 3


# Casts that are kept


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_casts_to_less_than_16_bits_keep_their_grid(dtype):
    x = np.random.default_rng(seed(0)).uniform(-3, 3, 50)
    cast = lambda x: [x.astype(dtype).astype(jnp.float32) + x]
    closed = widening.trace(cast, [jnp.asarray(x, jnp.float32)])
    with jax.enable_x64(True):
        (got,) = jax.jit(widening.widen(closed))(jnp.asarray(x))
    # Of float64 numbers at random none is so near the middle between two of 8 bits that a
    # rounding to float32 on the way could move it.
    assert np.array_equal(np.asarray(got), x.astype(jnp.dtype(dtype)).astype(np.float64) + x)


@pytest.mark.parametrize("bits, kept", [(3, True), (7, False), (10, False)])
def test_coarse_reduce_precision_is_kept(bits, kept):
    x = np.random.default_rng(seed(0)).uniform(1, 2, 50)
    closed = widening.trace(
        lambda x: [jax.lax.reduce_precision(x, 5, bits)], [jnp.asarray(x, jnp.float32)]
    )
    with jax.enable_x64(True):
        (got,) = jax.jit(widening.widen(closed))(jnp.asarray(x))
    # Between 1 and 2 the grid has steps of 2^-bits.
    assert np.array_equal(np.asarray(got), np.round(x * 2**bits) / 2**bits if kept else x)


def test_a_float64_function_in_float32():
    with jax.enable_x64(True):
        x = normal(jr.key(0), (4, 3), jnp.float64)
        closed = widening.trace(lambda x: [jnp.sin(x), jax.lax.complex(x, x)], [x])
        got = jax.jit(widening.widen(closed, np.float32))(x.astype(jnp.float32))
    assert [out.dtype for out in got] == [jnp.float32, jnp.complex64]
    # sin in float32: two ulps of 1 at most.
    np.testing.assert_allclose(got[0], np.sin(np.asarray(x)), rtol=0, atol=2**-22)
