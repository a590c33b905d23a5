"""The proof against edits of the input, on the zoo, on random programs and on real models.

What must hold is one sentence: an edit never moves an output that the structure calls unconnected.
"""

import collections
import functools
import pathlib
import subprocess
import sys

import causality_zoo as zoo
import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import haiku as hk
import hard_oracle
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import random_programs
from draws import seed
from jax.custom_derivatives import linear_call
from random_programs import STEPS, D, T
from refused import refused
from slow import few, slow

from benchmarks.proofs import on_the_page
from eqx_norms import GroupNorm, LayerNorm, RMSNorm
from eqx_norms.causality import (
    CausalityError,
    assert_causal,
    assert_independent,
    check_causal,
    check_same,
)
from eqx_norms.causality._proof import _reads
from eqx_norms.causality._proof._flow import RULES
from eqx_norms.causality._proof._labels import mask_of, others
from eqx_norms.causality._proof._prove import Context, Question, prove
from eqx_norms.causality._widen import trace

LENGTH = 12
CAUSAL = np.tri(LENGTH, dtype=bool)
RIGHT, WRONG = [*zoo.CAUSAL, *zoo.CAUSAL_TOKENS], [*zoo.LEAKY, *zoo.LEAKY_TOKENS]
# Causal in exact arithmetic only, or through values, which a structure does not know; and
# `padding_masked_by_position`, of which only this check finds that it is not causal.
NOT_PROVED = {
    "linear_attention_with_global_scale": "reduce_max",
    "fft_convolution": "fft",
    "prefix_sum_as_total_minus_suffix": "reduce_sum",
    "noisy_sum_in_float32_inside": "reduce_sum",
    "argmax_of_the_past": "gather",
    "padding_masked_by_position": "dot_general",
}


def proof(fn, x, allowed, assume_bounded=True):
    closed = trace(fn, [x])
    axes = [0] * len(closed.out_avals)
    return prove(Question(closed, [x], [0], axes), allowed, assume_bounded)


def floats(dtype="float32", *shape):
    rng = np.random.default_rng(seed(0))
    return jnp.asarray(rng.normal(size=shape or (LENGTH, 4)), dtype)


def tokens():
    return jnp.asarray(np.random.default_rng(seed(0)).integers(0, 16, LENGTH), jnp.int32)


@pytest.mark.parametrize("dtype", ("float32", pytest.param("bfloat16", marks=pytest.mark.slow)))
@pytest.mark.parametrize("name", few(RIGHT, RIGHT[::3]))
def test_what_is_causal_is_proved(name, dtype):
    fn = (zoo.CAUSAL | zoo.CAUSAL_TOKENS)[name]
    found = proof(fn, floats(dtype) if name in zoo.CAUSAL else tokens(), CAUSAL)
    assert found.holds == (name not in NOT_PROVED)
    assert found.holds == (not found.obstacles)
    if not found.holds:
        assert f"`{NOT_PROVED[name]}` in " in found.obstacles[0]
        assert "causality_zoo.py:" in found.obstacles[0]


@pytest.mark.parametrize("dtype", ("float32", pytest.param("bfloat16", marks=pytest.mark.slow)))
@pytest.mark.parametrize("name", few(WRONG, WRONG[::3]))
def test_no_leak_is_proved_causal(name, dtype):
    fn = (zoo.LEAKY | zoo.LEAKY_TOKENS)[name]
    found = proof(fn, floats(dtype) if name in zoo.LEAKY else tokens(), CAUSAL)
    assert not found.holds
    assert all("causality_zoo.py:" in obstacle for obstacle in found.obstacles)


def test_a_row_of_padding_reads_the_future():
    """Every score of a row of padding is the mask's, so that the softmax is an average of all."""
    fn = zoo.CAUSAL_TOKENS["padding_masked_by_position"]
    padding = jnp.zeros(LENGTH, jnp.int32)
    assert not np.array_equal(fn(padding)[0], fn(padding.at[-1].set(3))[0])


@pytest.mark.parametrize("name", [*zoo.INDEPENDENT, *zoo.BATCH_LEAKS])
def test_batches(name):
    fn = (zoo.INDEPENDENT | zoo.BATCH_LEAKS)[name]
    found = proof(fn, floats("float32", 6, LENGTH, 4), np.eye(6, dtype=bool))
    assert found.holds == (name in zoo.INDEPENDENT)


@pytest.mark.parametrize("name", [*zoo.STRICT, *zoo.NOT_STRICT])
def test_strict(name):
    fn = (zoo.STRICT | zoo.NOT_STRICT)[name]
    found = proof(fn, floats(), np.tri(LENGTH, k=-1, dtype=bool))
    assert found.holds == (name in zoo.STRICT)


# Random programs


def reads(fn, x, rng):
    """`[t, j]`: whether any of some edits of input j moves output t, bit for bit."""
    run = jax.jit(fn)
    try:
        base = np.asarray(run(x))
    except jax.errors.JaxRuntimeError as error:  # findings/jax_fft_before_a_triangular_solve.sh
        assert "fft_thunk" in str(error)
        run, base = fn, np.asarray(fn(x))
    found = np.zeros((T, T), bool)
    for j in range(T):
        for size in (1, 3, 0.1):
            out = np.asarray(run(x.at[j].set(jnp.asarray(rng.normal(size=D) * size, x.dtype))))
            found[:, j] |= ~((out == base) | (np.isnan(out) & np.isnan(base))).all(1)
    return found


def check(names, number):
    """No edit moves what is unconnected, and every operation has a rule."""
    rng = np.random.default_rng(number)
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    fn = random_programs.program(names, number)
    closed = trace(fn, [x])
    context = Context(assume_bounded=True)
    connected = Question(closed, [x], [0], [0]).connected(context)
    moved = reads(fn, x, rng) & ~connected
    assert not moved.any(), (names, number, moved)
    assert not context.opaque, (names, number)
    return closed, connected


