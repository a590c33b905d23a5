"""What is measured, and what it should come to. Imports no array library: the parent is light."""

import importlib.util
from typing import NamedTuple

NAMES = {
    "ours": "eqx_norms",
    "eqx": "eqx.nn",
    "flax": "flax",
    "flax, two-pass": "flax, two-pass",
    "haiku": "haiku",
    "keras": "keras",
    "jnp": "plain jnp",
    "kernel": "our kernel",
    "torch": "torch",
    "copy": "copy",
}
JAX_RIVALS = ("eqx", "flax", "haiku", "keras", "jnp")
RIVALS = (*JAX_RIVALS, "kernel", "torch", "copy")
MODULES = {
    "eqx": "equinox",
    "flax": "flax",
    "haiku": "haiku",
    "keras": "keras",
    "kernel": "numba",
    "torch": "torch",
    "tokamax": "tokamax",
}

SECTIONS = ("speed", "bytes", "compile", "accuracy")
LAYERS = ("LayerNorm", "RMSNorm", "GroupNorm")
ROWS = ("64x128", "4096x768", "16384x1024", "65536x256", "2048x4096")
DTYPES = ("float32", "bfloat16", "float16")
MODEL_DTYPES = ("float32", "bfloat16")  # of whole models, their bytes and their compilation
WORKS = {
    "forward": "Forward",
    "backward": "Forward and backward",
    "stack": "Gradient of twelve pre-norm MLP blocks",
    "decoder": "Training step of the decoder",
}
SINGLE = ("forward", "backward")  # one layer; the others are models

EPS = 1e-5
GROUPS, CHANNELS = 32, 128
STACK_ROWS, STACK_LAYERS = "1024x256", 12
DECODER_ROWS = "2048x96"  # 128 names of 16 letters: the defaults of examples/decoder
SCAN_LAYERS = 8
BYTES_ROWS = ("512x256", "4096x768")
OFFSETS = (0.0, 1e2, 1e4, 1e6)
SCALES = (1e-4, 1.0, 1e4, 1e10, 1e17, 1e18, 1e19, 1e30)


class Case(NamedTuple):
    """One row of the speed tables; in the JSON, the keys are these names."""

    layer: str
    rows: str
    dtype: str
    work: str

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.rows)


def shape_of(rows: str) -> tuple[int, int]:
    """How many examples, and how many entries each: `"4096x768"` is (4096, 768)."""
    first, second = rows.split("x")
    return int(first), int(second)


def speed_cases(rival: str, layers, rows, dtypes, works) -> list[Case]:
    """Shape by shape, so that inputs are drawn once each; then the two models."""
    if rival == "copy":  # the same bytes whatever the layer
        layers, works = [layer for layer in layers if layer == "LayerNorm"], set(works) & {*SINGLE}
    single = [
        Case(layer, shape, dtype, work)
        for shape in rows
        for dtype in dtypes
        for layer in layers
        for work in SINGLE
        if work in works
    ]
    models = [("stack", STACK_ROWS)] + [("decoder", DECODER_ROWS)] * (rival == "eqx")
    return single + [
        Case("LayerNorm", shape, dtype, work)
        for work, shape in models
        for dtype in MODEL_DTYPES
        if work in works and dtype in dtypes and "LayerNorm" in layers
        if shape in rows or tuple(rows) == ROWS
    ]


def is_installed(rival: str) -> bool:
    return rival not in MODULES or importlib.util.find_spec(MODULES[rival]) is not None
