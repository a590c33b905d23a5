"""Every call of a model's submodules, and of the activation functions in them: what went in, what
came out, and the loss's derivatives at both.

What `capture` refuses is listed here, and the rest is looked at all the same.
"""

import copy
import dataclasses
import functools as ft
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import primitives
from jaxtyping import Array, PyTree

from ._activations import Activation, activation_of, recognised
from ._capture import _check_arrays, _Program, _zero_shift
from ._instrument import Observer, Where, path
from ._interpret import Marked, loops_around, marked_types, supported
from ._plan import Output, Plan, Step, make_plan
from ._tag import Call, Place, tag_p


@dataclasses.dataclass(eq=False)
class Seen:
    """One call, of the submodule at `path` or, if there is one, of an activation function in it.

    `given` and `returned` say which of the marked arrays are its inputs and outputs; of an
    activation function, `applied` are both. `loops` are the lengths of the scans around the call.
    """

    path: str
    type: str
    loops: tuple[int, ...]
    number: int = 0
    given: int | None = None
    returned: int | None = None
    applied: int | None = None
    activation: Activation | None = None
    last: "Seen | None" = None  # the last call within it that has returned

    @property
    def output(self) -> int:
        """Which of the marked arrays are its outputs."""
        index = self.applied if self.returned is None else self.returned
        assert index is not None
        return index


class Survey(_Program):
    """`loss_fn(model, *args)`, in which every call that `where` matches is marked at both ends."""

    def __init__(self, loss_fn: Callable, model: PyTree, args: tuple, where: Where):
        watch = _Witness(model, where)
        _check_arrays(model, args)
        jaxpr, self.out, self.static_out = watch.trace(loss_fn, model, args)
        plan = make_plan(jaxpr, model, args, watch)
        self.not_looked_at = dict.fromkeys(sorted(watch.unclear), _UNCLEAR)
        self.plan = _what_can_be_seen(plan, {id(o.call) for o in plan.recomputed}, self)
        self.types = marked_types(self.plan)
        self.replacements = {}
        self.check_differentiable()
        modules = {path(keys): module for keys, module in watch.modules.items()}
        self.calls, self.returns = _calls(self.plan, self.types, modules)
        reached = {call.path for call in self.calls} | set(self.not_looked_at)
        self.never_called = [
            path(keys)
            for keys in watch.modules
            if keys in watch.matched and path(keys) not in reached
        ]

    def zero_shifts(self) -> Marked:
        pairs = zip(self.plan.outputs, self.types, strict=True)
        return [
            [None if isinstance(o.call, Applied) else _zero_shift(kind) for kind in kinds]
            for o, kinds in pairs
        ]


class Inputs(Call):
    """Marks what a submodule is given."""


class Applied(NamedTuple):
    """Marks what goes into an activation function, and what comes out."""

    activation: Activation


class _Witness(Observer):
    """Tags inputs too. Where it cannot be told which module is called, none is."""

    def __init__(self, model: PyTree, where: Where):
        super().__init__(model, where)
        self.unclear = set()

    def call(self, module: eqx.Module, run: Any) -> Any:
        place, held = self._place(module)
        if place is not None and self._may_match(module, place):
            args, kwargs = _tagged((run.args, run.keywords), place, held, self.level)
            run = ft.partial(run.func, *args, **kwargs)
        return super().call(module, run)

    def _place_of_equal(self, module: eqx.Module) -> Place | None:
        try:
            return super()._place_of_equal(module)
        except NotImplementedError:
            same = [keys for keys in self.matched if type(self.modules[keys]) is type(module)]
            self.unclear.update(path(keys) for keys in same)
            return None


_UNCLEAR = "several equal ones without arrays are called in a tree that is built anew"


def _tagged(inputs: PyTree, place: Place, held: Sequence[Array], level: int) -> PyTree:
    """`inputs`, whose arrays are marked. Those of modules and of a state in it are not."""
    whole = lambda x: isinstance(x, eqx.Module | eqx.nn.State)
    leaves, structure = jtu.tree_flatten(inputs, is_leaf=whole)
    at = [i for i, leaf in enumerate(leaves) if _is_traced_number(leaf)]
    if at:
        arrays = [leaves[i] for i in at]
        call = Inputs(place, level, jtu.tree_structure(arrays), None)
        for i, x in zip(at, tag_p.bind(*arrays, *held, call=call), strict=True):
            leaves[i] = x
    return jtu.tree_unflatten(structure, leaves)


