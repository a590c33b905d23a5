"""The causality check against functions whose leaks are known.

The oracle is the zoo: every function there says by its place what the answer is.
"""

import functools
import inspect
import itertools
import re

import causality_zoo as zoo
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed
from refused import refused
from slow import slow

from eqx_norms.causality import (
    CausalityError,
    CausalityReport,
    CausalityWarning,
    assert_causal,
    assert_independent,
    check_causal,
    check_independent,
    dependency_matrix,
)
from eqx_norms.causality._edits import Edit, make_editor
from eqx_norms.causality._inputs import Problem
from eqx_norms.causality._judge import Judge
from eqx_norms.causality._probe import Changes, Probe
from eqx_norms.causality._widen import trace

T, D = 8, 4
DTYPES = ("float32", "bfloat16", "float64")
OTHERS = DTYPES[1:]
# In bfloat16 these change not one bit of an output that is not near zero: there is nothing to see.
BELOW_BFLOAT16 = ("one_millionth", "one_millionth_through_float32")


def cases(functions, dtypes=DTYPES, slow=()):
    """Every function in every dtype; if some are `slow`, so are two functions of three."""
    quick = [*functions][:: 3 if slow else 1]
    mark = lambda name, dtype: pytest.mark.slow if dtype in slow or name not in quick else ()
    pairs = itertools.product(functions.items(), dtypes)
    return [pytest.param(f, d, id=f"{n}-{d}", marks=mark(n, d)) for (n, f), d in pairs]


def words(report):
    """The text of a report on one line."""
    return " ".join(str(report).split())


def floats(dtype, *shape):
    return normal(jr.key(seed(1)), shape, jnp.float32).astype(dtype)


@pytest.fixture
def x():
    return floats("float32", T, D)


@pytest.fixture
def tokens():
    # No 0, which the zoo's functions take for padding: only an edit can bring one in.
    return jr.randint(jr.key(seed(2)), (T,), 1, 16)


def test_the_zoo_is_large_enough():
    zoos = (zoo.CAUSAL, zoo.CAUSAL_TOKENS, zoo.STRICT, zoo.INDEPENDENT)
    leaks = (zoo.LEAKY, zoo.LEAKY_TOKENS, zoo.NOT_STRICT, zoo.BATCH_LEAKS)
    assert sum(map(len, zoos)) >= 15 and sum(map(len, leaks)) >= 22


@pytest.mark.parametrize("fn, dtype", cases(zoo.CAUSAL, slow=OTHERS))
def test_no_false_alarm(fn, dtype):
    with jax.enable_x64(dtype == "float64"):
        report = check_causal(fn, floats(dtype, T, D), pointwise=fn.__name__ in zoo.POINTWISE)
    assert not report.leak, str(report)
    assert report.pairs() == [] and report.pointwise is (fn.__name__ in zoo.POINTWISE)


@pytest.mark.parametrize("fn, dtype", cases(zoo.LEAKY, slow=OTHERS))
def test_leak_is_found_and_located(fn, dtype):
    seen = not (dtype == "bfloat16" and fn.__name__ in BELOW_BFLOAT16)
    with jax.enable_x64(dtype == "float64"):
        x = floats(dtype, T, D)
        report = check_causal(fn, x if seen else x + jnp.sign(x), pointwise=not seen)
    assert report.leak is seen, str(report)
    assert bool(report.pairs()) is seen
    assert all(pair.input > pair.output and pair.change > 0 for pair in report.pairs())
    assert report.joint is (fn.__name__ == "count_over_a_threshold")


@pytest.mark.slow
@pytest.mark.parametrize("fn", zoo.CAUSAL_TOKENS.values(), ids=zoo.CAUSAL_TOKENS)
def test_no_false_alarm_on_tokens(fn, tokens):
    report = check_causal(fn, tokens, pointwise=fn.__name__ in zoo.POINTWISE)
    assert not report.leak, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("fn", zoo.LEAKY_TOKENS.values(), ids=zoo.LEAKY_TOKENS)
def test_token_leak_is_found(fn, tokens):
    assert check_causal(fn, tokens).leak


