"""Normalization layers for Equinox with a hand-written derivative, and a causality check."""

from ._layer_norm import LayerNorm as LayerNorm, layer_norm as layer_norm
from ._normalize import normalize_reference as normalize_reference

__version__ = "0.1.0"
