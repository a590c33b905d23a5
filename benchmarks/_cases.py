"""What is measured: names, shapes and dtypes. Imports no array library, for the parent process."""

import importlib.util
from typing import NamedTuple

NAMES = {
    "ours": "eqx_norms",
    "eqx": "eqx.nn",
    "flax": "flax",
    "haiku": "haiku",
    "keras": "keras",
    "jnp": "plain jnp",
    "torch": "torch",
    "copy": "copy",
}
RIVALS = tuple(NAMES)[1:]
JAX_RIVALS = ("eqx", "flax", "haiku", "keras", "jnp")
MODULES = {"eqx": "equinox", "flax": "flax", "haiku": "haiku", "keras": "keras", "torch": "torch"}

LAYERS = ("LayerNorm", "RMSNorm", "GroupNorm")
ROWS = ("64x128", "4096x768", "16384x1024", "65536x256", "2048x4096")
DTYPES = ("float32", "bfloat16", "float16")
WORKS = ("forward", "backward", "stack")
SECTIONS = ("speed", "bytes", "compile", "accuracy")

EPS = 1e-5
GROUPS = 32
LAYERS_OF_STACK = 12
STACK_ROWS = "1024x256"


class Case(NamedTuple):
    """One row of the speed tables. In the JSON, the keys are these names."""

    layer: str
    rows: str
    dtype: str
    work: str

    @property
    def shape(self) -> tuple[int, int]:
        """How many examples, and how many entries each."""
        rows, n = self.rows.split("x")
        return int(rows), int(n)


def speed_cases(rival, layers, rows, dtypes, works) -> list[Case]:
    """Shape by shape. The copy, the floor of all layers alike, stands in the rows of LayerNorm."""
    if rival == "copy":
        layers, works = [x for x in layers if x == "LayerNorm"], [w for w in works if w != "stack"]
    single = [
        Case(layer, shape, dtype, work)
        for shape in rows
        for dtype in dtypes
        for layer in layers
        for work in works
        if work != "stack"
    ]
    stacks = [Case(layer, STACK_ROWS, dtype, "stack") for layer in layers for dtype in dtypes]
    return single + [case for case in stacks if "stack" in works and case.layer == "LayerNorm"]


def is_installed(rival: str) -> bool:
    return rival not in MODULES or importlib.util.find_spec(MODULES[rival]) is not None
