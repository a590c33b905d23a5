"""Which call of which module each tag in a jaxpr marks.

A module that `fn` has built anew is known by the arrays it holds: each variable of the jaxpr has
its origins, which are the arrays of the model that it was made of, and these lead back to a path.
They are a set of bits in an integer.
"""

import copy
import functools as ft
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from jax.extend.core import Literal, primitives
from jaxtyping import PyTree

from ..._jaxprs import is_jaxpr, opened, scan_counts
from ._functions import Function, found_in
from ._instrument import Arrays, Observer
from ._model import callable_modules, path
from ._names import named_call
from ._tag import Call, Inputs, tag_p


class Output(NamedTuple):
    """A tag, or a named value, that is looked for.

    It has more than one path if it cannot be told which module was called. What is not `wanted`
    is there to say where a function in between stands.
    """

    paths: tuple[str, ...]
    call: Call
    wanted: bool = True


class Step(NamedTuple):
    """What is marked in one equation, in program order, and the plans of its inner jaxprs.

    Where the equation itself is marked, though it is no tag, `operand` is which of its operands is
    handed out, ahead of its first result, or in place of both a `summary` of it. With `result` it
    is its only result. `donates` says whether something in it gives operands away, outside
    `jax.jit`.
    """

    outputs: list[Output]
    inner: list["Plan"]
    operand: int | None = None
    summary: Callable | None = None
    result: bool = False
    donates: bool = False


class Plan:
    """A jaxpr, closed or not, and what is marked in it.

    `recomputed` are the tags that a differentiated checkpoint computes anew in its backward pass:
    each has its twin in the forward pass, which is among the `outputs`.
    """

    def __init__(self, jaxpr: Any, steps: list[Step], recomputed: list[Output]):
        self.jaxpr = opened(jaxpr)
        self.consts = getattr(jaxpr, "consts", ())
        self.steps = steps
        self.outputs = [output for step in steps for output in step.outputs]
        self.donates = any(step.donates for step in steps)
        self.recomputed = recomputed

    def only_wanted(self) -> "Plan":
        """Without the marks that nobody asked for."""
        plan = copy.copy(self)
        keep = lambda outputs: [output for output in outputs if output.wanted]
        plan.steps = [
            step._replace(outputs=keep(step.outputs), inner=[p.only_wanted() for p in step.inner])
            for step in self.steps
        ]
        plan.outputs, plan.recomputed = keep(self.outputs), keep(self.recomputed)
        return plan

    @ft.cached_property
    def last_uses(self) -> list[set]:
        """For each equation, the variables that nothing after it reads."""
        needed = _variables(self.jaxpr.outvars)
        last = []
        for eqn in reversed(self.jaxpr.eqns):
            here = _variables([*eqn.invars, *eqn.outvars])
            last.append(here - needed)
            needed |= here
        return last[::-1]


def make_plan(jaxpr: Any, args: tuple, watch: Observer) -> Plan:
    """The plan of a jaxpr whose operands are the arrays of the model and of `args`."""
    planner = _Planner(jaxpr, watch)
    origins = list(planner.arrays.own.values())
    for arg in args:
        # What `equinox.partition` has taken out of the model stands there in an argument.
        more = watch.model.holds_more_of_it(arg)
        count = len(jtu.tree_leaves(eqx.filter(arg, eqx.is_array)))
        origins += [planner.add(keys) for keys in watch.model.keys(arg)] if more else [0] * count
    planner.add_shared(args)
    plan, _ = planner.plan(jaxpr, tuple(origins))
    if not watch.model.known:
        watch.check_matched()
    return plan


def _fits(arg: Any, model: PyTree) -> bool:
    """Whether it may be what `equinox.partition` has taken out of the model."""
    structure = lambda tree: jtu.tree_structure(tree, is_leaf=lambda x: x is None)
    return type(arg) is type(model) and structure(arg) == structure(model)