def every_primitive(closed):
    jaxpr = getattr(closed, "jaxpr", closed)
    names = {eqn.primitive.name.replace("-", "_") for eqn in jaxpr.eqns}
    return names.union(*map(every_primitive, jex.subjaxprs(jaxpr)))


def test_some_random_programs():
    rng = np.random.default_rng(seed(0))
    for number in range(6):
        check(tuple(map(str, rng.choice(list(STEPS), 3))), seed(number))


@pytest.mark.slow
def test_every_step_and_every_rule():
    """But for those that only one of the supported versions has, or that no public call makes."""
    drawn = set()
    for name in STEPS:
        for number in range(4):
            drawn |= every_primitive(check((name,), seed(number))[0])
    elsewhere = {"sharding_constraint", "copy_p", "random_wrap", "random_unwrap", "rng_uniform"}
    elsewhere |= {"random_split", "random_gamma", "rng_bit_generator", "igamma_grad_a"}
    elsewhere |= {name for name in RULES if name.startswith("eqx_norms_")}
    elsewhere |= {"log2", "one_minus_square", "tile", "split", "threefry2x32", "reshard", "unstack"}
    elsewhere |= {"eq_to", "le_to", "lt_to"}
    assert set(RULES) - drawn <= elsewhere


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_random_programs(part):
    """100 programs of two to five steps each."""
    rng = np.random.default_rng(seed(part))
    full = 0
    for number in range(100):
        names = rng.choice(list(STEPS), int(rng.integers(2, 6)))
        full += check(tuple(map(str, names)), seed(1000 * part + number))[1].all()
    assert full < 80  # or else nothing was put to the test


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of numbers that overflow, as they are meant to
@pytest.mark.parametrize("kind", ["short", "wide", "long"])
def test_hard_programs(pytestconfig, kind):
    """What no bound may be broken by. `--programs` says how many short ones are drawn, at a
    tenth of a second each, and a quarter as many of 64 bits; for every 50 of them one of 6 to 12
    steps is, at some seconds.
    """
    count, results = pytestconfig.getoption("--programs") // HARD[kind], 0
    with jax.enable_x64(kind == "wide"):
        for number in range(count):
            found = hard_oracle.check(seed(number), kind != "long")
            assert not found.unsound, (seed(number), found)
            results += found.results
            if number % 400 == 399:
                jax.clear_caches()  # compiled operations, some 4 MB a program
    assert results > count // 2  # or else nothing was put to the test


HARD = {"short": 1, "wide": 4, "long": 50}  # one for so many that are asked for


