"""Checks and flattens the function and its input; every message says what to pass instead."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ._edits import is_mask, require_names
from ._widen import trace


class Problem(NamedTuple):
    """A function of flat leaves, the leaves, and where the positions lie in them."""

    fn: Callable[..., tuple[Array, ...]]
    leaves: tuple[Array, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    closed: jex.ClosedJaxpr
    outs: tuple[jax.ShapeDtypeStruct, ...]
    names: tuple[str, ...] = ()

    @property
    def length(self) -> int:
        """The number of input positions."""
        return self.leaves[0].shape[self.in_axes[0]]

    @property
    def out_length(self) -> int:
        """The number of output positions."""
        return self.outs[0].shape[self.out_axes[0]]


def make_problem(
    fn: Callable, x: PyTree, axis: int, out_axis: int | None, fixed: str | Iterable[str] = ()
) -> Problem:
    """Checks `fn`, `x` and the axes by tracing `fn` once. It closes over the leaves in `fixed`."""
    if not callable(fn):
        raise TypeError(f"fn must be a function of one argument, got {type(fn).__name__}")
    named, treedef = _named_leaves(x)
    kept = _fixed_leaves(named, fixed)
    edited = {name: _input_leaf(leaf) for name, leaf in named.items() if name not in kept}
    if not edited:
        raise ValueError(
            "fixed names every array of x; leave out those that edits are to replace"
            if kept
            else "x holds no array; pass the input of fn, an array or a pytree of arrays"
        )
    leaves = tuple(edited.values())
    in_axes = _axes(leaves, axis, "axis", "x")
    if leaves[0].shape[in_axes[0]] < 2:
        raise ValueError(
            "x must have at least 2 positions along axis "
            f"{axis}, got shape {leaves[0].shape}; is axis= the sequence axis?"
        )

    def flat(*args: Array) -> tuple[Array, ...]:
        all_leaves = {**kept, **dict(zip(edited, args, strict=True))}
        out = fn(jax.tree.unflatten(treedef, [all_leaves[name] for name in named]))
        return tuple(_output_leaf(leaf) for leaf in jax.tree.leaves(out))

    closed = traced(flat, leaves)
    outs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.out_avals)
    if not outs:
        raise TypeError("fn returned no array; it must return an array or a pytree of arrays")
    out_axes = _axes(outs, axis if out_axis is None else out_axis, "out_axis", "the output")
    return Problem(flat, leaves, in_axes, out_axes, closed, outs, tuple(edited))


def traced(flat: Callable, leaves: Sequence[Array]) -> jex.ClosedJaxpr:
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


def perturbed(
    fn: Callable, sigma: float, rng: np.random.Generator, trainable: PyTree | None
) -> tuple[Callable, list[str]]:
    """`fn` with normal noise of size `sigma` on what is `trainable`, and the paths of the rest."""
    if not 0 < sigma < np.inf:
        raise ValueError(f"perturb_params must be positive and finite, got {sigma}; try 0.02")
    spec = _trainable(fn) if trainable is None else trainable
    params, static = eqx.partition(fn, spec)
    params, others = eqx.partition(params, eqx.is_inexact_array)
    if not jax.tree.leaves(params):
        selected = "" if trainable is None else " that trainable= selects"
        raise TypeError(
            f"perturb_params needs a fn that is a pytree with float arrays{selected}, as an "
            f"Equinox module is, got {type(fn).__name__}; wrap parameters with "
            "jax.tree_util.Partial(apply, params)"
        )

    def noisy(leaf: Array) -> Array:
        noise = sigma * rng.standard_normal(leaf.shape)
        return leaf + jnp.asarray(noise.astype(leaf.dtype))

    rest, _ = _named_leaves(static, is_leaf=_is_state)
    holds_floats = lambda node: any(map(eqx.is_inexact_array, jax.tree.leaves(node)))
    skipped = [name for name, node in rest.items() if holds_floats(node)]
    return eqx.combine(jax.tree.map(noisy, params), others, static), skipped


def _trainable(fn: Callable) -> PyTree:
    """Every float array, but for masks and for what an Equinox layer keeps as its state."""
    chosen = lambda leaf: eqx.is_inexact_array(leaf) and not is_mask(np.asarray(leaf), alone=True)
    return jax.tree.map(lambda node: not _is_state(node) and chosen(node), fn, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    return isinstance(node, eqx.nn.State | eqx.nn.StateIndex)


def _named_leaves(x: PyTree, is_leaf: Callable | None = None) -> tuple[dict[str, Any], Any]:
    """The leaves by their paths, as in `batch.ids` or, in a tuple, `0`."""
    leaves, treedef = jax.tree.flatten_with_path(x, is_leaf)
    named = {jtu.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) < len(leaves):  # a key with a dot in it, or the keys 0 and "0"
        named = {jtu.keystr(path): leaf for path, leaf in leaves}
    return named, treedef


def _fixed_leaves(named: Mapping[str, Any], fixed: str | Iterable[str]) -> dict[str, Any]:
    fixed = {fixed} if isinstance(fixed, str) else {*fixed}
    require_names("fixed", fixed, named, "array")
    # Under `jax.vmap`, JAX takes no NumPy array from outside.
    as_jax = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf
    return {name: as_jax(leaf) for name, leaf in named.items() if name in fixed}


def _input_leaf(leaf: Any) -> Array:
    if not eqx.is_array_like(leaf) or isinstance(leaf, bool | int | float | complex):
        raise TypeError(
            f"x must be an array or a pytree of arrays, got a {type(leaf).__name__} in it; give "
            "other arguments to fn by closure, lambda x: model(x, other), or name them in fixed="
        )
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            "x holds a PRNG key, which cannot be edited; give it to fn by closure, "
            "lambda x: model(x, key=key), or name it in fixed="
        )
    # As JAX would take it: float64 becomes float32 unless 64-bit mode is on. And as edits come,
    # which are not weakly typed.
    leaf = jnp.asarray(leaf)
    return leaf.astype(leaf.dtype)


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
            f"{[leaf.shape for leaf in leaves]}; give what has no positions to fn by closure, or "
            "name it in fixed="
        )
    return axes
