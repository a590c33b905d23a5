"""Pairs of functions with a known answer: the same up to rounding, or not the same.

`SAME` and `DIFFERENT` map names to functions of `draw`, which give both functions and their input.
`draw(*shape)` gives new normal numbers of the dtype in question, half as large as usual.
"""

import functools

import draws
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_norms

SAME, DIFFERENT = {}, {}
T, D = 12, 16


def put(zoo):
    def add(pair):
        zoo[pair.__name__] = pair
        return pair

    return add


def pair(name, dtype, seed=0):
    """Both functions and their input."""
    rng = np.random.default_rng(draws.seed(seed))
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2).astype(dtype)
    return (SAME | DIFFERENT)[name](draw)


def causal(length):
    return jnp.tri(length, dtype=bool)


def attend(q, k, v, mask, scale=None):
    """Attention of one head as written down: softmax in float32, or wider if it comes wider."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.where(mask, (q @ k.T).astype(jnp.float32) * scale, -jnp.inf)
    return jax.nn.softmax(scores).astype(v.dtype) @ v


def normed(x, eps=1e-5, ddof=0):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True, ddof=ddof)
    return (x - mean) * jax.lax.rsqrt(var + jnp.asarray(eps, x.dtype))


# The same: softmax and attention


@put(SAME)
def softmax_by_hand(draw):
    def by_hand(x):
        e = jnp.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    return jax.nn.softmax, by_hand, draw(T, D)


@put(SAME)
def logarithm_of_softmax(draw):
    other = lambda x: x - jax.nn.logsumexp(x, -1, keepdims=True)
    return jax.nn.log_softmax, other, draw(T, D)


@put(SAME)
def fused_attention(draw):
    wq, wk, wv = draw(D, D), draw(D, D), draw(D, D)

    def fused(x):
        q, k, v = (part[:, None] for part in (x @ wq, x @ wk, x @ wv))
        with jax.numpy_dtype_promotion("standard"):  # jax.nn's own code needs it
            return jax.nn.dot_product_attention(q, k, v, is_causal=True)[:, 0]

    return lambda x: attend(x @ wq, x @ wk, x @ wv, causal(T)), fused, draw(T, D)


@put(SAME)
def attention_in_blocks(draw):
    """With a running maximum and sum, as Flash Attention has them."""

    def in_blocks(x):
        def step(carry, block):
            top, total, mixed = carry
            k, at = block
            scores = (x @ k.T).astype(jnp.float32) * D**-0.5
            scores = jnp.where(jnp.arange(T)[:, None] >= at, scores, -jnp.inf)
            new = jnp.maximum(top, scores.max(1))
            e, shrink = jnp.exp(scores - new[:, None]), jnp.exp(top - new)
            mixed = mixed * shrink[:, None] + e @ k.astype(jnp.float32)
            return (new, total * shrink + e.sum(1), mixed), None

        start = jnp.full(T, -1e30), jnp.zeros(T), jnp.zeros((T, D))
        blocks = x.reshape(-1, 4, D), jnp.arange(T).reshape(-1, 1, 4)
        (_, total, mixed), _ = jax.lax.scan(step, start, blocks)
        return (mixed / total[:, None]).astype(x.dtype)

    return lambda x: attend(x, x, x, causal(T)), in_blocks, draw(T, D)


@put(SAME)
def one_matrix_for_query_key_and_value(draw):
    ws = draw(D, D), draw(D, D), draw(D, D)
    merged = jnp.concatenate(ws, 1)
    apart = lambda x: attend(*(x @ w for w in ws), causal(T))
    return apart, lambda x: attend(*jnp.split(x @ merged, 3, 1), causal(T)), draw(T, D)


@put(SAME)
def grouped_queries(draw):
    wq, wk = draw(D, D), draw(D, D // 2)

    def heads(x):
        return (x @ wq).reshape(T, 4, -1), (x @ wk).reshape(T, 2, -1)

    def repeated(x):
        q, k = heads(x)
        k = jnp.repeat(k, 2, axis=1)
        each = jax.vmap(functools.partial(attend, mask=causal(T)), in_axes=1, out_axes=1)
        return each(q, k, k)

    def grouped(x):
        q, k = heads(x)
        scores = jnp.einsum("tghf,sgf->ghts", q.reshape(T, 2, 2, -1), k).astype(jnp.float32)
        scores = jnp.where(causal(T), scores * (D // 4) ** -0.5, -jnp.inf)
        mixed = jnp.einsum("ghts,sgf->tghf", jax.nn.softmax(scores).astype(k.dtype), k)
        return mixed.reshape(T, 4, -1)

    return repeated, grouped, draw(T, D)


@put(SAME)
def masks_of_infinity_and_of_the_largest_number(draw):
    def finite(x):
        scores = jnp.where(causal(T), (x @ x.T).astype(jnp.float32) * D**-0.5, -1e30)
        return jax.nn.softmax(scores).astype(x.dtype) @ x

    return lambda x: attend(x, x, x, causal(T)), finite, draw(T, D)


# The same: caches and recurrences


class Attention(eqx.Module):
    """Causal attention with learned positions, of a row and token by token."""

    ws: tuple
    positions: jax.Array

    def __call__(self, x):
        q, k, v = (((x + self.positions) @ w) for w in self.ws)
        return x + attend(q, k, v, causal(len(x)))

    def cached(self, x, shift=0, slot=lambda t: t, seen=lambda t: t):
        """Options are what caches get wrong."""

        def step(cache, row):
            t, token = row
            at = jnp.minimum(t + shift, len(x) - 1)
            q, k, v = ((token + self.positions[at]) @ w for w in self.ws)
            keys, values = cache[0].at[slot(t)].set(k), cache[1].at[slot(t)].set(v)
            mask = jnp.arange(len(x)) <= seen(t)
            return (keys, values), token + attend(q[None], keys, values, mask)[0]

        empty = jnp.zeros_like(x), jnp.zeros_like(x)
        return jax.lax.scan(step, empty, (jnp.arange(len(x)), x))[1]


def attention(draw):
    return Attention((draw(D, D), draw(D, D), draw(D, D)), draw(T, D))


@put(SAME)
def cache_and_full(draw):
    model = attention(draw)
    return model, model.cached, draw(T, D)


@put(SAME)
def scan_and_parallel_prefix(draw):
    def in_turn(x):
        def step(h, row):
            h = jax.nn.sigmoid(row) * h + row
            return h, h

        return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[1]

    def in_parallel(x):
        combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
        return jax.lax.associative_scan(combine, (jax.nn.sigmoid(x), x))[1]

    return in_turn, in_parallel, draw(T, D)


@put(SAME)
def linear_attention_in_chunks(draw):
    def whole(x):
        return jnp.tril(x @ x.T) @ x

    def in_chunks(x):
        parts = x.reshape(-1, 4, D)
        state = jnp.einsum("ctk,ctv->ckv", parts, parts)
        inside = jnp.einsum("cts,csv->ctv", jnp.tril(parts @ parts.mT), parts)
        return (inside + parts @ (state.cumsum(0) - state)).reshape(-1, D)

    return whole, in_chunks, draw(T, D)


@put(SAME)
def prefix_sum_as_total_minus_rest(draw):
    other = lambda x: x.sum(0, keepdims=True) - x[::-1].cumsum(0)[::-1] + x
    return lambda x: x.cumsum(0), other, draw(T, D)


# The same: sums, products, precision


@put(SAME)
def sums_in_another_order(draw):
    def backwards(x):
        return jax.lax.fori_loop(0, len(x), lambda i, s: s + x[len(x) - 1 - i], 0 * x[0])

    return lambda x: x.sum(0), backwards, draw(300, 4)


@put(SAME)
def matrices_in_another_order(draw):
    a, b = draw(D, 4 * D), draw(4 * D, D)
    return lambda x: (x @ a) @ b, lambda x: x @ (a @ b), draw(T, D)


@put(SAME)
def matrices_multiplied_before(draw):
    a, b = draw(D, D), draw(D, D)
    product = jnp.matmul(a, b, precision="highest", preferred_element_type=a.dtype)
    return lambda x: x @ a @ b, lambda x: x @ product, draw(T, D)


@put(SAME)
def bfloat16_inside(draw):
    a, b = draw(D, D), draw(D, D)

    def inside(x):
        h = x.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16)
        return (jax.nn.silu(h) @ b.astype(jnp.bfloat16)).astype(x.dtype)

    return lambda x: jax.nn.silu(x @ a) @ b, inside, draw(T, D)


@put(SAME)
def weights_cast_before(draw):
    w = draw(D, D).astype(jnp.float32)
    coarse = w.astype(jnp.bfloat16)
    wide = lambda x: x.astype(jnp.float32) @ w
    return wide, lambda x: x.astype(jnp.float32) @ coarse.astype(jnp.float32), draw(T, D)


@put(SAME)
def rematerialised(draw):
    w = draw(D, D)
    loss = lambda x: jnp.tanh(jnp.tanh(x @ w) @ w).sum()
    return jax.grad(loss), jax.grad(jax.checkpoint(loss)), draw(T, D)


@put(SAME)
def mapped_and_looped(draw):
    w = draw(D, D)
    each = lambda row: jax.nn.gelu(row @ w)
    return jax.vmap(each), lambda x: jax.lax.map(each, x), draw(T, D)


@put(SAME)
def divided_and_multiplied(draw):
    return lambda x: jnp.sin(x / 3), lambda x: jnp.sin(x * (1 / 3)), draw(T, D)


@put(SAME)
def solved_and_inverted(draw):
    a = draw(D, D).astype(jnp.float32) + 4 * jnp.eye(D)
    wide = lambda x: x.astype(jnp.float32).T
    return lambda x: jnp.linalg.solve(a, wide(x)), lambda x: jnp.linalg.inv(a) @ wide(x), draw(T, D)


@put(SAME)
def sines_by_numpy_and_by_jax(draw):
    """A table that float64 computed, and one that the function computes."""
    at, rates = np.arange(T)[:, None], np.arange(D)[None] / D
    table = np.sin(at * 100.0**-rates)

    def computed(x):
        rates = jnp.arange(D, dtype=jnp.float32) / D
        sines = jnp.sin(jnp.arange(T, dtype=jnp.float32)[:, None] * 100 ** -rates[None])
        return x.astype(jnp.float32) + sines

    return lambda x: x.astype(jnp.float32) + table.astype(np.float32), computed, draw(T, D)


@put(SAME)
def fourier_transform_by_a_matrix(draw):
    angles = 2 * np.pi * np.outer(np.arange(T), np.arange(T)) / T
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    wide = lambda x: x.astype(jnp.float32)
    fast = lambda x: jnp.abs(jnp.fft.fft(wide(x), axis=0))
    return fast, lambda x: jnp.hypot(cos @ wide(x), sin @ wide(x)), draw(T, D)


# The same: layers


@put(SAME)
def variance_in_one_pass(draw):
    def one_pass(x):
        mean = x.mean(-1, keepdims=True)
        var = (x * x).mean(-1, keepdims=True) - mean * mean
        return (x - mean) * jax.lax.rsqrt(var + jnp.asarray(1e-5, x.dtype))

    return normed, one_pass, draw(T, D)


@put(SAME)
def norm_of_equinox(draw):
    ours, theirs = (jax.vmap(layer(D)) for layer in (eqx_norms.LayerNorm, eqx.nn.LayerNorm))
    return ours, theirs, draw(T, D)


@put(SAME)
def gradient_of_a_norm(draw):
    w = draw(D)
    by_hand = jax.grad(lambda x: (eqx_norms.layer_norm(x) * w).sum())
    plain = jax.grad(lambda x: (eqx_norms.normalize_reference(x, centre=True, eps=1e-5) * w).sum())
    return jax.vmap(by_hand), jax.vmap(plain), draw(T, D)


@put(SAME)
def batch_norm_folded_into_weights(draw):
    w, mean, gain = draw(D, D), draw(D), draw(D)
    folded, bias = w * gain[None], -mean * gain
    return (
        lambda x: (x @ w - mean[None]) * gain[None],
        lambda x: x @ folded + bias[None],
        draw(T, D),
    )


@put(SAME)
def gelu_by_erf(draw):
    by_erf = lambda x: x * (1 + jax.lax.erf(x * jnp.asarray(2**-0.5, x.dtype))) / 2
    return lambda x: jax.nn.gelu(x, approximate=False), by_erf, draw(T, D)


@put(SAME)
def rotary_positions_by_complex_numbers(draw):
    angles = np.outer(np.arange(T), 10.0 ** -np.arange(D // 2)).astype(np.float32)

    def real(x):
        a, b = jnp.split(x.astype(jnp.float32), 2, 1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], 1)

    def by_complex(x):
        a, b = jnp.split(x.astype(jnp.float32), 2, 1)
        turned = jax.lax.complex(a, b) * jnp.exp(1j * angles)
        return jnp.concatenate([turned.real, turned.imag], 1)

    return real, by_complex, draw(T, D)


@put(SAME)
def convolution_by_fourier(draw):
    kernel = draw(T, D).astype(jnp.float32)

    def direct(x):
        lags = np.subtract.outer(np.arange(T), np.arange(T))
        shifted = jnp.where((lags >= 0)[..., None], kernel[lags], 0)
        return jnp.einsum("tsd,sd->td", shifted, x.astype(jnp.float32))

    def by_fourier(x):
        product = jnp.fft.rfft(x.astype(jnp.float32), 2 * T, 0) * jnp.fft.rfft(kernel, 2 * T, 0)
        return jnp.fft.irfft(product, 2 * T, 0)[:T]

    return direct, by_fourier, draw(T, D)


@put(SAME)
def cross_entropy_by_one_hot(draw):
    labels = np.arange(T) % D
    taken = lambda x: -jax.nn.log_softmax(x)[np.arange(T), labels].mean()
    by_one_hot = lambda x: -(jax.nn.log_softmax(x) * jnp.eye(D, dtype=x.dtype)[labels]).sum() / T
    return taken, by_one_hot, draw(T, D)


@put(SAME)
def experts_by_mask_and_by_gather(draw):
    router, experts = draw(D, 4), draw(4, D, D)
    choose = lambda x: (x @ router).argmax(1)

    def by_mask(x):
        all_of_them = jnp.einsum("td,edf->tef", x, experts)
        return (all_of_them * jnp.eye(4, dtype=x.dtype)[choose(x)][..., None]).sum(1)

    return by_mask, lambda x: jnp.einsum("td,tdf->tf", x, experts[choose(x)]), draw(T, D)


@put(SAME)
def embedding_by_one_hot(draw):
    table = draw(9, D)
    by_one_hot = lambda ids: jnp.eye(9, dtype=table.dtype)[ids] @ table
    return lambda ids: table[ids], by_one_hot, jnp.arange(T) % 9


# Different: caches


def cached(**wrong):
    def made(draw):
        model = attention(draw)
        return model, functools.partial(model.cached, **wrong), draw(T, D)

    return made


DIFFERENT |= {
    "cache_with_positions_off_by_one": cached(shift=1),
    "cache_that_reads_one_slot_too_many": cached(seen=lambda t: t + 1),
    "cache_that_does_not_read_its_own": cached(seen=lambda t: jnp.maximum(t - 1, 0)),
    "cache_one_slot_too_short": cached(slot=lambda t: t % (T - 1)),
}


@put(DIFFERENT)
def rotary_positions_from_one(draw):
    def rotated(first):
        angles = np.outer(np.arange(T) + first, 10.0 ** -np.arange(D // 2)).astype(np.float32)

        def fn(x):
            a, b = jnp.split(x.astype(jnp.float32), 2, 1)
            cos, sin = jnp.cos(angles), jnp.sin(angles)
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], 1)

        return fn

    return rotated(0), rotated(1), draw(T, D)


# Different: attention


@put(DIFFERENT)
def scale_is_missing(draw):
    one = lambda x: attend(x, x, x, causal(T))
    return one, lambda x: attend(x, x, x, causal(T), scale=1.0), draw(T, D)


def padded_on_the_left():
    """Who may read whom, and attention where those that may read nothing get 0."""
    mask = causal(T) & (np.arange(T) > 1)[None]
    something = np.asarray(mask).any(1, keepdims=True)
    return mask, lambda x: jnp.where(something, attend(x, x, x, mask | ~something), 0)


@put(DIFFERENT)
def mask_of_ten_thousand(draw):
    """Rows that may read nothing read the mean of all, the future too."""
    mask, zero = padded_on_the_left()

    def weak(x):
        scores = (x @ x.T).astype(jnp.float32) * D**-0.5
        return jax.nn.softmax(scores + jnp.where(mask, 0, -1e4)).astype(x.dtype) @ x

    return zero, weak, draw(T, D)


@put(DIFFERENT)
def nan_where_nothing_may_be_read(draw):
    mask, zero = padded_on_the_left()
    return zero, lambda x: attend(x, x, x, mask), draw(T, D)


@put(DIFFERENT)
def keys_tiled_instead_of_repeated(draw):
    one, two, x = grouped_queries(draw)
    order = np.array([0, 2, 1, 3])
    return one, lambda x: two(x)[:, order], x


@put(DIFFERENT)
def softmax_over_queries(draw):
    return jax.nn.softmax, lambda x: jax.nn.softmax(x, 0), draw(T, D)


# Different: layers


@put(DIFFERENT)
def another_eps(draw):
    return normed, functools.partial(normed, eps=1e-6), draw(T, D)


@put(DIFFERENT)
def unbiased_variance(draw):
    return normed, functools.partial(normed, ddof=1), draw(T, D)


@put(DIFFERENT)
def gelu_by_tanh(draw):
    exact, by_tanh = (lambda x, a=a: jax.nn.gelu(x, approximate=a) for a in (False, True))
    return exact, by_tanh, draw(T, D)


@put(DIFFERENT)
def residual_is_dropped(draw):
    w = draw(D, D) / 100
    return lambda x: x + jnp.tanh(normed(x) @ w), lambda x: jnp.tanh(normed(x) @ w), draw(T, D)


@put(DIFFERENT)
def one_weight_off_by_a_ten_thousandth(draw):
    w = draw(D, D).astype(jnp.float32)
    off = w.at[3, 5].add(1e-4)
    wide = lambda x: x.astype(jnp.float32)
    return lambda x: wide(x) @ w, lambda x: wide(x) @ off, draw(T, D)


@put(DIFFERENT)
def small_bias_is_forgotten(draw):
    w, bias = draw(D, D), draw(D) / 1000
    return lambda x: x @ w + bias[None], lambda x: x @ w, draw(T, D)


@put(DIFFERENT)
def scores_are_not_capped(draw):
    w = draw(D, D)
    capped = lambda x: 30 * jnp.tanh(x @ w / 30)
    return capped, lambda x: x @ w, draw(T, D)


@put(DIFFERENT)
def temperature_of_1_001(draw):
    other = lambda x: jax.nn.softmax(x / jnp.asarray(1.001, jnp.float32).astype(jnp.float32))
    wide = lambda x: x.astype(jnp.float32)
    return lambda x: jax.nn.softmax(wide(x)), lambda x: other(wide(x)), draw(T, D)


@put(DIFFERENT)
def loss_counts_padding(draw):
    losses = lambda x: jax.nn.logsumexp(x, -1)
    padded = lambda x: jnp.where(np.arange(T) < 9, losses(x), 0).mean()
    return lambda x: losses(x)[:9].mean(), padded, draw(T, D)


@put(DIFFERENT)
def second_best_expert(draw):
    router = draw(D, 4)
    best = lambda x: jnp.argsort(x @ router, axis=1)[:, -1]
    return best, lambda x: jnp.argsort(x @ router, axis=1)[:, -2], draw(T, D)


@put(DIFFERENT)
def tokens_shifted_by_one(draw):
    return lambda ids: ids, lambda ids: jnp.roll(ids, 1), jnp.arange(T) % 9


@put(DIFFERENT)
def clipped_a_little_lower(draw):
    return lambda x: jnp.clip(x, max=3.0), lambda x: jnp.clip(x, max=2.99), draw(T, D)


@put(DIFFERENT)
def decay_of_another_power(draw):
    def decayed(rate):
        def fn(x):
            step = lambda h, row: (rate * h + row, rate * h + row)
            return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[1]

        return fn

    return decayed(0.9), decayed(0.9001), draw(T, D)
