"""Functions under rules: what they read is known, because it is written into their mask.

The oracle is the mask: `attend(mask)` reads the pairs of `mask`, all of them and no others.
"""

import dataclasses
import re

import causality_zoo as zoo
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib
import numpy as np
import pytest
from draws import normal, seed
from refused import refused
from slow import few, slow

from eqx_norms.causality import (
    CausalityError,
    CausalityReport,
    assert_causal,
    assert_reads,
    check_causal,
    check_independent,
    check_reads,
    dependency_matrix,
    rules,
)
from eqx_norms.causality._edits import Edit
from eqx_norms.causality._inputs import make_problem
from eqx_norms.causality._positions import Positions, make_positions
from eqx_norms.causality._trials import Rule

matplotlib.use("Agg")
import matplotlib.pyplot as plt

T, D = 8, 4
DOCUMENTS = np.array([0, 0, 0, 1, 1, 1, 1, 1])
PACKED = rules.causal(T) & rules.segments(DOCUMENTS)
CAUSAL = rules.causal(T)


def words(report):
    """The text of a report on one line."""
    return " ".join(str(report).split())


def attend(mask):
    """Attention whose queries are constants; an output that may read nothing is 0."""
    mask = np.asarray(mask)
    some = mask.any(1, keepdims=True)

    def fn(x):
        queries = np.sin(np.add.outer(3 * np.arange(len(mask)), np.arange(x.shape[1])))
        # Scores are bounded, so that no weight is small.
        scores = jnp.asarray(queries, x.dtype) @ jnp.tanh(x).T
        weights = jax.nn.softmax(jnp.where(mask | ~some, scores, -jnp.inf))
        return jnp.where(some, weights @ x, 0)

    return fn


def pairs(found):
    return {(pair.output, pair.input) for pair in found}


def where(mask):
    return {(int(t), int(j)) for t, j in np.argwhere(mask)}


@pytest.fixture
def x():
    return normal(jr.key(seed(1)), (T, D))


# Leaks


RULES = {
    "packed": PACKED,
    "segments": rules.segments([0, 1, 0, 1, 2, 2, 0, 1]),
    "window": CAUSAL & rules.window(T, 3),
    "prefix": rules.prefix(T, 3),
    "blocks": rules.blocks(T, 3),
    "dilated": CAUSAL & rules.dilated(T, 2),
    "ordered": rules.ordered([3, 1, 4, 0, 5, 7, 2, 6]),
    "unpadded": CAUSAL & rules.unpadded(np.arange(T) < 6),
    "strided": rules.strided(T, 3),
    "two outputs": rules.unpadded(np.arange(T) % 3 > 0, np.ones(2, bool)),
}


@pytest.mark.parametrize("name", few(RULES, ("packed", "two outputs")))
def test_what_keeps_the_rule_passes_and_one_pair_more_is_located(name, x):
    allowed = RULES[name]
    report = assert_reads(attend(allowed), x, allowed)
    assert report.status == "clear", str(report)
    assert np.array_equal(report.allowed, allowed) and report.kind == "reads"
    # What was covered is every forbidden pair, because every distinct row was tried.
    assert np.array_equal(report.matrix == 0, ~allowed)

    forbidden = np.argwhere(~allowed)
    t, j = forbidden[np.random.default_rng(seed(0)).integers(len(forbidden))]
    more = allowed.copy()
    more[t, j] = True
    report = check_reads(attend(more), x, allowed)
    assert report.leak and pairs(report.pairs()) == {(t, j)}, str(report)
    with pytest.raises(CausalityError, match="an output reads an input that it must not"):
        assert_reads(attend(more), x, allowed)


@pytest.mark.slow
def test_a_mask_that_was_forgotten_leaks_every_pair_that_it_forbade(x):
    report = check_reads(attend(CAUSAL), x, PACKED)
    assert pairs(report.pairs()) == where(CAUSAL & ~PACKED)
    assert not check_causal(attend(CAUSAL), x).leak