@pytest.mark.parametrize("fn, dtype", cases(zoo.STRICT, slow=OTHERS))
def test_strict_model_passes(fn, dtype):
    with jax.enable_x64(dtype == "float64"):
        report = check_causal(fn, floats(dtype, T, D), strict=True)
    assert not report.leak, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("fn", zoo.NOT_STRICT.values(), ids=zoo.NOT_STRICT)
def test_own_entry_is_a_leak_only_under_strict(fn, x):
    assert not check_causal(fn, x).leak
    report = check_causal(fn, x, strict=True)
    assert report.leak
    assert all(pair.input == pair.output for pair in report.pairs())


@pytest.mark.slow
@pytest.mark.parametrize("fn, dtype", cases(zoo.INDEPENDENT, slow=OTHERS))
def test_independent_examples_pass(fn, dtype):
    with jax.enable_x64(dtype == "float64"):
        report = check_independent(fn, floats(dtype, 4, 5, D))
    assert not report.leak, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("fn", zoo.BATCH_LEAKS.values(), ids=zoo.BATCH_LEAKS)
def test_batch_leak_is_found(fn):
    with pytest.raises(CausalityError, match=r"^leak: an output reads another example\."):
        assert_independent(fn, floats("float32", 4, 5, D))


def test_zero_initialised_branch_needs_perturb_params(x):
    model = zoo.ZeroInitialisedBranch(D)
    with pytest.warns(CausalityWarning, match="if a branch starts at zero, .* perturb_params=0.02"):
        report = check_causal(model, x)
    assert not report.leak and report.pointwise
    assert "No output reads another position along axis 0, 8 positions" in words(report)
    assert "perturb_params=0.02" in str(report)
    report = check_causal(model, x, perturb_params=0.02)
    assert report.leak
    assert "Noise of size 0.02 was added to the parameters." in str(report)


def test_mixing_model_gets_no_advice_about_zero_initialisation(x):
    assert "perturb_params" not in str(check_causal(zoo.rnn_scan, x))


def test_leak_of_an_id_that_only_token_values_names(tokens):
    padding = lambda t: zoo.embed(t) + (t == 40).any().astype(jnp.float32)
    assert not check_causal(padding, tokens, pointwise=True).leak
    report = check_causal(padding, tokens, token_values=(40,))
    assert report.leak
    assert "Tokens were drawn from 0 to 40, as found in x and token_values." in str(report)


def test_report_says_where_the_largest_id_comes_from(tokens):
    largest = int(tokens.max())
    expected = f"Tokens were drawn from 0 to {largest}, as found in x; token_values= adds ids."
    assert expected in check_causal(zoo.token_rnn, tokens).notes


# The edits


def test_floats_are_edited_at_every_scale_and_with_both_signs(x):
    leaf = np.asarray(x)
    editor = make_editor((leaf,), (0,), (1.0, 10.0), None, None)
    where = np.arange(T) >= 3
    assert editor.kinds == 6
    for kind, (scale, sign) in enumerate([(1, -1), (1, 1), (10, -1), (10, 1)], start=1):
        (edited,) = editor.apply(Edit(where, kind, seed=kind))
        assert np.array_equal(edited[:3], leaf[:3])
        assert np.array_equal(np.sign(edited[3:]), sign * np.sign(leaf[3:]))
        # The mean of 20 magnitudes of a normal, 0.8, within a factor of 2.
        assert 0.4 < np.abs(edited[3:]).mean() / scale / np.sqrt(np.mean(leaf**2)) < 1.6
    (zeros,) = editor.apply(Edit(where, 5, seed=5))
    assert np.array_equal(zeros[:3], leaf[:3]) and not zeros[3:].any()
    mixed = np.concatenate([editor.apply(Edit(where, 0, seed))[0][3:] for seed in range(20)])
    assert 0.3 < (mixed > 0).mean() < 0.7
    assert (np.abs(mixed).max(1) < 4).any() and (np.abs(mixed).max(1) > 8).any()