def held_otherwise(closed, x, words):
    """The connections where everything is written out that takes fewer words than this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_reads, "_SMALL", words)
        return Question(closed, [x], [0], [0]).connected(Context(assume_bounded=True))


@pytest.mark.parametrize("part", few(range(4), range(1)))
def test_terms_say_what_entries_say(part):
    """What is held as terms under masks reads what it does entry by entry, to the bit."""
    rng = np.random.default_rng(seed(part))
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    mixing = [
        n for n in STEPS if n.split("-")[0] in ("attention", "product", "selected", "scanned")
    ]
    for number in range(3 if part == 0 else 40):
        names = [*map(str, rng.choice(mixing, 2)), *map(str, rng.choice(list(STEPS), 3))]
        closed = trace(random_programs.program(names, seed(100 * part + number)), [x])
        terms, entries = (held_otherwise(closed, x, words) for words in (0, 2**30))
        np.testing.assert_array_equal(terms, entries, str(names))


@pytest.mark.parametrize("words", (1, 3))
def test_what_a_mask_lets_through(words, monkeypatch):
    """A union over the runs of its rows, against one over its entries."""
    monkeypatch.setattr(_reads, "_SMALL", 0)
    rng = np.random.default_rng(seed(words))
    for shape in ((7, 9, 1), (1, 9, 4), (6, 9, 4), (6, 1, 1)):
        bits = rng.random((*(n if rng.random() < 0.8 else 1 for n in shape), 64 * words)) < 0.1
        keep = rng.random((shape[0], 9, 1)) < rng.choice([0.2, 0.5, 0.9])
        full = np.broadcast_to(bits, (6 if shape[0] == 1 else shape[0], 9, 4, 64 * words))
        keep = np.broadcast_to(keep, (len(full), 9, 1)) if shape[0] > 1 else keep[:, :, :1]
        rows = _reads.of_dense(_reads.packed(bits))
        found = _reads.reduced(_reads.without(rows, others(mask_of(keep))), (1,))
        expected = (full & keep[..., None]).any(1)
        got = _reads.unpacked(_reads.dense(found, expected.shape[:2])) > 0
        np.testing.assert_array_equal(got, expected)


def test_labels_outlive_the_array_they_were_made_of():
    """They are found again by what they said: an array that is written into must not change it."""
    future = ~np.tri(16, dtype=bool)
    array = future.copy()
    held = mask_of(array)
    array[:] = np.eye(16, k=1, dtype=bool)
    np.testing.assert_array_equal(held.array(), future)
    np.testing.assert_array_equal(mask_of(future).array(), future)


ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_page_says_what_has_no_rule():
    """All that this JAX has without one, and nothing that has one: the list is generated, in a
    process of its own, because other libraries have primitives too."""
    command = [sys.executable, "-m", "benchmarks.proofs", "--without-rule"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed, found = on_the_page(), set(done.stdout.split())
    assert found == listed.get(jax.__version__, found)
    every = set().union(*listed.values())
    assert len(listed) == 2 and found <= every and not every & set(RULES)


# Masks


def attention(mask_scores, x):
    scores, below = x @ x.T, jnp.tri(len(x), dtype=bool)
    return jax.nn.softmax(mask_scores(scores, below)) @ x


MASKS = {
    "infinite": lambda s, m: jnp.where(m, s, -jnp.inf),
    "number": lambda s, m: jnp.where(m, s, -1e9),
    "lowest": lambda s, m: jnp.where(m, s, jnp.finfo(s.dtype).min),
    "added": lambda s, m: s + jnp.where(m, 0, -1e9),
    "subtracted": lambda s, m: s - 1e9 * (1 - m.astype(s.dtype)),
    "scaled": lambda s, m: (s + jnp.where(m, 0, -1e9)) / 8,
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    """What is masked by a finite number is not read as long as the scores are small beside it."""
    fn = functools.partial(attention, MASKS[name])
    assert proof(fn, floats(), CAUSAL).holds
    strictly = proof(fn, floats(), CAUSAL, assume_bounded=False)
    assert strictly.holds == (name == "infinite")
    assumed = proof(fn, floats(), CAUSAL).assumptions
    if name == "infinite":
        assert assumed == ()
    elif name != "lowest":
        assert assumed[-1] == "Scores that meet a mask of -1e+09 are below 1e+08 in size."


def test_a_mask_that_is_too_small_is_no_mask():
    fn = functools.partial(attention, lambda s, m: s + jnp.where(m, 0, -100.0))
    assert not proof(fn, floats(), CAUSAL).holds


def test_the_assumption_is_needed():
    """With scores of the size of the mask, the same function does read the future."""
    fn = functools.partial(attention, MASKS["added"])
    x = 1e5 * floats()
    assert not np.array_equal(fn(x)[:-1], fn(x.at[-1].multiply(-7))[:-1])


# What is no proof: for each function an edit that moves an earlier output


LINE = 8  # positions


def line(*numbers, dtype="float32"):
    numbers = numbers or np.random.default_rng(seed(0)).normal(size=LINE)
    return jnp.asarray(np.resize(numbers, LINE).astype(dtype))


def of_unsigned(i):
    return jnp.where(-i[::-1] > jnp.uint32(10), i[::-1], i)


def base_two(x):
    return jnp.where(jnp.exp2(jnp.clip(x[::-1], -3, -2)) > 0.2, x[::-1], x)


def filled(i):
    """An integer table gives the smallest integer, or the largest, outside."""
    return jnp.where(jnp.take(jnp.arange(3), i[::-1], mode="fill") >= 0, i, i[::-1])


def index_that_is_cast(i):
    return jnp.arange(LINE)[::-1][i[::-1].astype(jnp.int32)]


def smallest_integer(i):
    return jnp.where(jnp.abs(i[::-1]) >= 0, i, i[::-1])


def wide_integers(i):
    return jnp.where((i[::-1] // 2) * 2 + 1 > i[::-1], i, i[::-1])


def eight_bits(x):
    sevenths = (jnp.full(LINE, 10.0) / 7).astype("float8_e4m3fn").astype("float32")
    return jnp.where(sevenths < 1.4, x[::-1], x)  # 1.375


def underflow(x):
    small = jnp.full(LINE, 1e-30)
    return jnp.where(small * small > 0, x, x[::-1])


def prices(x):
    return jnp.maximum(x[::-1] - 50_000.0, 0)


def masked_prices(x):
    scores = jnp.where(jnp.tri(LINE, dtype=bool), x[None], x[None] - 50_000.0)
    return jax.nn.softmax(scores) @ (x / 50_000)


def sign_of_zero(x):
    return jnp.arctan2(0 * x[::-1], -1.0)


def order_of_zeros(x):
    """In the order of all numbers -0 comes first."""
    return jnp.where(jax.lax.lt_to_p.bind(0 * x[::-1], jnp.zeros(LINE)), x, 0)


def unsigned_start(x):
    """XLA takes this start for -1 in one compilation and for the largest in another."""
    start = jnp.asarray(np.array([2**32 - 1], np.uint32))[0]
    last = jax.lax.dynamic_slice(x, (start,), (1,))
    return x + jax.lax.dynamic_slice(x[::-1], (start,), (1,)) + last


def case_before_the_first(x):
    return jax.lax.select_n(jnp.full(LINE, -1, jnp.int32), x[::-1], x)


NO_PROOF = {
    of_unsigned: (line(1, 2, 0, dtype="uint32"), 3),
    base_two: (line(-5), 1),
    filled: (line(0, 1, dtype="int32"), 9),
    index_that_is_cast: (line(0, 1, dtype="uint32"), 2**32 - 1),
    smallest_integer: (line(1, dtype="int32"), -(2**31)),
    wide_integers: (line(2, dtype="int32"), 2**31 - 1),
    eight_bits: (line(), 5),
    underflow: (line(), 5),
    prices: (line(49_999), 50_002),
    sign_of_zero: (line(1), -1),
    order_of_zeros: (line(1), -1),
    unsigned_start: (line(), 5),
    case_before_the_first: (line(), 5),
}


@pytest.mark.parametrize("fn", NO_PROOF, ids=lambda fn: fn.__name__)
def test_no_leak_of_these_kinds_is_proved(fn):
    x, last = NO_PROOF[fn]
    assert not proof(fn, x, np.tri(LINE, dtype=bool)).holds
    changed = x.at[-1].set(jnp.asarray(last, x.dtype))
    assert not np.array_equal(fn(x)[:-1], fn(changed)[:-1])


def test_what_nobody_can_know_is_no_constant():
    """A number that is drawn anew at each call, and the order of what is equal."""
    drawn = lambda x: jnp.where(jax.lax.rng_uniform(0, 2**30, ()) == 5, x[::-1], x)
    assert not proof(drawn, line(), np.tri(LINE, dtype=bool)).holds
    equal = jnp.zeros(LINE, jnp.int32), jnp.arange(LINE, dtype=jnp.int32)
    order = lambda stable: jax.lax.sort(equal, num_keys=1, is_stable=stable)[1]
    for stable in (True, False):
        moved = lambda x, stable=stable: x[order(stable)]
        assert proof(moved, line(), np.tri(LINE, dtype=bool)).holds == stable


@pytest.mark.parametrize("dtype", ("int32", "float32"))
def test_the_order_of_writes_is_no_constant(dtype):
    """Which of two updates of one place comes last, in whatever mode they meet, and what they give
    if they were said not to meet; a function that is applied may round.
    """
    at = lambda *places: jnp.zeros(3, dtype).at[jnp.array(places)]
    two = jnp.arange(1, 3)
    anyhow = {
        "repeated": lambda: at(1, 1).set(two.astype(dtype)),
        "clipped": lambda: at(2, 7).set(two.astype(dtype), mode="clip"),
        "promised": lambda: at(1, 1).set(two.astype(dtype), mode="promise_in_bounds"),
        "unique": lambda: at(1, 1).add(two.astype(dtype), unique_indices=True),
        "applied": lambda: at(1).apply(lambda a: jnp.exp(a + 1).astype(a.dtype)),
    }
    settled = {
        "apart": lambda: at(1, 2).set(two.astype(dtype)),
        "dropped": lambda: at(5, 7).set(two.astype(dtype), mode="drop"),
        "equal": lambda: at(1, 1).set(two[0].astype(dtype)),
    }
    if dtype == "int32":  # of floats the proof knows none
        settled["largest"] = lambda: at(1, 1).max(two.astype(dtype))
    for name, make in (anyhow | settled).items():
        fn = lambda x, make=make: jnp.where((make() < 9).all() | (x[::-1] > 0), x, x[::-1])
        assert proof(fn, line(), np.tri(LINE, dtype=bool)).holds == (name in settled), name


def test_what_was_assumed_of_scores_is_looked_at():
    """With scores a hundred times as small the same function is proved, as far as these go."""
    report = check_causal(masked_prices, line(50_000), prove=True)
    assert "In " in report.obstacles[0] and "test_proof.py:" in report.obstacles[0]
    assert "scores that meet a mask of" in report.obstacles[0]
    small = check_causal(masked_prices, line(1, -2), prove=True)
    assert small.status == "proved" and small.assumptions


@pytest.mark.slow
def test_scores_are_looked_at_inside_of_loops():
    """Each row is masked in a step of its own, in a branch."""

    def row(x, t):
        masked = lambda: jnp.where(jnp.arange(LINE) <= t, x, x - 50_000.0)
        return jax.nn.softmax(jax.lax.cond(t >= 0, masked, lambda: x)) @ (x / 50_000)

    def fn(x):
        return jax.lax.scan(lambda c, t: (c, row(x, t)), 0, jnp.arange(LINE))[1]

    report = check_causal(fn, line(50_000), prove=True, splits=(3, 7))
    assert report.leak and "scores that meet a mask" in report.obstacles[0]
    assert check_causal(fn, line(1, -2), prove=True, splits=(3, 7)).status == "proved"


def test_the_platform_is_said():
    other = lambda x: x[::-1]
    fn = lambda x: jax.lax.platform_dependent(x, cpu=jnp.cumsum, default=other)
    report = check_causal(fn, line(), prove=True)
    assert report.status == "proved" and "holds on cpu" in report.assumptions[0]


def test_several_arrays_that_are_put_somewhere():
    put = lambda x: jax.device_put((x, 2 * x[::-1]))
    assert check_causal(lambda x: put(x)[0].cumsum(), line(), prove=True).status == "proved"
    assert check_causal(lambda x: put(x)[1], line(), prove=True).status == "leak"


@pytest.mark.slow
def test_a_loop_for_each_row():
    """Under `vmap` each row goes through as many steps as it says itself."""

    def sums(x, counts):
        one = lambda n: jax.lax.fori_loop(0, n, lambda i, c: c + x[i], 0.0)
        return jax.vmap(one)(counts)

    forward = lambda x: sums(x, jnp.arange(LINE) + 1)
    assert check_causal(forward, line(), prove=True).status == "proved"
    assert not proof(lambda x: sums(x, LINE - jnp.arange(LINE)), line(), np.tri(LINE) > 0).holds
    by_data = lambda x: sums(x, x.astype(jnp.int32))
    assert not proof(by_data, line(), np.tri(LINE) > 0).holds


# Refs


def write_backwards(x):
    ref = jax.new_ref(jnp.zeros_like(x))
    jax.ref.addupdate(ref, (...,), x[::-1])
    return x + ref[...]


def write_in_a_loop(x, sign=1.0):
    ref = jax.new_ref(jnp.zeros_like(x))

    def one(t, total):
        jax.ref.addupdate(ref, (t,), sign * x[t])
        return total

    jax.lax.fori_loop(0, len(x), one, 0)
    jax.lax.cond(x[0] < 9, lambda: jax.ref.addupdate(ref, (1,), sign * x[0]), lambda: None)
    return x + ref[...]


def test_refs():
    """The proof says that it does not follow them; the float64 re-run does."""
    found = proof(write_in_a_loop, line(), np.tri(LINE, dtype=bool))
    assert not found.holds and found.connected.all()
    assert "makes or uses a Ref" in found.obstacles[0] and "test_proof.py:" in found.obstacles[0]
    report = check_causal(write_backwards, line(), splits=(3, 7))
    assert report.leak and [*np.flatnonzero(report.leaking()[0])] == [LINE - 1]


@pytest.mark.slow
def test_refs_in_loops_and_branches_are_run_again():
    assert check_causal(write_in_a_loop, line(), prove=True).status == "clear"
    other = functools.partial(write_in_a_loop, sign=-1.0)
    assert check_same(write_in_a_loop, other, line()).status == "different"


def test_a_ref_from_outside_is_refused():
    ref = jax.new_ref(jnp.zeros(LINE))
    with refused(ValueError, "fn uses a jax.Ref that was made outside of it"):
        check_causal(lambda x: x + ref[...], line())


# Parameters


HELD, ENTRIES = np.float32(0), np.zeros(2, np.float32)


@pytest.mark.parametrize("gate", (np.zeros(()), slow(np.float32(0)), slow(np.float64(0))))
def test_whose_array_a_parameter_is_does_not_matter(gate):
    module, params = Gated(gate), {"gate": gate}
    for fn in (
        lambda x: x + gate * x.sum(),
        functools.partial(lambda params, x: x + params["gate"] * x.sum(), params),
        lambda x: module(x[:, None]),
        lambda x: x + HELD * x.sum(),
    ):
        report = check_causal(fn, line(), prove=True, splits=(3,), pointwise=True)
        assert not report.status == "proved"


def added_one_by_one(gates):
    return lambda x: functools.reduce(lambda y, gate: y + gate * x.sum(), gates, x)


@pytest.mark.parametrize(
    "fn",
    [
        added_one_by_one(np.zeros(2)),
        lambda x: x + ENTRIES[1] * x.sum(),
        slow(added_one_by_one(jax.device_get([jnp.zeros(())]))),
        slow(added_one_by_one(collections.deque([np.zeros(())]))),
        slow(added_one_by_one(np.array([np.float32(0), None])[:1])),
    ],
)
def test_an_entry_of_a_numpy_array_is_a_parameter(fn):
    """Python takes it out before JAX sees it, and it stands in the trace as a number would."""
    report = check_causal(fn, line(), prove=True, splits=(3,), pointwise=True)
    assert not report.status == "proved"


class Slotted:
    __slots__ = "gate"

    def __init__(self):
        self.gate = np.zeros(())


class Mixing(Slotted):
    __slots__ = ()

    def __call__(self, x):
        return x + self.gate * x.sum()


class Helped:
    def __call__(self, x):
        return x + self.mixed(x)

    def mixed(self, x):
        return HELD * x.sum()


class ByProperty(Helped):
    def mixed(self, x):
        return self.gate * x.sum()

    @property
    def gate(self):
        return HELD


class ByVariable(nnx.Module):
    def __init__(self):
        self.gate = nnx.Param(np.zeros(()))

    def __call__(self, x):
        return x + self.gate[...] * x.sum()


@pytest.mark.parametrize("module", [Mixing, Helped, slow(ByProperty), slow(ByVariable)])
def test_a_numpy_scalar_is_found_wherever_an_object_has_it(module):
    """In slots, in what a method looks up, in variables of other libraries."""
    report = check_causal(module(), line(), prove=True, splits=(3,), pointwise=True)
    assert not report.status == "proved"


def test_what_numpy_arrays_hold_takes_nothing_from_a_proof():
    """Zeros among them, where the program needs zeros of its own."""
    weights, mask = np.zeros((LINE, LINE), np.float32), np.tri(LINE, dtype=bool)
    fn = lambda x: jnp.where(mask, jnp.outer(x, x) + weights, 0.0) @ x
    assert check_causal(fn, line(), prove=True).status == "proved"


def test_a_numpy_scalar_that_is_fixed_is_a_parameter():
    x = {"x": line(), "gate": np.float32(0)}
    fn = lambda x: x["x"] + x["gate"] * x["x"].sum()
    report = check_causal(fn, x, prove=True, splits=(3,), pointwise=True, fixed="gate")
    assert not report.status == "proved"


def test_a_numpy_scalar_takes_nothing_from_a_proof():
    """A temperature and a gate of zero, beside a mask that needs zeros of the program."""
    heat, gate = np.float32(2), np.zeros(())

    def fn(x):
        scores = jax.nn.softmax(jnp.outer(x, x) / heat, where=jnp.tri(LINE, dtype=bool))
        return scores @ x + gate * x

    assert check_causal(fn, line(), prove=True).status == "proved"


class Gated(eqx.Module):
    """Adds the mean of all positions, times a gate."""

    gate: jax.Array

    def __call__(self, x):
        return x + self.gate * x.mean(0, keepdims=True)


@pytest.mark.parametrize("gate", (jnp.zeros(()), jnp.zeros((1, 4)), jnp.zeros((LENGTH, 4))))
def test_a_zero_parameter_counts_as_any_number(gate):
    assert not proof(Gated(gate), floats(), CAUSAL).holds


def test_a_zero_of_the_program_is_a_zero():
    mask = jnp.tri(LENGTH, dtype=bool)
    assert proof(lambda x: mask.astype(x.dtype) @ x, floats(), CAUSAL).holds
    assert proof(lambda x: x + 0.0 * x[::-1], floats(), CAUSAL).holds


def test_a_float_mask_that_is_held_is_a_parameter():
    """Of which any finite values are asked for; -inf is none."""
    held = jnp.tri(LENGTH)
    assert not proof(lambda x: held @ x, floats(), CAUSAL).holds
    infinite = jnp.where(jnp.tri(LENGTH, dtype=bool), 0, -jnp.inf)
    assert proof(lambda x: jax.nn.softmax(x @ x.T + infinite) @ x, floats(), CAUSAL).holds


# Loops


def test_a_carry_is_known_by_position():
    assert proof(zoo.rnn_scan, floats(), CAUSAL).holds


def test_a_long_loop_is_gone_through_to_a_fixed_point(monkeypatch):
    """Where every step may read every input: sound, and no longer exact."""
    monkeypatch.setattr("eqx_norms.causality._proof._control._STEPS", 10)
    found = proof(zoo.rnn_scan, floats(), CAUSAL)
    assert not found.holds and found.connected.all()
    independent = lambda x: jax.lax.scan(lambda c, a: (c + a, None), x[:, 0] * 0, x.T)[0]
    assert proof(independent, floats(), np.eye(LENGTH, dtype=bool)).holds


def test_an_unknown_operation_connects_everything():
    def fn(x):
        return jax.pure_callback(lambda a: a, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    found = proof(fn, floats(), CAUSAL)
    assert found.connected.all()
    [obstacle] = found.obstacles
    assert obstacle.startswith("`pure_callback`, which the proof has no rule for, in ")
    assert "test_proof.py:" in obstacle


def test_a_reduction_of_one_s_own_reads_what_it_reduces():
    """Its jaxpr is of two entries: to go through it as a call would take positions for one."""
    own = lambda a, b: a + b + a * b
    sums = lambda x: jnp.broadcast_to(jax.lax.reduce(x, 0.0, own, (0,)), x.shape)
    rows = lambda x: jax.lax.reduce_window(x, 0.0, own, (1, 2), (1, 2), "SAME").repeat(2, 1)
    assert proof(sums, floats(), CAUSAL).connected.all()
    assert proof(rows, floats(), np.eye(LENGTH, dtype=bool)).holds


def state_space_dual(x):
    """Mamba-2's, as one contraction: the order in which it is taken is einsum's own."""
    return jnp.einsum("ts,tk,sk,sd->td", jnp.tri(LENGTH), x, x, x)


def rotated(x):
    pairs = x.reshape(LENGTH, -1, 2)
    return jnp.stack([-pairs[..., 1], pairs[..., 0]], -1).reshape(x.shape).cumsum(0)


def triangular(x):
    """Whose upper triangle is there, and is not looked at."""
    matrix = jnp.eye(LENGTH) + x @ x.T
    return jax.lax.linalg.triangular_solve(matrix, x, left_side=True, lower=True)


def gaussian_process(x):
    return jnp.linalg.cholesky(x @ x.T + jnp.eye(LENGTH)) @ x


def noise_of_each(x):
    keys = jr.split(jr.key(0), LENGTH)
    return jnp.cumsum(x + jax.vmap(lambda key: jr.normal(key, (4,), jnp.float32))(keys), 0)


def product_of_two(x):
    return jax.lax.reduce_window(x, 1.0, jax.lax.mul, (2, 1), (1, 1), [(1, 0), (0, 0)])


def experts(x):
    return jax.lax.ragged_dot(x, jnp.ones((2, 4, 4)), jnp.array([5, LENGTH - 5])).cumsum(0)


def row_by_row(x):
    return jnp.stack([row * 2 for row in x]).cumsum(0)


def initialised_inside(x):
    """A parameter that fn itself draws, as Flax and Haiku do: a constant."""
    weight = jax.nn.initializers.lecun_normal()(jr.key(0), (4, 4), x.dtype)
    return jnp.tri(LENGTH, dtype=x.dtype) @ (x @ weight)


def best_experts(x):
    """Where in the row of a token its weights lie, the input decides; in which row, it does not."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(x), 2)
    gates = jnp.zeros_like(x).at[jnp.arange(LENGTH)[:, None], chosen].set(weights)
    return jnp.cumsum(gates * x, 0)


