"""What the causality check does to each array of its input, and where it splits.

The oracle is a model whose answer is known by construction, or the edited arrays themselves.
"""

import tracemalloc

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from draws import normal, seed
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from eqx_norms.causality import check_causal, dependency_matrix, rules
from eqx_norms.causality._edits import Edit, at_one, make_editor, nothing
from eqx_norms.causality._inputs import perturbed
from eqx_norms.causality._trials import Rule, spread

T, D, VOCABULARY = 8, 4, 50
SCALES = (1.0, 10.0, 100.0)  # the default


def embed(ids):
    return jr.normal(jr.key(3), (VOCABULARY, D))[ids]


def attend(batch):
    """Causal, and blind to padding, with masks that are added as a BERT adds them: 0 or -1e9."""
    h, mask = embed(batch["ids"]), batch["mask"].astype(jnp.float32)
    scores = h @ h.T + jnp.where(jnp.tri(T, dtype=bool), 0, -1e9) + (1 - mask)[None] * -1e9
    return jax.nn.softmax(scores) @ h


def leaky(batch):
    return attend(batch) + batch["mask"].astype(jnp.float32).mean()


@pytest.fixture
def ids():
    return jr.randint(jr.key(seed(1)), (T,), 1, VOCABULARY - 1)


MASKS = {
    "padded": jnp.arange(T) < 6,
    "full": jnp.ones(T, bool),
}


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_a_mask_stays_a_mask(ids, mask, dtype):
    batch = {"ids": ids, "mask": MASKS[mask].astype(dtype)}
    report = check_causal(attend, batch, token_values=(0, VOCABULARY - 1))
    assert not report.leak, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("token_values", [{"ids": (0, VOCABULARY - 1)}, None])
def test_a_mask_stays_a_mask_however_ids_are_given(ids, token_values):
    batch = {"ids": ids, "mask": MASKS["padded"].astype(jnp.int32)}
    assert not check_causal(attend, batch, token_values=token_values).leak
    assert check_causal(leaky, batch, token_values=token_values).leak


@pytest.mark.parametrize("dtype", ["int32", "float32", "bfloat16", "int4"])
def test_leaves_of_zeros_and_ones_are_edited_within_them(dtype):
    mask = np.asarray(jnp.asarray([0, 1, 1, 0] * 2, dtype))
    other = np.arange(T, dtype=np.int32)
    for leaves in ((mask,), (mask, other), (np.ones_like(mask), other)):
        editor = make_editor(leaves, (0,) * len(leaves), (1.0, 100.0), None, None)
        edits = [Edit(np.ones(T, bool), kind, seed(kind)) for kind in range(editor.kinds)]
        edited = np.stack([editor.apply(edit)[0] for edit in edits])
        assert edited.dtype == mask.dtype
        assert {0.0, 1.0} == set(edited.astype(float).ravel())
        # Each entry is flipped at least once: both values were tried everywhere.
        assert (edited != leaves[0]).any(0).all()


def test_a_single_constant_array_of_floats_is_no_mask():
    ones = np.ones((T, D), np.float32)
    (edited,) = make_editor((ones,), (0,), (1.0,), None, None).apply(Edit(ones[:, 0] > 0, 0, 1))
    assert len(np.unique(edited)) == T * D


def test_token_values_by_name():
    seen = make_editor(
        (np.arange(1, T), np.arange(1, T)), (0, 0), (1.0,), {"b": (40,)}, None, names=("a", "b")
    )
    everywhere = np.ones(T - 1, bool)
    edited = [seen.apply(Edit(everywhere, kind, seed(kind))) for kind in range(seen.kinds)]
    first, second = (np.stack(leaf) for leaf in zip(*edited, strict=True))
    assert first.max() < T and second.max() == 40


