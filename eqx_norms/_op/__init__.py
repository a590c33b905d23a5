"""The one operation behind every layer; the layers see what is named here, and nothing below."""

from ._cumulative import (
    CumulativeState as CumulativeState,
    no_steps as no_steps,
    normalize_chunk as normalize_chunk,
    normalize_so_far as normalize_so_far,
)
from ._lowering import MARKS as MARKS, grouped as grouped
from ._normalize import (
    as_jax_has_it as as_jax_has_it,
    normalize as normalize,
    normalize_reference as normalize_reference,
    together as together,
)
from ._plain import plain as plain
from ._reach import Reach as Reach
from ._rounded import rounded as rounded
from ._rows import PRIMITIVES as PRIMITIVES, normalize_by as normalize_by
