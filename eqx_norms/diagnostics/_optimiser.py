"""What an optimiser is about to do."""

import functools as ft
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._once import once


def next_updates(
    optim: Any,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    loss: Float[Array, ""],
    value_fn: Callable[[PyTree], Float[Array, ""]],
) -> PyTree:
    """The updates, also of an optimiser that needs the loss, or the function that gives it, as
    Optax's `lbfgs`, `polyak_sgd` and `reduce_on_plateau` do.
    """
    try:
        updates, _ = optim.update(grads, opt_state, params)
    except TypeError:
        more = {"value": jnp.asarray(loss), "grad": grads, "value_fn": value_fn}
        updates, _ = optim.update(grads, opt_state, params, **more)
    return updates


def compiled_updates(
    optim: Any,
    grads: PyTree,
    opt_state: PyTree,
    params: PyTree,
    loss: Float[Array, ""],
    value_fn: Callable[[PyTree], Float[Array, ""]],
) -> PyTree:
    """As `next_updates`, compiled. For most optimisers that is once, without `value_fn`."""
    try:
        return jax.block_until_ready(_updates()(optim, grads, opt_state, params))
    except TypeError:
        return eqx.filter_jit(next_updates)(optim, grads, opt_state, params, loss, value_fn)


def compiled_step(optim: Any, grads: PyTree, opt_state: PyTree, params: PyTree) -> PyTree:
    """The updates of an optimiser that needs nothing but these; else a `TypeError`."""
    return _updates()(optim, grads, opt_state, params)


def compiled_state(optim: Any, grads: PyTree, opt_state: PyTree, params: PyTree) -> PyTree:
    """The state after that."""
    return _updates(1)(optim, grads, opt_state, params)


@ft.cache
def _updates(part: int = 0) -> Callable[..., PyTree]:
    options: Any = {"compiler_options": once()}  # which the annotations do not know
    return eqx.filter_jit(lambda optim, *rest: optim.update(*rest)[part], **options)
