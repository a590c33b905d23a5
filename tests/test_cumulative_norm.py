"""CumulativeNorm: step t by the statistics of steps 0 to t.

Oracle: float64 numpy, by brute force: every prefix of every group is one row of `exact_norm`, of
which the last step alone is an output. Entries under a mask are dropped from the row.
"""

import functools as ft
import itertools as it

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, seed
from oracles import Exact, assert_close, assert_rounded_once, exact_norm, terms
from refused import refused
from slow import few, slow

from eqx_norms import CumulativeNorm, GroupNorm, assert_causal, cumulative_norm
from eqx_norms.causality import CausalityError, assert_reads, assert_same, check_reads, rules

TIME, CHANNELS = 9, 4


def draw(offset, *spatial):
    """At an offset, or after a first step of 0, which is the hardest for sums about that step."""
    rng = np.random.default_rng(seed(1))
    x, g = rng.normal(size=(2, TIME, CHANNELS, *spatial)).astype(np.float32)
    weight, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32) + 1
    if offset == "jump":
        x += np.float32(1e6)
        x[0] = 0
    else:
        x += np.float32(offset)
    return x, weight, bias, g


def exact_cumulative(x, weight, bias, g, groups, where, of=exact_norm) -> Exact:
    where = np.broadcast_to(where, x.shape)
    y, dx, dweight, dbias = (np.zeros(x.shape) for _ in range(4))
    channel = np.broadcast_to(np.arange(CHANNELS).reshape(-1, *[1] * (x.ndim - 2)), x.shape)
    group = channel * groups // CHANNELS
    step = np.broadcast_to(np.arange(TIME).reshape(-1, *[1] * (x.ndim - 1)), x.shape)
    for t in range(TIME):
        for i in range(groups):
            row = where & (group == i) & (step <= t)
            last = row & (step == t)
            if last.any():
                shown = np.where(last, g, 0)[row]
                one = of(x[row][None], weight[channel[row]], bias[channel[row]], shown[None])
                y[last] = one.y[0][last[row]]
                dx[row] += one.dx[0]
                dweight[row] += one.dweight
                dbias[row] += one.dbias
    per_channel = lambda a: a.sum((0, *range(2, a.ndim)))
    return Exact(y, dx, per_channel(dweight), per_channel(dbias))


@ft.partial(jax.jit, static_argnames="groups")
def value_and_vjp(x, weight, bias, g, where=None, *, groups):
    norm = lambda *args: cumulative_norm(*args, groups=groups, where=where)
    y, vjp = jax.vjp(norm, x, weight, bias)
    return y, *vjp(g)


MASKS = {
    "none": None,
    "padding": np.arange(TIME) < 6,
    "late": np.arange(TIME) % 3 == 2,
    "features": np.arange(TIME * CHANNELS).reshape(TIME, CHANNELS, 1) % 5 > 1,
    "nothing": np.zeros(TIME, bool),
}
QUICK = (CHANNELS, "none"), (2, "late"), (1, "features")
CASES = [case if case in QUICK else slow(*case) for case in it.product((1, 2, CHANNELS), MASKS)]


@pytest.mark.parametrize("groups, mask", CASES)
def test_float32(groups, mask):
    """The terms of a cumulative sum are the terms of the prefixes, summed."""
    where = MASKS[mask]
    for offset in (0, 1e6, "jump"):
        x, weight, bias, g = draw(offset, 2)
        full = True if where is None else where.reshape(*where.shape, *[1] * (3 - where.ndim))
        args = x, weight, bias, g, groups, full
        want, size = (exact_cumulative(*args, of=of) for of in (exact_norm, terms))
        hidden = ~np.broadcast_to(full, x.shape)
        under = np.where(hidden, np.float32(np.nan), x)
        got = value_and_vjp(under, weight, bias, g, where, groups=groups)
        assert_close(got, want, size, x.size)
        assert not np.asarray(got[0])[hidden].any() and not np.asarray(got[1])[hidden].any()