def documents(x):
    """That are found in the input: each reads itself at least, which makes all scores finite."""
    number = jnp.cumsum(x[:, 0] > 1)
    mine = (number[:, None] == number[None]) | jnp.eye(LENGTH, dtype=bool)
    mask = jnp.tri(LENGTH, dtype=bool) & mine
    return jax.nn.softmax(jnp.where(mask, x @ x.T, -jnp.inf)) @ x


def linear(x):
    """A function that brings its own transpose."""
    back = lambda _, g: jax.lax.cumsum(g, reverse=True)
    return linear_call(lambda _, y: jnp.cumsum(y, 0), back, (), x)


def delta_rule(x):
    """The matrix of a chunk of DeltaNet: the inverse of a triangle, whose zeros are known."""
    inverse = jax.scipy.linalg.solve_triangular(
        jnp.eye(LENGTH) + jnp.tril(x @ x.T, -1), jnp.eye(LENGTH), lower=True
    )
    return inverse @ x


def rows_of_a_triangle(x):
    """The same, row by row: what is written into a triangle leaves the rest as it was."""
    matrix = -jnp.tril(x @ x.T, -1)
    for i in (1, 2, LENGTH - 1):
        row = matrix[i, :i] + matrix[i] @ matrix[:, :i]
        matrix = matrix.at[i, :i].set(row)
    return (matrix + jnp.eye(LENGTH)) @ x


