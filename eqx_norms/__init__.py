"""Normalization layers for Equinox with a hand-written derivative, and a causality check."""

from ._ada_layer_norm import AdaLayerNorm as AdaLayerNorm
from ._cumulative_norm import (
    CumulativeNorm as CumulativeNorm,
    cumulative_norm as cumulative_norm,
)
from ._group_norm import GroupNorm as GroupNorm, group_norm as group_norm
from ._is_norm import is_norm as is_norm
from ._layer_norm import LayerNorm as LayerNorm, layer_norm as layer_norm
from ._op import normalize_reference as normalize_reference, plain as plain
from ._replace import replace_norms as replace_norms
from ._rms_norm import RMSNorm as RMSNorm, rms_norm as rms_norm
from ._segment_norm import SegmentNorm as SegmentNorm, segment_norm as segment_norm
from .causality import assert_causal as assert_causal, assert_independent as assert_independent

__version__ = "0.1.0"