@pytest.mark.slow
def test_any_boolean_array_will_do(x):
    rng = np.random.default_rng(seed(2))
    allowed = rng.random((T, T)) < 0.5
    assert not check_reads(attend(allowed), x, jnp.asarray(allowed)).leak
    other = rng.random((T, T)) < 0.5
    assert pairs(check_reads(attend(other), x, allowed).pairs()) == where(other & ~allowed)


@pytest.mark.slow
def test_tokens_and_several_arrays(x):
    tokens = jr.randint(jr.key(seed(3)), (T,), 1, 16)

    def model(mask):
        return lambda batch: attend(mask)(zoo.embed(batch["ids"]) + batch["x"][:, :3])

    batch = {"ids": tokens, "x": x}
    assert not check_reads(model(PACKED), batch, PACKED).leak
    assert check_reads(model(CAUSAL), batch, PACKED).leak


# One engine


@pytest.mark.parametrize("kind", ["causal", "strictly causal", "independent"])
def test_the_edits_of_the_old_rules_are_rows_of_the_array(kind):
    strict = kind == "strictly causal"
    independent = kind == "independent"
    rule = Rule(kind, rules.independent(T) if independent else rules.causal(T, strict=strict))
    first = 1 if kind == "causal" else 0
    assert rule.possible.tolist() == [*range(first, T)]
    for split in rule.possible:
        at = np.arange(T)
        assert np.array_equal(rule.where(split), at != split if independent else at >= split)


@pytest.mark.parametrize("shape", [(13, 13), (70, 130), (5, 64), (64, 65), (3, 1)])
def test_watched_and_covered_by_their_definitions(shape):
    rng = np.random.default_rng(seed(8))
    rule = Rule("reads", rng.random(shape) < 0.7)
    edits = [Edit(row, 0, 0) for row in rng.random((30, shape[1])) < rng.random((30, 1))]
    read = np.stack([edit.where for edit in edits]).astype(int) @ rule.allowed.T.astype(int)
    assert np.array_equal(rule.watch(edits), read == 0)
    # Every distinct row that forbids anything is tried, and so every forbidden pair is covered.
    rows = {tuple(row) for row in rule.allowed.tolist() if not all(row)}
    splits = rule.choose("auto", rng)
    assert len(splits) == len(rows)
    assert np.array_equal(rule.covered(splits) == 0, ~rule.allowed)


@pytest.mark.slow
def test_causal_is_one_rule_among_others(x):
    fn = zoo.norm_over_sequence_and_features
    one, two = check_causal(fn, x), check_reads(fn, x, CAUSAL)
    assert np.array_equal(one.matrix, two.matrix) and one.worst == two.worst
    # A general rule also mixes later inputs into earlier outputs: 3 more edits of 8 positions.
    assert [split - 1 for split in one.splits] == [*two.splits] and two.edits == one.edits + 3
    batch = zoo.batch_norm_in_training
    one = check_independent(batch, x[:, None])
    two = check_reads(batch, x[:, None], rules.independent(T))
    assert one.splits == two.splits and np.array_equal(one.matrix, two.matrix)


