"""Rules as masks: one boolean array is what a model may read and what the check holds it to.

Where a mask goes wrong, the report says so in words; the pairs are those of the masks themselves.
"""

import pathlib

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed
from flax import nnx
from refused import refused

from eqx_norms.causality import (
    CausalityError,
    assert_causal,
    assert_reads,
    check_causal,
    check_reads,
    rules,
)

T, D = 8, 4
CAUSAL = rules.causal(T)
QUERIES = np.random.default_rng(seed(1)).standard_normal((T, D)).astype(np.float32)
LEFT = np.arange(T) >= 3  # what is no padding


@pytest.fixture
def x():
    return normal(jr.key(seed(0)), (T, D))


def attend(mask, lowest=-jnp.inf):
    """One head under a boolean mask. Its queries are parameters: all is read through the mask."""
    mask, queries = jnp.asarray(mask), jnp.asarray(QUERIES[: len(mask)])

    def fn(x):
        scores = jnp.where(mask, queries @ x.T, jnp.asarray(lowest, x.dtype))
        return jax.nn.softmax(scores) @ x

    return fn


# Padding


def test_left_padding_is_let_off(x):
    """Under finfo.min or -1e9 a row of padding is an average of all, and nobody looks at it."""
    padded = attend(CAUSAL & LEFT, -1e9)
    report = check_reads(padded, x, CAUSAL & rules.unpadded(LEFT))
    assert report.leaking().sum() == 18 and (~report.allowed).sum() == 43
    text = " ".join(str(report).split())
    assert "All leaks are of outputs 0 to 2. Each reads every input" in text
    assert "if all of these outputs are padding" in text
    assert "rules.let_off(rule, mask)" in " ".join(str(report).splitlines()[:5])
    rule = rules.let_off(CAUSAL & LEFT, LEFT)
    must = CAUSAL & LEFT & LEFT[:, None]
    assert assert_reads(padded, x, rule, required=must, prove=True).status == "proved"
    forgotten = attend(CAUSAL, -1e9)
    assert check_reads(forgotten, x, rule).leaking().sum() == 15


