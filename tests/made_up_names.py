"""Some names for the decoders of the examples to learn."""

NAMES = [a + b for a in ("an", "ber", "ca", "do", "el") for b in ("son", "ley", "ton", "man", "s")]
