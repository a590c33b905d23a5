"""An identity that survives tracing: it marks in a jaxpr which arrays a submodule returned."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree


class Output:
    """What a tag knows of the output it marks: its path and all of it that is not an array.

    Compared by identity, for the static part may hold anything.
    """

    def __init__(self, path: str, structure: Any, static: PyTree):
        self.path = path
        self.structure = structure
        self.static = static

    def rebuild(self, leaves: list) -> PyTree:
        """The output as the submodule returned it, with these arrays in it."""
        return eqx.combine(jtu.tree_unflatten(self.structure, leaves), self.static)


def tag(out: PyTree, path: str) -> PyTree:
    """`out`, with its arrays marked as what the submodule at `path` returned."""
    value, state = _split_state(out)
    arrays, static = eqx.partition(value, eqx.is_array)
    leaves, structure = jtu.tree_flatten(arrays)
    if not leaves:
        return out
    output = Output(path, structure, static)
    value = output.rebuild(tag_p.bind(*leaves, output=output))
    return value if state is None else (value, state)


def _split_state(out: PyTree) -> tuple[PyTree, eqx.nn.State | None]:
    # The state of a stateful layer is bookkeeping: nobody takes the gradient at a running mean.
    if type(out) is tuple and len(out) == 2 and isinstance(out[1], eqx.nn.State):
        return out
    return out, None


tag_p = Primitive("eqx_norms_tag")
tag_p.multiple_results = True
tag_p.def_impl(lambda *arrays, output: list(arrays))
tag_p.def_abstract_eval(lambda *avals, output: list(avals))
mlir.register_lowering(tag_p, lambda context, *arrays, output: list(arrays))


def _jvp(primals, tangents, *, output):
    # Only the value is the submodule's output; a marked tangent would be taken for a call.
    return tag_p.bind(*primals, output=output), list(tangents)


def _batch(arrays, axes, *, output):
    # vmap leaves the batch axis wherever the last operation put it; a caller expects it in front.
    moved = [_to_front(x, axis) for x, axis in zip(arrays, axes, strict=True)]
    return tag_p.bind(*moved, output=output), [None if axis is None else 0 for axis in axes]


def _to_front(x, axis):
    return x if axis is None else jnp.moveaxis(x, axis, 0)


ad.primitive_jvps[tag_p] = _jvp
batching.primitive_batchers[tag_p] = _batch