@pytest.mark.slow
def test_other_leaks_are_not_put_down_to_padding(x):
    all_read, packed = np.ones((T, T), bool), rules.segments(np.arange(T) // 4)
    for read, rule in [
        (all_read, CAUSAL),
        (CAUSAL, CAUSAL & packed),
        (all_read, packed),
        (all_read, CAUSAL & packed),
        (all_read, rules.causal(T, strict=True)),
        (CAUSAL, rules.causal(T, strict=True)),
    ]:
        report = check_reads(lambda x, read=read: read.astype(np.float32) @ x, x, rule)
        assert report.leak and "padding, which" not in str(report)


# Dead rows

STRICT = rules.causal(T, strict=True)
DEAD = "Nothing may be read by output 0."


def test_a_dead_row_is_named_in_every_report_and_error(x):
    average = attend(STRICT, -1e9)  # its first row is an average of all
    assert DEAD in str(check_reads(average, x, STRICT)).replace("\n", " ")
    zeros = lambda x: jnp.where(rules.unread_rows(STRICT)[:, None], 0, average(x))
    report = assert_reads(zeros, x, STRICT)
    assert any(DEAD in note for note in report.notes)
    assert any(DEAD in note for note in assert_reads(zeros, x, STRICT, prove=True).notes)
    with pytest.raises(ValueError, match="finite") as info:
        check_reads(attend(STRICT), x, STRICT)  # 0 / 0
    assert any(DEAD in note for note in info.value.__notes__)
    alive = rules.let_off(STRICT, ~rules.unread_rows(STRICT))
    assert not any("Nothing may" in note for note in assert_reads(average, x, alive).notes)


# Other lengths


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_a_check_of_the_last_positions(x, strict):
    """As behind a cache: 3 queries, 8 keys."""
    rule = rules.causal(3, T, strict=strict, align="end")
    options = {"align": "end", "strict": strict, "complete": True}
    report = assert_causal(attend(rule), x, **options)
    assert np.array_equal(report.allowed, rule) and np.array_equal(report.required, rule)
    assert assert_causal(attend(rule), x, prove="required", align="end", strict=strict)
    # The same outputs held to the first positions, and a mask aligned to those.
    assert check_causal(attend(rule), x, align="start", strict=strict).leak
    start = rules.causal(3, T, align="start")
    report = check_causal(attend(start), x, **options)
    assert report.blind and np.array_equal(report.missing(), rule & ~start)


def test_lengths_that_differ_need_align(x):
    fn = attend(rules.causal(3, T, align="end"))
    text = r'as many positions as the input, 8, got 3 .*, or say by align="start" or "end" where'
    with refused(ValueError, text):
        assert_causal(fn, x)
    with refused(ValueError, 'align must be "start" or "end", got \'last\''):
        assert_causal(fn, x, align="last")
    assert assert_causal(attend(CAUSAL), x, align="end").kind == "causal"
    with refused(ValueError, "allowed forbids nothing"):
        assert_causal(attend(np.ones((1, T), bool)), x, align="end")


# Heads


@pytest.mark.slow
def test_a_rule_of_each_head(x):
    """Where a function returns heads, `(H, T, T)` is the rule of its outputs along two axes."""
    heads = np.stack([CAUSAL, CAUSAL & rules.window(T, 2), rules.independent(T)])
    fn = lambda x: jnp.stack([attend(mask)(x) for mask in heads])
    report = assert_reads(fn, x, heads, required=heads, out_axis=(0, 1))
    assert np.array_equal(report.allowed, heads.reshape(-1, T))
    turned = check_reads(fn, x, heads[[1, 0, 2]], out_axis=(0, 1))
    assert {pair.output[0] for pair in turned.pairs()} == {0}
    last = lambda x: jnp.moveaxis(fn(x), 0, 1)  # (T, H, D)
    assert_reads(last, x, heads, required=heads, out_axis=(1, 0))


@pytest.mark.parametrize(
    "allowed, cure",
    [
        (CAUSAL[None, None], r"got \(1, 1, 8, 8\); write allowed\[0, 0\]"),
        (np.stack([CAUSAL] * 3), r"got \(3, 8, 8\); for heads .* out_axis=\(0, 1\)"),
    ],
)
def test_a_mask_of_more_axes_is_refused_with_a_cure(x, allowed, cure):
    with refused(ValueError, cure):
        check_reads(attend(CAUSAL), x, allowed)


# The proof


def test_a_proof_goes_through_custom_vmap(x):
    """Whose jaxpr is in the equation: so is all of tokamax."""

    @jax.custom_batching.custom_vmap
    def inner(x):
        return attend(CAUSAL)(x)

    @inner.def_vmap
    def _(size, batched, x):
        return jax.vmap(attend(CAUSAL))(x), True

    fn = lambda x: jax.jit(inner)(x) + x
    assert assert_causal(fn, x, prove="required").status == "proved"
    assert check_causal(lambda x: inner(x[::-1]), x, prove=True).leak


def flax_attention(mask):
    return lambda x: nnx.dot_product_attention(
        x[None, :, None], x[None, :, None], x[None, :, None], mask=mask
    )[0, :, 0]


def test_a_mask_of_floats_is_named_among_the_obstacles(x):
    """`make_causal_mask` of Flax returns float32, which could be a parameter."""
    mask = nnx.make_causal_mask(jnp.ones((1, T)))
    assert mask.dtype == jnp.float32
    report = check_causal(flax_attention(mask), x, prove=True)
    assert report.status.startswith("clear") and len(report.obstacles) == 1
    assert "zeros and ones that fn holds, float32 of shape (1, 1, 8, 8)" in report.obstacles[0]
    assert "mask > 0" in report.obstacles[0]
    with pytest.raises(CausalityError, match="mask > 0"):
        assert_causal(flax_attention(mask), x, prove="required")
    assert_causal(flax_attention(mask > 0), x, prove="required")


@pytest.mark.slow
def test_what_else_is_in_the_way_is_named_beside_it(x):
    mask = nnx.make_causal_mask(jnp.ones((1, T)))
    rescaled = lambda x: flax_attention(mask)(x / x.max()) * x.max()
    obstacles = check_causal(rescaled, x, prove=True).obstacles
    assert "mask > 0" in obstacles[0] and "`reduce_max`" in obstacles[-1], obstacles
    assert len(obstacles) == 2
    # Ones and zeros that hide nothing are no obstacle.
    alternate = np.tile(np.float32([0, 1]), D // 2)
    (obstacle,) = check_causal(lambda x: x * alternate[None] / x.max(), x, prove=True).obstacles
    assert "`reduce_max`" in obstacle


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, and of a row that is dead on purpose
@pytest.mark.parametrize("table", ["MEANING", "REST"])
def test_the_tables_of_the_page_are_what_runs(table):
    """Of the libraries that come with the tests; `benchmarks/masks.py` prints them of all."""
    from benchmarks import masks  # imports all libraries that are there

    packages = {one.package for one in masks.LIBRARIES}
    assert packages >= {"jax", "equinox", "flax", "dm-haiku"}
    page = (pathlib.Path(__file__).parent.parent / "docs" / "masks.md").read_text()
    for one in masks.LIBRARIES:
        assert " ".join(masks.row(one, getattr(masks, table)).split()) in page
