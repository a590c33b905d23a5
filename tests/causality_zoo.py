"""Small sequence functions with known answers, each named after what it does or gets wrong.

`CAUSAL` and `LEAKY` map names to functions of `(T, D)` floats; `CAUSAL_TOKENS` and
`LEAKY_TOKENS` to functions of `(T,)` ids below 16; `INDEPENDENT` and `BATCH_LEAKS` to functions of
`(B, T, D)` floats; `STRICT` and `NOT_STRICT` to functions of `(T, D)` floats that are causal.
"""

import functools

import draws
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

CAUSAL, LEAKY, CAUSAL_TOKENS, LEAKY_TOKENS = {}, {}, {}, {}
INDEPENDENT, BATCH_LEAKS, STRICT, NOT_STRICT = {}, {}, {}, {}
# Causal because no output reads another position at all.
POINTWISE = ("norm_of_each_token", "token_embedding")


def put(zoo):
    """Adds the decorated function to `zoo` under its own name."""

    def add(fn):
        zoo[fn.__name__] = fn
        return fn

    return add


def weights(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(draws.seed(seed)).standard_normal(shape) * 0.5).astype(
        dtype
    )


def attention(x, scores_to_probabilities):
    q, k, v = (x @ weights(x.dtype, x.shape[1], x.shape[1], seed=i) for i in range(3))
    return scores_to_probabilities(q @ k.T, jnp.tri(len(x), dtype=bool)) @ v


def norm(x, axis):
    mean, var = x.mean(axis, keepdims=True), x.var(axis, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(var + 1e-5)


def later(x):
    """Row t is x[t + 1], the last one 0."""
    return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])


def future_mean(x):
    """Row t is the mean of the rows after t."""
    return (later(x)[::-1].cumsum(0)[::-1] / len(x)).astype(x.dtype)


# Causal: attention


@put(CAUSAL)
def softmax_attention_with_where(x):
    return attention(x, lambda s, m: jax.nn.softmax(s, where=m))


@put(CAUSAL)
def softmax_attention_with_finfo_min(x):
    return attention(x, lambda s, m: jax.nn.softmax(jnp.where(m, s, jnp.finfo(s.dtype).min)))


@put(CAUSAL)
def softmax_attention_with_minus_1e9(x):
    return attention(x, lambda s, m: jax.nn.softmax(s + jnp.where(m, 0, -1e9).astype(s.dtype)))


@put(CAUSAL)
def softmax_attention_with_is_causal(x):
    q = x[:, None, :]
    with jax.numpy_dtype_promotion("standard"):  # jax.nn's own code needs it
        return jax.nn.dot_product_attention(q, q, q, is_causal=True)[:, 0]


@put(CAUSAL)
def sliding_window_attention(x):
    band = jnp.tri(len(x), k=-3, dtype=bool)
    return attention(x, lambda s, m: jax.nn.softmax(jnp.where(m & ~band, s, -jnp.inf)))


@put(CAUSAL)
def linear_attention_with_global_scale(x):
    # Divided by the largest key of all positions and multiplied again: causal but for rounding.
    scale = jnp.abs(x).max()
    return ((x / scale).cumsum(0) * scale).astype(x.dtype)


# Causal: recurrences, convolutions, sums


@put(CAUSAL)
def rnn_scan(x):
    w = weights(x.dtype, x.shape[1], x.shape[1])

    def step(h, row):
        h = jnp.tanh(h @ w + row)
        return h, h

    return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[1]


@put(CAUSAL)
def associative_scan(x):
    decay = jax.nn.sigmoid(x)
    combine = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])
    return jax.lax.associative_scan(combine, (decay, x))[1]


@put(CAUSAL)
def causal_convolution(x):
    kernel = weights(x.dtype, x.shape[1], x.shape[1], 3)
    return jax.lax.conv_general_dilated(x.T[None], kernel, (1,), [(2, 0)])[0].T


@put(CAUSAL)
def fft_convolution(x):
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    kernel, n = weights(wide.dtype, *x.shape), 2 * len(x)
    product = jnp.fft.rfft(wide, n, 0) * jnp.fft.rfft(kernel, n, 0)
    return jnp.fft.irfft(product, n, 0)[: len(x)].astype(x.dtype)


@put(CAUSAL)
def prefix_sum_as_total_minus_suffix(x):
    return x.sum(0, keepdims=True) - x[::-1].cumsum(0)[::-1] + x


@put(CAUSAL)
def running_max(x):
    return jax.lax.cummax(x, 0)


@put(CAUSAL)
def norm_of_each_token(x):
    return norm(x, 1)


@put(CAUSAL)
def loop_that_writes_a_buffer(x):
    def write(t, buffer):
        return buffer.at[t].add(0.5 * buffer[jnp.maximum(t - 1, 0)])

    return jax.lax.fori_loop(0, len(x), write, x)


