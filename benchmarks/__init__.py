"""Ours against what a user would pick instead: speed, bytes, compile time, accuracy."""