def test_edits_stay_finite_and_in_their_dtype():
    for dtype, largest in (("float16", 6e4), ("float32", 3e38), ("float64", 1e308)):
        leaf = np.full((T, D), largest, dtype)
        editor = make_editor((leaf,), (0,), (1.0, 100.0), None, None)
        for kind in range(editor.kinds):
            (edited,) = editor.apply(Edit(np.ones(T, bool), kind, seed=kind))
            assert edited.dtype == leaf.dtype and np.isfinite(edited).all()


def test_tokens_are_edited_by_special_ids_and_by_others(tokens):
    leaf = np.asarray(tokens)
    editor = make_editor((leaf,), (0,), (1.0,), (20, 40), None)
    everywhere = np.ones(T, bool)
    pure = [editor.apply(Edit(everywhere, kind, kind))[0] for kind in range(1, editor.kinds)]
    filled = [row[0] for row in pure if (row == row[0]).all()]
    assert filled == [20, 40, 0, leaf[-1]]
    for row in pure[len(filled) :]:
        assert (row != leaf).all() and row.min() >= 0 and row.max() <= 40


# The judge


@pytest.mark.slow
def test_noise_is_called_noise(x):
    report = assert_causal(zoo.prefix_sum_as_total_minus_suffix, x)
    assert report.status == "clear (float noise)"
    assert 0 < report.worst < report.noise == pytest.approx(64 * 2**-23 * report.scale)
    leak = check_causal(zoo.target_not_shifted, x)
    assert leak.worst > leak.noise == pytest.approx(64 * 2**-23 * leak.scale)
    assert str(report).startswith("clear (float noise): no output reads a later position")


def test_no_noise_is_called_clear(x):
    report = assert_causal(zoo.rnn_scan, x)
    assert (report.status, report.worst, report.leak) == ("clear", 0.0, False)


def test_leak_below_the_noise_is_told_by_float64(x):
    report = check_causal(zoo.one_millionth, x)
    assert report.leak
    assert "does not shrink in float64: it is a leak" in words(report)
    report = check_causal(zoo.one_millionth, x, confirm_x64=False)
    assert report.status == "clear (float noise)"
    assert "(confirm_x64=False)" in str(report)


def test_noise_ulps_moves_the_threshold(x):
    noisy = zoo.prefix_sum_as_total_minus_suffix
    assert check_causal(noisy, x, noise_ulps=0, confirm_x64=False).leak
    assert not check_causal(noisy, x, noise_ulps=64, confirm_x64=False).leak


def test_casts_inside_are_reported(x):
    report = check_causal(zoo.bfloat16_inside, x)
    assert "it computes in bfloat16 and float32" in str(report)
    assert not report.notes == check_causal(zoo.rnn_scan, x).notes


def test_an_operation_without_a_float64_form_is_reported(x):
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    noisy = zoo.prefix_sum_as_total_minus_suffix
    host = lambda v: np.asarray(v) * np.float32(1)
    report = check_causal(lambda x: noisy(jax.pure_callback(host, shape, x)), x)
    assert report.status == "clear (float noise)"


@pytest.mark.slow
def test_an_overflow_behind_a_mask_is_no_leak():
    # At 100 times the input the float16 scores overflow, and 0 * inf is NaN in the past as well.
    x = floats("float16", T, D)
    report = check_causal(zoo.softmax_attention_with_minus_1e9, x * 10, scales=(1.0, 1000.0))
    assert not report.leak, str(report)


def test_an_edit_outside_the_domain_is_no_leak(x):
    # The logarithm of a large negative edit is NaN, and 0 * NaN is NaN in the past as well.
    report = check_causal(lambda x: jnp.tri(T) @ jnp.log(x + 5), x)
    assert report.status == "clear"
    assert "edits overflowed inside the function and say less" in words(report)