def gated_over_time(x):
    """gMLP's, whose weights are the entries of a triangle."""
    weights = jr.normal(jr.key(0), (LENGTH * (LENGTH + 1) // 2,), x.dtype)
    return jnp.zeros((LENGTH, LENGTH), x.dtype).at[np.tril_indices(LENGTH)].set(weights) @ x


def matrices(x):
    """One for each position: solved, decomposed and its determinant taken."""
    each = jnp.eye(4)[None] + x[:, :, None] * x[:, None]
    solved = jnp.linalg.solve(each, x[..., None])[..., 0]
    solved = solved + jnp.linalg.qr(each)[0].sum(-1) + jnp.linalg.det(each)[:, None]
    return jnp.cumsum(solved, 0)


def binned(x):
    """In JAX 0.12 jnp.searchsorted is an operation of jax.experimental.hijax."""
    return jnp.cumsum(jnp.searchsorted(jnp.linspace(-1, 1, 8), x), 0)


STRUCTURES = (delta_rule, rows_of_a_triangle, gated_over_time, matrices, binned)
STRUCTURES += (state_space_dual, rotated, triangular, gaussian_process, noise_of_each)
STRUCTURES += (product_of_two, experts, row_by_row, initialised_inside)
STRUCTURES += (best_experts, documents, linear)


def solved_the_other_way(x):
    inverse = jnp.eye(LENGTH) + jnp.triu(x @ x.T, 1)
    return jax.scipy.linalg.solve_triangular(inverse, jnp.eye(LENGTH)) @ x


def written_above(x):
    return jnp.tril(x @ x.T).at[0, 1].set(1.0) @ x


def added_above(x):
    return jnp.tril(x @ x.T).at[0, 1].add(1.0) @ x


def written_twice(x):
    """Of 0 and 1 either may be the last."""
    return jnp.zeros((LENGTH,) * 2).at[np.array([0, 0]), np.array([1, 1])].set(np.arange(2.0)) @ x


def written_anywhere(x):
    return jnp.tril(x @ x.T).at[0, jnp.argmax(x[0])].set(1.0) @ x


def solved_together(x):
    """One matrix of all positions, and pivots of it."""
    return jnp.linalg.solve(jnp.eye(LENGTH) + jnp.tril(x @ x.T), x)


NO_ZEROS = (solved_the_other_way, written_above, added_above, written_twice, written_anywhere)


@pytest.mark.parametrize("fn", (*NO_ZEROS, solved_together), ids=lambda fn: fn.__name__)
def test_where_there_are_no_zeros_nothing_is_proved(fn):
    assert not proof(fn, floats(), CAUSAL).holds


@pytest.mark.parametrize("fn", STRUCTURES, ids=lambda fn: fn.__name__)
def test_what_people_write_is_proved(fn):
    """And turned around in time it is not."""
    assert proof(fn, floats(), CAUSAL).holds
    assert not proof(lambda x: fn(x[::-1])[::-1], floats(), CAUSAL).holds


def one_hot_slots(x):
    """Which expert, which slot of its three, and the number of the slot, as Switch's are."""
    chosen = (x[:, 0] > 0).astype(jnp.int32)
    mine = jax.nn.one_hot(chosen, 2, dtype=jnp.int32)
    return chosen, mine, (jnp.cumsum(mine, 0) * mine).sum(1) - 1


def scattered(x):
    chosen, _, slot = one_hot_slots(x)
    slots = jnp.zeros((2, 3, 4), x.dtype).at[chosen, slot].set(x, mode="drop")
    return jnp.where((slot < 3)[:, None], jnp.tanh(slots)[chosen, jnp.clip(slot, 0, 2)], 0)


def dispatched(x):
    _, mine, slot = one_hot_slots(x)
    mask = mine[..., None] * jax.nn.one_hot(slot, 3, dtype=jnp.int32)[:, None]
    mask = mask.astype(x.dtype)
    slots = jnp.tanh(jnp.einsum("tec,td->ecd", mask, x))
    return jnp.einsum("tec,ecd->td", mask, slots)


@pytest.mark.parametrize("fn", (scattered, dispatched), ids=lambda fn: fn.__name__)
def test_experts_with_a_capacity_are_left_to_the_edits(fn):
    """Who is in a slot, the numbers decide. What is structure is that examples are apart."""
    found = proof(fn, floats(), CAUSAL)
    assert not found.holds and "test_proof.py:" in found.obstacles[0]
    assert ("the input decides where" in found.obstacles[0]) == (fn is scattered)
    examples = jnp.stack([floats(), -floats()])
    assert proof(jax.vmap(fn), examples, np.eye(2, dtype=bool)).holds


@pytest.mark.slow
def test_a_draw_that_looks_at_keys_as_a_whole_is_a_constant_as_well():
    drawn = lambda x: jnp.cumsum(x * jr.gamma(jr.key(0), 2, (1, 4), x.dtype), 0)
    assert proof(drawn, floats(), CAUSAL).holds


def test_a_solve_with_what_may_be_no_number_reads_everything():
    """Zero times NaN is NaN, in whatever block of the triangle it lies."""
    hole = jnp.where(jnp.tri(LENGTH, dtype=bool), 0, jnp.nan)
    solve = lambda a, x: jax.lax.linalg.triangular_solve(a, x, left_side=True, lower=True)
    assert proof(lambda x: solve(x @ x.T + hole, x), floats(), CAUSAL).connected.all()
    factor = lambda x: jax.lax.linalg.cholesky(x @ x.T + hole)
    assert proof(factor, floats(), CAUSAL).connected.all()


def test_what_is_sharded_otherwise_is_the_same():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spread = jax.sharding.PartitionSpec(None, "data")
    with jax.set_mesh(mesh):
        assert proof(lambda x: jax.sharding.reshard(x, spread).cumsum(0), floats(), CAUSAL).holds


# Models


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        one, two = jr.split(key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=one)
        self.mlp = eqx.nn.MLP(8, 8, 16, 1, key=two)
        self.norm = eqx.nn.LayerNorm(8)

    def __call__(self, x, mask):
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y, mask)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))


