"""What `Watch` measures at one step."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

BINS_A_DOUBLING, DOUBLINGS = 4, 16
_SIZES = 2.0 ** (np.arange(-BINS_A_DOUBLING * DOUBLINGS, 1) / BINS_A_DOUBLING)
# The edges of the bins of a histogram, over the largest entry.
EDGES = np.concatenate([-_SIZES[::-1], _SIZES])


class Look(NamedTuple):
    """What [`eqx_norms.diagnostics.Watch.measure`][] returns.

    `values`, `grads` and `params` hold the statistics of each array by its name, in the order of
    the calls and of the parameters. Inside a `jax.lax.scan` they hold those of each step. They are
    mappings, which hold all layers of a kind in one array. `{**look.values}` is a dictionary of
    dictionaries.

    - `loss`: the loss.
    - `values`: of what the submodules return `mean`, `std`, `rms`, `largest` (in absolute value),
        `non_finite` (the share of entries), `effective_rank` of at most 256 examples, `dead` and
        `counts`, a histogram. `dead` is the share of units as
        [`eqx_norms.diagnostics.dead_unit_fraction`][] counts it, or of those with derivative 0 in
        all examples, if that is more. The linear layer in front of a dead ReLU has such units.
    - `grads`: of the loss's derivatives there `rms`, `non_finite`, `silent` (the share of units
        with derivative 0 in all examples), `largest` and `counts`.
    - `params`: `rms` and `grad_rms`; `update_ratio` if there is an optimiser.

    The histograms count by sign and size. They have four bins for each doubling, from 2⁻¹⁶ of the
    largest entry to the largest. The bin in the middle counts what is smaller.
    """

    loss: Float[Array, ""]
    values: Mapping[str, dict[str, Any]]
    grads: Mapping[str, dict[str, Any]]
    params: Mapping[str, dict[str, Any]]
