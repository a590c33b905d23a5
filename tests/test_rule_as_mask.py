"""The example: what its checks say of the decoder as it is, and of decoders that are wrong."""

import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from draws import normal, seed

from eqx_norms.causality import DifferenceError, assert_same, check_reads, rules

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
example = importlib.import_module("rule_as_mask")

PACKED = rules.causal(example.TOKENS) & rules.segments(example.DOCUMENTS)


@pytest.fixture(scope="module")
def decoder():
    return example.make_decoder(jr.key(seed(0)))


@pytest.fixture
def x():
    return normal(jr.key(seed(1)), (example.TOKENS, example.WIDTH))


@pytest.mark.slow
def test_every_rule_is_proved_and_the_cache_is_the_same(capsys):
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("reads:")[0].strip() for line in lines] == [
        "packed documents",
        "padded",
    ]
    for line in lines:
        _, reads, same = line.split(": ")
        assert reads.split()[0] == "proved" and same in ("rounding", "same bits"), line


@pytest.mark.slow
def test_a_mask_that_is_turned_or_too_narrow_is_found(decoder, x):
    """Under the rule of two documents: read ahead, and within two positions."""
    forward = lambda mask: lambda x: example.forward(x, decoder, jnp.asarray(mask))
    turned = check_reads(forward(PACKED.T), x, PACKED, required=PACKED)
    strict = np.tri(example.TOKENS, k=-1, dtype=bool)
    assert np.array_equal(turned.leaking(), PACKED.T & ~PACKED)
    assert np.array_equal(turned.missing(), PACKED & strict)


@pytest.mark.slow
def test_a_cache_that_forgets_is_found(decoder, x):
    """The last token that was kept is not there: a step that writes one too late."""

    def late(x):
        stale = jnp.asarray(PACKED & ~np.eye(example.TOKENS, k=-1, dtype=bool))
        return example.cached(x, decoder, stale)

    full = lambda x: example.forward(x, decoder, jnp.asarray(PACKED))
    with pytest.raises(DifferenceError):
        assert_same(full, late, x)
    same = jax.jit(lambda x: example.cached(x, decoder, jnp.asarray(PACKED)))
    assert_same(full, same, x)