def _is_traced_number(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer) and not jnp.issubdtype(x.dtype, jax.dtypes.extended)


# ---- Of the plan, what can be handed out.


def _what_can_be_seen(plan: Plan, recomputed: set[int], survey: Survey) -> Plan:
    """`plan` without what cannot be captured, of which `survey` is told, and with activations."""
    seen = copy.copy(plan)
    seen.steps = [_seen_step(plan, i, recomputed, survey) for i in range(len(plan.jaxpr.eqns))]
    seen.outputs = [output for step in seen.steps for output in step.outputs]
    seen.recomputed = []
    return seen


def _seen_step(plan: Plan, i: int, recomputed: set[int], survey: Survey) -> Step:
    eqn, step = plan.jaxpr.eqns[i], plan.steps[i]
    nothing = Step([], [])
    if eqn.primitive is tag_p:
        for output in step.outputs:
            reason = None
            if len(output.paths) > 1:
                reason = "which of several is called cannot be told"
            elif id(output.call) in recomputed:
                reason = "the function differentiates a `jax.checkpoint` that calls it"
            if reason:
                survey.not_looked_at.update(dict.fromkeys(output.paths, reason))
                return nothing
        return step
    found = recognised(plan.jaxpr, i)
    if found is not None and not step.outputs:
        activation, operand = found
        return Step([Output((activation.name,), Applied(activation))], [], operand)  # pyright: ignore
    differentiated = eqn.primitive is primitives.remat_p and eqn.params["differentiated"]
    if eqn.primitive not in supported or differentiated:
        for output in step.outputs:
            reason = f"it is called inside `{eqn.primitive.name}`"
            survey.not_looked_at.update(dict.fromkeys(output.paths, reason))
        return nothing
    inner = [_what_can_be_seen(p, recomputed, survey) for p in step.inner]
    return Step([output for p in inner for output in p.outputs], inner)


# ---- The calls, from the order of their marks.


def _calls(
    plan: Plan, types: list, modules: dict[str, eqx.Module]
) -> tuple[list[Seen], list[Seen]]:
    """In the order in which they begin, and those of submodules in the order they return."""
    calls, returned, open_, numbers = [], [], [], Counter()
    for i, (output, loops) in enumerate(zip(plan.outputs, loops_around(plan), strict=True)):
        [where] = output.paths
        if isinstance(output.call, Applied):
            _add_activation(calls, open_, i, output.call.activation, loops, types)
            continue
        call = None
        if not isinstance(output.call, Inputs):
            # One of which the output was not marked, as it raised, is still open.
            call = next((seen for seen in reversed(open_) if seen.path == where), None)
        if call is None:
            module = modules[where]
            call = Seen(where, type(module).__name__, loops, numbers[where])
            if isinstance(module, eqx.nn.Lambda):
                call.activation = activation_of(module.fn, getattr(module.fn, "__name__", "Lambda"))
            numbers[where] += 1
            calls.append(call)
            open_.append(call)
        if isinstance(output.call, Inputs):
            call.given = i
            continue
        call.returned = i
        del open_[open_.index(call) :]
        returned.append(call)
        if open_:
            open_[-1].last = call
    return [
        call for call in calls if call.returned is not None or call.applied is not None
    ], returned


def _add_activation(
    calls: list[Seen],
    open_: list[Seen],
    i: int,
    activation: Activation,
    loops: tuple[int, ...],
    types: list,
) -> None:
    around = open_[-1] if open_ else None
    if around is not None and around.activation is not None:
        return  # It is the whole of an `equinox.nn.Lambda`.
    # It is named after the submodule whose output it takes, if that is in the same call.
    where = around
    if around is not None and around.last is not None:
        feeds = around.last
        where = feeds if types[feeds.output][0].shape == types[i][0].shape else around
    at = "" if where is None else where.path
    number = 0 if where is None else where.number
    taken = {(c.path, c.number, c.type) for c in calls}
    while (at, number, activation.name) in taken:
        number += 1
    calls.append(Seen(at, activation.name, loops, number, applied=i, activation=activation))
