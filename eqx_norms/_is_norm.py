"""is_norm: which nodes of a model are norms."""

from typing import Any

import equinox as eqx

from ._ada_layer_norm import AdaLayerNorm
from ._cumulative_norm import CumulativeNorm
from ._group_norm import GroupNorm
from ._layer_norm import LayerNorm
from ._rms_norm import RMSNorm
from ._segment_norm import SegmentNorm

_norms = (
    LayerNorm,
    RMSNorm,
    GroupNorm,
    AdaLayerNorm,
    CumulativeNorm,
    SegmentNorm,
    eqx.nn.LayerNorm,
    eqx.nn.RMSNorm,
    eqx.nn.GroupNorm,
    eqx.nn.BatchNorm,
)


def is_norm(node: Any) -> bool:
    """Whether a node of a model is a norm, of this package or of `equinox.nn`.

    It is meant as the `is_leaf` of `jax.tree.map`, which then stops at whole norms. Everything but
    the norms in bfloat16:
    ```python
    cast = lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf
    keep_norms = lambda node: node if is_norm(node) else cast(node)
    model = jax.tree.map(keep_norms, model, is_leaf=is_norm)
    ```
    [Recipes](../recipes.md) has the mask for weight decay, learning rates of their own, and
    training the norms alone.

    **Arguments:**

    - `node`: anything.

    **Returns:**

    `True` for `LayerNorm`, `RMSNorm`, `GroupNorm`, `AdaLayerNorm`, `CumulativeNorm` and
    `SegmentNorm` of this package, for `LayerNorm`, `RMSNorm`, `GroupNorm` and `BatchNorm` of
    `equinox.nn`, and for their subclasses;
    with parameters that are stacked, only shapes, or `None` after `equinox.partition`, all the
    same. An `AdaLayerNorm` counts with the `linear` that computes its scale and shift.
    `eqx.nn.SpectralNorm` and `WeightNorm` are `False`: they hold a layer whose weight they
    normalise. So is a class of yours that merely holds a norm; the norm inside is found.
    """
    return isinstance(node, _norms)