class _Planner:
    def __init__(self, jaxpr: Any, watch: Observer):
        self.repeated = _repeated(jaxpr)
        model = watch.model
        keys, arrays = model.keys(model.tree), jtu.tree_leaves(eqx.filter(model.tree, eqx.is_array))
        shapes = {each: array.shape for each, array in zip(keys, arrays, strict=True)}
        self.arrays = Arrays({each: 1 << i for i, each in enumerate(keys)}, {}, shapes)
        self.watch = watch
        self.plans = {}

    def add(self, keys: tuple) -> int:
        """The origin of an array that stands at these keys, if the model has none there."""
        own = self.arrays.own
        if keys in own:
            return 0
        own[keys] = 1 << len(own)
        return own[keys]

    def add_shared(self, args: tuple) -> None:
        """The arrays that an `equinox.nn.Shared` puts where it holds a marker come from others."""
        own, shared, shapes = self.arrays
        tree = self.watch.model.tree
        whole = eqx.combine(tree, *(arg for arg in args if _fits(arg, tree)))
        for keys, module in callable_modules((), whole):
            if isinstance(module, eqx.nn.Shared):
                jaxpr, out, _ = eqx.filter_make_jaxpr(lambda module: module())(module)
                inside = [own.get((*keys, *each), 0) for each in self.watch.model.keys(module)]
                _, origins = self.plan(jaxpr, tuple(inside))
                arrays, _ = jtu.tree_flatten_with_path(out)
                for (each, array), origin in zip(arrays, origins, strict=True):
                    at = (*keys, jtu.GetAttrKey("pytree"), *each)
                    shared[at] = origin
                    shapes.setdefault(at, array.shape)

    def plan(self, jaxpr: Any, origins: tuple[int, ...]) -> tuple[Plan, list[int]]:
        # Planned once for each set of origins, however often it is called.
        key = id(opened(jaxpr)), origins
        if key not in self.plans:
            self.plans[key] = self._plan(jaxpr, origins)
        return self.plans[key]

    def _plan(self, jaxpr: Any, origins: tuple[int, ...]) -> tuple[Plan, list[int]]:
        inside = opened(jaxpr)
        env = dict(zip(inside.invars, origins, strict=True))
        read = lambda atom: 0 if isinstance(atom, Literal) else env.get(atom, 0)
        steps, recomputed = [], []
        functions = found_in(inside, self.watch.functions)
        for i, eqn in enumerate(inside.eqns):
            if i in functions:
                [out] = eqn.outvars
                env[out] = _union(tuple(map(read, eqn.invars)))
                output = Output((functions[i],), Function(functions[i], self.watch.level))
                steps.append(Step([output], [], result=True))
                continue
            inner, outs = self._inner(eqn, tuple(map(read, eqn.invars)))
            env.update(zip(eqn.outvars, outs, strict=True))
            found = self._outputs(eqn, read, id(inside) in self.repeated)
            found = found or [o for plan in inner for o in plan.outputs]
            recomputed += [o for plan in inner for o in plan.recomputed]
            primitive, params = kind(eqn)
            if primitive is primitives.remat_p and params["differentiated"]:
                recomputed += found
                found = []
            donates = any(eqn.params.get("donated_invars", ())) or any(p.donates for p in inner)
            steps.append(Step(found, inner, donates=donates))
        return Plan(jaxpr, steps, recomputed), [read(atom) for atom in inside.outvars]

    def _inner(self, eqn: Any, origins: tuple[int, ...]) -> tuple[list[Plan], list[int]]:
        """The plans of the inner jaxprs of `eqn`, and the origins of its outputs."""
        pairs = [self._inner_plan(eqn, jaxpr, origins) for jaxpr in _inner_jaxprs(eqn.params)]
        outs = _outer_origins(eqn, origins)
        through = [inner for _, inner in pairs if len(inner) == len(outs)]
        if through:
            outs = [ft.reduce(operator.or_, each) for each in zip(*through, strict=True)]
        return [plan for plan, _ in pairs], outs

    def _inner_plan(self, eqn: Any, jaxpr: Any, origins: tuple[int, ...]) -> tuple[Plan, list[int]]:
        if eqn.primitive is primitives.scan_p:
            return self._loop(jaxpr, origins, *scan_counts(eqn))
        if eqn.primitive is primitives.while_p:
            of_cond, of_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            if jaxpr is eqn.params["body_jaxpr"]:
                return self._loop(jaxpr, origins[of_cond:], of_body, len(eqn.outvars))
            return self.plan(jaxpr, (*origins[:of_cond], *origins[of_cond + of_body :]))
        if eqn.primitive is primitives.cond_p:
            return self.plan(jaxpr, origins[1:])
        count = len(opened(jaxpr).invars)
        return self.plan(jaxpr, origins if count == len(origins) else (_union(origins),) * count)

    def _loop(
        self, jaxpr: Any, origins: tuple[int, ...], num_consts: int, num_carry: int
    ) -> tuple[Plan, list[int]]:
        start, stop = num_consts, num_consts + num_carry
        while True:
            plan, outs = self.plan(jaxpr, origins)
            # What one step makes of the carry is what the next one gets.
            carry = tuple(map(operator.or_, origins[start:stop], outs[:num_carry]))
            if carry == origins[start:stop]:
                return plan, outs
            origins = (*origins[:start], *carry, *origins[stop:])

    def _outputs(self, eqn: Any, read: Any, repeated: bool) -> list[Output]:
        primitive, params = kind(eqn)
        if primitive is primitives.name_p:
            name = params["name"]
            self.watch.named[name] = None
            looked_for = name in self.watch.names
            return [Output((str(name),), named_call(name, self.watch.level))] if looked_for else []
        call = eqn.params.get("call")
        if eqn.primitive is not tag_p or call.level != self.watch.level:
            return []
        held = [(read(atom), atom.aval.shape) for atom in eqn.invars[len(eqn.outvars) :]]
        holders = self.watch.holders(call.place, held, self.arrays)
        # Modules that are static arguments share a trace if they are equal.
        ends = [call.place.keys, *(call.place.equals if repeated else ())]
        found = [(*keys, *end) for keys in holders for end in ends]
        wanted = self.watch.looks_for(found, call.place)
        wanted = wanted and (self.watch.inputs or not isinstance(call, Inputs))
        if not found or not (wanted or self.watch.functions):
            return []
        return [Output(tuple(path(keys) for keys in found), call, wanted)]


