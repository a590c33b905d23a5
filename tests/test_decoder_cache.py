"""The cache of examples/decoder: the same scores and the same names as without it.

The oracle is the full forward, compared as `assert_same` compares; and caches broken on purpose.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed

from eqx_norms import CumulativeNorm
from eqx_norms.causality import DifferenceError
from examples.decoder import cache, model
from examples.decoder.data import split
from examples.decoder.sample import sample
from examples.decoder.settings import PLACEMENTS, Settings

SYMBOLS, CONTEXT = 7, 6
SMALL = Settings(width=8, layers=2, heads=2, context=CONTEXT)
slow = pytest.mark.slow


def decoder(so_far=None, **options):
    """With every parameter moved, so that none is 0 or 1 as at the start.

    `so_far`: with norms over the letters so far in the place of those of a letter, made with these.
    """
    made = model.Decoder(dataclasses.replace(SMALL, **options), SYMBOLS, key=jr.key(seed(0)))
    if so_far is not None:
        is_norm = lambda node: isinstance(node, model.PerToken)
        new = lambda node: CumulativeNorm(SMALL.width, **so_far) if is_norm(node) else node
        made = jax.tree.map(new, made, is_leaf=is_norm)
    params, static = eqx.partition(made, eqx.is_inexact_array)
    keys = iter(jr.split(jr.key(seed(1)), 100))
    moved = jax.tree.map(lambda leaf: leaf + 0.1 * normal(next(keys), leaf.shape), params)
    return eqx.combine(moved, static)


def letters():
    return jr.randint(jr.key(seed(2)), (CONTEXT,), 0, SYMBOLS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        *(pytest.param({"placement": placement}, marks=slow) for placement in PLACEMENTS[1:]),
        pytest.param({"bf16": True}, marks=slow),
        pytest.param({"norm": "none", "remat": True}, marks=slow),
        pytest.param({"norm": "layer-scale"}, marks=slow),
        pytest.param({"so_far": {}}, marks=slow),
        pytest.param({"so_far": {"groups": 2, "window": 3}, "placement": "peri"}, marks=slow),
        pytest.param({"so_far": {"decay": 0.5}, "bf16": True}, marks=slow),
    ],
    ids=str,
)
def test_letter_by_letter_is_the_same_function(options):
    report = cache.check_cache(decoder(**options), letters(), SYMBOLS)
    assert report.status in ("same bits", "rounding")


def with_positions_off_by_one(model):
    return eqx.tree_at(lambda m: m.position, model, jnp.roll(model.position, 1, 0))


def with_a_weight_off(model):
    where = lambda m: m.blocks[1].attention.key_proj.weight
    return eqx.tree_at(where, model, where(model).at[2, 1].add(1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [with_positions_off_by_one, with_a_weight_off])
def test_a_wrong_cache_is_not_used(wrong, monkeypatch):
    right = cache.next_scores
    monkeypatch.setattr(cache, "next_scores", lambda model, *args: right(wrong(model), *args))
    with pytest.raises(DifferenceError, match=r"^The cache is not used:\ndifferent: "):
        cache.check_cache(decoder(), letters(), SYMBOLS)


@pytest.mark.slow
@pytest.mark.parametrize("norm", model.LEAKING)
def test_norms_over_tokens_have_no_cache(norm):
    with pytest.raises(ValueError, match="a norm over tokens cannot have one: each new letter"):
        cache.check_cache(decoder(norm=norm), letters(), SYMBOLS)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["per-token", "over-tokens"])
def test_the_writer_is_chosen(norm):
    names = split([a + b + c for a in "abc" for b in "def" for c in "gh"], CONTEXT)
    chosen = model.Decoder(
        dataclasses.replace(SMALL, norm=norm), len(names.vocabulary), key=jr.key(0)
    )
    write, said = cache.writer(chosen, names)
    if norm == "per-token":
        assert write is cache.sample_cached
        assert said.startswith("writes with a cache, checked on 8 names: ")
    else:
        assert write is sample
        assert said.startswith("writes without a cache: a norm over tokens cannot have one:")


@pytest.mark.slow
@pytest.mark.parametrize("so_far", [None, {}], ids=["per token", "so far"])
def test_names_are_those_written_without_a_cache(so_far, getkey):
    # From the same random numbers. Rounding may decide between two letters that nearly tie: of
    # 120 choices by scores that differ by some 1e-6, one in about ten thousand such tests.
    chosen, key = decoder(so_far), getkey()
    options = {"count": 20, "context": CONTEXT}
    one, two = sample(chosen, key, **options), cache.sample_cached(chosen, key, **options)
    np.testing.assert_array_equal(one, two)
    assert one.dtype == two.dtype and len(np.unique(one)) > 2


@pytest.mark.slow
def test_rates_are_printed(capsys):
    assert cache.main(["--context", "4", "--names", "2", "--width", "8", "--layers", "1"]) == 0
    out = capsys.readouterr().out
    assert "the same up to rounding" in out or "give equal values" in out
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["full", "cached"]