@pytest.mark.parametrize("reach", few(({}, {"decay": 0.9}, {"window": 3}), ({},)))
def test_float64_that_was_asked_for_stays_float64(reach):
    """JAX takes it for granted then, and makes none by itself: the bound of a clamp was float32. At
    this offset float32 has one number for all entries. (No dx: JAX's own derivative of `lax.pad`
    raises in this mode, 0.10.2 and 0.12.0.1.)"""
    x = np.random.default_rng(seed(0)).normal(size=(TIME, 2)) + 1e9
    layer = CumulativeNorm(2, **reach)
    run = jax.jit(lambda x: (layer(x), layer.chunk(x, layer.init_state(x.dtype))[0]))
    jax.config.update("jax_explicit_x64_dtypes", "allow")
    try:
        got = run(jnp.asarray(x, dtype=jnp.float64))
    finally:
        jax.config.update("jax_explicit_x64_dtypes", "warn")
    with jax.enable_x64(True):
        want = run(jnp.asarray(x))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float64
        # The same operations, of entries of 1e9.
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())
    assert np.asarray(got[0]).std() > 0.1


def reference(x, weight, bias, where):
    """Each prefix by itself, differentiated by JAX."""

    def at(t):
        row = where & (jnp.arange(len(x)) <= t)[:, None]
        mean = jnp.mean(x, where=row)
        var = jnp.mean(jnp.square(x - mean), where=row)
        return (x[t] - mean) * jax.lax.rsqrt(var + 1e-5) * weight + bias

    return jnp.where(where, jnp.stack([at(t) for t in range(len(x))]), 0)


@pytest.mark.parametrize("masked, order", ((True, 1), slow(True, 2), slow(False, 2)))
def test_derivatives_of_every_order(masked, order, getkey):
    with jax.enable_x64(True):
        x, dx, g = normal(getkey(), (3, 5, 3))
        weight, bias = normal(getkey(), (2, 3))
        where = (jnp.arange(15).reshape(5, 3) % 4 > 0) | (not masked)
        mask = where if masked else None

        def along(f):
            loss = lambda t: jnp.vdot(jnp.sin(f(x + t * dx, weight + t, bias)), g)
            modes = (jax.jacfwd, jax.hessian)[:order]
            return jax.jit(lambda t: [mode(loss)(t) for mode in modes])(0.1)

        got = along(lambda *args: cumulative_norm(*args, where=mask))
        want = along(lambda *args: reference(*args, where))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


def streamed(norm, x, where=None, chunks=()):
    """By `step`, or in chunks that begin at 0 and at these."""
    if not chunks:
        masks = jnp.ones(len(x), bool) if where is None else where
        take = lambda state, step: norm.step(step[0], state, where=step[1])[::-1]
        return jax.lax.scan(take, norm.init_state(x.dtype), (x, masks))[1]
    state, ys = norm.init_state(x.dtype), []
    for i, j in it.pairwise((0, *chunks, len(x))):
        y, state = norm.chunk(x[i:j], state, where=None if where is None else where[i:j])
        ys.append(y)
    return jnp.concatenate(ys)


@pytest.mark.parametrize("groups", few((1, 2, CHANNELS), (2,)))
def test_steps_are_the_whole(groups):
    """Values to a few ulps at every offset, the same function by `assert_same`, derivatives."""
    norm = CumulativeNorm(CHANNELS, groups)
    where = MASKS["late"] | (np.arange(TIME) == 4)
    step = jax.jit(lambda x: streamed(norm, x, where))
    chunks = jax.jit(lambda x: streamed(norm, x, where, chunks=(1, 4, 4)))  # One is empty.
    for offset in (0, 1e4, 1e6, "jump"):
        x, *_, g = draw(offset)
        ones, zeros = np.ones(CHANNELS), np.zeros(CHANNELS)
        args = x, ones, zeros, g, groups, where[:, None]
        want, size = (exact_cumulative(*args, of=of).y for of in (exact_norm, terms))
        # Those of `oracles.ulps`, and one step of rounding for each.
        for f in (step, chunks):
            assert (np.abs(f(x) - want) <= 40 * 2.0**-23 * size).all()


@pytest.mark.slow
def test_steps_are_the_same_function():
    x, *_, g = draw(0)
    norm, where = CumulativeNorm(CHANNELS, 2), jnp.asarray(MASKS["late"])
    whole = lambda x: norm(x, where=where)
    dx = lambda f: jax.jit(lambda x: jax.vjp(f, x)[1](g)[0])(x)
    for chunks in ((), (1, 5)):
        part = lambda x, chunks=chunks: streamed(norm, x, where, chunks)
        assert_same(whole, part, x)
        np.testing.assert_allclose(dx(part), dx(whole), rtol=0, atol=1e-5 * np.abs(dx(whole)).max())