@pytest.mark.slow
def test_a_leak_of_a_named_leaf_s_own_id(ids):
    batch = {"text": {"ids": ids}, "segment": jnp.arange(T) // 3}
    special = lambda b: embed(b["text"]["ids"]) + (b["text"]["ids"] == 49).any().astype(jnp.float32)
    assert not check_causal(special, batch, token_values={"segment": (49,)}, pointwise=True).leak
    report = check_causal(special, batch, token_values={"text.ids": (0, 49)})
    assert report.leak
    assert "'text.ids' was drawn from 0 to 49" in str(report)
    assert "'segment' was drawn from 0 to 2" in str(report)


@pytest.mark.slow
def test_fixed_leaves_are_left_alone(ids):
    batch = {"ids": ids, "mask": MASKS["padded"]}
    assert check_causal(leaky, batch).leak
    for fixed in ("mask", {"mask"}):
        assert not check_causal(leaky, batch, fixed=fixed).leak
    assert check_causal(leaky, batch, fixed="ids").leak
    matrix = dependency_matrix(leaky, batch, fixed="mask")
    assert (matrix[~np.tri(T, dtype=bool)] == 0).all() and matrix.diagonal().all()


@pytest.mark.slow
def test_fixed_leaves_need_no_positions_and_may_be_anything(ids):
    causal = np.tri(T, dtype=bool)
    x = (ids, causal, np.float32(2), jr.key(0), "softmax")

    def model(x):
        ids, mask, scale, key, how = x
        h = embed(ids) + scale * jr.normal(key, (1, D))
        return getattr(jax.nn, how)(jnp.where(mask, h @ h.T, -jnp.inf)) @ h

    assert not check_causal(model, x, fixed=("1", "2", "3", "4")).leak
    assert check_causal(model, (ids, causal.T, *x[2:]), fixed=("1", "2", "3", "4")).leak


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2"])
def test_four_bit_integers(dtype):
    x = jnp.asarray([0, 1] * 4, dtype)
    assert not check_causal(lambda x: x.astype(jnp.int32).cumsum(), x).leak
    assert check_causal(lambda x: x[::-1].astype(jnp.int32), x).leak


def test_floats_of_four_bits_are_moved():
    x = np.asarray(jnp.asarray([0.5, -1, 2, 6] * 2, "float4_e2m1fn"))
    editor = make_editor((x,), (0,), (1.0, 100.0), None, None)
    for kind in range(editor.kinds):
        edits = [Edit(np.ones(T, bool), kind, seed(n)) for n in range(10)]
        edited = np.stack([editor.apply(edit)[0] for edit in edits]).astype(float)
        # Of 8 values or more; normals of any size around 1 hit several of them in 80 draws.
        zeros = kind == editor.kinds - 1
        assert len(np.unique(edited)) == 1 if zeros else len(np.unique(edited)) > 2
        assert np.abs(edited).max() <= 6


REFUSED = {
    "x has no integers called 'token'; token_values may name 'ids', 'segment'": {
        "token_values": {"token": (0,)}
    },
    "token_values must fit the dtype of 'segment', int8, got (0, 300); say which array they are "
    "for: token_values={'ids': (0, 300)}": {"token_values": (0, 300)},
    "x has no array called 'masks'; fixed may name 'ids', 'mask', 'segment'": {"fixed": "masks"},
    "fixed names every array of x": {"fixed": ["ids", "mask", "segment"]},
}


@pytest.mark.parametrize("text", REFUSED)
def test_names_that_do_not_fit_are_refused(ids, text):
    batch = {"ids": ids, "mask": MASKS["full"], "segment": jnp.arange(T, dtype=jnp.int8)}
    with pytest.raises(ValueError) as caught:
        check_causal(attend, batch, **REFUSED[text])
    assert text in str(caught.value)


def test_names_of_a_bare_array_are_refused(ids):
    with pytest.raises(ValueError, match="x is one array, without a name"):
        check_causal(embed, ids, token_values={"ids": (0,)})


def test_several_leaves_of_zeros_and_ones_must_be_told_apart():
    batch = {"ids": jnp.arange(T) % 2, "mask": jnp.ones(T, int)}
    with pytest.raises(ValueError, match=r"holds only 0 and 1; say which one .*=\{'ids'"):
        check_causal(attend, batch, token_values=(0, 49))
    assert not check_causal(attend, batch, token_values={"ids": (0, 49)}).leak


def test_report_names_what_it_took_for_a_mask(ids):
    batch = {"ids": ids, "mask": MASKS["full"].astype(jnp.float32)}
    report = check_causal(attend, batch)
    assert "'mask' holds only 0 and 1, and was edited within them." in str(report)


# What perturb_params moves


class LinearAttention(eqx.Module):
    """Its mask is held as an array of floats; its branches start at zero, and one of them leaks."""

    mask: jax.Array
    scale: jax.Array = eqx.field(default_factory=lambda: jnp.zeros(()))
    leak: jax.Array | None = None

    def __call__(self, x):
        x = x + self.scale * ((x @ x.T) * self.mask @ x)
        return x if self.leak is None else x + self.leak * x.mean(0, keepdims=True)


@pytest.fixture
def x():
    return normal(jr.key(seed(2)), (T, D))


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.02, 1e-6])
def test_noise_leaves_a_mask_of_floats_alone(x, sigma):
    model = LinearAttention(jnp.tri(T))
    report = check_causal(model, x, perturb_params=sigma)
    assert not report.leak, str(report)
    assert "It was not added to mask." in " ".join(str(report).split())
    # What starts at zero is moved: the attention shows, and with it a branch that leaks.
    assert not any("react to no input but their own" in note for note in report.notes)
    leaky = LinearAttention(jnp.tri(T), leak=jnp.zeros(()))
    assert not check_causal(leaky, x, pointwise=True).leak
    assert check_causal(leaky, x, perturb_params=sigma).leak


