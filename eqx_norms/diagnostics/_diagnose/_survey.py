"""Every call of a model's submodules, and of the activation functions in them: what went in, what
came out, and the loss's derivatives at both.

What `capture` refuses is listed here, and the rest is looked at all the same.
"""

import copy
import dataclasses
import functools as ft
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.extend.core import primitives
from jaxtyping import Array, PyTree

from ..._jaxprs import is_jaxpr, opened
from .._capture._activations import Activation, activation_of, recognised
from .._capture._capture import _check_arrays, _Program, _zero_shift
from .._capture._instrument import Where
from .._capture._interpret import ArrayType, Marked, loops_around, marked_types, supported
from .._capture._library import observe
from .._capture._model import Model, path
from .._capture._plan import Output, Plan, Step, make_plan
from .._capture._tag import Inputs, tag_p
from ._dataflow import Fact, Flow
from ._scores import of_scores


@dataclasses.dataclass(eq=False)
class Seen:
    """One call, of the submodule at `path` or, if there is one, of an activation function in it.

    `given` and `returned` say which of the marked arrays are its inputs and outputs; of an
    activation function, `applied` are both. `loops` are the lengths of the scans around the call,
    and of the axes of an ensemble; `kinds` says of each whether its steps are each a `"layer"` with
    parameters of its own, in `"time"`, or a `"member"`.

    - `examples`: how many axes of examples the first array has, behind these.
    - `batched`: whether the first of its other axes is that of the batch, as in Flax.
    - `shape`: of a softmax, of which only figures are marked, that of its scores.
    - `inputs`: the marks of which its input was made.
    - `begins`, `returns`: where, as the numbers of the equations around it, the outermost first,
        each with whether it is a scan in reverse, `None` if it is no scan.
    - `units`: of an activation function, whether it acts on the units of a hidden layer: weights
        made them, and weights read them. Terms of a loss, and variances in a norm, are none. Of a
        softmax, whether it acts on the scores of an attention.
    - `gate`: whether its output is multiplied with something else that is computed.
    - `ends`: whether a module with two weight matrices or more returns what it returns: it is the
        last of a network, as of an actor or a generator, whose output another network reads.
    - `conditional`: whether it is in a `jax.lax.cond`.
    """

    path: str
    type: str
    loops: tuple[int, ...]
    number: int = 0
    given: int | None = None
    returned: int | None = None
    applied: int | None = None
    activation: Activation | None = None
    # The last call within it that has returned; that which an activation function is named after.
    last: "Seen | None" = dataclasses.field(default=None, repr=False)
    kinds: tuple[str, ...] = ()
    examples: int = 0
    batched: bool = False
    shape: tuple[int, ...] | None = None
    inputs: int = 0
    units: bool = False
    gate: bool = False
    ends: bool = False
    hidden: bool = False
    conditional: bool = False
    differentiated: bool = False
    begins: "At" = ()
    returns: "At" = ()

    @property
    def output(self) -> int:
        """Which of the marked arrays are its outputs."""
        index = self.applied if self.returned is None else self.returned
        assert index is not None
        return index


# The number of each equation around a mark, and whether it is a scan in reverse, `None` if none.
At = tuple[tuple[int, bool | None], ...]


def when(at: At, step: tuple[int, ...]) -> tuple[int, ...]:
    """What is smaller the earlier it is, of marks in these steps of the loops around them."""
    numbers, found = iter(step), []
    for equation, reverse in at:
        number = 0 if reverse is None else next(numbers)
        found += [equation, -number if reverse else number]
    return (*found, *numbers)


class Survey(_Program):
    """`loss_fn(model, *args)`, in which every call that `where` matches is marked at both ends."""

    def __init__(self, loss_fn: Callable, model: Model, args: tuple, where: Where):
        self.model = model
        watch = observe(model, where, inputs=True, lenient=True)
        _check_arrays(model.tree, args)
        jaxpr, self.out, self.static_out = watch.trace(loss_fn, args)
        plan = make_plan(jaxpr, args, watch)
        self.not_looked_at = dict.fromkeys(sorted(watch.unclear), _UNCLEAR)
        self.plan = _what_can_be_seen(plan, {id(o.call) for o in plan.recomputed}, self)
        self.marked_types = marked_types(self.plan)
        self.replacements = {}
        self.check_differentiable()
        self.modules = {path(keys): module for keys, module in watch.modules.items()}
        self.linear = {
            path(keys): shape
            for keys, module in watch.modules.items()
            if (shape := model.linear_shape(keys, module)) is not None
        }
        self.flow = Flow(self.plan, model.tree, args)
        self.calls, self.returns = _calls(self.plan, self.marked_types, self.modules, self.flow)
        self._arrangements = _described(self)
        self.types = [
            [_arranged_type(kind, how) for kind, how in zip(kinds, hows, strict=True)]
            for kinds, hows in zip(self.marked_types, self._arrangements, strict=True)
        ]
        self.constants = list(_constants(jaxpr))
        reached = {call.path for call in self.calls} | set(self.not_looked_at)
        self.never_called = [
            path(keys)
            for keys in watch.modules
            if keys in watch.matched and path(keys) not in reached
        ]

    def zero_shifts(self) -> Marked:
        pairs = zip(self.plan.outputs, self.marked_types, strict=True)
        return [
            [None if isinstance(o.call, Applied) else _zero_shift(kind) for kind in kinds]
            for o, kinds in pairs
        ]

    def backward(self, tree: PyTree, args: tuple) -> tuple[Any, Marked, Marked, PyTree]:
        """With the axes of an ensemble ahead of all but those of loops."""
        loss, marked, grads, model_grads = super().backward(tree, args)
        return loss, self._arranged(marked), self._arranged(grads), model_grads

    def _arranged(self, marked: Marked) -> Marked:
        return [
            [x if x is None else _arranged(x, how) for x, how in zip(arrays, hows, strict=True)]
            for arrays, hows in zip(marked, self._arrangements, strict=True)
        ]