def decoder(blocks, embedding, ids, masked):
    mask = jnp.tri(len(ids), dtype=bool) if masked else None
    x = jax.vmap(embedding)(ids)
    for block in blocks:
        x = block(x, mask)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("masked", (True, False))
def test_a_decoder(getkey, masked):
    blocks = [Block(getkey()) for _ in range(2)]
    embedding = eqx.nn.Embedding(16, 8, key=getkey())
    fn = functools.partial(decoder, blocks, embedding, masked=masked)
    found = proof(fn, tokens(), CAUSAL)
    assert found.holds == masked
    assert found.connected.all() != masked
    if not masked:  # the product of probabilities and values, in each layer
        assert [o.split()[0] for o in found.obstacles] == ["`dot_general`"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", (eqx.nn.GRUCell, pytest.param(eqx.nn.LSTMCell, marks=pytest.mark.slow))
)
def test_cells(getkey, cell):
    cell = cell(4, 5, key=getkey())
    lstm = isinstance(cell, eqx.nn.LSTMCell)
    start = (jnp.zeros(5), jnp.zeros(5)) if lstm else jnp.zeros(5)

    def run(x):
        one = lambda h, row: 2 * (cell(row, h),)
        out = jax.lax.scan(one, start, x)[1]
        return out[0] if lstm else out

    assert proof(run, floats(), CAUSAL).holds
    assert not proof(lambda x: run(x[::-1])[::-1], floats(), CAUSAL).holds