@pytest.mark.slow
def test_trainable_says_what_noise_moves(x):
    model = LinearAttention(0.5 * jnp.tri(T))
    report = check_causal(model, x, perturb_params=0.02)
    assert report.leak and "trainable=" in str(report)
    only = eqx.tree_at(lambda m: m.scale, jax.tree.map(lambda _: False, model), True)
    not_the_mask = lambda leaf: eqx.is_inexact_array(leaf) and leaf.shape != (T, T)
    for spec in (only, not_the_mask):
        report = check_causal(model, x, perturb_params=0.02, trainable=spec)
        assert not report.leak, str(report)
        assert not any("react to no input but their own" in note for note in report.notes)


def test_noise_leaves_state_alone():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(D, "batch", mode="batch")
    index = eqx.nn.StateIndex(jnp.full(3, 0.5))
    fn = jtu.Partial(lambda *args: None, norm, state, index)
    noisy, skipped = perturbed(fn, 1.0, np.random.default_rng(0), None)
    assert eqx.tree_equal(noisy.args[1:], fn.args[1:])
    before, after = (f.args[0].weight for f in (fn, noisy))
    assert (before != after).all()
    assert skipped == ["0.1", "0.2"]


def test_messages_mention_the_noise(x):
    model = jtu.Partial(lambda variance, x: x / jnp.sqrt(variance), jnp.full((1, D), 1e-6))
    with pytest.raises(ValueError, match="must return finite numbers") as caught:
        check_causal(model, x, perturb_params=10.0)
    (note,) = caught.value.__notes__
    assert "Noise of size 10 was added to the parameters." in note and "trainable=" in note


def test_noise_that_is_none_is_refused(x):
    for sigma in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="perturb_params must be positive and finite"):
            check_causal(LinearAttention(jnp.tri(T)), x, perturb_params=sigma)
    with pytest.raises(TypeError, match="float arrays that trainable= selects"):
        check_causal(LinearAttention(jnp.tri(T)), x, perturb_params=1, trainable=False)