class Applied(NamedTuple):
    """Marks what goes into an activation function, and what comes out, both of this shape."""

    activation: Activation
    shape: tuple[int, ...]


_UNCLEAR = "several equal ones without arrays are called in a tree that is built anew"


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
        applied = Applied(activation, eqn.outvars[0].aval.shape)
        # The scores of an attention are larger than all else, and in no memory at once.
        summary = None if activation.axis is None else ft.partial(of_scores, axis=activation.axis)
        outputs = [Output((activation.name,), applied)]  # pyright: ignore
        return Step(outputs, [], operand, summary)
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
    plan: Plan, types: list, modules: dict[str, Any], flow: Flow
) -> tuple[list[Seen], list[Seen]]:
    """In the order in which they begin, and those of submodules in the order they return."""
    calls, returned, open_, numbers = [], [], [], Counter()
    for i, (output, loops) in enumerate(zip(plan.outputs, loops_around(plan), strict=True)):
        [where] = output.paths
        if isinstance(output.call, Applied):
            fact = flow.facts[i][0] if i in flow.facts else Fact()
            if output.call.activation.by_hand and fact.summed:
                continue  # `jnp.maximum(variance, 0)`
            like = fact.like
            feeds = next((call for call in returned if call.returned == like), None)
            _add_activation(calls, open_, feeds, i, output.call, loops, types)
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
        call.differentiated = output.call.differentiated
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
    feeds: Seen | None,
    i: int,
    applied: Applied,
    loops: tuple[int, ...],
    types: list,
) -> None:
    activation = applied.activation
    around = open_[-1] if open_ else None
    if around is not None and around.activation is not None:
        return  # It is the whole of an `equinox.nn.Lambda`.
    # It is named after the submodule whose output it takes, if that is in the same call.
    inside = around is None or (feeds is not None and calls.index(feeds) > calls.index(around))
    where = feeds if inside else around
    if where is around and around is not None and around.last is not None:
        last = around.last
        alike = activation.axis is None and types[last.output][0].shape == applied.shape
        where = last if alike else around
    at = "" if where is None else where.path
    number = 0 if where is None else where.number
    taken = {(c.path, c.number, c.type) for c in calls}
    while (at, number, activation.name) in taken:
        number += 1
    seen = Seen(at, activation.name, loops, number, applied=i, activation=activation)
    seen.shape = None if activation.axis is None else applied.shape
    seen.last = where  # whose axes it has
    calls.append(seen)


# ---- What the program says of each call, and the order of the axes of what it marks.


class Arrangement(NamedTuple):
    """How many axes of loops are in front, which axes are an ensemble's, and their lengths."""

    loops: int
    members: tuple[int, ...]
    lengths: tuple[int, ...]


def _described(survey: Survey) -> list[list[Arrangement]]:
    """Fills in what the program says of the calls; returns the arrangement of each marked array."""
    flow, types = survey.flow, survey.marked_types
    loops = loops_around(survey.plan)
    arrangements = [
        [Arrangement(len(around), (), ())] * len(kinds)
        for around, kinds in zip(loops, types, strict=True)
    ]
    conditional, places = _in_branches(survey.plan), _places(survey.plan)
    ends = _ends_of_networks(survey)
    for call in survey.calls:
        around = loops[call.output]
        call.conditional = conditional[call.output]
        call.returns = places[call.output]
        call.begins = places[call.output if call.given is None else call.given]
        call.hidden = flow.is_hidden(call.output)
        call.gate = flow.is_gate(call.output)
        call.ends = call.output in ends
        if call.applied is None:
            vmaps, given = flow.vmaps[call.output], call.given
            facts = flow.facts.get(-1 if given is None else given, [])
            call.inputs = ft.reduce(operator.or_, (fact.reach for fact in facts), 0)
        else:
            vmaps = [_of_function(call, flow, types)] * (2 if call.shape is None else 1)
            facts = flow.facts[call.output]
        call.units = call.hidden and any(fact.affine for fact in facts)
        if call.shape is not None:
            call.units = facts[0].product
        sliced = flow.sliced.get(call.last.output if call.applied and call.last else call.output, 0)
        call.kinds = tuple("layer" if sliced >> i & 1 else "time" for i in range(len(around)))
        widest = max(vmaps, key=lambda kinds: kinds.count("member"), default=())
        at = vmaps.index(widest) if vmaps else 0
        shape = types[call.output][at].shape if vmaps else ()
        members = [len(around) + i for i, kind in enumerate(widest) if kind == "member"]
        lengths = tuple(shape[i] for i in members)
        for each in {call.output, call.output if call.given is None else call.given}:
            arrangements[each] = [
                _arrangement(len(around), kinds, lengths)
                for kinds in (vmaps if each == call.output else flow.vmaps[each])
            ]
        call.loops = (*around, *lengths)
        if call.shape is not None:  # which has axes of loops no more than of members
            call.shape = _without(call.shape, [i - len(around) for i in members])
        call.kinds += ("member",) * len(lengths)
        call.examples = vmaps[0].count("example") if vmaps else 0
        call.batched = survey.model.batches_first and not call.examples
    return arrangements