@pytest.mark.slow
def test_a_convolutional_net(getkey):
    one, two = (eqx.nn.Conv1d(4, 4, 3, padding=[(2, 0)], key=getkey()) for _ in range(2))
    causal = lambda x: two(jax.nn.relu(one(x.T))).T
    assert proof(causal, floats(), CAUSAL).holds
    centred = eqx.nn.Conv1d(4, 4, 3, padding=1, key=getkey())
    assert not proof(lambda x: centred(x.T).T, floats(), CAUSAL).holds


@pytest.mark.slow
@pytest.mark.parametrize("masked", (True, False))
def test_the_attention_of_jax(masked):
    """Of a batch, with two heads that share a head of keys and values, and its window."""
    keys = [floats("float32", 2, LENGTH, heads, 4) for heads in (2, 1, 1)]

    def run(x):
        with jax.numpy_dtype_promotion("standard"):  # jax.nn's own code needs it
            parts = [jnp.einsum("btd,bthd->bthd", x, key) for key in keys]
            window = (2, 0) if masked else None
            return jax.nn.dot_product_attention(*parts, is_causal=masked, local_window_size=window)

    report = check_causal(run, floats("float32", 2, LENGTH, 4), axis=1, prove=True)
    assert report.status == ("proved" if masked else "leak")
    near = np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)) <= 2
    if masked:  # all else is known to have no effect
        assert np.array_equal(np.isnan(report.matrix), CAUSAL & near)


