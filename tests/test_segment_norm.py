"""SegmentNorm: each token by the statistics of its segment.

Oracle: float64 numpy; the entries of each segment and group are one row of `exact_norm`.
"""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal, seed
from oracles import Exact, assert_close, exact_norm, terms
from refused import refused
from slow import few

from eqx_norms import SegmentNorm, segment_norm
from eqx_norms.causality import check_reads, rules

CHANNELS, COUNT = 4, 5
# Not sorted; segment 3 is empty, 4 is one token, two tokens are of no segment.
IDS = np.array([2, 0, 0, 1, 2, -1, 1, 2, 5, 0, 4, 1])
TOKENS = len(IDS)


def exact(x, weight, bias, g, groups, where, of=exact_norm) -> Exact:
    where = np.broadcast_to(where, x.shape)
    y, dx, dweight, dbias = (np.zeros(x.shape) for _ in range(4))
    channel = np.broadcast_to(np.arange(CHANNELS)[:, None], x.shape)
    for segment in range(COUNT):
        for group in range(groups):
            row = where & (IDS == segment)[:, None, None] & (channel * groups // CHANNELS == group)
            if row.any():
                each = channel[row]
                one = of(x[row][None], weight[each], bias[each], g[row][None])
                y[row], dx[row], dweight[row], dbias[row] = (np.ravel(a) for a in one)
    return Exact(y, dx, dweight.sum((0, 2)), dbias.sum((0, 2)))


@ft.partial(jax.jit, static_argnames="groups")
def value_and_vjp(x, weight, bias, g, where=None, *, groups):
    norm = lambda *args: segment_norm(
        args[0], IDS, *args[1:], num_segments=COUNT, groups=groups, where=where
    )
    y, vjp = jax.vjp(norm, x, weight, bias)
    return y, *vjp(g)


MASKS = {
    "none": None,
    "tokens": np.arange(TOKENS) % 5 > 0,
    "entries": np.arange(TOKENS * CHANNELS * 2).reshape(TOKENS, CHANNELS, 2) % 5 > 1,
}


@pytest.mark.parametrize("mask", few(MASKS, ("entries",)))
@pytest.mark.parametrize("groups", few((1, 2, CHANNELS), (2,)))
def test_float32(groups, mask):
    rng = np.random.default_rng(seed(1))
    drawn, g = rng.normal(size=(2, TOKENS, CHANNELS, 2)).astype(np.float32)
    weight, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32) + 1
    where = MASKS[mask]
    full = True if where is None else where.reshape(*where.shape, *[1] * (3 - where.ndim))
    for offset in (0, 1e6):
        # Each segment has an offset of its own.
        x = drawn + np.float32(offset) * (1 + IDS)[:, None, None].astype(np.float32)
        args = x, weight, bias, g, groups, full
        want, size = (exact(*args, of=of) for of in (exact_norm, terms))
        hidden = ~np.broadcast_to(full & ((IDS >= 0) & (IDS < COUNT))[:, None, None], x.shape)
        under = np.where(hidden, np.float32(np.nan), x)
        got = value_and_vjp(under, weight, bias, g, where, groups=groups)
        assert_close(got, want, size, x.size)
        assert not np.asarray(got[0])[hidden].any() and not np.asarray(got[1])[hidden].any()


@pytest.mark.slow
@pytest.mark.parametrize("order", (1, 3))
def test_derivatives_of_every_order(order, getkey):
    """Against each segment by itself, differentiated by JAX."""
    with jax.enable_x64(True):
        x, dx, g = normal(getkey(), (3, TOKENS, 3))

        def reference(x):
            y = jnp.zeros_like(x)
            for segment in range(COUNT):
                own = np.flatnonzero(IDS == segment)
                if len(own):
                    xc = x[own] - x[own].mean()
                    y = y.at[own].set(xc * jax.lax.rsqrt(jnp.square(xc).mean() + 1e-5))
            return y

        def along(f):
            loss = lambda t: jnp.vdot(jnp.sin(f(x + t * dx)), g)
            modes = (jax.grad, jax.hessian, lambda f: jax.jacfwd(jax.hessian(f)))[:order]
            return jax.jit(lambda t: [mode(loss)(t) for mode in modes])(0.1)

        got = along(lambda x: segment_norm(x, IDS, num_segments=COUNT))
        want = along(reference)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9 * np.abs(want).max())


def test_an_entry_by_itself():
    """It has no gradient, however large its weight: rstd is 316, and would show a rounding."""
    rng = np.random.default_rng(seed(2))
    x, g = rng.normal(size=(2, CHANNELS, 3)).astype(np.float32)
    norm = lambda x: segment_norm(x, np.arange(CHANNELS), 1 + g[0], num_segments=4, groups=3)
    assert not jax.jit(lambda x: jax.vjp(norm, x)[1](g)[0])(x).any()


