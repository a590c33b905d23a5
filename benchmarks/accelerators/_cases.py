"""What is compiled. Imports no array library: the parent is light."""

import itertools
from typing import NamedTuple

from .._cases import NAMES, shape_of

PLATFORMS = {"h100": "H100", "v5e": "TPU v5e", "v6e": "TPU v6e"}
PALLAS = "pallas"  # ours with `implementation="pallas"`
LIBRARIES = ("ours", "eqx", "flax", PALLAS)
NO_NORM = "none"  # the model without norms: what its norms cost is the difference
AXIS_NAME = "axis_name"  # ours by parts, in a `jax.shard_map`
LIBRARY_NAMES = {
    **{name: NAMES[name] for name in LIBRARIES if name != PALLAS},
    PALLAS: "eqx_norms, pallas",
    NO_NORM: "no norm",
    AXIS_NAME: "eqx_norms, axis_name=",
}
DTYPES = ("float32", "bfloat16")

LAYER_ROWS = ("4096x768", "16384x1024", "8192x4096", "4096x12288")
MODEL_ROWS = "8192x1024"
UNROLLED, SCANNED = 6, 8  # layers
LAYER_WORKS = {"forward": "Forward", "backward": "Forward and backward"}
MODELS = {
    "tanh": f"{UNROLLED} [norm, matmul, tanh]",
    "tanh, x fixed": f"{UNROLLED} [norm, matmul, tanh], x fixed",
    "tanh, x and norms fixed": f"{UNROLLED} [norm, matmul, tanh], x and norms fixed",
    "mlp": f"{UNROLLED} MLP blocks",
    "tanh scan": f"scan of {SCANNED} [norm, matmul, tanh]",
    "mlp scan": f"scan of {SCANNED} MLP blocks",
    "tanh scan, checkpoint": f"scan of {SCANNED} [norm, matmul, tanh], checkpoint",
    "mlp scan, checkpoint": f"scan of {SCANNED} MLP blocks, checkpoint",
}
SECTIONS = ("layers", "models", "collectives")

SPLITS = ("batch", "features")
SPLIT_ROWS, SPLIT_OVER = "8192x4096", 4


class Case(NamedTuple):
    """One program; in the JSON, the keys are these names."""

    platform: str
    library: str
    layer: str
    dtype: str
    work: str
    rows: str

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.rows)


class Split(NamedTuple):
    """A LayerNorm, forward and backward, whose x is split over four devices."""

    platform: str
    library: str
    split: str

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(SPLIT_ROWS)


def layer_cases(platforms, libraries, layers, dtypes, rows) -> list[Case]:
    return [
        Case(platform, library, layer, dtype, work, shape)
        for platform, layer, dtype, work, shape, library in itertools.product(
            platforms, layers, dtypes, LAYER_WORKS, rows, libraries
        )
        if _is_to_be_had(platform, library, layer)
    ]


def model_cases(platforms, libraries, layers, dtypes, rows=MODEL_ROWS, works=MODELS) -> list[Case]:
    """Row by row, so that those of an interrupted run have their libraries beside each other."""
    return [
        Case(platform, library, layer, dtype, work, rows)
        for platform, work, dtype in itertools.product(platforms, works, dtypes)
        for library, layer in [(NO_NORM, ""), *itertools.product(libraries, layers)]
        if _is_to_be_had(platform, library, layer)
    ]


def _is_to_be_had(platform: str, library: str, layer: str) -> bool:
    """Kernels are for two layers, and XLA estimates no cycles for those of a TPU."""
    return library != PALLAS or (platform == "h100" and layer != "GroupNorm")


def split_cases(platforms, libraries) -> list[Split]:
    libraries = [name for name in libraries if name != PALLAS]  # which takes the plain path there
    cases = [Split(*parts) for parts in itertools.product(platforms, libraries, SPLITS)]
    if "ours" in libraries:
        cases += [Split(platform, AXIS_NAME, "features") for platform in platforms]
    return cases


def layers_of(work: str) -> int:
    """How many norms the model has."""
    return SCANNED if "scan" in work else UNROLLED