def _ends_of_networks(survey: Survey) -> set[int]:
    """The marks of what a module with two matrices or more returns."""
    model, found = survey.model, set()
    leaves = jtu.tree_leaves(model.trained(model.tree))
    matrices = [where for where, x in zip(model.paths(), leaves, strict=True) if x.ndim > 1]
    for call in survey.returns:
        if sum(is_in(where, call.path) for where in matrices) > 1:
            for fact in survey.flow.facts[call.output]:
                found |= {fact.function, fact.same}
    return found


def is_in(parameter: str, module: str) -> bool:
    inside = parameter[len(module) :][:1] in (".", "[", "")
    return not module or (parameter.startswith(module) and inside)


def _without(shape: tuple[int, ...], axes: list[int]) -> tuple[int, ...]:
    return tuple(length for i, length in enumerate(shape) if i not in axes)


def _of_function(call: Seen, flow: Flow, types: list) -> tuple[str, ...]:
    """The kinds of its axes that come from `jax.vmap`: those of the call that it is named after."""
    if call.last is None or call.last.applied is not None or call.last.returned is None:
        return ()
    of = flow.vmaps.get(call.last.returned)
    if not of:
        return ()
    there, here = (types[mark][0].shape for mark in (call.last.returned, call.output))
    if call.shape is not None:  # Scores have other axes behind these.
        ahead = len(call.loops) + len(of[0])
        return of[0] if there[:ahead] == here[:-1][:ahead] else ()
    return of[0] if there == here or len(of[0]) <= len(here) else ()


def _arrangement(loops: int, kinds: tuple[str, ...], lengths: tuple[int, ...]) -> Arrangement:
    members = tuple(loops + i for i, kind in enumerate(kinds) if kind == "member")
    return Arrangement(loops, members if len(members) == len(lengths) else (), lengths)


def _arranged(x: Array, how: Arrangement) -> Array:
    loops, members, lengths = how
    if members:
        return jnp.moveaxis(x, members, range(loops, loops + len(members)))
    if not lengths:
        return x
    ahead = x.shape[:loops]
    x = x.reshape(*ahead, *[1] * len(lengths), *x.shape[loops:])
    return jnp.broadcast_to(x, (*ahead, *lengths, *x.shape[loops + len(lengths) :]))


def _arranged_type(kind: ArrayType, how: Arrangement) -> jax.ShapeDtypeStruct:
    if not how.lengths:
        return jax.ShapeDtypeStruct(kind.shape, kind.dtype)
    return jax.eval_shape(
        ft.partial(_arranged, how=how), jax.ShapeDtypeStruct(kind.shape, kind.dtype)
    )


def _in_branches(plan: Plan, inside: bool = False) -> list[bool]:
    """Whether each mark is in the branch of a `cond`."""
    found = []
    for eqn, step in zip(plan.jaxpr.eqns, plan.steps, strict=True):
        here = inside or eqn.primitive is primitives.cond_p
        inner = [each for part in step.inner for each in _in_branches(part, here)]
        found += inner or [inside] * len(step.outputs)
    return found


def _places(plan: Plan) -> list[At]:
    found = []
    for i, (eqn, step) in enumerate(zip(plan.jaxpr.eqns, plan.steps, strict=True)):
        here = i, eqn.params["reverse"] if eqn.primitive is primitives.scan_p else None
        inner = [(here, *more) for part in step.inner for more in _places(part)]
        found += inner or [(here,)] * len(step.outputs)
    return found


def _constants(jaxpr: Any) -> Iterator[Any]:
    """The arrays that a traced function holds, without having been given them."""
    yield from getattr(jaxpr, "consts", ())
    for eqn in opened(jaxpr).eqns:
        for value in eqn.params.values():
            for each in value if isinstance(value, tuple | list) else (value,):
                if is_jaxpr(each):
                    yield from _constants(each)