def shares(where, decay=1.0, window=None):
    """What an entry of step s weighs at step t: decay to the number of steps behind s, up to t, of
    which anything counts; within the window."""
    time, counted = np.arange(len(where)), np.cumsum(where.any(1))
    decay = np.float64(np.float32(decay))
    far = time[:, None] - time if window else np.zeros((len(where),) * 2, int)
    weigh = decay ** np.maximum(counted[:, None] - counted, 0)
    return np.where((time <= time[:, None]) & (far < (window or 1)), weigh, 0)


def exact_forgetful(x, where, g, **how):
    """`(y, dx)` of one group in float64, each prefix by itself, without weight and bias."""
    x, g = np.float64(x), np.float64(g)
    y, dx = np.zeros((2, *x.shape))
    for t, share in enumerate(shares(where, **how)):
        weigh = where * share[:, None]
        if not where[t].any():
            continue
        n = weigh.sum()
        xc = x - x[t][where[t]][0]
        xc = np.where(weigh > 0, xc - (weigh * xc).sum() / n, 0)
        r = ((weigh * xc**2).sum() / n + 1e-5) ** -0.5
        shown = np.where(where[t], g[t], 0)
        y[t] = np.where(where[t], xc[t] * r, 0)
        dx[t] += r * shown
        dx -= weigh * (r * shown.sum() + xc * r**3 * (shown * xc[t]).sum()) / n
    return y, dx


FORGETFUL = (
    *((9, {"window": 4}), (4, {"decay": 0.7}), (1, {"decay": 0.7}), (300, {"decay": 0.99})),
    *((1, {"window": 1}), (6, {"window": 3}), (7, {"window": 99}), (300, {"window": 37})),
)