@put(CAUSAL)
def bfloat16_inside(x):
    w = weights(jnp.bfloat16, x.shape[1], x.shape[1])
    return jnp.tanh((x.astype(jnp.bfloat16) @ w).cumsum(0)).astype(x.dtype)


@put(CAUSAL)
def noisy_sum_in_float32_inside(x):
    return prefix_sum_as_total_minus_suffix(x.astype(jnp.float32)).astype(x.dtype)


@put(CAUSAL)
def causal_with_dropout_under_a_fixed_key(x):
    return jnp.where(jr.bernoulli(jr.key(draws.seed(3)), 0.7, x.shape), rnn_scan(x), 0)


@put(CAUSAL)
def argmax_of_the_past(x):
    best = jnp.argmax(jnp.where(jnp.tri(len(x), dtype=bool), x[:, 0][None], -jnp.inf), 1)
    return x[best]


@put(CAUSAL)
def first_come_mixture_of_experts(x):
    expert = x.argmax(1)
    taken = jax.nn.one_hot(expert, x.shape[1], dtype=jnp.int32).cumsum(0)
    place = jnp.take_along_axis(taken, expert[:, None], 1)
    return jnp.where(place <= 2, x * 2, x)


# Leaks: norms, masks, shifts


@put(LEAKY)
def norm_over_sequence_and_features(x):
    return norm(x, (0, 1))


@put(LEAKY)
def norm_over_the_sequence_per_channel(x):
    return norm(x, 0)


@put(LEAKY)
def bidirectional_rnn(x):
    return rnn_scan(x) + rnn_scan(x[::-1])[::-1]


@put(LEAKY)
def attention_without_a_mask(x):
    return attention(x, lambda s, m: jax.nn.softmax(s))


@put(LEAKY)
def mask_off_by_one(x):
    mask = jnp.tri(len(x), k=1, dtype=bool)
    return attention(x, lambda s, m: jax.nn.softmax(s, where=mask))


@put(LEAKY)
def mask_after_the_softmax(x):
    return attention(x, lambda s, m: jnp.where(m, jax.nn.softmax(s), 0))


@put(LEAKY)
def mask_weaker_than_the_scores(x):
    return attention(x, lambda s, m: jax.nn.softmax(s + jnp.where(m, 0, -10).astype(s.dtype)))


@put(LEAKY)
def convolution_padded_on_both_sides(x):
    kernel = weights(x.dtype, x.shape[1], x.shape[1], 3)
    return jax.lax.conv_general_dilated(x.T[None], kernel, (1,), "SAME")[0].T


@put(LEAKY)
def fft_convolution_that_wraps_around(x):
    wide = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    kernel = weights(wide.dtype, *x.shape)
    product = jnp.fft.rfft(wide, axis=0) * jnp.fft.rfft(kernel, axis=0)
    return jnp.fft.irfft(product, len(x), 0).astype(x.dtype)


@put(LEAKY)
def target_not_shifted(x):
    return later(x)


@put(LEAKY)
def divided_by_the_largest_of_all(x):
    return x / jnp.abs(x).max()


# Leaks: hidden from gradients, or nearly so


@put(LEAKY)
def hidden_before_a_layer_norm(x):
    return norm(x + future_mean(x), 1)


@put(LEAKY)
def hidden_before_a_softmax(x):
    return jax.nn.softmax(x + future_mean(x))


@put(LEAKY)
def dead_relu(x):
    return x + jax.nn.relu(later(x) - 20)


@put(LEAKY)
def saturated_tanh(x):
    return x + jnp.tanh(1e4 * later(x))


@put(LEAKY)
def stopped_gradient(x):
    return x + jax.lax.stop_gradient(future_mean(x))


@put(LEAKY)
def rounded(x):
    return x + jnp.round(future_mean(x))


@put(LEAKY)
def argmax_of_all(x):
    return x + (x.argmax(0)[None] > jnp.arange(len(x))[:, None]).astype(x.dtype)