@pytest.mark.slow
def test_what_a_kernel_masks_is_not_read():
    """A convolution of three taps on either side is causal where its later ones are zero."""
    kernel = floats("float32", 4, 4, 5)
    layout = ("NCH", "OIH", "NCH")

    def run(x, mask):
        masked = jnp.where(mask, kernel, 0)
        out = jax.lax.conv_general_dilated(x.T[None], masked, (1,), "SAME", (1,), (1,), layout)
        return out[0].T

    assert proof(functools.partial(run, mask=np.arange(5) < 3), floats(), CAUSAL).holds
    assert not proof(functools.partial(run, mask=np.arange(5) < 4), floats(), CAUSAL).holds


@pytest.mark.slow
@pytest.mark.parametrize("masked", (True, False))
def test_a_flax_transformer(masked):
    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(16, 8)(ids)
            mask = nn.make_causal_mask(ids) if masked else None
            for _ in range(2):
                x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
                x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
            return x

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = Transformer()
        params = model.init(jr.key(seed(0)), tokens())
        assert proof(lambda ids: model.apply(params, ids), tokens(), CAUSAL).holds == masked


@pytest.mark.slow
@pytest.mark.parametrize("masked", (True, False))
def test_a_haiku_transformer(masked):
    def transformer(ids):
        x = hk.Embed(16, 8)(ids)
        mask = jnp.tri(len(ids), dtype=bool)[None] if masked else None
        for _ in range(2):
            y = hk.LayerNorm(-1, True, True)(x)
            init = hk.initializers.VarianceScaling()
            x = x + hk.MultiHeadAttention(2, 4, w_init=init)(y, y, y, mask=mask)
            x = x + hk.nets.MLP([16, 8], activation=jax.nn.gelu)(hk.LayerNorm(-1, True, True)(x))
        return x

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = hk.without_apply_rng(hk.transform(transformer))
        params = model.init(jr.key(seed(0)), tokens())
        assert proof(lambda ids: model.apply(params, ids), tokens(), CAUSAL).holds == masked


# Through the checks


def test_the_report_of_a_proof():
    report = assert_causal(zoo.rnn_scan, floats(), prove=True)
    assert report.status == "proved" and not report.leak and report.edits == 0
    assert np.array_equal(report.matrix == 0, ~CAUSAL) and report.matrix.shape == CAUSAL.shape
    assert str(report).startswith("proved: no output reads a later position.\nFor every finite")
    assert not report.pairs() and report.splits == ()


def test_the_report_names_what_was_assumed():
    masked = functools.partial(attention, MASKS["number"])
    report = check_causal(masked, floats(), prove=True)
    assert report.assumptions[0] in str(report) and "-1e+09" in report.assumptions[0]
    report = check_causal(masked, floats(), prove=True, assume_bounded=False)
    assert report.status == "clear" and report.obstacles


def test_without_a_proof_the_edits_decide():
    report = check_causal(zoo.fft_convolution, floats(), prove=True)
    assert report.status == "clear (float noise)" and report.edits
    assert "Not proved: `fft` in " in str(report)
    assert check_causal(zoo.later, floats(), prove=True).status == "leak"


def test_a_proof_can_be_required():
    with pytest.raises(CausalityError, match="Not proved: `fft` in "):
        assert_causal(zoo.fft_convolution, floats(), prove="required")
    assert assert_causal(zoo.rnn_scan, floats(), prove="required").status == "proved"
    with refused(ValueError, 'prove must be True, False or "required", got 3'):
        assert_causal(zoo.rnn_scan, floats(), prove=3)


def test_independence_is_proved():
    report = assert_independent(zoo.mapped_norm, floats("float32", 6, LENGTH, 4), prove=True)
    assert report.status == "proved" and "no output reads another example" in str(report)


def test_strict_causality_is_proved():
    assert assert_causal(zoo.shifted_right, floats(), strict=True, prove=True).status == "proved"


def test_other_axes_and_several_arrays():
    x = {"a": floats("float32", 3, LENGTH, 2), "b": tokens()[None]}
    fn = lambda x: jnp.cumsum(x["a"], 1) * jnp.cumsum(x["b"], 1)[..., None].astype("float32")
    assert check_causal(fn, x, axis=1, prove=True).status == "proved"
    fixed = check_causal(
        lambda x: jnp.cumsum(x["a"], 1) + x["b"].sum().astype("float32"),
        x,
        axis=1,
        fixed="b",
        prove=True,
    )
    assert fixed.status == "proved"


def test_zero_parameters_are_not_proved():
    """Found by the proof without `perturb_params`, which the edits need."""
    report = check_causal(zoo.ZeroInitialisedBranch(4), floats(), prove=True, pointwise=True)
    assert report.status == "clear" and report.obstacles


@pytest.mark.parametrize("norm", (LayerNorm(4), RMSNorm(4), GroupNorm(2, 4)))
def test_our_norms_are_proved(norm):
    per_token = lambda x: jax.vmap(norm)(x).cumsum(0)
    assert check_causal(per_token, floats(), prove=True).status == "proved"


@pytest.mark.slow
def test_our_norm_over_everything_is_not():
    leaking = check_causal(LayerNorm((LENGTH, 4)), floats(), prove=True)
    assert leaking.leak
