"""What becomes of the marked arrays, and what they were made of, read off the traced program.

Statistics alone cannot tell a hidden unit from a term of the loss, layers from steps in time, or
members of an ensemble from examples. The program can.
"""

import functools as ft
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.tree_util as jtu
from jax.extend.core import Literal, primitives
from jaxtyping import PyTree

from ..._jaxprs import scan_counts
from .._capture._plan import Plan, Step
from .._capture._tag import Inputs, tag_p

NOTHING = -1


class Fact(NamedTuple):
    """Of one variable. Sets of marks, and of loops by their depth, are bits of an integer.

    - `fixed`: whether it is made of parameters and constants alone; `param`: of a parameter.
    - `sliced`: of which loops each step gets a part of that parameter of its own.
    - `near`: the marks that it was made of since the last weights; `reach`: all of them.
    - `affine`: it is the result of a matrix or convolution of weights, changed entry by entry only.
    - `summed`: it is a sum or mean, as a variance is, changed entry by entry only.
    - `product`: it is one of two computed matrices, as scores are, changed entry by entry only.
    - `same`: the output of the submodule that it is, `like`: that it is entry by entry a function
        of; `function`: the activation function of which it is the output. Each is a mark.
    """

    fixed: bool = False
    param: bool = False
    sliced: int = 0
    near: int = 0
    reach: int = 0
    affine: bool = False
    summed: bool = False
    product: bool = False
    same: int = NOTHING
    like: int = NOTHING
    function: int = NOTHING


_CONSTANT = Fact(fixed=True)
_LAYOUT = ("reshape", "transpose", "squeeze", "expand_dims", "copy", "convert_element_type")
_AFFINE = ("dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general")


class Flow:
    """Of each mark, by its place in `plan.outputs`:

    - `facts`: those of the arrays that it marks, before it;
    - `vmaps`: for each of the arrays the kinds of its axes that come from `jax.vmap`, the outermost
        first: `"member"` where the parameters have one too, and else `"example"`;
    - `sliced`: of which loops around each step has parameters of its own.

    And the sets `hidden`, of what weights multiply later on, and `gates`, of activation functions
    whose output is multiplied with something that is computed.
    """

    def __init__(self, plan: Plan, model: PyTree, args: tuple):
        self.facts: dict[int, list[Fact]] = {}
        self.vmaps: dict[int, list[tuple[str, ...]]] = {}
        self.sliced: dict[int, int] = {}
        self.hidden = self.gates = 0
        self.readers: dict[int, set[int]] = {}
        self._walk(plan, _operands(model, args), 0, 0)

    def is_hidden(self, mark: int) -> bool:
        return bool(self.hidden >> mark & 1)

    def is_gate(self, mark: int) -> bool:
        return bool(self.gates >> mark & 1)

    def _walk(self, plan: Plan, facts: Sequence[Fact], first: int, depth: int) -> list[Fact]:
        """The facts of what the plan returns; its first mark is the one of that number."""
        jaxpr = plan.jaxpr
        env = dict.fromkeys(jaxpr.constvars, _CONSTANT) | dict(
            zip(jaxpr.invars, facts, strict=True)
        )
        read = lambda atom: _CONSTANT if isinstance(atom, Literal) else env[atom]
        for eqn, step in zip(jaxpr.eqns, plan.steps, strict=True):
            outs = self._step(eqn, step, [read(atom) for atom in eqn.invars], first, depth)
            env.update(zip(eqn.outvars, outs, strict=True))
            first += len(step.outputs)
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, step: Step, ins: list, first: int, depth: int) -> list[Fact]:
        if eqn.primitive is tag_p:
            return self._tag(eqn, step, ins, first)
        if step.operand is not None:
            self.facts[first] = [ins[step.operand]]
            out, *rest = [self._one(eqn, ins, out) for out in eqn.outvars]
            bit = 1 << first
            out = out._replace(near=out.near | bit, reach=out.reach | bit, function=first)
            return [out, *rest]
        if step.inner and eqn.primitive is primitives.scan_p:
            return self._scan(eqn, step.inner[0], ins, first, depth)
        if step.inner and eqn.primitive is primitives.cond_p:
            return self._cond(step, ins[1:], first, depth)
        if step.inner and len(step.inner) == 1 and len(step.inner[0].jaxpr.invars) == len(ins):
            return self._walk(step.inner[0], ins, first, depth)
        return [self._one(eqn, ins, out) for out in eqn.outvars]

    def _tag(self, eqn: Any, step: Step, ins: list[Fact], mark: int) -> list[Fact]:
        arrays, held = ins[: len(eqn.outvars)], ins[len(eqn.outvars) :]
        if not isinstance(eqn.params["call"], Inputs):
            self._read_by(eqn, arrays)
        if not step.outputs:
            return arrays
        self.facts[mark] = arrays
        self.sliced[mark] = ft.reduce(operator.or_, (h.sliced for h in held if h.fixed), 0)
        mapped = eqn.params["mapped"][::-1]
        own = [i for i, h in enumerate(held, len(arrays)) if h.fixed]
        kind = ["member" if any(level[i] for i in own) else "example" for level in mapped]
        self.vmaps[mark] = [
            tuple(k for k, level in zip(kind, mapped, strict=True) if level[i])
            for i in range(len(arrays))
        ]
        if isinstance(eqn.params["call"], Inputs):
            return arrays
        bit = 1 << mark
        fresh = {"same": mark, "like": mark, "function": NOTHING}
        return [a._replace(near=a.near | bit, reach=a.reach | bit, **fresh) for a in arrays]

    def _read_by(self, eqn: Any, ins: list[Fact]) -> None:
        for fact in ins:
            if fact.same != NOTHING:
                self.readers.setdefault(fact.same, set()).add(id(eqn))

    def _one(self, eqn: Any, ins: list[Fact], out: Any) -> Fact:
        """The fact of a result of an equation that is not looked into."""
        name = eqn.primitive.name
        if name in _LAYOUT:
            fact = ins[0]
            same_shape = eqn.invars[0].aval.shape == out.aval.shape
            return fact if same_shape else fact._replace(like=NOTHING)
        self._read_by(eqn, ins)
        of_weights = name in _AFFINE and any(fact.param for fact in ins)
        if of_weights and not all(fact.param for fact in ins):  # data may be constants too
            self.hidden |= ft.reduce(operator.or_, (fact.near for fact in ins))
            return Fact(reach=ft.reduce(operator.or_, (fact.reach for fact in ins)), affine=True)
        if all(fact.fixed for fact in ins):
            sliced = ft.reduce(operator.or_, (fact.sliced for fact in ins), 0)
            return Fact(fixed=True, param=any(fact.param for fact in ins), sliced=sliced)
        moving = [
            (atom, fact) for atom, fact in zip(eqn.invars, ins, strict=True) if not fact.fixed
        ]
        near = ft.reduce(operator.or_, (fact.near for _, fact in moving))
        reach = ft.reduce(operator.or_, (fact.reach for _, fact in moving))
        if name in _AFFINE:
            return Fact(near=near, reach=reach, product=True)
        if name == "mul" and len(moving) == 2 and eqn.invars[0] is not eqn.invars[1]:
            for mark in (m for _, fact in moving for m in (fact.function, fact.same)):
                self.gates |= 1 << mark if mark != NOTHING else 0
        if _reduces(name):
            return Fact(near=near, reach=reach, summed=True)
        shape = getattr(out.aval, "shape", None)
        alike = (f.like for atom, f in moving if f.like != NOTHING and atom.aval.shape == shape)
        affine = any(fact.affine for _, fact in moving)
        summed = all(fact.summed for _, fact in moving)
        found = Fact(near=near, reach=reach, affine=affine, summed=summed)
        product = any(fact.product for _, fact in moving)
        return found._replace(product=product, like=next(alike, NOTHING))

    def _scan(self, eqn: Any, plan: Plan, ins: list, first: int, depth: int) -> list[Fact]:
        num_consts, num_carry = scan_counts(eqn)
        inside = [*ins[:num_consts], *(_into(fact, depth) for fact in ins[num_consts:])]
        start, stop = num_consts, num_consts + num_carry
        while True:
            outs = self._walk(plan, inside, first, depth + 1)
            # What one step makes of the carry is what the next one gets.
            pairs = zip(inside[start:stop], outs[:num_carry], strict=True)
            carry = [_joined(a, _into(b, depth)) for a, b in pairs]
            if carry == inside[start:stop]:
                return [_out_of(fact, depth) for fact in outs]
            inside[start:stop] = carry

    def _cond(self, step: Step, ins: list[Fact], first: int, depth: int) -> list[Fact]:
        branches = []
        for plan in step.inner:
            branches.append(self._walk(plan, ins, first, depth))
            first += len(plan.outputs)
        return [ft.reduce(_joined, outs) for outs in zip(*branches, strict=True)]


