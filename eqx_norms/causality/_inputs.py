"""Checks and flattens the function and its input; every message says what to pass instead."""

import math
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

from .._jaxprs import is_ref
from .._processes import everywhere_the_same, fetched, spans_processes
from .._real import Integer, Real
from ._call import call
from ._edits import is_mask, require_names
from ._host import learn, within_reach
from ._probe import placed
from ._tensors import as_array
from ._torch import TorchFunction
from ._widen import is_key, trace

Axes = Integer | tuple[Integer, ...]


class Problem(NamedTuple):
    """A function of flat leaves, the leaves, and where the positions lie in them.

    Several axes of positions are merged into one, the first. `in_lengths` and `out_lengths` are how
    long each of them was, `axis` and `out_axis` what the user called them.
    """

    fn: Callable[..., tuple[Array, ...]]
    leaves: tuple[Array, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    closed: jex.ClosedJaxpr
    outs: tuple[jax.ShapeDtypeStruct, ...]
    names: tuple[str, ...] = ()
    in_lengths: tuple[int, ...] = ()
    out_lengths: tuple[int, ...] = ()
    axis: Axes = 0
    out_axis: Axes = 0

    @property
    def length(self) -> int:
        """The number of input positions."""
        return self.leaves[0].shape[self.in_axes[0]]

    @property
    def out_length(self) -> int:
        """The number of output positions."""
        return self.outs[0].shape[self.out_axes[0]]

    def output(self, number: Integer) -> int | tuple[int, ...]:
        """What to call an output."""
        return place(number, self.out_lengths)


def place(number: Integer, lengths: Sequence[int]) -> int | tuple[int, ...]:
    """The number of a position; a tuple if they lie along several axes."""
    if len(lengths) < 2:
        return int(number)
    return tuple(map(int, np.unravel_index(number, lengths)))


def make_problem(
    fn: Callable, x: PyTree, axis: Axes, out_axis: Axes | None, fixed: str | Iterable[str] = ()
) -> Problem:
    """Checks `fn`, `x` and the axes by tracing `fn` once. It closes over the leaves in `fixed`."""
    if not callable(fn):
        raise TypeError(f"fn must be a function of one argument, got {type(fn).__name__}")
    given = split_input(within_reach(x, fn), fixed)
    if not given.leaves:
        raise ValueError(
            "fixed names every array of x; leave out those that edits are to replace"
            if given.fixed
            else "x holds no array; pass the input of fn, an array or a pytree of arrays"
        )
    edited = tuple(given.leaves.values())
    in_axes = _axes(edited, axis, "axis", "x")
    in_lengths = _lengths(edited[0], in_axes[0])
    if math.prod(in_lengths) < 2:
        raise ValueError(
            "x must have at least 2 positions along axis "
            f"{axis}, got shape {edited[0].shape}; is axis= the sequence axis?"
        )
    _require_numbers("x", edited)

    def apply(*args: Array) -> tuple[Array, ...]:
        leaves = [_split(arg, axes, in_lengths) for arg, axes in zip(args, in_axes, strict=True)]
        out = call(fn, given.whole(leaves))
        return _with_entries([output_leaf(leaf) for leaf in jax.tree.leaves(out)])

    def merged(*args: Array) -> tuple[Array, ...]:
        return tuple(map(_merged, apply(*args), out_axes))

    leaves = tuple(map(_merged, edited, in_axes))
    learn(fn, given.whole(edited))
    closed = traced(apply, leaves)
    require_agreement(given, closed)
    outs = _shapes(closed)
    if not outs:
        raise TypeError("fn returned no array; it must return an array or a pytree of arrays")
    out_axis = axis if out_axis is None else out_axis
    out_axes = _output_axes(outs, out_axis)
    out_lengths = _lengths(outs[0], out_axes[0])
    flat = apply if len(out_lengths) == 1 else merged
    if flat is merged:
        closed = traced(flat, leaves)
    return Problem(
        flat,
        leaves,
        tuple(map(_merged_axis, in_axes)),
        tuple(map(_merged_axis, out_axes)),
        closed,
        _shapes(closed),
        tuple(given.leaves),
        in_lengths,
        out_lengths,
        axis,
        out_axis,
    )


class Given(NamedTuple):
    """An input: the arrays that edits replace and those that are `fixed`, by their paths."""

    leaves: dict[str, Array]
    fixed: dict[str, Any]
    whole: Callable[[Sequence[Any]], PyTree]  # of others in the place of `leaves`


def split_input(x: PyTree, fixed: str | Iterable[str]) -> Given:
    """Checks that what edits replace can be edited."""
    named, treedef = named_leaves(jax.tree.map(as_array, x))
    kept = _fixed_leaves(named, fixed)
    leaves = {name: _input_leaf(leaf) for name, leaf in named.items() if name not in kept}

    def whole(values: Sequence[Any]) -> PyTree:
        all_leaves = {**kept, **dict(zip(leaves, values, strict=True))}
        return jax.tree.unflatten(treedef, [all_leaves[name] for name in named])

    return Given(leaves, kept, whole)


def _require_numbers(what: str, leaves: Sequence[Any]) -> None:
    if not any(leaf.size for leaf in leaves):
        raise ValueError(
            f"{what} must hold numbers, got shapes {[leaf.shape for leaf in leaves]}; nothing can "
            "be read from an axis of length 0, or by it"
        )


def _with_entries(outs: Sequence[Array]) -> tuple[Array, ...]:
    """Those outputs that can be compared."""
    if outs:
        _require_numbers("the output", outs)
    return tuple(leaf for leaf in outs if leaf.size)


def _shapes(closed: jex.ClosedJaxpr) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.out_avals)