# One input at a time


@pytest.mark.parametrize("kind", ["floats", "tokens"])
def test_a_leak_of_one_value_that_only_the_leaking_edit_drew(x, ids, kind):
    """Edits of single positions draw other values, and say nothing about this one."""
    x, token_values = (x, None) if kind == "floats" else (ids, (10**6,))
    editor = make_editor((np.asarray(x),), (0,), SCALES, token_values, None)
    leaking = next(Rule("causal", rules.causal(T)).edits((3,), editor.kinds))
    special = editor.apply(leaking)[0][5].ravel()[0]

    def fn(x):
        hit = (x[5].ravel()[0] == special).astype(jnp.float32)
        return x.reshape(T, -1)[:, 0].astype(jnp.float32).at[1].add(hit)

    report = check_causal(fn, x, splits=[3], token_values=token_values)
    assert [(pair.output, pair.input) for pair in report.pairs()] == [(1, 5)]
    assert not report.joint and "No input does it alone" not in str(report)


def test_one_position_keeps_the_value_of_the_edit_it_is_taken_from(x):
    editor = make_editor((np.asarray(x), np.arange(T)), (0, 0), (1.0,), None, None)
    for kind in range(editor.kinds):
        whole = Edit(np.arange(T) >= 3, kind, seed(kind))
        before, edited = editor.apply(nothing(editor)), editor.apply(whole)
        alone = editor.apply(at_one(whole, 5))
        for old, new, one in zip(before, edited, alone, strict=True):
            assert np.array_equal(one[5], new[5])
            assert np.array_equal(np.delete(one, 5, 0), np.delete(old, 5, 0))


def test_two_inputs_that_leak_only_together_still_do(x):
    x0 = np.asarray(x)
    apart = lambda x: jnp.abs(x - jnp.asarray(x0)) > 1e-3
    both = lambda x: x.at[1].add(apart(x)[5:7, 0].all().astype(x.dtype))
    report = check_causal(both, x)
    assert report.joint and "No input does it alone" in str(report)


@pytest.mark.slow
def test_long_sequences_say_how_many_inputs_were_tried_alone():
    x = normal(jr.key(seed(3)), (600, 1))
    old = np.asarray(x)
    apart = lambda x: jnp.abs(x - jnp.asarray(old)) > 1e-3
    both = lambda x: x.at[1].add(apart(x)[-2:].all().astype(x.dtype))
    report = check_causal(both, x, splits=[2])
    assert report.joint
    words = " ".join(str(report).split())
    assert "512 of 598 values of the leaking edits were tried alone" in words


