"""Small functions under a rule, each named after what it does or gets wrong.

`ZOO` maps a name to a `Case`: the function, the rule it is held to, and a plain statement of who
reads whom in fact. What it reads and must not is a leak, what it must read and does not is blind.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import draws
import jax
import jax.numpy as jnp
import numpy as np
from causality_zoo import causal_convolution, norm, rnn_scan, shifted_right, weights

import eqx_norms
from eqx_norms.causality import rules

T, D = 8, 4


class Case(NamedTuple):
    """A function under a rule. All arrays are boolean, `[t, j]`: output t and input j.

    `required` is what must be read, `unproved` the operation in the way of a proof, if it is right
    all the same. `x` is the kind of input, see `make_input`; `options` are those of the check.
    """

    fn: Callable
    allowed: np.ndarray
    required: np.ndarray
    reads: np.ndarray
    x: str
    unproved: str
    options: dict[str, Any]

    @property
    def leaking(self) -> np.ndarray:
        return self.reads & ~self.allowed

    @property
    def blind(self) -> np.ndarray:
        return self.required & ~self.reads

    @property
    def right(self) -> bool:
        return not (self.leaking.any() or self.blind.any())


ZOO: dict[str, Case] = {}


def case(allowed, reads=None, *, required=None, x="rows", unproved="", **options):
    """Enters the decorated function. By default it reads what is allowed, and all of it must be."""

    def enter(fn):
        must = allowed if required is None else required
        truth = allowed if reads is None else reads
        ZOO[fn.__name__] = Case(fn, allowed, must, truth, x, unproved, options)
        return fn

    return enter


def who(reads: Callable, outputs: int = T, inputs: int = T) -> np.ndarray:
    """The matrix of a statement about output t and input j."""
    t, j = np.indices((outputs, inputs))
    return np.broadcast_to(reads(t, j), t.shape).astype(bool)


def through(*layers: np.ndarray) -> np.ndarray:
    """Who reads whom through layers, the last one last: a chain of readers."""
    reads, *rest = (layer.astype(int) for layer in layers)
    for layer in rest:
        reads = layer @ reads
    return reads > 0


def make_input(kind: str, dtype: Any) -> Any:
    """Typical values. Tokens are below 10, and 0 ends a document."""
    rng = np.random.default_rng(draws.seed(1))
    floats = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)
    if kind == "tokens":
        return jnp.array([3, 5, 0, 7, 2, 9, 0, 4])
    if kind == "rows and documents":
        return {"rows": floats(T, D), "documents": jnp.asarray(DOCUMENTS)}
    shapes = {"rows": (T, D), "numbers": (6,), "image": (SIDE, SIDE, 2), "batch": (2, 4, D)}
    return floats(*shapes[kind])


def attend(x, mask, source=None):
    """One head of attention under a boolean mask; what sees nothing is 0."""
    source = x if source is None else source
    wide = x.shape[-1]
    q, k, v = (
        a @ weights(x.dtype, wide, wide, seed=seed) for seed, a in enumerate((x, source, source))
    )
    return jax.nn.softmax(q @ k.T, where=jnp.asarray(mask)) @ v


CAUSAL = who(lambda t, j: j <= t)
ALL = np.ones((T, T), bool)


# Packed documents: what is one row to the program are three to the reader

DOCUMENTS = np.array([0, 0, 0, 1, 1, 1, 1, 2])
PLACES = np.array([0, 1, 2, 0, 1, 2, 3, 0])
PACKED = rules.causal(T) & rules.segments(DOCUMENTS)
OWN = who(lambda t, j: DOCUMENTS[t] == DOCUMENTS[j])


@case(PACKED, OWN & CAUSAL)
def packed(x):
    return attend(x, CAUSAL & OWN)


@case(PACKED, CAUSAL)
def packed_and_the_mask_forgotten(x):
    return attend(x, CAUSAL)


@case(PACKED, CAUSAL)
def packed_with_positions_reset_and_the_mask_forgotten(x):
    return attend(x + weights(x.dtype, T, D, seed=7)[PLACES], CAUSAL)


@case(PACKED, OWN)
def packed_with_the_second_mask_in_place_of_the_first(x):
    return attend(x, OWN)


@case(PACKED, OWN | CAUSAL)
def packed_with_masks_joined_by_or(x):
    return attend(x, CAUSAL | OWN)


@case(PACKED, through(who(lambda t, j: (j == t) | (j == t - 1)), OWN & CAUSAL))
def packed_with_a_shifted_key(x):
    return attend(x, CAUSAL & OWN, source=x + shifted_right(x))


LATE = np.roll(DOCUMENTS, 1)


@case(PACKED, CAUSAL & (LATE[:, None] == LATE))
def packed_with_borders_one_late(x):
    return attend(x, CAUSAL & (LATE[:, None] == LATE))


@case(PACKED, OWN & CAUSAL, x="rows and documents", fixed="documents")
def packed_with_documents_as_an_input(x):
    documents = x["documents"]
    return attend(x["rows"], jnp.asarray(CAUSAL) & (documents[:, None] == documents[None]))


# The end of a document is found by its own value, which an edit takes away: two become one.
AFTER_AN_END = who(lambda t, j: np.isin(j, (2, 6)) & (DOCUMENTS[t] == DOCUMENTS[j] + 1))


@case(PACKED, OWN & CAUSAL | AFTER_AN_END, x="tokens")
def packed_with_borders_found_in_the_tokens(tokens):
    ended = (shifted_right(tokens) == 0).at[0].set(False).cumsum()
    mask = jnp.asarray(CAUSAL) & (ended[:, None] == ended[None])
    return attend(weights(jnp.float32, 16, D)[tokens], mask)


@case(PACKED, CAUSAL)
def packed_and_the_state_carried_over(x):
    return rnn_scan(x)


@case(PACKED, OWN & CAUSAL)
def packed_and_the_state_reset(x):
    w = weights(x.dtype, D, D)

    def step(h, row_and_first):
        row, first = row_and_first
        h = jnp.tanh(jnp.where(first, 0, h) @ w + row)
        return h, h

    return jax.lax.scan(step, jnp.zeros_like(x[0]), (x, jnp.asarray(PLACES == 0)))[1]


@case(PACKED, OWN & CAUSAL, unproved="cumsum")
def packed_sums_as_a_difference_of_prefix_sums(x):
    sums = jnp.cumsum(x, 0)
    before = np.arange(T) - PLACES  # the first of the document
    return sums - jnp.where((before > 0)[:, None], sums[before - 1], 0)


NEAR = who(lambda t, j: (0 <= t - j) & (t - j < 3))


@case(PACKED & rules.window(T, 3), NEAR)
def packed_and_convolved_across_borders(x):
    return causal_convolution(x)


@case(PACKED & rules.window(T, 3), NEAR & OWN)
def packed_and_convolved_within_documents(x):
    taps = []
    for back in range(3):
        there = (PLACES >= back)[:, None]
        tap = jnp.where(there, jnp.roll(x, back, 0), 0)
        taps.append(tap @ weights(x.dtype, D, D, seed=back))
    return sum(taps)


@case(PACKED, ALL)
def packed_under_a_norm_of_the_row(x):
    return norm(x, (0, 1))


@case(rules.segments(DOCUMENTS), OWN)
def packed_under_a_norm_of_each_document(x):
    count = jnp.asarray(np.bincount(DOCUMENTS)[DOCUMENTS][:, None], x.dtype)
    of_token = lambda a: a.mean(1, keepdims=True)
    mean_of = lambda a: jax.ops.segment_sum(of_token(a), DOCUMENTS, 3)[DOCUMENTS] / count
    centred = x - mean_of(x)
    return centred * jax.lax.rsqrt(mean_of(centred**2) + 1e-3)


# Windows and dilation

WINDOW = rules.causal(T) & rules.window(T, 3)


@case(WINDOW, NEAR)
def window(x):
    return attend(x, NEAR)


@case(WINDOW, who(lambda t, j: (0 <= t - j) & (t - j < 4)))
def window_one_too_wide(x):
    return attend(x, who(lambda t, j: (0 <= t - j) & (t - j < 4)))


@case(WINDOW, who(lambda t, j: (0 <= t - j) & (t - j < 2)))
def window_one_too_short(x):
    return attend(x, who(lambda t, j: (0 <= t - j) & (t - j < 2)))


@case(WINDOW, who(lambda t, j: (0 <= t - j) & (t - j < 5)))
def window_in_two_layers(x):
    return attend(attend(x, NEAR), NEAR)


@case(WINDOW, CAUSAL)
def window_forgotten(x):
    return attend(x, CAUSAL)


SINK = rules.causal(T) & (rules.window(T, 2) | (np.arange(T) == 0))


@case(SINK, who(lambda t, j: (j == t) | (j == t - 1) | (j == 0)))
def window_and_a_first_token_that_all_read(x):
    return attend(x, who(lambda t, j: (j == t) | (j == t - 1) | (j == 0)))


@case(SINK, who(lambda t, j: (j == t) | (j == t - 1)))
def window_and_the_first_token_forgotten(x):
    return attend(x, who(lambda t, j: (j == t) | (j == t - 1)))


DILATED = rules.causal(T) & rules.dilated(T, 2) & rules.window(T, 5)
EVERY_OTHER = who(lambda t, j: np.isin(t - j, (0, 2, 4)))


@case(DILATED, EVERY_OTHER)
def dilated_convolution(x):
    kernel = weights(x.dtype, D, D, 3)
    return jax.lax.conv_general_dilated(x.T[None], kernel, (1,), [(4, 0)], rhs_dilation=(2,))[0].T


@case(DILATED, NEAR)
def dilated_convolution_and_the_dilation_forgotten(x):
    return causal_convolution(x)


# A prefix that is read both ways

PREFIX = rules.prefix(T, 3)


@case(PREFIX, who(lambda t, j: (j <= t) | (j < 3)))
def prefix(x):
    return attend(x, who(lambda t, j: (j <= t) | (j < 3)))


@case(PREFIX, who(lambda t, j: (j <= t) | (j < 4)))
def prefix_one_too_long(x):
    return attend(x, who(lambda t, j: (j <= t) | (j < 4)))


@case(PREFIX, CAUSAL)
def prefix_under_the_causal_mask(x):
    return attend(x, CAUSAL)


# Padding: on the right as in encoders, on the left as where text is generated

RIGHT, LEFT = np.arange(T) < 5, np.arange(T) >= 3  # what is no padding
UNPADDED = rules.unpadded(RIGHT)
OF_TEXT = {"required": UNPADDED & RIGHT[:, None]}  # what is written at padding is of no interest


@case(UNPADDED, who(lambda t, j: (j < 5) | (j == t)), **OF_TEXT)
def padding_masked(x):
    return attend(x, np.broadcast_to(RIGHT, (T, T)))


@case(UNPADDED, ALL, **OF_TEXT)
def padding_in_the_mean(x):
    return x + x.mean(0, keepdims=True)


@case(UNPADDED, ALL, **OF_TEXT)
def padding_under_a_mask_that_is_too_weak(x):
    q, k, v = (x @ weights(x.dtype, D, D, seed=seed) for seed in range(3))
    return jax.nn.softmax(q @ k.T + jnp.where(RIGHT, 0, -5).astype(x.dtype)[None]) @ v


@case(UNPADDED, who(lambda t, j: (t < 5) & (j < 5)), **OF_TEXT)
def padding_left_out_of_a_norm(x):
    return eqx_norms.layer_norm(x, where=jnp.broadcast_to(RIGHT[:, None], x.shape))


@case(UNPADDED, ALL, **OF_TEXT)
def padding_under_a_norm(x):
    return eqx_norms.layer_norm(x)


BESIDE = who(lambda t, j: abs(t - j) <= 1)


@case(UNPADDED & BESIDE, BESIDE, required=UNPADDED & BESIDE & RIGHT[:, None])
def padding_beside_the_text_under_a_convolution(x):
    kernel = weights(x.dtype, D, D, 3)
    return jax.lax.conv_general_dilated(x.T[None], kernel, (1,), "SAME")[0].T


BEHIND_PADDING = rules.causal(T) & rules.unpadded(LEFT)
OF_TEXT_BEHIND = {"required": BEHIND_PADDING & LEFT[:, None]}


@case(BEHIND_PADDING, who(lambda t, j: (j <= t) & ((j >= 3) | (j == t))), **OF_TEXT_BEHIND)
def padding_on_the_left(x):
    return attend(x, who(lambda t, j: (j <= t) & ((j >= 3) | (j == t))))


@case(BEHIND_PADDING, who(lambda t, j: (t < 3) | (j <= t) & (j >= 3)), **OF_TEXT_BEHIND)
def padding_on_the_left_whose_rows_are_an_average_of_all(x):
    q, k, v = (x @ weights(x.dtype, D, D, seed=seed) for seed in range(3))
    scores = jnp.where(CAUSAL & LEFT, q @ k.T, -1e9)  # of padding, all are -1e9
    return jax.nn.softmax(scores) @ v


# Cross-attention: 6 outputs, 8 inputs

QUERIES = 6
WAITING = who(lambda t, j: j < t + 2, QUERIES)


def cross(x, mask):
    return attend(weights(x.dtype, QUERIES, D, seed=9), mask, source=x)


@case(WAITING)
def translation_that_waits_for_two(x):
    return cross(x, WAITING)


@case(WAITING, who(lambda t, j: j < t + 3, QUERIES))
def translation_that_waits_for_three(x):
    return cross(x, who(lambda t, j: j < t + 3, QUERIES))


@case(WAITING, who(lambda t, j: j < t + 1, QUERIES))
def translation_that_waits_for_one(x):
    return cross(x, who(lambda t, j: j < t + 1, QUERIES))


SOURCE = rules.unpadded(RIGHT, np.ones(QUERIES, bool))


@case(SOURCE, who(lambda t, j: j < 5, QUERIES))
def translation_of_a_padded_source(x):
    return cross(x, np.broadcast_to(RIGHT, (QUERIES, T)))


@case(SOURCE, who(lambda t, j: j >= 0, QUERIES))
def translation_of_the_padding_too(x):
    return cross(x, np.ones((QUERIES, T), bool))


# Strides, patches, blocks

STRIDED = rules.strided(T, 2, start=1) & rules.window(T, 3)[1::2]


def strided(x, padding):
    kernel = weights(x.dtype, D, D, 3)
    return jax.lax.conv_general_dilated(x.T[None], kernel, (2,), [padding])[0].T


@case(STRIDED, who(lambda t, j: (2 * t - 1 <= j) & (j <= 2 * t + 1), T // 2))
def strided_convolution(x):
    return strided(x, (1, 0))


@case(STRIDED, who(lambda t, j: (2 * t <= j) & (j <= 2 * t + 2), T // 2))
def strided_convolution_padded_behind(x):
    return strided(x, (0, 1))


PATCHES = rules.segments(np.arange(T) // 2, np.arange(T // 2))


@case(PATCHES, who(lambda t, j: t == j // 2, T // 2))
def patches(x):
    return x.reshape(T // 2, 2 * D) @ weights(x.dtype, 2 * D, D)


@case(PATCHES, who(lambda t, j: t == j % 4, T // 2))
def patches_of_what_is_far_apart(x):
    pairs = x.reshape(2, T // 2, D).swapaxes(0, 1)
    return pairs.reshape(T // 2, 2 * D) @ weights(x.dtype, 2 * D, D)


@case(rules.segments(np.arange(T), np.arange(2 * T) // 2), who(lambda t, j: t // 2 == j, 2 * T))
def patches_taken_apart(x):
    return (x @ weights(x.dtype, D, 2 * D)).reshape(2 * T, D)


BLOCKS = rules.blocks(T, 2)


@case(BLOCKS, who(lambda t, j: j // 2 <= t // 2))
def blocks(x):
    return attend(x, who(lambda t, j: j // 2 <= t // 2))


@case(BLOCKS, CAUSAL)
def blocks_written_token_by_token(x):
    return attend(x, CAUSAL)


@case(BLOCKS, who(lambda t, j: j // 4 <= t // 4))
def blocks_of_twice_the_size(x):
    return attend(x, who(lambda t, j: j // 4 <= t // 4))


# Block diffusion: a noisy copy, then a clean one. Noise reads its own block and clean ones before.
CLEAN, BLOCK = np.arange(T) >= 4, np.arange(T) % 4 // 2
DENOISED = who(
    lambda t, j: np.where(
        CLEAN[j],
        BLOCK[j] < BLOCK[t] + CLEAN[t],
        ~CLEAN[t] & (BLOCK[t] == BLOCK[j]),
    )
)
GIVEN_AWAY = DENOISED | who(lambda t, j: CLEAN[j] & (BLOCK[j] <= BLOCK[t]))


@case(DENOISED)
def noisy_and_clean_copies(x):
    return attend(x, DENOISED)


@case(DENOISED, GIVEN_AWAY)
def noisy_copy_that_reads_its_own_clean_one(x):
    return attend(x, GIVEN_AWAY)


# Orders: MADE of six numbers, PixelCNN of an image

ORDER = np.array([2, 0, 5, 1, 4, 3])
RANK = np.argsort(ORDER)
DEGREE = np.arange(10) % 5
EARLIER = rules.ordered(ORDER, strict=True)
INTO = DEGREE[:, None] >= RANK
OUT_OF = RANK[:, None] > DEGREE


def made(x, into, out_of):
    keep = lambda mask, w: jnp.where(mask, w, 0)
    hidden = jnp.tanh(keep(into, weights(x.dtype, 10, 6, seed=1)) @ x)
    return keep(out_of, weights(x.dtype, 6, 10, seed=2)) @ hidden


@case(EARLIER, who(lambda t, j: RANK[j] < RANK[t], 6, 6), x="numbers")
def masked_autoencoder(x):
    return made(x, INTO, OUT_OF)


@case(
    EARLIER,
    who(lambda t, j: RANK[j] < RANK[t], 6, 6),
    x="numbers",
    unproved="zeros and ones that fn holds",
)
def masked_autoencoder_with_masks_of_floats(x):
    into, out_of = (np.asarray(mask, x.dtype) for mask in (INTO, OUT_OF))  # may be parameters
    hidden = jnp.tanh((into * weights(x.dtype, 10, 6, seed=1)) @ x)
    return (out_of * weights(x.dtype, 6, 10, seed=2)) @ hidden


@case(EARLIER, through(INTO, RANK[:, None] >= DEGREE), x="numbers")
def masked_autoencoder_that_lets_the_diagonal_through(x):
    return made(x, INTO, RANK[:, None] >= DEGREE)


@case(EARLIER, through(INTO, np.arange(6)[:, None] > DEGREE), x="numbers")
def masked_autoencoder_of_two_orders(x):
    return made(x, INTO, np.arange(6)[:, None] > DEGREE)


SIDE = 4
PIXELS = SIDE * SIDE
RASTER = rules.ordered(np.arange(PIXELS), strict=True)
IMAGE = {"x": "image", "axis": (0, 1)}


def kernel_mask(kind, rows=3, columns=3):
    """Of a kernel around a pixel: what comes before it, and with "b" itself."""
    before = np.arange(rows * columns) < rows * columns // 2 + (kind == "b")
    return before.reshape(rows, columns)


def around(mask):
    """Who reads whom through a convolution with such a kernel."""
    rows, columns = (n // 2 for n in mask.shape)

    def reads(t, j):
        down, right = j // SIDE - t // SIDE, j % SIDE - t % SIDE
        inside = (abs(down) <= rows) & (abs(right) <= columns)
        return inside & mask[np.clip(down + rows, 0, 2 * rows), np.clip(right + columns, 0, 2)]

    return who(reads, PIXELS, PIXELS)


def masked_convolution(x, mask, seed):
    kernel = weights(x.dtype, *mask.shape, x.shape[-1], 2, seed=seed)
    kernel = jnp.where(mask[:, :, None, None], kernel, 0)
    layout = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=layout)
    return out[0]


def pixelcnn(x, kinds):
    for seed, kind in enumerate(kinds):
        x = masked_convolution(x, kernel_mask(kind), seed)
    return x


def reads_of_pixelcnn(kinds):
    return through(*(around(kernel_mask(kind)) for kind in kinds))


@case(RASTER, reads_of_pixelcnn("abb"), **IMAGE)
def pixelcnn_and_its_blind_spot(x):
    """Above and to the right, what no chain of masked kernels reaches (van den Oord 2016)."""
    return pixelcnn(x, "abb")


@case(RASTER, reads_of_pixelcnn("bbb"), **IMAGE)
def pixelcnn_that_reads_its_own_pixel(x):
    return pixelcnn(x, "bbb")


@case(RASTER, who(lambda t, j: j < t, PIXELS, PIXELS), **IMAGE)
def pixelcnn_of_two_stacks(x):
    """What is above comes by a stack of its own, which has no blind spot."""
    above, left = x, x
    for layer, kind in enumerate("abb"):
        rows = np.tile(np.array([[True], [kind == "b"], [False]]), 3)
        above = masked_convolution(above, rows, seed=2 * layer)
        left = above + masked_convolution(left, kernel_mask(kind, rows=1), seed=2 * layer + 1)
    return left


DOWNWARD = np.arange(PIXELS).reshape(SIDE, SIDE).T.reshape(-1)  # by columns


@case(RASTER, RASTER[np.ix_(DOWNWARD, DOWNWARD)], **IMAGE)
def pixels_by_columns(x):
    return pixelcnn_of_two_stacks(x.swapaxes(0, 1)).swapaxes(0, 1)


QUARTER = np.arange(PIXELS) // SIDE // 2 * 2 + np.arange(PIXELS) % SIDE // 2


@case(
    rules.blocks((SIDE, SIDE), (2, 2)),
    who(lambda t, j: QUARTER[j] <= QUARTER[t], PIXELS, PIXELS),
    **IMAGE,
)
def pixels_by_quarters(x):
    mask = who(lambda t, j: QUARTER[j] <= QUARTER[t], PIXELS, PIXELS)
    return attend(x.reshape(PIXELS, 2), mask).reshape(x.shape)


# Batch and time at once: 2 examples of 4 positions

EACH = rules.each(2, rules.causal(4))
EXAMPLE, TIME = np.divmod(np.arange(T), 4)
MAPPED = who(lambda t, j: (EXAMPLE[t] == EXAMPLE[j]) & (TIME[j] <= TIME[t]))
BATCH = {"x": "batch", "axis": (0, 1)}


def mapped_attention(x):
    return jax.vmap(lambda example: attend(example, np.tri(4, dtype=bool)))(x)


@case(EACH, MAPPED, **BATCH)
def batch_mapped(x):
    return mapped_attention(x)


@case(EACH, MAPPED, **BATCH, out_axis=(1, 0))
def batch_mapped_and_time_first(x):
    return mapped_attention(x).swapaxes(0, 1)


@case(EACH, CAUSAL, **BATCH)
def batch_as_one_long_sequence(x):
    return attend(x.reshape(T, D), CAUSAL).reshape(x.shape)


@case(EACH, who(lambda t, j: TIME[j] <= TIME[t]), **BATCH)
def batch_statistics(x):
    return norm(mapped_attention(x), 0)


@case(EACH, who(lambda t, j: (t % 2 == j % 2) & (j <= t)), **BATCH)
def batch_reshaped_where_it_should_be_transposed(x):
    return x.reshape(4, 2, D).cumsum(0).reshape(x.shape)


# Blind: what should be read is not

BOTH_HEADS = np.tile(CAUSAL, (2, 1))


@case(rules.causal(T), np.eye(T, dtype=bool))
def blind_under_a_mask_of_eye(x):
    return attend(x, np.eye(T, dtype=bool))


@case(BOTH_HEADS, BOTH_HEADS & (np.arange(2 * T) < T)[:, None], axis=0, out_axis=(0, 1))
def blind_head_that_sees_nothing(x):
    return jnp.stack([attend(x, CAUSAL), attend(x, np.zeros((T, T), bool))])


@case(rules.causal(T), who(lambda t, j: (j <= t) & (t != 3)))
def blind_at_a_dead_position(x):
    return attend(x, CAUSAL).at[3].set(0)


@case(rules.causal(T), who(lambda t, j: (j <= t) & (j != 0)))
def blind_to_the_first_token(x):
    return attend(x.at[0].set(0), CAUSAL)


@case(rules.causal(T), np.eye(T, dtype=bool))
def blind_behind_a_gate_of_zero(x):
    return x + jnp.zeros((), x.dtype) * attend(x, CAUSAL)


@case(rules.causal(T), np.zeros((T, T), bool))
def blind_for_all_is_rounded_away(x):
    return attend(jnp.round(1e-4 * x), CAUSAL)


# Not blind, though it looks so


@case(rules.causal(T), CAUSAL)
def reads_behind_a_stopped_gradient(x):
    return attend(jax.lax.stop_gradient(x), CAUSAL)


@case(rules.causal(T), CAUSAL)
def reads_behind_a_dead_relu(x):
    return jax.nn.relu(x - 20).cumsum(0)


@case(rules.causal(T), CAUSAL)
def reads_what_has_all_but_faded(x):
    """A twentieth at each step, 1e-9 at the end: in float64 alone that is more than rounding."""
    step = lambda h, row: (0.05 * h + row,) * 2
    return jax.lax.scan(step, jnp.zeros_like(x[0]), x)[1]


@case(rules.causal(T), CAUSAL)
def reads_the_one_of_the_best_score(x):
    q, k, v = (x @ weights(x.dtype, D, D, seed=seed) for seed in range(3))
    best = jnp.argmax(jnp.where(CAUSAL, q @ k.T, -jnp.inf), 1)
    chosen = jax.nn.one_hot(best, T, dtype=x.dtype)
    return jnp.where(CAUSAL, chosen, 0) @ v


# Anybody's arrays

PARENT = np.array([0, 0, 0, 1, 1, 2, 2, 3])  # the first is the root
PARENT_OR_OWN = np.eye(T, dtype=bool) | who(lambda t, j: PARENT[t] == j)
ANCESTORS = through(PARENT_OR_OWN, PARENT_OR_OWN, PARENT_OR_OWN)  # a rule of one's own
SIBLINGS = ANCESTORS | who(lambda t, j: (PARENT[t] == PARENT[j]) & (t > 0) & (j > 0))


@case(ANCESTORS)
def tree_of_drafts(x):
    return attend(x, ANCESTORS)


@case(ANCESTORS, SIBLINGS)
def tree_of_drafts_that_reads_siblings(x):
    return attend(x, SIBLINGS)


GRAPH = who(lambda t, j: np.isin((j - t) % T, (0, 1, 3)))


@case(GRAPH)
def message_passing(x):
    return jnp.tanh(jnp.where(GRAPH, 1, 0).astype(x.dtype) @ (x @ weights(x.dtype, D, D)))


@case(GRAPH, GRAPH.T)
def message_passing_along_the_wrong_direction(x):
    return jnp.tanh(jnp.where(GRAPH.T, 1, 0).astype(x.dtype) @ (x @ weights(x.dtype, D, D)))


@case(~rules.independent(T), who(lambda t, j: t != j))
def mean_of_the_others(x):
    return jnp.where(np.eye(T, dtype=bool), 0, 1 / 7).astype(x.dtype) @ x


@case(~rules.independent(T), who(lambda t, j: t != j), unproved="sub")
def mean_of_the_others_as_total_minus_own(x):
    return (x.sum(0, keepdims=True) - x) / 7


@case(rules.causal(T, strict=True), who(lambda t, j: j < t))
def strictly_before(x):
    return rnn_scan(shifted_right(x))


@case(rules.causal(T, strict=True), CAUSAL)
def strictly_before_and_a_residual(x):
    return rnn_scan(shifted_right(x)) + x
