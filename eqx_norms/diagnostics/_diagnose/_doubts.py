"""What an optimiser will not do, though nothing is NaN: found by trying it, whatever its name.

It is asked for other steps from the same state: with the gradient's sign turned, with ones in the
place of zeros, without a gradient. So masks, labels and schedules count as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ..._processes import fetched
from .._capture._model import path
from .._layer_statistics import is_floating
from .._optimiser import compiled_state, compiled_step

_SMALL, _NEAR = 1e-3, 1e-2  # where a step is measured, and what counts as a vector near 0
_TIMES, _TURNED, _SHARE = 30.0, 1e-2, 0.25


class Doubt(NamedTuple):
    """As of a `Finding`: where, the figure and its limit, and what to do."""

    where: str
    value: float
    threshold: float
    advice: str


def doubts(
    optimiser: tuple[Any, PyTree],
    grads: PyTree,
    params: PyTree,
    paths: Sequence[str],
    stacks: Sequence[int],
    sizes: Sequence[float],
) -> list[Doubt]:
    """Of moments that cannot decay, of steps in proportion to a zero, of layers that are mixed.

    Of each leaf of `params` there are a path, how many axes of layers it has, and its rms.
    """
    optim, state = optimiser
    step = lambda grads, params: jtu.tree_leaves(compiled_step(optim, grads, state, params))
    try:
        return [
            *_stands_still(optim, grads, state, params),
            *_in_proportion(step, grads, params, paths, stacks, sizes),
            *_mixed(step, grads, params, paths, stacks),
        ]
    except TypeError:  # it asks for more than a gradient, as for the loss
        return []


def _stands_still(optim: Any, grads: PyTree, state: PyTree, params: PyTree) -> Iterator[Doubt]:
    """Moments in half precision that a step without a gradient leaves as they are."""
    if not any(map(_is_half, jtu.tree_leaves(state))):
        return
    nothing = jtu.tree_map(jnp.zeros_like, grads)
    # What is 0 at the start stands for what it becomes.
    filled = jtu.tree_map(
        lambda x: jnp.where(x == 0, jnp.ones_like(x), x) if _is_half(x) else x, state
    )
    before = jtu.tree_leaves_with_path(filled)
    after = jtu.tree_leaves(compiled_state(optim, nothing, filled, params))
    exact = jtu.tree_leaves(compiled_state(optim, *map(_single, (nothing, filled, params))))
    for (keys, old), new, wide in zip(before, after, exact, strict=True):
        if not _is_half(old):
            continue
        still, decays = np.mean(_host(old) == _host(new)), np.mean(_host(old) != _host(wide))
        if min(still, decays) > _SHARE:
            advice = (
                f"This share of {path(keys)} in its state stays as it is in a step without a "
                f"gradient, because the decay is lost in rounding to {old.dtype}. In float32 it "
                "goes down. A second moment that cannot decay makes all later steps too small. "
                "Keep the parameters in float32, and so its state."
            )
            yield Doubt("optimiser", float(still), _SHARE, advice)
            return


def _in_proportion(
    step: Callable,
    grads: PyTree,
    params: PyTree,
    paths: Sequence[str],
    stacks: Sequence[int],
    sizes: Sequence[float],
) -> Iterator[Doubt]:
    """Parameters at 0, of which the steps would be many times as large elsewhere."""
    leaves, tree = jtu.tree_flatten(params)
    # All of it, or of a vector nearly: a matrix may start small, and learns to scale.
    near = [
        size == 0 or (size < _NEAR and p.ndim <= stack + 1)
        for p, stack, size in zip(leaves, stacks, sizes, strict=True)
    ]
    if not any(near):
        return
    back = jtu.tree_map(jnp.negative, grads)

    def moved(fill: Callable[[Array, float], Array]) -> list[float]:
        """By the gradient and not by weight decay: what its sign makes of the step."""
        there = [fill(p, s) if here else p for p, s, here in zip(leaves, sizes, near, strict=True)]
        there = jtu.tree_unflatten(tree, there)
        pairs = zip(step(grads, there), step(back, there), near, strict=True)
        return [_rms(_host(a) - _host(b)) if here else 0.0 for a, b, here in pairs]

    # At 0 itself some leave the size of a step as it is, and make up for it in the next.
    small = moved(lambda p, size: p if size > 0 else jnp.full_like(p, _SMALL))
    large = moved(lambda p, _: jnp.ones_like(p))
    found = [
        (b / a if a else np.inf, where)
        for a, b, where, here in zip(small, large, paths, near, strict=True)
        if here and b > _TIMES * a
    ]
    if found:
        times, where = max(found)
        more = f", and so do those of {len(found) - 1} more" if len(found) > 1 else ""
        advice = (
            "The steps of this parameter, which is at 0, are in proportion to its size"
            f"{more}: from 1 they would be so many times as large. It all but stands still. Give "
            "norms and biases to an optimiser that does not scale its steps, as Adam, by "
            "optax.partition."
        )
        yield Doubt(where, float(times), _TIMES, advice)


def _mixed(
    step: Callable, grads: PyTree, params: PyTree, paths: Sequence[str], stacks: Sequence[int]
) -> Iterator[Doubt]:
    """Vectors of several layers in one array, of which the optimiser makes a matrix."""
    leaves, (slopes, tree) = jtu.tree_leaves(params), jtu.tree_flatten(grads)
    rows = [
        is_floating(p) and stack >= 1 and p.ndim == stack + 1 and p.shape[0] > 1 < p.shape[-1]
        for p, stack in zip(leaves, stacks, strict=True)
    ]
    if not any(rows):
        return
    # In another order the gradient of the first layer is as long as before, for clipping by norms.
    other = [
        g.at[0].set(jnp.roll(g[0], 1, -1)) if here else g
        for g, here in zip(slopes, rows, strict=True)
    ]
    pairs = zip(step(grads, params), step(jtu.tree_unflatten(tree, other), params), strict=True)
    found = []
    for (one, two), where, here in zip(pairs, paths, rows, strict=True):
        turned = float(_turned(_host(one)[1:], _host(two)[1:])) if here else 0.0
        if turned > _TURNED:
            found.append((turned, where))
    if found:
        turned, where = max(found)
        more = f"; so are {len(found) - 1} more" if len(found) > 1 else ""
        advice = (
            "The vectors of several layers stand in this array, and the optimiser takes it for a "
            f"matrix{more}: the step of one layer turns by this much of its size with the gradient "
            "of another. Say which axes are those of matrices, as by Muon's "
            "muon_weight_dimension_numbers=, or give norms and biases to Adam."
        )
        yield Doubt(where, turned, _TURNED, advice)


def _turned(one: np.ndarray, two: np.ndarray) -> float:
    """The largest distance between directions of rows; a common factor does not count."""
    rows = [x.reshape(-1, x.shape[-1]) for x in (one, two)]
    sizes = [np.linalg.norm(x, axis=-1, keepdims=True) for x in rows]
    moves = (sizes[0] > 0) & (sizes[1] > 0)
    units = [x / np.where(moves, size, 1) for x, size in zip(rows, sizes, strict=True)]
    return np.linalg.norm(units[0] - units[1], axis=-1).max(initial=0, where=moves[:, 0])


def _is_half(x: Any) -> bool:
    return is_floating(x) and x.ndim > 0 and x.dtype in (jnp.bfloat16, jnp.float16)


def _single(tree: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: x.astype(jnp.float32) if _is_half(x) else x, tree)


def _host(x: Array) -> np.ndarray:
    return np.asarray(fetched(x), np.float64)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))
