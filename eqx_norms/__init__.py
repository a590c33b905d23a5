"""Normalisation layers for Equinox with a hand-written backward pass, and two instruments.

Layers act on one example: map them with `jax.vmap`. `LayerNorm`, `RMSNorm`, `GroupNorm` and
`AdaLayerNorm` are modules; `layer_norm`, `rms_norm` and `group_norm` are the functions behind them.
`replace_norms` exchanges the norms of a model, and `is_norm` finds them.

`eqx_norms.causality` asks who reads whom: `assert_causal`, `assert_reads`, `assert_same`.
`eqx_norms.diagnostics` looks inside a model: `diagnose`, `capture`, `Watch`.
"""

from ._ada_layer_norm import AdaLayerNorm as AdaLayerNorm
from ._cumulative_norm import (
    CumulativeNorm as CumulativeNorm,
    cumulative_norm as cumulative_norm,
)
from ._group_norm import GroupNorm as GroupNorm, group_norm as group_norm
from ._is_norm import is_norm as is_norm
from ._layer_norm import LayerNorm as LayerNorm, layer_norm as layer_norm
from ._op import (
    normalize_reference as normalize_reference,
    plain as plain,
    rounded as rounded,
)
from ._replace import replace_norms as replace_norms
from ._rms_norm import RMSNorm as RMSNorm, rms_norm as rms_norm
from ._segment_norm import SegmentNorm as SegmentNorm, segment_norm as segment_norm
from .causality import assert_causal as assert_causal, assert_independent as assert_independent

__version__ = "0.1.0"

__all__ = [
    "AdaLayerNorm",
    "CumulativeNorm",
    "GroupNorm",
    "LayerNorm",
    "RMSNorm",
    "SegmentNorm",
    "assert_causal",
    "assert_independent",
    "cumulative_norm",
    "group_norm",
    "is_norm",
    "layer_norm",
    "normalize_reference",
    "plain",
    "replace_norms",
    "rms_norm",
    "rounded",
    "segment_norm",
]
