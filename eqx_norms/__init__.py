"""Normalization layers for Equinox with a hand-written derivative."""

__version__ = "0.1.0"
