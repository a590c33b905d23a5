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

    Use it as the `is_leaf` of `jax.tree.map`, which then stops at whole norms. This casts all of a
    model except its norms to bfloat16:
    ```python
    cast = lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf
    keep_norms = lambda node: node if is_norm(node) else cast(node)
    model = jax.tree.map(keep_norms, model, is_leaf=is_norm)
    ```
    [Recipes](../recipes.md) shows a mask for weight decay, another learning rate for norms, and how
    to train the norms alone.

    **Arguments:**

    - `node`: anything.

    **Returns:**

    `True` for `LayerNorm`, `RMSNorm`, `GroupNorm`, `AdaLayerNorm`, `CumulativeNorm` and
    `SegmentNorm` of this package, for `LayerNorm`, `RMSNorm`, `GroupNorm` and `BatchNorm` of
    `equinox.nn`, and for their subclasses. Their parameters may also be stacked, be only shapes,
    or be `None` after `equinox.partition`. An `AdaLayerNorm` counts as one norm with the `linear`
    that computes its scale and shift. The answer is `False` for `eqx.nn.SpectralNorm` and
    `WeightNorm`, because they hold a layer whose weight they normalise. It is also `False` for a
    class of yours that merely holds a norm. The norm inside is found.
    """
    return isinstance(node, _norms)