def _lengths(leaf: Any, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(leaf.shape[axis] for axis in axes)


def _merged(leaf: Array, axes: Sequence[int]) -> Array:
    """Several axes become one, the first, in C order; a single one stays where it is."""
    if len(axes) == 1:
        return leaf
    front = jnp.moveaxis(leaf, axes, range(len(axes)))
    return front.reshape(-1, *front.shape[len(axes) :])


def _merged_axis(axes: Sequence[int]) -> int:
    return axes[0] if len(axes) == 1 else 0


def _split(leaf: Array, axes: Sequence[int], lengths: Sequence[int]) -> Array:
    """The inverse of `_merged`."""
    if len(axes) == 1:
        return leaf
    return jnp.moveaxis(leaf.reshape(*lengths, *leaf.shape[1:]), range(len(axes)), axes)


def traced(flat: Callable, leaves: Sequence[Array]) -> jex.ClosedJaxpr:
    """The trace of `flat`; an error of the user's function is theirs, with a remark of ours."""
    try:
        return _without_refs_of_others(trace(flat, leaves))
    except jax.errors.JAXTypeError as error:
        error.add_note(
            "The check runs fn under jax.jit: write it without Python control flow on its input, "
            "as with jnp.where or jax.lax.cond."
        )
        raise


def require_agreement(given: "Given", *functions: jex.ClosedJaxpr) -> None:
    """Refuses an input that is another one on each process, where all of them run one program."""
    leaves = [*given.leaves.values(), *filter(eqx.is_array, given.fixed.values())]
    held = [const for closed in functions for const in closed.consts]
    if not any(map(spans_processes, [*leaves, *held])):
        return
    own = [leaf for leaf in leaves if not spans_processes(leaf) and not is_key(leaf)]
    if not everywhere_the_same(own):
        raise ValueError(
            "x must be the same on every process, because fn holds arrays of all of them, but "
            "each has numbers of its own. If these are parts of one batch, write "
            "jax.make_array_from_process_local_data(sharding, x) in the place of x"
        )


def _without_refs_of_others(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """Refuses a function that reads or writes a Ref that it has not made itself."""
    if any(map(is_ref, closed.consts)):
        raise ValueError(
            "fn uses a jax.Ref that was made outside of it, and whose contents change from one "
            "call to the next; make it inside fn, by jax.new_ref(values), or give fn its values, "
            "ref[...]"
        )
    return closed


def require_same_length(
    problem: Problem, axis: Axes, out_axis: Axes | None, or_align: bool = False
) -> None:
    """Output `t` is compared with input `t`, so that there must be as many of one as the other."""
    if problem.out_length != problem.length:
        out_axis = axis if out_axis is None else out_axis
        shape = problem.outs[0].shape
        cure = "no axis is: cut or pad the output inside fn, or return what it was pooled from"
        named = f"along axis {out_axis} of shape {shape}"
        if isinstance(out_axis, tuple):
            named = f"of lengths {problem.out_lengths} along the axes {out_axis}"
        raise ValueError(
            f"the output must have as many positions as the input, {problem.length}, got "
            f"{problem.out_length} {named}; "
            + ("name the axis as out_axis=" if problem.length in shape else cure)
            + ', or say by align="start" or "end" where it stands beside the input' * or_align
        )


def perturbed(
    fn: Callable, sigma: Real, rng: np.random.Generator, trainable: PyTree | None
) -> tuple[Callable, list[str]]:
    """`fn` with normal noise of size `sigma` on what is `trainable`, and the paths of the rest."""
    if not 0 < sigma < np.inf:
        raise ValueError(f"perturb_params must be positive and finite, got {sigma}; try 0.02")
    if isinstance(fn, TorchFunction):
        return fn.perturbed(sigma, rng)
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
        noise = np.asarray(sigma * rng.standard_normal(leaf.shape), leaf.dtype)
        return leaf + placed(noise, leaf.sharding)

    rest, _ = named_leaves(static, is_leaf=_is_state)
    holds_floats = lambda node: any(map(eqx.is_inexact_array, jax.tree.leaves(node)))
    skipped = [name for name, node in rest.items() if holds_floats(node)]
    return eqx.combine(jax.tree.map(noisy, params), others, static), skipped


def _trainable(fn: Callable) -> PyTree:
    """Every float array except masks and what an Equinox layer keeps as its state."""
    chosen = lambda leaf: eqx.is_inexact_array(leaf) and not is_mask(fetched(leaf), alone=True)
    return jax.tree.map(lambda node: not _is_state(node) and chosen(node), fn, is_leaf=_is_state)


def _is_state(node: Any) -> bool:
    return isinstance(node, eqx.nn.State | eqx.nn.StateIndex)


def named_leaves(x: PyTree, is_leaf: Callable | None = None) -> tuple[dict[str, Any], Any]:
    """The leaves by their paths, as in `batch.ids` or, in a tuple, `0`."""
    leaves, treedef = jax.tree.flatten_with_path(x, is_leaf)
    named = {jtu.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) < len(leaves):  # a key with a dot in it, or the keys 0 and "0"
        named = {jtu.keystr(path): leaf for path, leaf in leaves}
    return named, treedef


def _fixed_leaves(named: Mapping[str, Any], fixed: str | Iterable[str]) -> dict[str, Any]:
    fixed = {fixed} if isinstance(fixed, str) else {*fixed}
    require_names("fixed", fixed, named, "array")
    # Under `jax.vmap`, JAX takes no NumPy array from outside; and a float is a parameter.
    numpy = np.ndarray | np.inexact
    as_jax = lambda leaf: jnp.asarray(leaf) if isinstance(leaf, numpy) else leaf
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


def output_leaf(leaf: Any) -> Array:
    if not eqx.is_array_like(leaf):
        raise TypeError(
            f"fn must return an array or a pytree of arrays, got a {type(leaf).__name__} in it"
        )
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError("fn must return numbers, got a PRNG key among its outputs")
    return leaf


def _output_axes(outs: Sequence[jax.ShapeDtypeStruct], axis: Axes) -> tuple[tuple[int, ...], ...]:
    """The axis in each output; one without positions, such as a loss, has none to compare."""
    shapes = [out.shape for out in outs]
    if () in shapes:
        raise ValueError(
            f"every array that fn returns must have positions, got shapes {shapes}; return only "
            "those that have: lambda x: fn(x)[0], or logits in the place of a loss"
        )
    try:
        return _axes(outs, axis, "out_axis", "the output")
    except ValueError as error:
        if len(outs) == 1:
            raise
        raise ValueError(
            f"every array that fn returns must have the positions along out_axis={axis}, got "
            f"shapes {shapes}; move that axis inside fn, and return only what has it"
        ) from error


def _axes(leaves: Sequence[Any], axis: Axes, name: str, what: str) -> tuple[tuple[int, ...], ...]:
    """Of each leaf, the axes that `axis` means."""
    given = tuple(map(operator.index, axis if isinstance(axis, tuple) else (axis,)))
    for leaf in leaves:
        if not given or not all(-leaf.ndim <= one < leaf.ndim for one in given):
            raise ValueError(
                f"{name}={axis} does not exist in {what} of shape {leaf.shape}; pass the axis of "
                f"the positions as {name}="
            )
        if len({one % leaf.ndim for one in given}) < len(given):
            raise ValueError(
                f"{name}={axis} names one axis of {what} of shape {leaf.shape} twice; name each "
                "once"
            )
    axes = tuple(tuple(one % leaf.ndim for one in given) for leaf in leaves)
    lengths = {_lengths(leaf, own) for leaf, own in zip(leaves, axes, strict=True)}
    if len(lengths) > 1:
        raise ValueError(
            f"every array in {what} must have the same length along {name}={axis}, got shapes "
            f"{[leaf.shape for leaf in leaves]}; give what has no positions to fn by closure, or "
            "name it in fixed="
        )
    return axes
