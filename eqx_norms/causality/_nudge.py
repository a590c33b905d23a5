"""Inputs beside those of an editor: chaos and ties show there what they are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._processes import fetched
from ._edits import Edit, Editor
from ._widen import is_key


def beside(editor: Editor, by: float, seed: int = 0, wide: bool = False) -> Editor:
    """The same edits of an input whose floats are moved by up to `by` of their size.

    `wide` is for values that are float64. Equal numbers stay equal and zero stays zero, for a
    function may look for them; masks and tokens stay as they are.
    """
    leaves = [
        leaf if leaf.ids else leaf._replace(values=_moved(leaf.values, by, seed, wide))
        for leaf in editor.leaves
    ]
    return dataclasses.replace(editor, leaves=tuple(leaves))


@dataclasses.dataclass(frozen=True)
class Shaken(Editor):
    """Of each edit only its seed counts: the input is moved by so much of its size, of 0 not."""

    by: float = 0.0

    def apply(self, edit: Edit) -> tuple[np.ndarray, ...]:
        """The leaves, moved."""
        moved = beside(self, self.by * bool(edit.seed), edit.seed, wide=True)
        return tuple(leaf.values for leaf in moved.leaves)


def constants_beside(by: float, seed: int) -> tuple[Callable, Callable]:
    """For `widen`, of functions of tokens: its `constant` and `watch`, which move by as much.

    They move the constants, and the floats that integers become.
    """

    def constant(value: Any) -> Any:
        if is_key(value) or not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
            return value
        return _moved(fetched(value), by, seed, wide=True)

    def watch(eqn: Any, args: Any, outs: Any, _: Any) -> Any:
        casts = eqn.primitive.name == "convert_element_type"
        if not (casts and jnp.issubdtype(args[0].dtype, jnp.integer)):
            return outs
        if not jnp.issubdtype(outs[0].dtype, jnp.floating):
            return outs
        return [out * (1 + by * jnp.sin(out + seed)) for out in outs]

    return constant, watch


def _moved(values: np.ndarray, by: float, seed: int, wide: bool) -> np.ndarray:
    found, where = np.unique(values, return_inverse=True)
    factors = 1 + by * np.random.default_rng(seed).choice([-1, -0.5, 0.5, 1], size=found.shape)
    exact = found.astype(np.complex128 if np.iscomplexobj(found) else np.float64)
    moved = np.asarray((exact * factors)[where]).reshape(values.shape)
    return moved if wide else moved.astype(values.dtype)
