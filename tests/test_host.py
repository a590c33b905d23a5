"""Functions that JAX cannot trace: how they are called, and who reads whom in them.

What a function reads is known by the way it is made. Torch's own are in `test_from_torch.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import seed
from refused import refused

from eqx_norms.causality import (
    CausalityError,
    DifferenceError,
    assert_causal,
    assert_independent,
    assert_same,
    check_causal,
    check_reads,
    check_same,
    dependency_matrix,
    host,
    rules,
)

T, D = 6, 3


def words(report):
    return " ".join(str(report).split())


def floats(*shape, dtype=np.float32):
    return np.random.default_rng(seed(0)).standard_normal(shape or (T, D)).astype(dtype)


def total_minus_rest(x):
    """A prefix sum whose rounding reads the future; its exact values do not."""
    return x.sum(0, keepdims=True) - x[::-1].cumsum(0)[::-1] + x


# Who reads whom


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.slow)])
def test_prefix_sums_are_causal_and_suffix_sums_are_not(dtype):
    x = floats(dtype=dtype)
    assert check_causal(host(lambda x: np.cumsum(x, 0)), x).status == "clear"
    report = check_causal(host(lambda x: np.cumsum(x[::-1], 0)[::-1]), x)
    assert report.leak and len(report.pairs()) == T * (T - 1) // 2
    assert check_causal(host(total_minus_rest), x).status.startswith("clear (float noise)")


def test_a_small_leak_is_no_rounding():
    small = np.float32(1e-7)
    report = check_causal(host(lambda x: np.cumsum(x, 0) + small * x.mean()), floats())
    assert report.leak and "does not shrink in float64" in words(report)


@pytest.mark.slow
def test_the_other_rules():
    x = floats(4, T, D)
    whiten = host(lambda x: x - x.mean(0))
    with pytest.raises(CausalityError, match=r"^leak: "):
        assert_independent(whiten, x)
    assert assert_independent(host(lambda x: x - x.mean(1, keepdims=True)), x).status == "clear"
    windowed = host(lambda x: x + np.concatenate([x[:1] * 0, x[:-1]]))
    rule = rules.causal(T) & rules.window(T, 2)
    assert check_reads(windowed, floats(), rule, required=rule).status == "clear"
    assert check_reads(host(lambda x: x + 0), floats(), rule, required=rule).blind
    reads = dependency_matrix(windowed, floats()) > 0
    assert np.array_equal(reads, rule)


# Edits as examples of one batch


def rows_apart(x):
    """Of (examples, time, features), which it sees as they come."""
    return x.cumsum(1)


def seen_by(fn):
    """`fn`, and the shapes that it was called with."""
    shapes = []

    def told(x):
        shapes.append(jax.tree.leaves(x)[0].shape)
        return fn(x)

    return told, shapes


def test_edits_together_say_what_they_say_one_by_one():
    x = floats(2, T, D)
    for fn, status in (rows_apart, "clear"), (lambda x: x - x.mean(1, keepdims=True), "leak"):
        together, shapes = seen_by(fn)
        report = check_causal(host(together, batch_axis=0), x, axis=1, batch_size=50)
        alone = check_causal(host(fn), x, axis=1)
        assert report.status == alone.status == status and report.edits == alone.edits
        assert np.array_equal(report.matrix > 0, alone.matrix > 0)
        assert {*shapes} == {x.shape, (100, T, D)} and len(shapes) < report.edits / 3
    together, shapes = seen_by(lambda x: np.float32(3) * x)
    assert assert_same(host(together, batch_axis=-3), lambda x: x + 2 * x, x).status in (
        "same bits",
        "rounding",
    )
    assert (16, T, D) in shapes


@pytest.mark.slow
def test_edits_together_with_arrays_that_stay_and_another_axis():
    scale = np.linspace(1, 2, 2 * D, dtype=np.float32).reshape(1, 2, D)
    x = {"x": floats(T, 2, D), "scale": scale}
    fn = lambda x: x["x"].cumsum(0) * x["scale"]
    together, shapes = seen_by(fn)
    assert check_causal(host(together, batch_axis=1), x, fixed="scale").status == "clear"
    assert (1, 16, D) in shapes  # of the scale, which comes first
    # A sum in another order is rounding, and decided by float64.
    report = check_same(host(fn, batch_axis=1), lambda x: fn(x)[::1] * np.float32(1), x)
    assert report.status in ("same bits", "rounding")
    # What rounds to float32 inside has no float64: as without.
    noisy = lambda x: total_minus_rest(x.astype(np.float32))
    for axis in (None, 1):
        assert check_causal(host(noisy, batch_axis=axis), floats(T, 2, D)).status == "undecided"


def test_what_must_hold_of_edits_together():
    x = floats(3, T, D)
    mixes = host(lambda x: x.cumsum(1) - x.mean(0), batch_axis=0)
    with refused(ValueError, "batch_axis=, leave that out"):
        check_causal(mixes, x, axis=1)
    with refused(ValueError, "batch_axis=0 must be the axis of the examples", "(3,)"):
        check_causal(
            host(lambda x: x.mean((0, 2)), batch_axis=0), floats(4, 3, D), axis=1, out_axis=0
        )
    # With JAX around it they run one by one.
    together, shapes = seen_by(rows_apart)
    fn = host(together, batch_axis=0)
    assert check_causal(lambda x: fn(x) * 2, jnp.asarray(x), axis=1).status == "clear"
    assert {*shapes} == {x.shape}


# How it is called


def test_dtypes_shapes_and_trees_are_those_of_numpy():
    seen = []

    def fn(x):
        seen.append({name: (type(a), a.dtype, a.shape) for name, a in x.items()})
        return {"out": x["ids"][:, None] * x["table"], "mask": x["ids"] > 1}

    ids = np.random.default_rng(seed(1)).integers(0, 9, T)
    x = {"ids": ids, "table": floats(dtype=np.float64), "name": "kept"}
    fixed = lambda x: fn({name: x[name] for name in ("ids", "table")})
    assert check_causal(host(fixed), x, fixed="name", pointwise=True).status == "clear"
    expected = {"ids": (np.ndarray, ids.dtype, (T,)), "table": (np.ndarray, np.float64, (T, D))}
    assert seen and all(one == expected for one in seen)


def test_its_errors_come_as_they_are():
    cholesky = lambda x: np.linalg.cholesky(x)
    with refused(np.linalg.LinAlgError, "must be square"):
        assert_causal(host(cholesky), floats())
    calls = []

    def later(x):
        calls.append(x)
        if len(calls) == 5:
            raise KeyError("the fifth")
        return x

    with pytest.raises(KeyError, match="the fifth"):
        assert_causal(host(later), floats())
    calls.clear()
    with pytest.raises(KeyError, match="the fifth"):
        assert_same(host(later), lambda x: x, floats())
    calls.clear()
    with pytest.raises(KeyError, match="the fifth"):
        assert_causal(jax.jit(lambda x: host(later)(x) + jnp.ones(())), jnp.asarray(floats()))


def test_what_it_returns_must_be_arrays_of_one_shape():
    with refused(TypeError, "got a object in it"):
        assert_causal(host(lambda x: object()), floats())
    grown = lambda x: np.zeros((T, 1 + int(x[0, 0] > 0)), np.float32)
    with refused(ValueError, "must return the same shapes and dtypes for every x of one shape"):
        assert_causal(host(grown), np.abs(floats()))
    with refused(TypeError, "fn must be a function of arrays, got int"):
        host(3)


def test_random_numbers_start_from_one_seed():
    noisy = host(lambda x: x + np.random.normal(size=x.shape).astype(x.dtype))
    np.random.seed(7)
    expected = np.random.normal()
    np.random.seed(7)
    report = check_causal(noisy, floats(), pointwise=True)
    assert np.random.normal() == expected  # the generator went on as if nothing had been
    assert report.status == "clear" and "drew random numbers: each call starts" in words(report)
    own = np.random.default_rng(0)
    with refused(ValueError, "gives different outputs for the same x"):
        assert_causal(host(lambda x: x + own.normal()), floats())


@pytest.mark.slow
def test_in_the_middle_of_jax_code():
    prefix = host(lambda x: np.cumsum(x, 0))
    reverse = host(lambda x: x[::-1])
    x = jnp.asarray(floats())
    assert check_causal(lambda x: jnp.tanh(prefix(x) * 2), x).status == "clear"
    assert check_causal(jax.jit(lambda x: jnp.tanh(reverse(x))), x).leak
    batched = lambda x: jax.vmap(prefix)(x)
    assert check_causal(batched, jnp.stack([x, x + 1]), axis=1).status == "clear"
    np.testing.assert_array_equal(jax.jit(prefix)(x), np.cumsum(x, 0))


# The second precision


def test_without_one_rounding_is_undecided():
    single = host(lambda x: total_minus_rest(x.astype(np.float32)))
    report = check_causal(single, floats())
    assert report.status == "undecided" and "(it returned float32)" in words(report)
    # A buffer of float64 around results of float32.
    buffered = host(lambda x: np.array(total_minus_rest(x.astype(np.float32)), x.dtype))
    report = check_causal(buffered, floats())
    assert report.status == "undecided" and "float32 holds all that it returned" in words(report)

    def refuses(x):
        if x.dtype != np.float32:
            raise TypeError("tensor(float) expected")
        return total_minus_rest(x)

    report = check_causal(host(refuses), floats())
    assert report.status == "undecided" and "TypeError: tensor(float) expected" in words(report)
    told = host(refuses, in_float64=total_minus_rest)
    assert check_causal(told, floats()).status == "clear (float noise)"


@pytest.mark.slow
def test_there_is_no_proof():
    report = check_causal(host(lambda x: np.cumsum(x, 0)), floats(), prove=True)
    assert report.status == "clear" and "`pure_callback`" in str(report.obstacles)
    with pytest.raises(CausalityError):
        assert_causal(host(lambda x: np.cumsum(x, 0)), floats(), prove="required")


# The same function?


def test_a_port_is_the_same_but_for_rounding():
    w = floats(D, D)
    theirs = host(lambda x: np.stack([w.T @ row for row in x]))
    assert assert_same(theirs, lambda x: x @ w, floats()).status in ("same bits", "rounding")
    with pytest.raises(DifferenceError, match=r"^different: "):
        assert_same(theirs, lambda x: x @ w.T, floats())
    slightly = lambda x: x @ w * np.float32(1 + 1e-5)
    assert check_same(theirs, slightly, floats()).status == "different"


def test_what_stayed_in_float32_is_not_called_float64():
    w = floats(D, D)
    single = host(lambda x: total_minus_rest(x.astype(np.float32)) @ w)
    for other in (lambda x: jnp.cumsum(x, 0) @ w, lambda x: jnp.cumsum(x, 0) @ w * 1.1):
        report = check_same(single, other, floats())
        assert report.exact is None and report.ulps64 is None
        assert "in float64 " not in words(report).replace("not run in float64 (", "")
    assert report.status == "different" and "kept its own precision" in words(report)


# Ids that edits may put in


def test_allowed_values_leave_others_out():
    ids = np.random.default_rng(seed(2)).integers(3, 9, T)
    seen = set()

    def fn(ids):
        seen.update(ids.tolist())
        return np.cumsum(ids)

    report = check_causal(host(fn), ids, allowed_values=range(3, 9))
    assert report.status == "clear" and "drawn from 6 ids, 3 to 8, as given" in words(report)
    assert seen == set(range(3, 9))
    seen.clear()
    ids[2] = 0  # stays where it is not edited, and is put nowhere else
    assert check_causal(host(fn), ids, allowed_values={"": [8, 3, 5]}).status == "clear"
    assert seen <= {*ids.tolist(), 3, 5, 8}
    assert (dependency_matrix(fn_of_jax, ids, allowed_values=[3, 5]) > 0).all()
    assert check_same(fn_of_jax, fn_of_jax, ids, allowed_values=[3, 5]).status == "same bits"
    with refused(ValueError, "allowed_values of x must hold at least two ids"):
        assert_causal(host(fn), ids, allowed_values=[3])
    with refused(ValueError, "allowed_values must fit the dtype of x"):
        assert_causal(host(fn), ids.astype(np.int8), allowed_values=[3, 1000])


def fn_of_jax(ids):
    return jnp.cumsum(ids) + 0 * ids[::-1].cumsum() + ids.sum()