def _operands(model: PyTree, args: tuple) -> list[Fact]:
    """Of the model's arrays and of those of modules that can be called, such as a target network,
    which are parameters; and of all others.
    """
    param, facts = Fact(fixed=True, param=True), []
    for tree, whole in ((model, True), *((arg, False) for arg in args)):
        nodes = jtu.tree_leaves(tree, is_leaf=lambda x: isinstance(x, eqx.Module))
        for node in nodes:
            of_params = whole or (isinstance(node, eqx.Module) and callable(node))
            count = len(jtu.tree_leaves(eqx.filter(node, eqx.is_array)))
            facts += [param if of_params else Fact()] * count
    return facts


def _reduces(name: str) -> bool:
    reduces = name.startswith(("reduce_", "arg", "cum")) or "psum" in name
    return reduces and name not in ("reduce_precision", "reduce_window_max", "reduce_window_sum")


def _into(fact: Fact, depth: int) -> Fact:
    """Of what differs from step to step of a loop, within it: it is not the same array any more."""
    sliced = fact.sliced | 1 << depth if fact.fixed else 0
    return fact._replace(sliced=sliced, same=NOTHING, like=NOTHING, function=NOTHING)


def _out_of(fact: Fact, depth: int) -> Fact:
    sliced = fact.sliced & ~(1 << depth)
    return fact._replace(sliced=sliced, same=NOTHING, like=NOTHING, function=NOTHING)


def _joined(a: Fact, b: Fact) -> Fact:
    return Fact(
        fixed=a.fixed and b.fixed,
        param=a.param and b.param,
        sliced=a.sliced & b.sliced,
        near=a.near | b.near,
        reach=a.reach | b.reach,
        affine=a.affine or b.affine,
        summed=a.summed and b.summed,
        product=a.product and b.product,
    )
