"""Everything that decides what a run computes. A checkpoint carries it, and `--resume` compares."""

import dataclasses
import math

# Where the norms of a block stand, `model.Block` says how.
PLACEMENTS = ("pre", "post", "sandwich", "peri", "parallel")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The defaults are the run that the documentation shows."""

    norm: str = "per-token"  # of `model.NORMS`, or what stands instead, of `instead.INSTEAD`
    norms: str = "ours"  # whose layers: "ours" or "eqx"
    placement: str = "pre"  # one of `PLACEMENTS`
    width: int = 96
    layers: int = 3
    heads: int = 4
    context: int = 16  # letters of a name and its end mark, filled up with end marks
    bf16: bool = False  # activations; parameters stay float32
    remat: bool = False  # recompute each block in the backward
    steps: int = 2500
    batch: int = 128  # names in a step
    rate: float = 6e-3  # the highest learning rate
    warm_up: float = 0.05  # the share of the steps until it is reached
    weight_decay: float = 0.1
    clip: float = 1.0  # the largest norm of a gradient
    seed: int = 0

    def __post_init__(self):
        for name in ("width", "layers", "heads", "context", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:  # JAX's keys are of 32 bits
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be positive and finite, got {self.rate}")
        if self.placement not in PLACEMENTS:
            raise ValueError(
                f"placement must be one of {', '.join(PLACEMENTS)}, got {self.placement!r}"
            )
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of the {self.heads} heads, got {self.width}; "
                f"try {-(-self.width // self.heads) * self.heads}"
            )


QUICK = {"width": 32, "layers": 1, "heads": 2, "steps": 60, "batch": 32}  # seconds
