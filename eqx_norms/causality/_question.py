"""Whether the question that was asked is the one that was meant: positions along another axis?"""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ._inputs import Problem


class CausalityWarning(UserWarning):
    """A test shows nothing: no output reads another position, as along a batch axis."""


def nothing_is_read(problem: Problem, asked: str, zero_branch: bool) -> str:
    """What to do where no output reads another position along the axes `asked`."""
    time = likely_time(problem)
    causes = [
        f"if that is the batch, pass the axis of time instead: axis={time}" * (time is not None),
        "if a branch starts at zero, move it: perturb_params=0.02" * zero_branch,
        "if each position is meant to be on its own, as in a norm of each token, say so: "
        "pointwise=True",
    ]
    causes = "; ".join(filter(None, causes))
    return (
        f"No output reads another position along {asked}, so that this test shows nothing about "
        f"a model that does. {causes[0].upper()}{causes[1:]}."
    )


def likely_time(problem: Problem) -> int | None:
    """The first other axis that every array has at one length, features aside."""
    if len(problem.in_lengths) > 1:
        return None
    arrays = [*problem.leaves, *problem.outs]
    taken = {*problem.in_axes, *problem.out_axes}
    for axis in range(min(array.ndim for array in arrays)):
        lengths = {array.shape[axis] for array in arrays}
        if axis in taken or len(lengths) > 1 or lengths == {1}:
            continue
        if not any(_is_feature_axis(leaf, axis) for leaf in problem.leaves):
            return axis
    return None


def _is_feature_axis(leaf: Any, axis: int) -> bool:
    """The last of at least three; of two, as (batch, time), nobody can tell."""
    return leaf.ndim > 2 and axis == leaf.ndim - 1 and jnp.issubdtype(leaf.dtype, jnp.inexact)


def warn(message: str, skipped: Sequence[str] = (__name__.split(".")[0], "jaxtyping")) -> None:
    """A `CausalityWarning` at the line that called this package."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in skipped:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, CausalityWarning, stacklevel=level)