@pytest.mark.slow
@pytest.mark.parametrize("offset", (1e3, 1e6))
@pytest.mark.parametrize("segments", (1, 3))
def test_a_million_tokens(segments, offset):
    """Errors below 1e-6 of the largest entry. Oracle: float64 about the offset.

    A scatter adds one token after the other, and at an offset each addition rounds to the same
    side: by sums of a million y was off by 5e-7 to 1e-5, and dweight by 3e-6.
    """
    n = 1_000_000
    rng = np.random.default_rng(seed(2))
    drawn, g = rng.normal(size=(2, n, 2)).astype(np.float32)
    x, ids = drawn + np.float32(offset), rng.integers(0, segments, n)
    wide, y, dx = np.float64(x) - offset, np.zeros((n, 2)), np.zeros((n, 2))
    for i in range(segments):
        for channel in range(2):
            row = ids == i, channel
            one = exact_norm(wide[row][None], np.ones(1), np.zeros(1), g[row][None])
            y[row], dx[row] = one.y, one.dx
    want = y, dx, (g * y).sum(0)
    norm = lambda x, w: segment_norm(x, ids, w, num_segments=segments, groups=2)
    got = jax.jit(lambda x, w: ((f := jax.vjp(norm, x, w))[0], *f[1](g)))(x, np.ones(2, np.float32))
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() < 1e-6 * max(np.abs(b).max(), 1)


def test_other_segments_are_not_read():
    """Proved, and all of its own are read; one norm over all is found."""
    ids = np.array([0, 1, 0, 1])
    rule = rules.segments(ids)
    x = normal(jax.random.key(seed(3)), (4, 2))
    norm = lambda x: SegmentNorm(2)(x, ids, num_segments=2)
    assert check_reads(norm, x, rule, prove=True).status == "proved"
    one = lambda x: SegmentNorm(2)(x, np.zeros(4, int), num_segments=2)
    assert check_reads(one, x, rule).leak


@pytest.mark.slow
@pytest.mark.parametrize("groups", (1, 2, CHANNELS))
def test_segments_of_a_padded_row(groups):
    """Proved: each reads its own segment, and of that what is no padding, in any order of ids."""
    real, x = MASKS["tokens"], normal(jax.random.key(seed(5)), (TOKENS, CHANNELS))
    norm = SegmentNorm(CHANNELS, groups)
    masked = lambda x: norm(x, IDS, num_segments=COUNT, where=jnp.asarray(real))
    rule = rules.segments(IDS) & rules.unpadded(real)
    assert check_reads(masked, x, rule, prove=True).status == "proved"
    bare = lambda x: norm(x, IDS, num_segments=COUNT)
    assert check_reads(bare, x, rule).status == "leak"


def test_kept_are_x_and_three_numbers_a_token():
    x, ids = jnp.ones((50, 64), jnp.bfloat16), jnp.arange(50) // 7
    norm = lambda x, ids: SegmentNorm(64, 2)(x, ids, num_segments=8)
    _, vjp = jax.vjp(jax.jit(norm), x, ids)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(vjp))
    assert held <= x.size * 2 + 50 * (2 * 12 + 4 + 1) + 64 * 4


@pytest.mark.slow
def test_batches_and_counted_segments():
    """Ids of each example its own; where they are known, so is their number."""
    x = normal(jax.random.key(seed(4)), (2, 3, 2))
    ids = jnp.array([[0, 0, 1], [1, 1, 0]])
    norm = lambda x, ids: segment_norm(x, ids, num_segments=2)
    got = jax.jit(jax.vmap(norm))(x, ids)
    want = [segment_norm(x, ids) for x, ids in zip(x, ids, strict=True)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=0, atol=1e-5)


def test_numbers_that_no_int32_holds():
    """They are of no segment, and not what is left of them in 32 bits."""
    x = normal(jax.random.key(seed(6)), (4, 2))
    for outside in (2**32, 2**32 + 1, -(2**32), 2**63 - 1):
        ids = np.array([0, 1, outside, 0], np.int64)
        y = segment_norm(x, ids, num_segments=2)
        assert not y[2].any()
        np.testing.assert_array_equal(y, segment_norm(x, np.array([0, 1, -1, 0]), num_segments=2))


def test_bad_input():
    norm, x, ids = SegmentNorm(CHANNELS, 2), jnp.ones((TOKENS, CHANNELS)), jnp.asarray(IDS)
    with refused(ValueError, r"Say how many there may be: SegmentNorm\(x, segments, num_segments="):
        jax.jit(lambda ids: norm(x, ids))(ids)
    with refused(TypeError, "takes an array of integers; got float32"):
        norm(x, jnp.ones(TOKENS))
    with refused(ValueError, r"expected shape \(12,\), got \(3,\)"):
        norm(x, ids[:3])
    with refused(ValueError, r"`SegmentNorm\(num_segments=...\)` must be 1 or more; got 0"):
        norm(x, ids, num_segments=0)
    with refused(ValueError, "expected 4 channels"):
        norm(x[:, :3], ids)
    with refused(ValueError, "one entry a step, or with as many axes as x"):
        norm(x, ids, where=jnp.ones(CHANNELS, bool))