def kind(eqn: Any) -> tuple[Any, dict[str, Any]]:
    """The primitive of an equation, and its parameters.

    Of those that `jax_remat3` switches on, as of those that they replace; they keep parameters one
    level down.
    """
    newer = eqn.params.get("_prim")
    if type(newer).__name__ == "RematTraced":
        return primitives.remat_p, {"differentiated": False, "prevent_cse": True, **newer.params}
    if type(newer).__name__ == "CheckpointName":
        return primitives.name_p, newer.params
    return eqn.primitive, eqn.params


def _repeated(jaxpr: Any) -> set[int]:
    """The ids of the jaxprs that several equations hold, and of all within these."""
    seen, repeated = set(), set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            for inner in map(opened, _inner_jaxprs(eqn.params)):
                if id(inner) not in repeated:
                    (repeated if id(inner) in seen else seen).add(id(inner))
                    walk(inner)

    walk(opened(jaxpr))
    return repeated


def _outer_origins(eqn: Any, origins: tuple[int, ...]) -> list[int]:
    count = len(eqn.outvars)
    if eqn.primitive is tag_p or count == len(origins) > 1:
        return list(origins[:count])  # one result for each operand, as of an optimization barrier
    name = eqn.primitive.name
    reduces = name.startswith("reduce_") and name != "reduce_precision"
    if reduces or name in ("dot_general", "conv_general_dilated"):
        # This makes an activation, a gradient or a norm, not what could stand for the weight.
        return [0] * count
    return [_union(origins)] * count


def _union(origins: tuple[int, ...]) -> int:
    return ft.reduce(operator.or_, origins, 0)


def _variables(atoms: list) -> set:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    values = list(params.values())
    # The newer kind of primitive, which `jax_remat3` and `jax_custom_vjp3` switch on, keeps its
    # parameters one level down, some of them in a `jax.stages.Traced`.
    if "_prim" in params:
        values += [getattr(v, "jaxpr", v) for v in params["_prim"].params.values()]
    for value in values:
        for each in value if isinstance(value, tuple) else (value,):
            if is_jaxpr(each):
                yield each