@pytest.mark.parametrize("steps, how", [FORGETFUL[0], *(slow(*case) for case in FORGETFUL[1:])])
def test_forgetting(steps, how):
    """Whole, its derivative, chunks and steps, at every offset: without a mask, with one, and with
    one that hides some steps in a row, more than a window.

    The largest entry sets the scale: errors are of the statistics, which all steps share.
    """
    rng = np.random.default_rng(seed(7))
    drawn, g = rng.normal(size=(2, steps, CHANNELS)).astype(np.float32)
    norm = CumulativeNorm(CHANNELS, channelwise_affine=False, **how)
    late = np.broadcast_to((np.arange(steps) % 3 != 1)[:, None], drawn.shape).copy()
    late[::2, 1] = False
    gap = np.abs(np.arange(steps) - steps // 2) > steps // 4
    gap = np.broadcast_to(gap[:, None], drawn.shape)

    @jax.jit
    def run(x, where):
        y, vjp = jax.vjp(lambda x: norm(x, where=where), x)
        chunks = streamed(norm, x, where, chunks=(1, steps // 2)[: steps - 1])
        return y, vjp(g)[0], chunks, streamed(norm, x, where)

    for where, offset in it.product((np.ones_like(late), late, gap), (0, 1e4, 1e6)):
        x = drawn + np.float32(offset)
        y, dx = exact_forgetful(x, where, g, **how)
        got = run(np.where(where, x, np.float32(np.nan)), where)
        for one, want in zip(got, (y, dx, y, y), strict=True):
            assert np.abs(one - want).max() <= 1e-6 * max(np.abs(want).max(), 1)


def test_a_window_of_equal_steps():
    """Of no variance at all y is 0, however far they are from the steps before."""
    x = jnp.asarray([[1e6], [3.0], [3.0], [3.0], [0.1]])
    norm = CumulativeNorm(1, window=2)
    whole = jax.jit(lambda x: norm(x))(x)
    for y in (whole, jax.jit(ft.partial(streamed, norm))(x)):
        np.testing.assert_allclose(y[:, 0], [0, -1, 0, 0, -1], atol=1e-5)
        assert not y[2:4].any()


# Where a stream of 100 steps is far away: from a step on, at one alone, for longer than a window
# and for less. In the third, steps are in windows with a jump at the end, none, and one in front.
AWAY = {"jump": (50, 100), "spike": (41, 42), "long": (38, 60), "short": (47, 52)}


@pytest.mark.parametrize("away", few(AWAY, {"long"}))
def test_a_window_near_a_jump(away):
    """What has left the window leaves no trace, in y or dx, and is none before it comes."""
    rng = np.random.default_rng(seed(9))
    x, g = rng.normal(size=(2, 100, CHANNELS)).astype(np.float32)
    norm, all_of = CumulativeNorm(CHANNELS, window=16), np.ones(x.shape, bool)
    first, last = AWAY[away]
    run = jax.jit(lambda x: (norm(x), jax.vjp(norm, x)[1](g)[0]))
    for size in (0, 1e2, 1e4, 1e6):
        jumped = x.copy()
        jumped[first:last] += np.float32(size)
        for got, want in zip(
            run(jumped), exact_forgetful(jumped, all_of, g, window=16), strict=True
        ):
            assert np.abs(got - want).max() <= 1e-6 * max(np.abs(want).max(), 1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ({"decay": 0.5}, {"window": 2}), ids=str)
def test_derivatives_of_forgetting(how, getkey):
    """Both modes and second order, beside JAX's of each prefix."""
    where = np.arange(5) != 2
    with jax.enable_x64(True):
        x, dx, g = normal(getkey(), (3, 5, 3))
        share = jnp.asarray(where * shares(where[:, None], **how))

        def reference(x):
            def at(t):
                mean = lambda a: (share[t][:, None] * a).sum() / (3 * share[t].sum())
                xc = x - mean(x)
                return xc[t] * jax.lax.rsqrt(mean(jnp.square(xc)) + 1e-5)

            return jnp.stack([at(t) if where[t] else jnp.zeros(3) for t in range(5)])

        def along(f):
            loss = lambda t: jnp.vdot(jnp.sin(f(x + t * dx)), g)
            modes = jax.grad, jax.jacfwd, jax.hessian, jax.grad(jax.grad(loss))
            return jax.jit(lambda t: [m(loss)(t) for m in modes[:3]] + [modes[3](t)])(0.1)

        got = along(lambda x: cumulative_norm(x, where=where, **how))
        want = along(reference)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


@pytest.mark.slow
def test_masks_of_chunks():
    """Of one entry a step, a feature, or all; a chunk of one step."""
    norm, x = CumulativeNorm(CHANNELS, 2), draw(1e6)[0]
    features = MASKS["features"][..., 0]

    def run(x):
        for where in (features, features[:1], MASKS["late"][:, None]):
            first, state = norm.chunk(x[:1], norm.init_state(), where=where[:1])
            rest, _ = norm.chunk(x[1:], state, where=where[-8:])
            yield jnp.concatenate([first, rest]), norm(x, where=where)

    for got, want in jax.jit(lambda x: list(run(x)))(x):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_causal_and_proved():
    x = draw(0)[0]
    norm = CumulativeNorm(CHANNELS, 2)
    assert assert_causal(norm, x, prove="required").status == "proved"
    with pytest.raises(CausalityError):
        assert_causal(GroupNorm(1, CHANNELS), x.T, axis=1)


def test_padding_is_not_read():
    real = np.arange(4) != 1
    rule = rules.causal(4) & np.outer(real, real)
    norm = lambda x: CumulativeNorm(2)(x, where=jnp.asarray(real))
    x = normal(jax.random.key(seed(3)), (4, 2))
    assert check_reads(norm, x, rule, prove=True).status == "proved"


FORMS = (
    *({"groups": 1}, {"groups": CHANNELS}, {"groups": 2, "decay": 0.9}),
    *({"groups": 1, "window": 3}, {"groups": CHANNELS, "window": 3}),
)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_is_causal_and_reads_no_padding(form):
    """Proved: whole, in chunks, and under a mask. Without the mask padding is read."""
    norm, x = CumulativeNorm(CHANNELS, **form), draw(0)[0]
    assert assert_causal(norm, x, prove="required").status == "proved"
    in_chunks = ft.partial(streamed, norm, chunks=(2, 5))
    assert assert_causal(in_chunks, x, prove="required").status == "proved"
    real = np.arange(TIME) % 4 != 2
    rule = rules.unpadded(real) & rules.causal(TIME)
    masked = lambda x: norm(x, where=jnp.asarray(real))
    assert check_reads(masked, x, rule, prove=True).status == "proved"
    assert check_reads(norm, x, rule).status == "leak"


@pytest.mark.slow
def test_a_window_is_causal_and_proved():
    """Nor is anything read that has left it. One step fewer is a leak."""
    norm, x = CumulativeNorm(2, window=3), normal(jax.random.key(seed(3)), (7, 2))
    assert assert_reads(norm, x, rules.window(7, (2, 0)), prove="required").status == "proved"
    assert check_reads(norm, x, rules.window(7, (1, 0))).status == "leak"


@pytest.mark.parametrize("how", few(({}, {"decay": 0.9}, {"window": 7}), ({},)), ids=str)
def test_kept_are_x_and_three_numbers_a_step(how):
    for dtype, size in ((jnp.float32, 4), (jnp.bfloat16, 2)):
        x = jnp.ones((50, 64), dtype)
        _, vjp = jax.vjp(jax.jit(lambda x: CumulativeNorm(64, 2, **how)(x)), x)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
        assert held <= x.size * size + 50 * 2 * 12 + 64 * 4


@pytest.mark.slow
@pytest.mark.parametrize("features", (1, 4))
@pytest.mark.parametrize("offset", (0.0, 1e3, 1e6))
def test_a_million_steps(features, offset):
    """Errors below 1e-6 of the largest entry, that of the last step by itself as well.

    Oracle: sums of numpy's long doubles about the offset, which keep 64 bits on x86 and lose a few
    of them; where they are float64, they lose more, and still keep 1e-9.
    """
    rng = np.random.default_rng(seed(5))
    x = (rng.normal(size=(1_000_000, features)) + offset).astype(np.float32)
    want = np.longdouble(x) - offset
    n = features * np.arange(1, len(x) + 1, dtype=np.longdouble)[:, None]
    mean, square = (np.cumsum(a.sum(1, keepdims=True), 0) / n for a in (want, want**2))
    want = np.float64((want - mean) / np.sqrt(np.maximum(square - mean**2, 0) + 1e-5))
    error = np.abs(jax.jit(cumulative_norm)(x) - want)
    assert error.max() < 1e-6 * np.abs(want).max() and error[-1].max() < 1e-6
    if offset == 1e6 and features == 1:
        norm = CumulativeNorm(1, channelwise_affine=False)
        error = np.abs(jax.jit(ft.partial(streamed, norm))(x) - want)
        assert error.max() < 1e-6 * np.abs(want).max() and error[-1].max() < 1e-6


def test_many_steps_of_an_odd_size_at_an_offset():
    """Division by 33 is a product to XLA, and a product and a sum may be one operation.

    Then an origin may differ between those who read it, and y is off by 1. In steps as well.
    """
    rng = np.random.default_rng(seed(6))
    x = (rng.normal(size=(300, 33)) + 1e6).astype(np.float32)
    wide = np.float64(x) - 1e6
    sofar = [wide[: t + 1] for t in range(len(x))]
    want = np.stack([(a[-1] - a.mean()) / np.sqrt(a.var() + 1e-5) for a in sofar])
    norm = CumulativeNorm(33, channelwise_affine=False)
    for f in (norm, ft.partial(streamed, norm)):
        error = np.abs(jax.jit(lambda x, f=f: f(x))(x) - want)
        assert error.max() < 1e-6 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.parametrize("how", ({}, {"decay": 0.9}, {"window": 5}), ids=str)
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_half_precision(dtype, how):
    """y and dx are rounded once; what they are rounded from is off by 1e-6 of the largest entry."""
    rng = np.random.default_rng(seed(8))
    x, g = (jnp.asarray(rng.normal(size=(40, CHANNELS)) + mean, dtype) for mean in (3, 0))
    norm = CumulativeNorm(CHANNELS, channelwise_affine=False, **how)
    y, vjp = jax.vjp(jax.jit(lambda x: norm(x)), x)
    want = exact_forgetful(x, np.ones(x.shape, bool), g, **how)
    for got, exact in zip((y, *vjp(g)), want, strict=True):
        assert got.dtype == dtype
        assert_rounded_once(got, exact, 1e-6 * np.abs(exact).max() + np.zeros(exact.shape))


def test_half_precision_and_float64():
    x, weight, bias, g = draw(0, 2)
    for dtype in (jnp.bfloat16,):
        low = jnp.asarray(x, dtype)
        y = jax.jit(cumulative_norm)(low, weight, bias)
        exact = exact_cumulative(np.float32(low), weight, bias, g, 1, True).y
        assert y.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float32(y), exact, rtol=eps, atol=1e-5)
    with jax.enable_x64(True):
        wide = (jnp.asarray(a, jnp.float64) for a in (x, weight, bias))
        y = jax.jit(cumulative_norm)(*wide)
        exact = exact_cumulative(np.float64(x), weight, bias, g, 1, True).y
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, exact, rtol=0, atol=1e-13 * np.abs(exact).max())


def test_the_count_ends_where_int32_does():
    """There the oldest is forgotten as fast as the new comes: var stays a mean of squares."""
    norm = CumulativeNorm(1, channelwise_affine=False)
    most = 2**31 - 1
    full = lambda a: jnp.full(1, a, jnp.float32)
    state = norm.init_state()._replace(entries=jnp.full(1, most), mean=full(3), m2=full(most * 4.0))
    y, after = jax.jit(lambda x, state: norm.step(x, state))(np.full(1, 5, np.float32), state)
    assert after.entries[0] == most and after.mean[0] == 3
    np.testing.assert_allclose([y[0], after.m2[0] / most], [1, 4], rtol=1e-5)


def test_no_steps():
    assert jax.eval_shape(cumulative_norm, jnp.ones((0, 3))).shape == (0, 3)


def test_bad_input():
    norm, x = CumulativeNorm(CHANNELS, 2), jnp.ones((TIME, CHANNELS))
    with refused(ValueError, r"Map it over the axes before: jax.vmap\(norm\)\(x\)"):
        norm(x[None])
    with refused(ValueError, "Bring the steps to the front"):
        norm(x.T)
    with refused(ValueError, r"expected 4 channels, got an array of shape \(4,\)"):
        norm(x[0])
    with refused(ValueError, "got 3 groups and 4 channels"):
        cumulative_norm(x, groups=3)
    with refused(ValueError, "got 3 groups and 4 channels"):
        CumulativeNorm(4, 3)
    with refused(ValueError, r"expected shape \(4,\), got \(3,\)"):
        cumulative_norm(x, jnp.ones(3))
    with refused(TypeError, "normalises real floating-point arrays"):
        norm(jnp.ones((TIME, CHANNELS), int))
    for mask in (jnp.ones(CHANNELS, bool), jnp.ones(TIME), jnp.ones((2, CHANNELS), bool)):
        with refused(ValueError, "one entry a step, or with as many axes as x"):
            norm(x, where=mask)
    with refused(ValueError, r"`norm.init_state\(x.dtype\)`: expected statistics of shape \(2,\)"):
        norm.step(x[0], CumulativeNorm(CHANNELS).init_state())
    with refused(ValueError, r"expected 4 channels, got an array of shape \(9, 4\)"):
        norm.step(x, norm.init_state())
    with refused(ValueError, r"`CumulativeNorm.chunk\(x, state\)` takes the state of the step"):
        norm.chunk(x, CumulativeNorm(CHANNELS).init_state())
    with refused(ValueError, r"expected 4 channels, got an array of shape \(4,\)"):
        norm.chunk(x[0], norm.init_state())
    for decay in (0, 1, -0.5, float("nan"), "0.9"):
        with refused(ValueError, "a number above 0 and below 1, or None to forget nothing"):
            CumulativeNorm(CHANNELS, decay=decay)
    with refused(ValueError, "by `decay=` or by `window=`, not by both"):
        cumulative_norm(x, decay=0.9, window=3)
    with refused(ValueError, r"`CumulativeNorm\(window=...\)` must be 1 or more; got 0"):
        CumulativeNorm(CHANNELS, window=0)
    with refused(ValueError, r"expected statistics of shape \(2, 2\) and float32, got \(2,\)"):
        CumulativeNorm(CHANNELS, 2, window=3).chunk(x, norm.init_state())
    with refused(ValueError, "got the state of a layer without decay, and is with: begin with"):
        CumulativeNorm(CHANNELS, decay=0.9).step(x[0], CumulativeNorm(CHANNELS).init_state())
    stacked = eqx.filter_vmap(lambda _: CumulativeNorm(CHANNELS))(jnp.arange(3))
    with refused(ValueError, "If these are several layers, stacked, map over them"):
        stacked(x)
