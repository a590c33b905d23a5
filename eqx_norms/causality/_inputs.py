"""Checks and flattens the function and its input; every message says what to pass instead."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from .._real import Real
from ._widen import trace


class Problem(NamedTuple):
    """A function of flat leaves, the leaves, and where the positions lie in them."""

    fn: Callable[..., tuple[Array, ...]]
    leaves: tuple[np.ndarray, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    closed: jex.ClosedJaxpr
    outs: tuple[jax.ShapeDtypeStruct, ...]

    @property
    def length(self) -> int:
        """The number of input positions."""
        return self.leaves[0].shape[self.in_axes[0]]

    @property
    def out_length(self) -> int:
        """The number of output positions."""
        return self.outs[0].shape[self.out_axes[0]]


def make_problem(fn: Callable, x: PyTree, axis: int, out_axis: int | None) -> Problem:
    """Checks `fn`, `x` and the axes by tracing `fn` once."""
    if not callable(fn):
        raise TypeError(f"fn must be a function of one argument, got {type(fn).__name__}")
    leaves, treedef = jax.tree.flatten(x)
    leaves = [_input_leaf(leaf) for leaf in leaves]
    if not leaves:
        raise ValueError("x holds no array; pass the input of fn, an array or a pytree of arrays")
    in_axes = _axes(leaves, axis, "axis", "x")
    if leaves[0].shape[in_axes[0]] < 2:
        raise ValueError(
            "x must have at least 2 positions along axis "
            f"{axis}, got shape {leaves[0].shape}; is axis= the sequence axis?"
        )

    def flat(*args: Array) -> tuple[Array, ...]:
        out = fn(jax.tree.unflatten(treedef, args))
        return tuple(_output_leaf(leaf) for leaf in jax.tree.leaves(out))

    closed = traced(flat, leaves)
    outs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.out_avals)
    if not outs:
        raise TypeError("fn returned no array; it must return an array or a pytree of arrays")
    out_axes = _axes(outs, axis if out_axis is None else out_axis, "out_axis", "the output")
    return Problem(flat, tuple(leaves), in_axes, out_axes, closed, outs)


def traced(flat: Callable, leaves: Sequence[np.ndarray]) -> jex.ClosedJaxpr:
    """The trace of `flat`; an error of the user's function is theirs, with a remark of ours."""
    try:
        return trace(flat, leaves)
    except jax.errors.JAXTypeError as error:
        error.add_note(
            "The check runs fn under jax.jit: write it with jax.numpy instead of numpy, and "
            "without Python control flow on its input."
        )
        raise


def require_same_length(problem: Problem, axis: int, out_axis: int | None) -> None:
    """Output `t` is compared with input `t`, so that there must be as many of one as the other."""
    if problem.out_length != problem.length:
        out_axis = axis if out_axis is None else out_axis
        raise ValueError(
            f"the output must have as many positions as the input, {problem.length}, got "
            f"{problem.out_length} along axis {out_axis} of shape {problem.outs[0].shape}; name "
            "the axis as out_axis=, or cut the output inside fn"
        )


def perturbed(fn: Callable, sigma: Real, rng: np.random.Generator) -> Callable:
    """`fn` with normal noise of size `sigma` on its float leaves."""
    params, static = eqx.partition(fn, eqx.is_inexact_array)
    if not jax.tree.leaves(params):
        raise TypeError(
            "perturb_params needs a fn that is a pytree with float arrays, as an Equinox module "
            f"is, got {type(fn).__name__}; wrap parameters with "
            "jax.tree_util.Partial(apply, params)"
        )

    def noisy(leaf: Array) -> Array:
        noise = sigma * rng.standard_normal(leaf.shape)
        return leaf + jnp.asarray(noise.astype(leaf.dtype))

    return eqx.combine(jax.tree.map(noisy, params), static)


def _input_leaf(leaf: Any) -> np.ndarray:
    if not eqx.is_array_like(leaf) or isinstance(leaf, bool | int | float | complex):
        raise TypeError(
            f"x must be an array or a pytree of arrays, got a {type(leaf).__name__} in it; give "
            "other arguments to fn by closure: lambda x: model(x, other)"
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            "x holds a PRNG key, which cannot be edited; give it to fn by closure: "
            "lambda x: model(x, key=key)"
        )
    # As JAX would take it: float64 becomes float32 unless 64-bit mode is on.
    return np.asarray(jnp.asarray(leaf))


def _output_leaf(leaf: Any) -> Array:
    if not eqx.is_array_like(leaf):
        raise TypeError(
            f"fn must return an array or a pytree of arrays, got a {type(leaf).__name__} in it"
        )
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError("fn must return numbers, got a PRNG key among its outputs")
    return leaf


def _axes(leaves: Sequence[Any], axis: int, name: str, what: str) -> tuple[int, ...]:
    axis = operator.index(axis)
    for leaf in leaves:
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(
                f"{name}={axis} does not exist in {what} of shape {leaf.shape}; pass the axis of "
                f"the positions as {name}="
            )
    axes = tuple(axis % leaf.ndim for leaf in leaves)
    lengths = {leaf.shape[i] for leaf, i in zip(leaves, axes, strict=True)}
    if len(lengths) > 1:
        raise ValueError(
            f"every array in {what} must have the same length along {name}={axis}, got shapes "
            f"{[leaf.shape for leaf in leaves]}; give what has no positions to fn by closure"
        )
    return axes
