"""is_norm, and the trees that are made with it as `is_leaf`."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import pytest
from draws import seed

import eqx_norms
from eqx_norms import is_norm

KEY = jr.key(seed(0))
NORMS = {
    "LayerNorm": eqx_norms.LayerNorm(4),
    "RMSNorm": eqx_norms.RMSNorm(4),
    "GroupNorm": eqx_norms.GroupNorm(2, 4),
    "AdaLayerNorm": eqx_norms.AdaLayerNorm(4, 3, key=KEY),
    "CumulativeNorm": eqx_norms.CumulativeNorm(4),
    "SegmentNorm": eqx_norms.SegmentNorm(4),
    "eqx.nn.LayerNorm": eqx.nn.LayerNorm(4),
    "eqx.nn.RMSNorm": eqx.nn.RMSNorm(4),
    "eqx.nn.GroupNorm": eqx.nn.GroupNorm(2, 4),
    "eqx.nn.BatchNorm": eqx.nn.BatchNorm(4, "batch", mode="batch"),
    "without parameters": eqx_norms.LayerNorm(4, use_weight=False, use_bias=False),
    "stacked": eqx.filter_vmap(lambda _: eqx_norms.LayerNorm(4))(jnp.arange(3)),
    "shapes": eqx.filter_eval_shape(eqx_norms.LayerNorm, 4),
    "partitioned": eqx.partition(eqx.nn.LayerNorm(4), eqx.is_array)[1],
    "a subclass": type("Mine", (eqx.nn.LayerNorm,), {})(4),
}
OTHERS = {
    "Linear": (linear := eqx.nn.Linear(4, 4, key=KEY)),
    "MultiheadAttention": eqx.nn.MultiheadAttention(2, 4, key=KEY),
    "Identity": eqx.nn.Identity(),
    "SpectralNorm": eqx.nn.SpectralNorm(linear, "weight", key=KEY),
    "WeightNorm": eqx.nn.WeightNorm(linear),
    "that holds a norm": eqx.nn.Sequential([eqx.nn.LayerNorm(4)]),
    "an array": jnp.ones(4),
    "a class": eqx_norms.LayerNorm,
    "nothing": None,
}


@pytest.mark.parametrize("name", NORMS)
def test_norms(name):
    assert is_norm(NORMS[name]) is True


@pytest.mark.parametrize("name", OTHERS)
def test_others(name):
    assert is_norm(OTHERS[name]) is False


def test_every_norm_of_the_package_and_of_eqx_nn_was_asked():
    """A norm that either gets later has to be added here, and to `is_norm` or to the others."""
    public = {
        prefix + name
        for prefix, module in (("", eqx_norms), ("eqx.nn.", eqx.nn))
        for name, value in vars(module).items()
        if isinstance(value, type) and name.endswith("Norm")
    }
    asked = {*NORMS, *(f"eqx.nn.{name}" for name in OTHERS)}
    assert public <= asked


def test_as_is_leaf_it_finds_norms_at_any_depth():
    model = {"a": [OTHERS["that holds a norm"], NORMS["RMSNorm"]], "b": (linear, KEY)}
    leaves = jax.tree.leaves(model, is_leaf=is_norm)
    assert [type(leaf).__name__ for leaf in leaves if is_norm(leaf)] == ["LayerNorm", "RMSNorm"]
    assert len(leaves) == 2 + 3  # weight, bias and key
