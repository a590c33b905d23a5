"""What stands in for the outputs of calls: functions of them, or arrays."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._interpret import ArrayType, type_of
from ._tag import Call

# A function of what the call returned and of the numbers of the steps, or what it is to return.
Replace = Mapping[str, Callable[..., PyTree] | PyTree]


def path_of(key: str) -> str:
    """That of the submodule whose call has this key: `norm` for `norm#1` and `norm:in#1`."""
    return re.sub(r"(:in)?(#\d+)?$", "", key)


def check_called(replace: Replace, keys: Sequence[str]) -> None:
    """Raises `ValueError` unless all of `replace` are among the `keys` of the calls."""
    for key in replace:
        if key not in keys:
            calls = ", ".join(repr(other) for other in keys if path_of(other) == path_of(key))
            raise ValueError(
                "`replace` must name calls of submodules, or values in `names`, but none has the "
                f"key {key!r}. "
                + (f"Its calls are {calls}." if calls else "It is not called, or returns no array.")
            )


def replacement(
    key: str, call: Call, types: Sequence[ArrayType], new: Callable[..., PyTree] | PyTree
) -> Callable[..., list[Array]]:
    """Of the arrays that a call returns, and of the numbers of the steps of the loops around it:
    those that stand in for them.

    **Arguments:**

    - `types`: those of all steps together, with an axis in front for each loop.
    """
    if call.differentiated:
        raise NotImplementedError(
            f"The output of {key!r} cannot be replaced: `fn` takes a derivative through it, which "
            "would stay that of the model as it is. Take the derivative outside, as in "
            "`jax.grad(lambda x: capture(fn, model, x, where=where, replace=replace)[0])`."
        )
    if not callable(new):
        arrays = _fitted(f"`replace[{key!r}]`", new, call, types)
        return lambda values, *steps: [_at(x, steps) for x in arrays]

    def replaced(values, *steps):
        try:
            out = new(call.rebuild(values), *steps)
        except Exception as error:
            loops = ", and the number of the step of each loop around it" if steps else ""
            error.add_note(f"`replace[{key!r}]` was given {call.what}{loops}.")
            raise
        types = [type_of(jax.typeof(x)) for x in values]
        return _fitted(f"What `replace[{key!r}]` returns", out, call, types)

    return replaced


def _at(x: Array, steps: Sequence[Any]) -> Array:
    for step in steps:
        x = jax.lax.dynamic_index_in_dim(x, step, keepdims=False)
    return x


def _fitted(what: str, new: PyTree, call: Call, types: Sequence[ArrayType]) -> list[Array]:
    """The arrays of `new`, if they are as those that the submodule returns."""
    old = call.rebuild([jax.ShapeDtypeStruct(kind.shape, kind.dtype) for kind in types])
    as_text = lambda tree: eqx.tree_pformat(tree, struct_as_array=True)
    differs = f"{what} must be as {call.what}, {as_text(old)}, but it is "
    if jtu.tree_structure(new) != jtu.tree_structure(old):
        raise ValueError(f"{differs}{as_text(new)}. Type the same structure.")
    pairs = zip(jtu.tree_leaves(new), jtu.tree_leaves(old), strict=True)
    arrays = [jnp.asarray(x) for x, like in pairs if isinstance(like, jax.ShapeDtypeStruct)]
    for x, kind in zip(arrays, types, strict=True):
        if x.shape != kind.shape:
            raise ValueError(
                f"{differs}{as_text(new)}. Type for instance `jnp.broadcast_to(x, {kind.shape})`."
            )
        if x.dtype != kind.dtype:
            raise TypeError(f"{differs}{as_text(new)}. Type `x.astype(jnp.{kind.dtype})`.")
    return [kind.placed(x) for x, kind in zip(arrays, types, strict=True)]