def test_float64_has_rounding_of_its_own():
    # A change of a millionth of an ulp of float32 and of 5 ulps of float64: no leak, though it did
    # not shrink a thousandfold.
    def measured(edits, ulps):
        changes = np.array([[ulps if edit.where.any() else 0.0] for edit in edits])
        one = np.ones_like(changes)
        return Changes(changes, changes, one, one, one, changes < 0)

    class Measured(Probe):
        ulps = 1e-6

        def measure(self, edits, label=""):
            return measured(edits, self.ulps)

    editor = make_editor((np.ones(2),), (0,), (1.0,), None, None)
    closed = trace(lambda x: [x], [jnp.ones(2)])
    problem = Problem(zoo.rnn_scan, (), (0,), (0,), closed, ())
    edits = [Edit(np.array(where), 0, 0) for where in ([False, False], [False, True])]
    watch = np.array([[True], [True]])
    judge = Judge(problem, Measured(jnp.ones, editor, (0,), 2.0**-23, 8), 64, confirm_x64=True)
    vars(judge)["_second"] = Measured(jnp.ones, editor, (0,), 2.0**-52, 8)
    for Measured.ulps, leaks in ((5.0, False), (65.0, True)):
        assert judge.tell(edits, watch, measured(edits, 1e-6)).leaks.any() == leaks


def test_nan_in_the_past_alone_is_a_leak(x):
    poison = lambda x: x.at[0].set(jnp.where(x[5, 0] > 10, jnp.nan, x[0]))
    report = check_causal(poison, x)
    assert report.leak
    assert [(pair.output, pair.input) for pair in report.pairs()] == [(0, 5)]
    assert report.worst == np.inf


# Inputs and outputs of every form


@pytest.mark.slow
def test_dict_of_floats_and_tokens_with_two_outputs(x, tokens):
    def model(batch):
        h = zoo.rnn_scan(batch["x"]) + zoo.weights(jnp.float32, 16, D)[batch["tokens"]]
        return {"h": h, "next": h.argmax(1)}

    batch = {"x": x, "tokens": tokens}
    assert check_causal(model, batch).status == "clear"
    for name in batch:
        leaky = lambda b, name=name: model({**b, name: b[name][::-1]})
        assert check_causal(leaky, batch).leak, name


@pytest.mark.slow
def test_only_the_second_output_leaks(x):
    report = check_causal(lambda x: (zoo.rnn_scan(x), zoo.later(x)), x)
    assert {pair.input - pair.output for pair in report.pairs()} == {1}


@pytest.mark.slow
def test_a_small_output_is_judged_by_its_own_scale(x):
    # One thousandth of the noise level of the large output, a hundred thousand times its own.
    report = check_causal(lambda x: (zoo.rnn_scan(x) * 1e9, zoo.later(x)), x)
    assert report.leak and report.scale < 1e4


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis, out_axis", [(1, None), *(slow(*axes) for axes in [(-2, None), (1, 0), (-2, -3)])]
)
def test_axes(axis, out_axis):
    x = floats("float32", 2, T, D)
    moved = (lambda y: jnp.moveaxis(y, 1, 0)) if out_axis is not None else lambda y: y
    causal = lambda x: moved(jax.vmap(zoo.rnn_scan)(x))
    leaky = lambda x: moved(jax.vmap(zoo.target_not_shifted)(x))
    assert not check_causal(causal, x, axis=axis, out_axis=out_axis).leak
    report = check_causal(leaky, x, axis=axis, out_axis=out_axis)
    assert {pair.input - pair.output for pair in report.pairs()} == {1}
    assert report.matrix.shape == (T, T)


@pytest.mark.slow
def test_bool_and_complex_inputs(x):
    bits = x[:, 0] > 0
    assert check_causal(lambda b: b[::-1], bits).leak
    assert not check_causal(lambda b: b.astype(jnp.int32).cumsum(), bits).leak
    waves = jax.lax.complex(x, -x)
    assert check_causal(lambda z: jnp.abs(z[::-1]), waves).leak
    assert check_causal(lambda z: z.cumsum(0), waves).status == "clear"


def test_numpy_input_and_integer_output(x):
    assert check_causal(lambda x: jnp.sign(x[::-1]).astype(jnp.int8), np.asarray(x)).leak