@pytest.mark.slow
def test_rows_that_are_the_same_are_one_edit():
    x = normal(jr.key(seed(4)), (200, 1))
    segments = rules.segments(np.arange(200) // 50)
    report = assert_reads(lambda x: x.reshape(4, 50).cumsum(1).reshape(200, 1), x, segments)
    assert report.splits == (0, 50, 100, 150) and report.possible_splits == 4
    assert "Tried 4 of 4 distinct rows of the rule" in str(report)
    # 4 rows in 8 kinds, and 8 binary digits of 200 positions, twice; 7 of another input.
    assert report.edits == 4 * 8 + 2 * 8 + 7


def test_68_of_many_rows():
    x = normal(jr.key(seed(4)), (200, 1))
    window = rules.causal(200) & rules.window(200, 3)
    fn = lambda x: x + jnp.pad(x, ((2, 0), (0, 0)))[:-2]
    report = assert_reads(fn, x, window)
    assert len(report.splits) == 68 and report.possible_splits == 200
    assert "Tried 68 of 200 distinct rows of the rule with 91 edited inputs." in str(report)
    assert np.isnan(report.matrix).any(1).sum() > 100


@pytest.mark.slow
def test_a_pair_of_a_long_sequence_is_located():
    x = normal(jr.key(seed(5)), (300, 1))
    packed = rules.causal(300) & rules.segments(np.arange(300) // 60)
    report = check_reads(lambda x: x.at[100].add(x[57]), x, packed)
    # Which of 64 rows see it: those of its segment that come later, as their outputs may read less.
    assert report.leak and pairs(report.pairs()) == {(100, 57)}


# Blindness


FEWER = {
    "only the diagonal": rules.independent(T),
    "window one too short": CAUSAL & rules.window(T, 3),
    "strict": CAUSAL & (rules.causal(T, strict=True) | (np.arange(T) == 0)[:, None]),
    "a dead output": CAUSAL & (np.arange(T) != 5)[:, None],
    "an input that nobody reads": CAUSAL & (np.arange(T) != 2),
}


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
@pytest.mark.parametrize("name", few(FEWER, ("only the diagonal", "window one too short")))
def test_what_must_be_read_and_is_not(name, dtype, x):
    required = CAUSAL & rules.window(T, 4) if "window" in name else CAUSAL
    read = FEWER[name]
    report = check_reads(attend(read), x.astype(dtype), CAUSAL, required=required)
    assert (report.status, report.blind, report.leak) == ("blind", True, False), str(report)
    assert pairs(report.unread()) == where(required & ~read) and report.pairs() == []
    assert np.array_equal(report.missing(), required & ~read)
    with pytest.raises(CausalityError, match=r"^blind: an output does not read an input that it"):
        assert_reads(attend(read), x.astype(dtype), CAUSAL, required=required)


@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16"), slow("float64")])
def test_what_reads_all_that_it_must_passes(dtype):
    with jax.enable_x64(dtype == "float64"):
        x = normal(jr.key(seed(1)), (T, D)).astype(dtype)
        report = assert_causal(attend(CAUSAL), x, complete=True)
        assert report.status == "clear" and not report.blind and report.unread() == []
        assert (report.matrix[CAUSAL] > 0).all() and (report.matrix[~CAUSAL] == 0).all()
        assert check_causal(attend(np.eye(T, dtype=bool)), x, complete=True).status == "blind"


@pytest.mark.slow
def test_complete_and_strict(x):
    strict = rules.causal(T, strict=True)
    assert assert_causal(attend(strict), x, strict=True, complete=True).status == "clear"
    report = check_causal(attend(strict & rules.window(T, 2)), x, strict=True, complete=True)
    assert pairs(report.unread()) == where(strict & ~rules.window(T, 2))


@pytest.mark.parametrize("dtype", [slow("float32"), "bfloat16"])
def test_what_is_read_too_faintly_for_its_dtype_is_read(dtype):
    """1e-11 of the others changes no bit of either, and is there in float64."""
    x = normal(jr.key(seed(1)), (T, D)).astype(dtype)
    faint = lambda x: (x + 1e-11 * jnp.cumsum(x, 0)).astype(x.dtype)
    assert check_causal(faint, x, complete=True).status == "clear"
    only = check_causal(faint, x, complete=True, confirm_x64=False)
    assert only.status == "blind" and len(only.unread()) > 20  # of 28; x may be tiny at some place


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", slow("bfloat16")])
def test_rounding_is_no_reading(dtype):
    """Where every output is the total minus the rest, rounding alone reaches all of them."""
    x = normal(jr.key(seed(1)), (T, D)).astype(dtype)
    total = lambda x: attend(np.eye(T, dtype=bool))(x) + (x.sum(0) - jnp.flip(x, 0).sum(0))
    with jax.numpy_rank_promotion("allow"):
        report = check_causal(total, x, complete=True)
    assert report.status == "blind"
    assert pairs(report.unread()) == where(rules.causal(T, strict=True)), str(report)


def test_a_leak_and_a_blindness_are_both_reported_the_leak_first(x):
    fn = attend(np.eye(T, k=1, dtype=bool) | np.eye(T, dtype=bool))
    report = check_causal(fn, x, complete=True)
    assert (report.status, report.leak, report.blind) == ("leak", True, True)
    assert pairs(report.pairs()) == where(np.eye(T, k=1))
    assert pairs(report.unread()) == where(rules.causal(T, strict=True))
    text = str(report)
    assert text.index("leak: an output reads a later position.") == 0
    assert 0 < text.index("7 of 28 forbidden pairs") < text.index("And blind: an output does not")
    assert "28 of 36 required pairs that were measured:" in text
    assert "  output 1 <- input 0\n" in text and "and 23 more: report.unread()" in text
    assert "0  oX......" in text and "7  !!!!!!!o" in text


def test_a_rule_that_forbids_nothing_can_still_require(x):
    everything = np.ones((T, T), bool)
    assert assert_reads(attend(everything), x, everything, required=everything).status == "clear"
    report = check_reads(attend(CAUSAL), x, everything, required=everything)
    assert pairs(report.unread()) == where(~CAUSAL)


@pytest.mark.slow
def test_128_of_many_inputs_are_edited_alone():
    x = normal(jr.key(seed(4)), (200, 1))
    report = check_causal(lambda x: jnp.cumsum(x, 0).at[150].set(x[150]), x, complete=True)
    assert report.status == "blind" and {pair.output for pair in report.unread()} == {150}
    assert "128 of 200 inputs were edited alone for what must be read" in words(report)
    assert np.isnan(report.matrix[199]).sum() == 72


@pytest.mark.slow
def test_what_only_some_kinds_of_edits_move_is_read():
    """The largest so far of 128 positions is moved by large positive numbers alone."""
    x = normal(jr.key(seed(7)), (128, D))
    report = assert_causal(lambda x: jax.lax.cummax(x, 0), x, complete=True)
    assert report.status == "clear"


def test_an_operation_without_a_float64_form_blinds_nobody(x):
    """What is below the last bit there cannot be seen; what changes at all counts as read."""
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    host = lambda v: np.cumsum(np.asarray(v), 0, dtype=np.float32)
    fn = lambda x: jax.pure_callback(host, shape, x)
    assert check_causal(fn, x, complete=True).status == "clear"


def test_a_function_of_tokens(x):
    tokens = jr.randint(jr.key(seed(3)), (T,), 1, 16)
    fn = lambda ids: attend(CAUSAL)(zoo.embed(ids))
    assert check_causal(fn, tokens, complete=True).status == "clear"
    alone = check_causal(zoo.embed, tokens, complete=True)
    assert pairs(alone.unread()) == where(rules.causal(T, strict=True))


# Proof


@pytest.mark.slow
def test_a_rule_can_be_proved_and_what_must_be_read_is_still_edited(x):
    report = assert_reads(attend(PACKED), x, PACKED, prove="required")
    assert report.status == "proved" and report.edits == 0
    report = assert_reads(attend(PACKED), x, PACKED, required=PACKED, prove="required")
    assert report.status == "proved" and (report.matrix[PACKED] > 0).all()
    blind = check_reads(attend(np.eye(T, dtype=bool)), x, PACKED, required=PACKED, prove=True)
    assert blind.status == "blind"
    assert "Beside that: proved: no output reads an input that it must not." in words(blind)
    assert check_reads(attend(CAUSAL), x, PACKED, prove=True).status == "leak"


@pytest.mark.slow
@pytest.mark.parametrize("out_axis", [slow(None), (1, 0)])
def test_batch_and_time_at_once_are_proved(out_axis):
    x = normal(jr.key(seed(6)), (3, 5, D))
    turned = (lambda y: y) if out_axis is None else (lambda y: jnp.swapaxes(y, 0, 1))
    fn = lambda x: turned(jax.vmap(attend(rules.causal(5)))(x))
    allowed = rules.each(3, rules.causal(5))
    report = assert_reads(fn, x, allowed, axis=(0, 1), out_axis=out_axis, prove="required")
    assert report.status == "proved"


@pytest.mark.slow
def test_a_rule_of_other_lengths_is_proved(x):
    kernel = zoo.weights(jnp.float32, D, D, 3)
    strided = lambda x: jax.lax.conv_general_dilated(x.T[None], kernel, (2,), [(2, 0)])[0].T
    assert assert_reads(strided, x, rules.strided(T, 2), prove="required").status == "proved"
    late = lambda x: jax.lax.conv_general_dilated(x.T[None], kernel, (2,), [(1, 1)])[0].T
    report = check_reads(late, x, rules.strided(T, 2), prove=True)
    assert report.leak and pairs(report.pairs()) == {(0, 1), (1, 3), (2, 5), (3, 7)}


# Several axes


@pytest.mark.slow
def test_positions_of_several_axes_are_tuples_in_c_order():
    x = normal(jr.key(seed(6)), (2, D, 3))
    leak = lambda x: x.at[0, :, 1].add(x[1, :, 2])
    report = check_reads(leak, x, rules.independent(6), axis=(0, 2))
    assert pairs(report.pairs()) == {((0, 1), (1, 2))}
    assert "output (0, 1) <- input (1, 2)   " in str(report)
    assert "\n  (0, 0)  o" in report.heatmap()


@pytest.mark.slow
def test_positions_in_another_order_and_dependency_matrices():
    x = normal(jr.key(seed(6)), (2, D, 3))
    leak = lambda x: x.at[0, :, 1].add(x[1, :, 2])
    report = check_reads(leak, x, rules.independent(6), axis=(-1, 0))
    assert pairs(report.pairs()) == {((1, 0), (2, 1))}
    matrix = dependency_matrix(leak, x, axis=(0, 2))
    assert where(matrix > 0) == where(np.eye(6)) | {(1, 5)}
    matrix = dependency_matrix(leak, x, axis=(0, 2), method="vjp")
    assert where(matrix > 0) == where(np.eye(6)) | {(1, 5)}


@pytest.mark.slow
def test_batch_and_time_at_once():
    x = normal(jr.key(seed(6)), (3, 4, D))
    allowed = rules.each(3, rules.causal(4))
    fn = jax.vmap(attend(rules.causal(4)))
    assert assert_reads(fn, x, allowed, required=allowed, axis=(0, 1)).status == "clear"
    mixed = lambda x: fn(x).at[2, 0].add(x[0, 3])
    report = check_reads(mixed, x, allowed, axis=(0, 1))
    assert pairs(report.pairs()) == {((2, 0), (0, 3))}


@pytest.mark.slow
def test_pixels_in_raster_order():
    image = normal(jr.key(seed(6)), (3, 4, 1))
    summed = lambda image: image.reshape(12, 1).cumsum(0).reshape(3, 4, 1)
    assert assert_causal(summed, image, axis=(0, 1), complete=True).status == "clear"
    report = check_causal(lambda image: summed(image[::-1]), image, axis=(0, 1))
    assert report.leak and ((0, 0), (2, 0)) in pairs(report.pairs())


@pytest.mark.slow
def test_lengths_that_differ_along_several_axes():
    image = normal(jr.key(seed(6)), (4, 6, 2))
    pooled = lambda image: image.reshape(2, 2, 3, 2, 2).mean((1, 3)).reshape(6, 2)
    patch = (np.arange(4)[:, None] // 2 * 3 + np.arange(6) // 2).reshape(-1)
    allowed = rules.segments(patch, range(6))
    report = assert_reads(pooled, image, allowed, required=allowed, axis=(0, 1), out_axis=0)
    assert report.matrix.shape == (6, 24)
    shifted = lambda image: pooled(jnp.roll(image, 1, 1))
    report = check_reads(shifted, image, allowed, axis=(0, 1), out_axis=0)
    assert (0, (0, 5)) in pairs(report.pairs())


# What a person reads


NAMED = {"labels": "the cats"}


def test_labels_name_positions(x):
    report = check_reads(lambda x: x.at[2].add(x[4]), x, CAUSAL, **NAMED)
    assert pairs(report.pairs()) == {(2, 4)}
    assert "output 2 'e' <- input 4 'c'" in str(report)
    assert report.heatmap().split("\n")[1:3] == ["     the cats", "  t  o......."]


@pytest.mark.slow
def test_labels_of_several_axes_and_of_outputs():
    x = normal(jr.key(seed(6)), (2, 3, D))
    leak = lambda x: (x.at[0, 1].add(x[1, 2])).reshape(6, D)
    allowed = rules.independent(6)
    report = check_reads(leak, x, allowed, axis=(0, 1), out_axis=0, labels=["ann", "bob"])
    assert "output 1 'n' <- input (1, 2) 'b'" in str(report)
    names = [f"row {i}" for i in range(6)]
    report = check_reads(leak, x, allowed, axis=(0, 1), out_axis=0, out_labels=names)
    assert "output 1 'row 1' <- input (1, 2)" in str(report)
    assert "\n  row 5  " in report.heatmap()


@pytest.mark.parametrize("labels", [["ann", "bob"], np.array([[*"ann"], [*"bob"]]), "annbob"])
def test_labels_come_nested_or_in_c_order(labels):
    x = jnp.ones((2, 3))
    problem = make_problem(lambda x: x, x, (0, 1), None)
    outputs, inputs = make_positions(problem, labels, None)
    assert inputs.labels == outputs.labels == (*"annbob",)
    assert inputs.name(4) == "(1, 1) 'o'"
    outputs, _ = make_positions(problem, labels, "a\nb\t 1")
    assert outputs.labels == (*"a·b· 1",)


def test_plot_shows_blindness_in_yellow_and_labels_on_both_axes():
    read = rules.strided(T, 4) & (np.arange(T) > 0)
    read[0, 5] = True
    report = measured(read, rules.strided(T, 4), rules.strided(T, 4))
    report = dataclasses.replace(report, inputs=Positions((T,), (*"the cats",)))
    axes = report.plot(plt.subplots()[1])
    images = {image.get_cmap().name: image.get_array() for image in axes.images}
    assert np.array_equal(~np.ma.getmaskarray(images["blind"]), report.missing())
    assert np.array_equal(~np.ma.getmaskarray(images["Reds"]), report.leaking())
    assert axes.get_title() == "leak: 1 forbidden pair (red) and 2 required pairs (yellow)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [*"the cats"]
    axes.figure.canvas.draw()
    plt.close("all")


@pytest.mark.slow
def test_plot_names_positions_of_several_axes():
    report = measured(rules.causal(6), rules.causal(6), rules.causal(6))
    axes = dataclasses.replace(report, inputs=Positions((2, 3))).plot(plt.subplots()[1])
    axes.figure.canvas.draw()
    assert "(1, 1)" in [tick.get_text() for tick in axes.get_xticklabels()]
    plt.close("all")


@pytest.mark.parametrize("status", ["clear", slow("leak"), "blind"])
def test_text_of_every_status(status, x):
    read = {"clear": PACKED, "leak": CAUSAL, "blind": np.eye(T, dtype=bool)}[status]
    report = check_reads(attend(read), x, PACKED, required=PACKED)
    assert report.status == status
    first = {
        "clear": "clear: no output reads an input that it must not, as far as the edits can tell.",
        "leak": "leak: an output reads an input that it must not.",
        "blind": "blind: an output does not read an input that it must.",
    }
    lines = str(report).split("\n")
    assert lines[0] == first[status]
    assert max(map(len, lines)) <= 100 and len(lines) < 30
    # 8 rows in 8 kinds, and 3 binary digits of 8 positions, twice; 7 of each of 4 other inputs.
    count = 70 if status == "leak" else 70 + 28
    assert f"Tried 8 of 8 distinct rows of the rule with {count} edited inputs." in words(report)
    other = "What an output may read was as in x, and in 28 of the edits as in other inputs."
    assert (other in words(report)) == (status != "leak")
    assert "8 of 8 inputs were edited alone for what must be read, with 64 edited" in words(report)


def test_rows_that_forbid_nothing_are_said_not_to_be_tested(x):
    report = check_reads(attend(CAUSAL), x, CAUSAL)
    assert "1 of 8 outputs may read every input, and is not tested." in report.notes
    assert not any("not tested" in note for note in check_causal(attend(CAUSAL), x).notes)


@pytest.mark.slow
def test_outputs_that_mix_nothing_are_remarked_upon(x):
    some = CAUSAL & (np.arange(T)[:, None] < 2) | np.eye(T, dtype=bool)
    text = words(check_causal(attend(some), x))
    assert "6 of 8 outputs react to no input but their own" in text and "complete=True" in text
    text = words(check_reads(attend(some), x, PACKED))
    assert "5 of 8 outputs react to no input but their own" in text and "required=" in text
    text = words(check_reads(attend(np.eye(T, dtype=bool)), x, PACKED, pointwise=True))
    assert "react to" not in text and "No output reads another position" in text
    assert "react to" not in words(check_reads(attend(CAUSAL.T), x, CAUSAL.T))


def test_leaks_that_take_two_edits_at_once(x):
    old = np.asarray(x)
    apart = lambda x: jnp.abs(x - old) > 1e-3
    both = lambda x: x.at[1].add(apart(x)[5:7, 0].all().astype(x.dtype))
    report = check_reads(both, x, CAUSAL)
    assert report.joint and "output 1 <- input 5 and others" in str(report)


SUGGESTED = {
    "Every leak crosses from one segment to another: look for a mask that ignores the segment "
    "ids. Positions": (CAUSAL, CAUSAL & rules.segments([0, 0, 0, 1, 1, 2, 2, 2])),
    "a mask that ignores the segment ids or padding. Positions that are reset hide nothing.": (
        CAUSAL,
        PACKED,
    ),
    "Every leak comes from inputs 6 to 7, which no other output may read: look for padding": (
        np.ones((T, T), bool),
        rules.unpadded(np.arange(T) < 6),
    ),
    "Every leak comes from input 2, which no other output may read": (
        np.ones((3, T), bool),
        rules.unpadded(np.arange(T) != 2, np.ones(3, bool)),
    ),
    "Every leak is of the input just before the first that the output may read: look for a window "
    "that is 1 too wide.": (CAUSAL & rules.window(T, 4), CAUSAL & rules.window(T, 3)),
    "one of the 2 inputs just before the first that the output may read": (
        CAUSAL & rules.window(T, 5),
        CAUSAL & rules.window(T, 3),
    ),
    "Every leak reaches 1 ahead: look for a mask or a shift off by 1.": (
        np.tri(T, k=1, dtype=bool),
        CAUSAL,
    ),
    "the input just after the last that the output may read: look for a mask that is 1 too wide": (
        rules.strided(T, 2, start=1),
        rules.strided(T, 2),
    ),
    "All forbidden pairs leak alike: look for a norm, mean or softmax": (
        np.ones((T, T), bool),
        CAUSAL,
    ),
}


def measured(read, allowed, required=None):
    """The report on a function that reads `read`, each pair as much as any other."""
    leak = bool((read & ~allowed).any())
    blind = required is not None and bool((required & ~read).any())
    outputs, inputs = allowed.shape
    return CausalityReport(
        leak=leak,
        status="leak" if leak else "blind",
        matrix=read.astype(float),
        allowed=allowed,
        worst=1.0,
        scale=1.0,
        noise=1e-5,
        splits=(),
        possible_splits=outputs,
        edits=0,
        joint=False,
        notes=(),
        kind="reads",
        outputs=Positions((outputs,)),
        inputs=Positions((inputs,)),
        blind=blind,
        required=required,
    )


@pytest.mark.parametrize("text", SUGGESTED)
def test_patterns_of_leaks_are_named(text):
    read, allowed = SUGGESTED[text]
    assert text in words(measured(read, allowed))
    one = allowed.copy()
    one[tuple(np.argwhere(read & ~allowed)[-1])] = True
    assert "look for" not in words(measured(one, allowed))  # a single pair tells nothing


def test_a_leak_between_examples_is_named():
    report = measured(np.tile(rules.causal(4), (3, 3)), rules.each(3, rules.causal(4)))
    assert "from one segment to another" in words(report)
    report = dataclasses.replace(report, inputs=Positions((3, 4)), outputs=Positions((3, 4)))
    text = "Every leak crosses from one of the 3 examples to another: look for statistics over"
    assert text in words(report)


BLIND = {
    "Only the diagonal is read: look for a mask of the wrong shape": np.eye(T, dtype=bool),
    "No output reads its own input: look for a mask or a shift off by 1.": ~np.eye(T, dtype=bool),
    "Nobody reads inputs 2 to 3: look for a mask that hides": np.arange(T) // 2 != 1,
    "Nothing that it must is read by output 5.": (np.arange(T) != 5)[:, None],
    "Nothing is read: look for a branch that starts at zero": np.zeros((T, T), bool),
}


@pytest.mark.parametrize("text", BLIND)
def test_patterns_of_blindness_are_named(text):
    everything = np.ones((T, T), bool)
    assert text in words(measured(everything & BLIND[text], everything, everything))


def test_a_window_that_is_too_short_is_named():
    window = CAUSAL & rules.window(T, 4)
    text = words(measured(CAUSAL & rules.window(T, 3), window, window))
    assert (
        "always the first input that the output must read: look for a window that is 1 too" in text
    )


# Errors


REFUSED = {
    "allowed must be a boolean array, got int64; write allowed != 0": (CAUSAL.astype(int), {}),
    "allowed must have shape (T_out, T_in) = (8, 8), a row for every output": (CAUSAL[:7], {}),
    "required must have shape (T_out, T_in) = (8, 8)": (CAUSAL, {"required": CAUSAL[0]}),
    "required must be a boolean array, got float64": (CAUSAL, {"required": np.tri(T)}),
    "required must lie within allowed, but output 0 must read input 1, which it may not": (
        CAUSAL,
        {"required": np.ones((T, T), bool)},
    ),
    "allowed forbids nothing, so that there is nothing to check": (np.ones((T, T), bool), {}),
    "axis=(0, 2) does not exist in x of shape (8, 4)": (CAUSAL, {"axis": (0, 2)}),
    "axis=(0, -2) names one axis of x of shape (8, 4) twice": (CAUSAL, {"axis": (0, -2)}),
    "labels must name the 8 positions, got 3 labels": (CAUSAL, {"labels": "abc"}),
    "out_labels must name the 8 positions, got 9 labels": (CAUSAL, {"out_labels": range(9)}),
    "labels must name the 32 positions, (8, 4), got 3": (
        rules.causal(32),
        {"labels": "abc", "axis": (0, 1)},
    ),
}


@pytest.mark.parametrize("text", REFUSED)
def test_bad_arguments_are_refused(text, x):
    allowed, options = REFUSED[text]
    with refused((ValueError, TypeError), re.escape(text)):
        check_reads(attend(np.eye(T, dtype=bool)), x, allowed, **options)


def test_a_rule_that_is_turned_gets_a_remark(x):
    with refused(ValueError, r"got \(8, 3\); write allowed\.T if its rows are inputs"):
        check_reads(attend(rules.strided(T, 3)), x, rules.strided(T, 3).T)


@pytest.mark.slow
def test_messages_name_positions_of_several_axes(x):
    everything = np.ones((32, 32), bool)
    with refused(ValueError, re.escape("output (0, 0) must read input (0, 1), which it may not")):
        check_reads(jnp.tanh, x, rules.causal(32), required=everything, axis=(0, 1))
    with refused(ValueError, re.escape("but output (2, 1) holds NaN")):
        check_causal(lambda x: x.at[2, 1].set(jnp.nan), x, axis=(0, 1))
    report = check_causal(lambda x: x - x.mean(), x, axis=(0, 1), prove=True)
    assert report.leak and report.obstacles[0].endswith(
        "connects outputs (0, 0) to (7, 2) with what must not be read."
    )


def test_lengths_of_several_axes_that_differ_are_refused(x):
    with refused(ValueError, re.escape("got 16 of lengths (4, 4) along the axes (0, 1)")):
        check_causal(lambda x: x[:4], x, axis=(0, 1))