@put(LEAKY)
def top_k_routing_over_the_sequence(x):
    chosen = jax.lax.top_k(x[:, 0], len(x) // 2)[1]
    return x.at[chosen].multiply(2)


@put(LEAKY)
def capacity_by_score(x):
    score, expert = x.max(1), x.argmax(1)
    rivals = (expert[:, None] == expert[None]) & (score[None] > score[:, None])
    return jnp.where(rivals.sum(1)[:, None] < 2, x * 2, x)


@jax.custom_vjp
def _liar(x):
    return x + future_mean(x)


_liar.defvjp(lambda x: (_liar(x), None), lambda _, g: (g,))


@put(LEAKY)
def custom_vjp_that_lies(x):
    return _liar(x)


@put(LEAKY)
def chunks_read_across_their_border(x):
    starts = jnp.arange(len(x)) // 4 * 4
    return x + x[jnp.minimum(starts + 3, len(x) - 1)]


@put(LEAKY)
def single_pair(x):
    return x.at[2, 0].add(x[7, 1])


@put(LEAKY)
def one_millionth(x):
    return x + 1e-6 * future_mean(x)


@put(LEAKY)
def one_millionth_through_float32(x):
    return (x.astype(jnp.float32) + 1e-6 * future_mean(x.astype(jnp.float32))).astype(x.dtype)


@put(LEAKY)
def sorted_by_value(x):
    return jnp.sort(x, 0)


@put(LEAKY)
def sign_of_one_future_entry(x):
    return x.at[0].add(jnp.sign(x[-1]))


@put(LEAKY)
def count_over_a_threshold(x):
    # Two of the last three rows must change together.
    crowd = (jnp.abs(x[-3:]).max(1) > 5).sum() >= 2
    return x + crowd.astype(x.dtype)


# Tokens


def embed(tokens):
    return weights(jnp.float32, 64, 3)[tokens]


@put(CAUSAL_TOKENS)
def token_embedding(tokens):
    return embed(tokens)


@put(CAUSAL_TOKENS)
def bigram_counts_of_the_past(tokens):
    return jax.nn.one_hot(tokens, 64, dtype=jnp.int32).cumsum(0)


@put(CAUSAL_TOKENS)
def token_rnn(tokens):
    return rnn_scan(embed(tokens))


@put(CAUSAL_TOKENS)
def padding_masked_by_position(tokens):
    return attention(
        embed(tokens), lambda s, m: jax.nn.softmax(jnp.where(m & (tokens != 0)[None], s, -1e9))
    )


@put(LEAKY_TOKENS)
def token_histogram(tokens):
    return embed(tokens) + jax.nn.one_hot(tokens, 3, dtype=jnp.float32).mean(0)[None]


@put(LEAKY_TOKENS)
def padding_length(tokens):
    return embed(tokens) * (tokens == 0).sum().astype(jnp.float32)


@put(LEAKY_TOKENS)
def all_padding_after_the_end(tokens):
    rest_is_padding = (later(tokens)[::-1] == 0)[::-1].all()
    return embed(tokens) + rest_is_padding.astype(jnp.float32)


@put(LEAKY_TOKENS)
def next_token(tokens):
    return later(tokens)


@put(LEAKY_TOKENS)
def parity_of_a_later_token(tokens):
    return embed(tokens).at[1].add((tokens[6] % 2).astype(jnp.float32))


# Strict: output t must not read input t either


@put(STRICT)
def shifted_right(x):
    return jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])


@put(STRICT)
def rnn_on_shifted_input(x):
    return rnn_scan(shifted_right(x))


@put(NOT_STRICT)
def prefix_sum_with_its_own_entry(x):
    return x.cumsum(0)


@put(NOT_STRICT)
def own_entry_through_a_residual(x):
    return rnn_on_shifted_input(x) + x


@put(NOT_STRICT)
def own_entry_in_the_query(x):
    below = jnp.tri(len(x), k=-1, dtype=bool)
    probabilities = jax.nn.softmax(jnp.where(below, x @ x.T, -1e9), where=below)
    return jnp.where(below.any(1, keepdims=True), probabilities, 0).astype(x.dtype) @ x


@put(NOT_STRICT)
def own_entry_at_the_first_position_only(x):
    return shifted_right(x).at[0].set(x[0])


# Batches: each example on its own


@put(INDEPENDENT)
def mapped_norm(x):
    return jax.vmap(functools.partial(norm, axis=(0, 1)))(x)


@put(INDEPENDENT)
def mapped_rnn(x):
    return jax.vmap(rnn_scan)(x)


@put(BATCH_LEAKS)
def batch_norm_in_training(x):
    return norm(x, (0, 1))


@put(BATCH_LEAKS)
def norm_over_the_batch(x):
    return norm(x, 0)


@put(BATCH_LEAKS)
def routing_over_the_flattened_batch(x):
    flat = x.reshape(-1, x.shape[-1])
    return first_come_mixture_of_experts(flat).reshape(x.shape)


@put(BATCH_LEAKS)
def missing_vmap(x):
    return x * jax.nn.softmax(x[:, 0, 0])[:, None, None]


class ZeroInitialisedBranch(eqx.Module):
    """Reads the future through a projection that is still zero."""

    weight: jax.Array

    def __init__(self, features):
        self.weight = jnp.zeros((features, features))

    def __call__(self, x):
        return x + future_mean(x) @ self.weight