# Arrays that are split over devices


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P(None, "d"), P("d", None)])
def test_explicit_sharding_is_kept(x, spec):
    """In the unedited input, the edits, the float64 re-run and the gradients."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))

    def model(x):
        assert jax.typeof(x).sharding.spec == spec
        return x + jnp.zeros_like(x)

    def faint(x):  # told by float64, through a loop whose carry is split
        return jax.lax.fori_loop(0, 2, lambda _, h: h + 1e-6 * jnp.roll(x, -1, 0), model(x))

    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        assert check_causal(model, split, pointwise=True).status == "clear"
        if spec[0] is None:
            assert check_causal(faint, split).leak
        for method in ("perturb", "vjp"):
            matrix = dependency_matrix(model, split, method=method)
            assert np.array_equal(matrix > 0, np.eye(T, dtype=bool))


def test_weakly_typed_input_is_traced_as_it_is_run():
    """Else the trace has one dtype inside, and what runs another."""
    weak = jnp.where(jnp.arange(T) < 3, 1.0, 2.0)
    assert weak.weak_type
    seen = []
    check_causal(lambda x: seen.append(x.weak_type) or x.cumsum(), weak)
    assert not any(seen)


# Splits


RULES = {
    "causal": rules.causal,
    "strictly causal": lambda length: rules.causal(length, strict=True),
    "independent": rules.independent,
}


@pytest.mark.parametrize("kind", RULES)
def test_watched_and_covered_by_their_definitions(kind):
    rng = np.random.default_rng(seed(4))
    rule = Rule(kind, RULES[kind](13))
    edits = [Edit(where, 0, 0) for where in rng.random((40, 13)) < rng.random((40, 1))]
    read = np.stack([edit.where for edit in edits]).astype(int) @ rule.allowed.T.astype(int)
    assert np.array_equal(rule.watch(edits), read == 0)

    splits = rule.choose(rng.choice([*rule.possible], 4, replace=False).tolist(), rng)
    expected = np.full((13, 13), np.nan)
    for split in splits:
        where = rule.where(split)
        (watched,) = rule.watch([Edit(where, 0, 0)])
        expected[np.ix_(watched, where)] = 0
    assert np.array_equal(rule.covered(splits), expected, equal_nan=True)


def test_no_square_arrays_but_those_of_the_report():
    length = 2000
    rule, rng = Rule("causal", rules.causal(length)), np.random.default_rng(seed(5))
    edits = [*rule.edits(rule.choose("auto", rng), 7)]
    tracemalloc.start()
    rule.watch(edits)
    _, peak = tracemalloc.get_traced_memory()
    assert peak < length**2  # 68 edits: less than a byte a pair of positions
    tracemalloc.reset_peak()
    rule.covered(rule.choose("auto", rng))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * length**2  # float32 and little else


@pytest.mark.parametrize("length", [129, 300, 1000, 4096, 16_000, 1_000_003])
@pytest.mark.parametrize("first", [0, 1])
def test_chosen_splits_leave_no_wide_gap(first, length):
    possible = np.arange(first, length)
    splits = spread(possible, np.random.default_rng(seed(6)))
    assert len(splits) == 68 == len(set(splits)) and set(splits) <= set(possible.tolist())
    # 12 or more were put into the widest gap of the time, leaving 3/8 of it on either side, less 1
    # for rounding. So 13 gaps are at least 3/8 of the widest of the end, less 1.
    assert np.diff([0, *splits, length]).max() <= 8 / 3 * (length / 13 + 1)
    powers = [2**i for i in range(1, (length - 1).bit_length())][-12:]
    beside = {p + step for p in powers[-3:] for step in (-1, 1) if p + step < length}
    assert {*powers, *beside} <= set(splits)


@pytest.mark.parametrize("length, every", [(300, 37), (1000, 120), (2048, 90)])
def test_chosen_splits_end_chunks_of_every_length(length, every):
    """Up to `every`, and those that are usual up to a fifth of the length. All but 12 are fixed."""
    splits = np.array(spread(np.arange(1, length), np.random.default_rng(seed(6))))
    usual = {n for n in range(2, length // 5) if n % 8 == 0 or n % 10 == 0}
    for chunk in {*range(2, every + 1), *usual}:
        assert (splits % chunk == 0).any(), chunk
    # Rows of a rule are numbered by the output before the border.
    rows = spread(np.arange(length - 1), np.random.default_rng(seed(6)), ahead=1)
    assert rows == (splits - 1).tolist()


@pytest.mark.slow
def test_what_is_missed_at_odd_chunks_is_said_and_found_by_the_structure():
    """A read one ahead at every 131st of 600 positions: no split is a multiple of that."""
    where = np.arange(600) + (np.arange(600) % 131 == 130)
    x = jnp.asarray(np.random.default_rng(seed(1)).normal(size=600), jnp.float32)
    fn = lambda x: jnp.cumsum(x)[where]
    missed = check_causal(fn, x)
    assert not missed.leak
    assert "prove=True tries those where" in " ".join(str(missed).split())
    found = check_causal(fn, x, prove=True)
    assert found.leak and found.splits == (131, 262, 393, 524)
    assert "prove=True tries" not in " ".join(str(found).split())