def test_inputs_that_are_never_negative_stay_so(x):
    # The logarithm of a negative edit would be NaN in the past too, through 0 * NaN.
    logs = lambda x: jnp.tri(T) @ jnp.log(x)
    report = check_causal(logs, jnp.abs(x))
    assert report.status == "clear" and not any("overflowed" in note for note in report.notes)
    assert "Zeros in the place of x made outputs NaN or infinite, and say less." in report.notes


def test_strict_dtype_promotion_is_not_asked_of_the_user(x):
    with jax.numpy_dtype_promotion("standard"):
        mixed = lambda x: x.astype(jnp.bfloat16).cumsum(0) * zoo.weights(jnp.float32, D)[None]
        assert not check_causal(mixed, x).leak


def test_under_jit_inside_and_equinox_modules(x):
    norm = eqx.nn.LayerNorm((T, D))
    assert check_causal(eqx.filter_jit(norm), x).leak
    assert not check_causal(jax.jit(jax.vmap(eqx.nn.LayerNorm(D))), x, pointwise=True).leak


# Splits, keys, batches


@pytest.mark.slow
def test_all_splits_up_to_128_and_68_chosen_above():
    few, many = (assert_causal(zoo.running_max, floats("float32", t, 1)) for t in (128, 129))
    assert few.splits == tuple(range(1, 128))
    assert len(many.splits) == 68 and many.possible_splits == 128
    assert {1, 2, 4, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128} <= set(many.splits)
    # Each once, 8 edits that mix, and 7 of another input.
    assert "Tried 68 of 128 splits with 83 edited inputs." in str(many)


@pytest.mark.slow
def test_a_single_pair_of_a_long_sequence_is_located():
    pair = lambda x: x.at[100].add(x[257])
    report = check_causal(pair, floats("float32", 300, 1))
    assert [(p.output, p.input) for p in report.pairs()] == [(100, 257)]
    assert "were edited alone to locate the leak" in str(report)


def test_splits_can_be_named(x):
    single = lambda x: x.at[2].add(x[5])
    assert check_causal(single, x, splits=[3]).leak
    report = check_causal(single, x, splits=[2, 6, 7])
    assert not report.leak and report.splits == (2, 6, 7)
    # Split 2 covers no pair of an output below 2; the pair (2, 5) is covered by 3, 4 and 5 only.
    assert np.isnan(report.matrix[2, 5]) and report.matrix[1, 5] == 0


@pytest.mark.slow
def test_the_same_key_gives_the_same_report_legacy_keys_too(x):
    fn = zoo.norm_over_sequence_and_features
    one, two = (check_causal(fn, x, key=key) for key in (jr.key(seed(5)), jr.PRNGKey(seed(5))))
    other = check_causal(fn, x, key=jr.key(seed(6)))
    assert np.array_equal(one.matrix, two.matrix)
    assert not np.array_equal(one.matrix, other.matrix)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [3, slow(1), slow(200)])
def test_batch_size_does_not_matter(x, batch_size):
    fn = zoo.norm_over_sequence_and_features
    one, two = check_causal(fn, x), check_causal(fn, x, batch_size=batch_size)
    # Two executables may round differently, by an ulp of outputs of size 3.
    np.testing.assert_allclose(one.matrix, two.matrix, atol=1e-5)


def test_every_edit_runs_through_one_executable(x):
    traces = itertools.count()
    seen = []

    def fn(x):
        seen.append(next(traces))
        return zoo.rnn_scan(x)

    assert_causal(fn, x)
    # Once to look at it, once more to see that it stays the same, once to compile it.
    assert len(seen) == 3


# Guards


def test_function_of_global_numpy_randomness_is_refused(x):
    rng = np.random.default_rng(seed(0))
    with pytest.raises(ValueError, match="pass a fixed key: lambda x: model"):
        assert_causal(lambda x: x * rng.random((T, 1)).astype(np.float32), x)


def test_dropout_that_counts_its_calls_is_refused(x):
    calls = itertools.count()
    dropout = lambda x: jnp.where(jr.bernoulli(jr.key(seed(next(calls))), 0.5, x.shape), x, 0)
    with pytest.raises(ValueError, match="fn gives different outputs for the same x"):
        assert_causal(dropout, x)


