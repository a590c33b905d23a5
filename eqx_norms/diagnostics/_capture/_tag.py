"""An identity that survives tracing: it marks in a jaxpr which arrays a submodule returned."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree


class Place(NamedTuple):
    """Where in the model a called module stands.

    At `keys`; or, where `holder` is not `None`, at `keys` within a module of that class. Which one
    of that class is seen from the arrays it holds, at `names`: the tag has them as operands.
    A module without arrays may have `equals`: where those stand that are equal to it. `module` is
    the called one where it is not in the model.
    """

    keys: tuple
    holder: type | None = None
    names: tuple = ()
    equals: tuple[tuple, ...] = ()
    module: Any = None


class Call:
    """What a tag knows of the call it marks: its place and all of its output that is no array.

    Compared by identity, because the static part may hold anything.

    **Arguments:**

    - `level`: of how many other captures the one that looks for this tag is part.
    - `what`: what is marked, in words.
    """

    def __init__(
        self,
        place: Place,
        level: int,
        structure: Any,
        static: PyTree,
        what: str = "what the submodule returns",
    ):
        self.place = place
        self.level = level
        self.structure = structure
        self.static = static
        self.what = what
        self.differentiated = False

    def within_derivative(self) -> "Call":
        """The same call, of which the traced function computes a derivative as well."""
        call = copy.copy(self)
        call.differentiated = True
        return call

    def rebuild(self, leaves: list) -> PyTree:
        """The output as the submodule returned it, with these arrays in it."""
        return eqx.combine(jtu.tree_unflatten(self.structure, leaves), self.static)


class Inputs(Call):
    """Marks what a submodule is given: the only array, or a tuple of several."""

    def __init__(self, place: Place, level: int, count: int):
        what = "what the submodule is given"
        super().__init__(place, level, jtu.tree_structure(_alone([0] * count)), None, what)

    def rebuild(self, leaves: list) -> PyTree:
        """The arrays, in the order of the arguments."""
        return _alone(leaves)


def _alone(leaves: list) -> Any:
    return leaves[0] if len(leaves) == 1 else tuple(leaves)


def tag(out: PyTree, place: Place, held: Sequence[Array], level: int) -> PyTree:
    """`out`, with its arrays marked as what the submodule at `place` returned.

    **Arguments:**

    - `held`: the arrays of the place's holder.
    """
    value, state = _split_state(out)
    arrays, static = eqx.partition(value, eqx.is_array)
    leaves, structure = jtu.tree_flatten(arrays)
    if not leaves:
        return out
    call = Call(place, level, structure, static)
    value = call.rebuild(mark([*leaves, *held], call))
    return value if state is None else (value, state)


def tag_inputs(
    inputs: PyTree, place: Place, held: Sequence[Array], level: int, is_whole: Callable[[Any], bool]
) -> PyTree:
    """`inputs`, whose arrays are marked. Those of modules and of a state, which `is_whole` knows,
    are not.
    """
    leaves, structure = jtu.tree_flatten(inputs, is_leaf=is_whole)
    at = [i for i, leaf in enumerate(leaves) if _is_marked_input(leaf)]
    if at:
        call = Inputs(place, level, len(at))
        for i, x in zip(at, mark([*(leaves[i] for i in at), *held], call), strict=True):
            leaves[i] = x
    return jtu.tree_unflatten(structure, leaves)


def _is_marked_input(x: Any) -> bool:
    """Python may look at what is not traced, as at a flag; nobody branches on a float array."""
    if isinstance(x, jax.core.Tracer):
        return not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return eqx.is_inexact_array(x)


def mark(arrays: Sequence[Array], call: Call) -> list[Array]:
    return tag_p.bind(*arrays, call=call, mapped=())


def _split_state(out: PyTree) -> tuple[PyTree, eqx.nn.State | None]:
    # The state of a stateful layer is bookkeeping: nobody takes the gradient at a running mean.
    if type(out) is tuple and len(out) == 2 and isinstance(out[1], eqx.nn.State):
        return out
    return out, None


def _marked(operands: Sequence, call: Call) -> list:
    return list(operands[: call.structure.num_leaves])


# `mapped` says for each `jax.vmap` around, the innermost first, which operands have an axis for it.
tag_p = Primitive("eqx_norms_tag")
tag_p.multiple_results = True
tag_p.def_impl(lambda *arrays, call, mapped: _marked(arrays, call))
tag_p.def_abstract_eval(lambda *avals, call, mapped: _marked(avals, call))
mlir.register_lowering(tag_p, lambda context, *arrays, call, mapped: _marked(arrays, call))


def _jvp(primals, tangents, *, call, mapped):
    # Only the value is the submodule's output; a marked tangent would be taken for a call.
    outs = tag_p.bind(*primals, call=call.within_derivative(), mapped=mapped)
    return outs, _marked(tangents, call)


def _transpose(cotangents, *operands, call, mapped):
    return [*cotangents, *[None] * (len(operands) - len(cotangents))]


def _jet(primals, series, *, call, mapped):
    outs = tag_p.bind(*primals, call=call.within_derivative(), mapped=mapped)
    return outs, _marked(series, call)


def _batch(arrays, axes, *, call, mapped):
    # vmap leaves the batch axis wherever the last operation put it; a caller expects it in front.
    moved = [_to_front(x, axis) for x, axis in zip(arrays, axes, strict=True)]
    mapped = (*mapped, tuple(axis is not None for axis in axes))
    outs = tag_p.bind(*moved, call=call, mapped=mapped)
    return outs, [None if axis is None else 0 for axis in _marked(axes, call)]


def _to_front(x, axis):
    return x if axis is None else jnp.moveaxis(x, axis, 0)


ad.primitive_jvps[tag_p] = _jvp
ad.primitive_transposes[tag_p] = _transpose
batching.primitive_batchers[tag_p] = _batch
jet.jet_rules[tag_p] = _jet
