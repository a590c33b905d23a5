"""What would become of the loss with a longer step: evidence that a learning rate is too small.

One update says little. The first one of a warm-up and the last of a decay are small on purpose, and
so is any where the gradient is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ..._processes import fetched, laid_out
from .._capture._model import Model
from .._layer_statistics import is_floating
from .._once import jit_once
from .._optimiser import compiled_updates
from ._numbers import of_update

SMALL, USUAL = 1e-5, 1e-3
_COUNTS = (1, 10, 100, 1000, 10_000, 100_000)


def typical_ratio(parameters: Sequence[Any]) -> float | None:
    """The median of the update ratios of the weights; `None` if there are none."""
    ratios = [p.statistics.get("update_ratio", 0) for p in parameters if len(p.shape) > 1]
    known = [r for r in ratios if 0 < r < float("inf")]
    return float(np.median(known)) if known else None


def try_steps(
    loss_fn: Callable,
    model: Model,
    args: tuple,
    optimiser: tuple[Any, PyTree],
    loss: Array,
    grads: PyTree,
    updates: PyTree,
    parameters: Sequence[Any],
) -> dict[str, float]:
    """Tries what the updates leave in doubt, and nothing where they do not.

    `longer` is, for a small step, the share of the loss's slope along it that is left behind one of
    the usual size; 0 if the schedule has larger ones. The loss itself need not fall: that of an
    actor and its critic stops gradients. The `lost` of the parameters becomes that of the
    schedule's largest step. `never` is whether no step moves anything.
    """
    ratio = typical_ratio(parameters)
    still = all(p.statistics.get("update_rms", 0) == 0 for p in parameters)
    if ratio is None and not still:
        return {}
    in_doubt = [p for p in parameters if p.statistics.get("lost", 0) > 0.5]
    if ratio is not None and ratio >= SMALL and not in_doubt:
        return {}
    params = model.trained(model.tree)
    value_fn = lambda params: loss_fn(model.with_trained(model.tree, params), *args)
    optim, state = optimiser
    update = lambda state: compiled_updates(optim, grads, state, params, loss, value_fn)
    if ratio is None:
        learns = any(p.statistics["grad_largest"] > 0 for p in parameters)
        return {"never": float(learns and _never_moves(update, state))}
    best = _largest_of_schedule(update, state, params)
    for p, numbers in zip(parameters, best, strict=True):
        p.statistics["lost"] = min(p.statistics["lost"], float(numbers["lost"]))
    peak = _median_ratio(best)
    if peak < SMALL:  # At a minimum the moments make a step small, and not its rate.
        peak = _median_ratio(_largest_of_schedule(update, optim.init(params), params))
    if ratio >= SMALL or peak >= SMALL:
        return {"longer": 0.0}
    scale, slope = USUAL / ratio, _dot(grads, updates)
    if not -scale * slope > 1e-6 * abs(float(fetched(loss))):  # what float32 can show
        return {"longer": 0.0}
    there = _grads_along(loss_fn, model, args, updates, scale)
    return {"longer": _dot(there, updates) / slope}


def _median_ratio(found: Sequence[dict[str, Any]]) -> float:
    return float(np.median([float(n["update_ratio"]) for n in found if _counts(n)] or [0.0]))


def _counts(numbers: dict[str, Any]) -> bool:
    return numbers["matrix"] and 0 < float(numbers["update_ratio"]) < float("inf")


def _largest_of_schedule(
    update: Callable[[PyTree], PyTree], state: PyTree, params: PyTree
) -> list[dict[str, Any]]:
    """The figures of the largest update that this gradient gives at any step of a schedule."""
    leaves = _floats(params)
    best, size = [], -1.0
    for count in (None, *_COUNTS):
        at = state if count is None else _at_count(state, count)
        updates = _floats(update(at))
        found = [
            of_update(p, u) | {"matrix": p.ndim > 1} for p, u in zip(leaves, updates, strict=True)
        ]
        here = float(np.nanmedian([float(n["update_ratio"]) for n in found if _counts(n)] or [0.0]))
        # Without the moments that are there at such a count, Adam's steps are 3 times as large.
        if here > (10 * size if best else -1):
            best, size = found, here
    return best


def _never_moves(update: Callable[[PyTree], PyTree], state: PyTree) -> bool:
    """Nor in another step of an optimiser that accumulates gradients over several."""
    tried = (update(_at_count(state, count)) for count in (*range(_EVERY), *_COUNTS))
    return not any(np.any(fetched(u) != 0) for updates in tried for u in _floats(updates))


_EVERY = 64


def _floats(tree: PyTree) -> list[Array]:
    return [x for x in jtu.tree_leaves(tree) if is_floating(x)]


def _at_count(state: PyTree, count: int) -> PyTree:
    is_count = lambda x: eqx.is_array(x) and x.ndim == 0 and jnp.issubdtype(x.dtype, jnp.integer)
    return jtu.tree_map(lambda x: jnp.full_like(x, count) if is_count(x) else x, state)


def _grads_along(
    loss_fn: Callable, model: Model, args: tuple, updates: PyTree, scale: float
) -> PyTree:
    dynamic, static = eqx.partition((model.tree, args), eqx.is_array)

    @jit_once
    def at(scale, updates, dynamic) -> PyTree:
        tree, args = eqx.combine(dynamic, static)
        step = lambda p, u: p if u is None else p + scale.astype(p.dtype) * u.astype(p.dtype)
        moved = jtu.tree_map(step, model.trained(tree), updates)
        of_params = lambda params: loss_fn(model.with_trained(tree, params), *args)
        return eqx.filter_grad(of_params)(moved)

    return at(jnp.float32(scale), updates, dynamic)


def _dot(grads: PyTree, updates: PyTree) -> float:
    of = lambda g, u: float(jnp.sum(g.astype(jnp.float32) * u.astype(jnp.float32)))
    return sum(map(of, jtu.tree_leaves(grads), jtu.tree_leaves(updates)))


def has_learnt(loss_fn: Callable, model: Model, args: tuple, loss: float) -> bool:
    """Whether the loss is a twentieth of what it is with the entries of each parameter shuffled.

    Such a model may have dead and saturated units, which do no harm, and small gradients.
    """
    dynamic, static = eqx.partition((model.tree, args), eqx.is_array)
    leaves, structure = jtu.tree_flatten(model.trained(model.tree))

    @jit_once
    def loss_with(leaves, dynamic):
        tree, args = eqx.combine(dynamic, static)
        return loss_fn(model.with_trained(tree, jtu.tree_unflatten(structure, leaves)), *args)

    draws = np.random.default_rng(0)
    found = []
    for _ in range(_SHUFFLES):
        shuffled = [_shuffled(leaf, draws) for leaf in leaves]
        found.append(float(fetched(loss_with(shuffled, dynamic))))
    return 0 <= loss < _LEARNT * min(found)


_SHUFFLES, _LEARNT = 3, 0.05


def _shuffled(leaf: Array, draws: np.random.Generator) -> np.ndarray | Array:
    entries = draws.permutation(fetched(leaf).ravel())
    return laid_out(entries.reshape(leaf.shape), leaf.sharding)