def test_state_behind_a_callback_is_refused(x):
    calls = itertools.count()
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    count = lambda: np.float32(next(calls))
    with pytest.raises(ValueError, match="fn gives different outputs for the same x"):
        assert_causal(lambda x: x + jax.pure_callback(count, shape), x)


def test_harmless_differences_of_two_traces_are_accepted(x):
    # A fresh function object at each call: the text of the trace has another address.
    def fn(x):
        f = jax.custom_jvp(lambda v: v * 2)
        f.defjvp(lambda p, t: (p[0] * 2, t[0] * 2))
        return f(x)

    assert assert_causal(fn, x, pointwise=True).status == "clear"


def test_non_finite_baseline_is_refused(x):
    with pytest.raises(
        ValueError, match=r"must return finite numbers .* output 2 holds NaN or inf"
    ):
        assert_causal(lambda x: x.at[2].set(jnp.nan), x)


def test_edits_that_break_everything_are_refused(x):
    fragile = lambda x: x * jnp.where(jnp.abs(x).max() < 10, 1, jnp.nan)
    with pytest.raises(ValueError, match=r"every edit made output 0 NaN .* pass smaller scales="):
        assert_causal(fragile, x, scales=(1e6,))


REFUSED = {
    "axis=2 does not exist in x of shape (8, 4)": lambda x: assert_causal(zoo.rnn_scan, x, axis=2),
    "out_axis=1 does not exist in the output of shape (8,)": lambda x: assert_causal(
        lambda x: x[:, 0], x, axis=1
    ),
    "at least 2 positions along axis 0, got shape (1, 4)": lambda x: assert_causal(
        zoo.rnn_scan, x[:1]
    ),
    "as many positions as the input, 8, got 7 along axis 0 of shape (7, 4)": lambda x: (
        assert_causal(lambda x: x[1:], x)
    ),
    "same length along axis=0, got shapes [(8, 4), (4,)]": lambda x: assert_causal(
        lambda p: p[0], (x, x[0])
    ),
    "x holds no array": lambda x: assert_causal(lambda _: x, ()),
    "got a str in it; give other arguments to fn by closure": lambda x: assert_causal(
        lambda p: p[0], (x, "causal")
    ),
    "x holds a PRNG key, which cannot be edited": lambda x: assert_causal(
        lambda p: p[0], (x, jr.split(jr.key(seed(0)), T))
    ),
    "fn must return an array or a pytree of arrays, got a str": lambda x: assert_causal(
        lambda x: (x, "mean"), x
    ),
    "fn returned no array": lambda x: assert_causal(lambda x: None, x),
    "fn must be a function of one argument, got ArrayImpl": lambda x: assert_causal(x, x),
    "splits must be integers from 1 to 7, got (0, 3)": lambda x: assert_causal(
        zoo.rnn_scan, x, splits=(0, 3)
    ),
    "splits must be \"auto\" or a sequence of integers, got 'all'": lambda x: assert_causal(
        zoo.rnn_scan, x, splits="all"
    ),
    "scales must be positive and finite, got (0.0,)": lambda x: assert_causal(
        zoo.rnn_scan, x, scales=(0,)
    ),
    "batch_size must be at least 1": lambda x: assert_causal(zoo.rnn_scan, x, batch_size=0),
    "every token of x is 0, so no edit of it could differ": lambda x: assert_causal(
        zoo.embed, jnp.zeros(T, jnp.int32)
    ),
    "token_values must fit the dtype of x, int8, got (300,)": lambda x: assert_causal(
        zoo.embed, jnp.arange(T, dtype=jnp.int8), token_values=(300,)
    ),
    "perturb_params needs a fn that is a pytree with float arrays": lambda x: assert_causal(
        zoo.rnn_scan, x, perturb_params=0.1
    ),
    'method must be "perturb" or "vjp", got \'grad\'': lambda x: dependency_matrix(
        zoo.rnn_scan, x, method="grad"
    ),
    'method="vjp" needs float inputs, and x has none': lambda x: dependency_matrix(
        zoo.embed, jnp.arange(T), method="vjp"
    ),
    'method="vjp" needs float outputs, and fn returns none': lambda x: dependency_matrix(
        lambda x: x.argmax(1), x, method="vjp"
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_bad_arguments_are_refused(x, text):
    with refused((ValueError, TypeError), re.escape(text)):
        REFUSED[text](x)


def test_python_control_flow_inside_gets_a_remark(x):
    with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
        assert_causal(lambda x: x if x[0, 0] > 0 else -x, x)
    assert "without Python control flow on its input" in "".join(caught.value.__notes__)


# What a person reads


def test_error_message(x):
    with pytest.raises(CausalityError) as caught:
        assert_causal(zoo.norm_over_sequence_and_features, x, err_msg="my decoder:")
    lines = str(caught.value).split("\n")
    pairs = caught.value.report.pairs()
    assert lines[:3] == [
        "my decoder:",
        "leak: an output reads a later position.",
        "Asked of axis 0, 8 positions.",
    ]
    assert lines[3] == "28 of 28 forbidden pairs, the largest change first:"
    assert lines[4].startswith(f"  output {pairs[0].output} <- input {pairs[0].input}   ")
    assert "  and 23 more: report.pairs()" in lines
    assert "  0  oXXXXXXX" in lines and "  7  oooooooo" in lines
    assert "All pairs leak alike: look for a norm, mean or softmax over the sequence axis" in str(
        caught.value
    )
    assert "Tried 7 of 7 splits with 59 edited inputs." in lines
    assert len(lines) < 30 and max(map(len, lines)) <= 100
    assert isinstance(caught.value, AssertionError)


def test_off_by_one_is_named(x):
    assert "Every leak reaches 1 ahead: look for a mask or a shift off by 1." in str(
        check_causal(zoo.target_not_shifted, x)
    )


@pytest.mark.slow
def test_batch_statistics_are_named():
    report = check_independent(zoo.batch_norm_in_training, floats("float32", 4, 5, D))
    assert "BatchNorm in training" in words(report)


def test_single_pair_gets_no_suggestion(x):
    text = str(check_causal(zoo.single_pair, x))
    assert "look for" not in text
    assert "1 of 28 forbidden pairs" in text and "output 2 <- input 7" in text


def test_joint_leak_is_named(x):
    report = check_causal(zoo.count_over_a_threshold, x)
    assert "No input does it alone" in str(report)
    assert {pair.input for pair in report.pairs()} == {T - 2}


@pytest.mark.slow
def test_heatmap_of_a_long_sequence_is_made_of_blocks():
    report = check_causal(lambda x: x.at[3].add(x[190]), floats("float32", 200, 1))
    rows = report.heatmap().split("\n")
    assert "a character for 4 positions" in rows[0] and len(rows) == 51
    assert rows[1] == "    0  o" + "." * 46 + "X.."
    assert max(map(len, rows[1:])) == 5 + 2 + 50


def test_check_returns_what_assert_raises(x):
    report = check_causal(zoo.target_not_shifted, x)
    assert isinstance(report, CausalityReport) and report.leak
    assert np.array_equal(report.allowed, np.tri(T, dtype=bool))
    assert report.matrix.shape == (T, T)
    with pytest.raises(AttributeError):
        report.leak = False


def test_the_signature_is_the_documented_one():
    names = list(inspect.signature(assert_causal).parameters)
    assert (
        names
        == (
            "fn x axis out_axis strict align complete pointwise labels out_labels splits scales "
            "token_values allowed_values fixed noise_ulps confirm_x64 batch_size key "
            "perturb_params trainable prove assume_bounded err_msg"
        ).split()
    )
    assert inspect.signature(assert_causal).parameters["scales"].default == (1.0, 10.0, 100.0)


# The matrix


@pytest.mark.parametrize("method", ["perturb", "vjp"])
def test_dependency_matrix_has_the_pattern_of_the_function(x, method):
    band = lambda x: x + jnp.roll(x, 2, 0) - 2 * x[:1]
    expected = np.eye(T) + np.roll(np.eye(T), 2, 0) + np.eye(T)[:1] > 0
    matrix = dependency_matrix(band, x, method=method)
    assert np.array_equal(matrix > 0, expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["perturb", "vjp"])
def test_dependency_matrix_of_another_length_and_axis(x, method):
    pooled = lambda x: x.T.reshape(T // 2, 2, D).mean(1)
    matrix = dependency_matrix(pooled, x.T, axis=1, out_axis=0, method=method)
    assert np.array_equal(matrix > 0, np.kron(np.eye(T // 2), [1, 1]) > 0)


def test_vjp_matrix_is_the_jacobian(x):
    # Each entry is the largest of |c J| over random c: for one feature, |c| times |J|.
    w = jnp.asarray([[2.0, 0], [0.5, 3]])
    matrix = dependency_matrix(lambda x: w @ x, x[:2, :1], method="vjp")
    np.testing.assert_allclose(matrix / matrix[:, :1], [[1, 0], [1, 6]], rtol=1e-5)


@pytest.mark.slow
def test_vjp_is_blind_where_its_docstring_says(x):
    for fn in (zoo.stopped_gradient, zoo.rounded, zoo.custom_vjp_that_lies, zoo.dead_relu):
        forbidden = ~np.tri(T, dtype=bool)
        assert not dependency_matrix(fn, x, method="vjp")[forbidden].any()
        assert dependency_matrix(fn, x)[forbidden].any()


@pytest.mark.slow
def test_vjp_is_not_blind_on_a_norm_as_ones_are(x):
    fn = zoo.norm_over_the_sequence_per_channel
    ones = jax.grad(lambda x: fn(x).sum())(x)
    assert jnp.abs(ones).max() < 1e-5
    assert dependency_matrix(fn, x, method="vjp").min() > 1e-2
    # Nor on the features of a single output, whose sum is always 0.
    assert dependency_matrix(zoo.norm_of_each_token, x, method="vjp").diagonal().min() > 1e-2


# A random dependency in a random causal model


def random_causal_model(n):
    rng = np.random.default_rng(seed(n))
    layers = [zoo.rnn_scan, zoo.causal_convolution, zoo.norm_of_each_token, zoo.running_max]
    layers += [zoo.softmax_attention_with_where, zoo.prefix_sum_as_total_minus_suffix]
    chosen = [layers[i] for i in rng.integers(0, len(layers), 2)]
    return lambda x: functools.reduce(lambda h, layer: h + layer(h), chosen, x)


LINKS = {
    "linear": lambda v: v,
    "small": lambda v: 1e-4 * v,
    "tanh": lambda v: jnp.tanh(50 * v),
    "square": lambda v: v * v,
    "round": lambda v: jnp.round(v),
    "no gradient": jax.lax.stop_gradient,
}


def check_that_a_random_dependency_is_located(data):
    model = random_causal_model(data.draw(st.integers(0, 2**31), "model"))
    output = data.draw(st.integers(0, T - 2), "output")
    source = data.draw(st.integers(output + 1, T - 1), "input")
    link = LINKS[data.draw(st.sampled_from(sorted(LINKS)), "link")]
    x = normal(jr.key(seed(data.draw(st.integers(0, 1000), "x"))), (T, D))

    assert not check_causal(model, x).leak
    leaky = lambda x: model(x).at[output].add(link(x[source]))
    report = check_causal(leaky, x)
    assert [(p.output, p.input) for p in report.pairs()] == [(output, source)], str(report)


@pytest.mark.slow
@hypothesis.settings(max_examples=5, deadline=None, database=None)
@hypothesis.seed(seed())
@hypothesis.given(data=st.data())
def test_random_dependency_in_a_random_causal_model_is_found_and_located(data):
    check_that_a_random_dependency_is_located(data)


@pytest.mark.slow
@hypothesis.settings(max_examples=60, deadline=None, database=None)
@hypothesis.seed(seed())
@hypothesis.given(data=st.data())
def test_many_random_dependencies_are_found_and_located(data):
    check_that_a_random_dependency_is_located(data)
