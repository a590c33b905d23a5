"""Proof from the structure: where no chain of operations leads from an input to an output.

The traced function is gone through once, with the inputs that every entry of every intermediate
result may read in place of its value. What this says holds for every finite input of this shape
and any finite values of the floating-point parameters, as long as no intermediate value becomes
infinite or NaN but by what the program makes of its own constants.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from ..._jaxprs import called, first_ref, is_foreign, opened
from .._edits import is_mask
from .._held import Held
from .._inputs import place
from .._lines import line_of
from . import (
    _along,
    _contraction,
    _control,
    _elementwise,
    _indexing,
    _reads as r,
    _windows,
)
from ._definitions import DEFINED, definition
from ._devices import SHARD_MAP
from ._elementwise import ENTRY_BY_ENTRY
from ._exact import exact, in_numpy
from ._flow import RULES, connect_all
from ._indexing import SHAPE_MOVES
from ._known import Known, constant, free, is_real, known, parameter
from ._labels import joint, label
from ._masks import LARGE, Meeting, assumed

# What is computed of constants is kept if it is larger.
_SMALL = 2**12
# The modules that fill the table of rules.
FAMILIES = (_elementwise, _indexing, _along, _contraction, _windows)

_MASKS = ("masks",)  # in the place of an equation's path


@dataclasses.dataclass
class Context:
    """What one pass through a function has besides its values.

    - `assume_bounded`: whether scores that meet a mask of a large number are below a tenth of it.
    - `cut`: for some equations, by their path, the only inputs that their results are taken to
        read.
    - `trust_masks`: whether floats of zeros and ones that the function holds are taken for what
        they are; `float_masks`: what these are, in words.
    - `zeros_cut`: whether what is multiplied by zero is not read.
    - `signs`: for each equation that tells 0 from -0 what its operands read where no zero cuts.
    - `meetings`: where scores meet masks, `used` those that something was concluded from.
    - `held`: the numbers that are parameters wherever they stand in the program.
    - `opaque`: names of what is not in the table; `platforms`: what was asked for.
    - `looking`: whether to look for what may be to blame: `merging` are then the equations that
        bring inputs together, `moving` the others, by path, each with its line.
    - `calls`: the equations that the present one is inside of.
    - `computed`: what was computed of constants, because it is the same in every pass.
    """

    assume_bounded: bool
    cut: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    trust_masks: bool = False
    zeros_cut: bool = True
    signs: dict = dataclasses.field(default_factory=dict)
    meetings: dict[Any, Meeting] = dataclasses.field(default_factory=dict)
    used: set = dataclasses.field(default_factory=set)
    held: Held = dataclasses.field(default_factory=Held)
    opaque: set = dataclasses.field(default_factory=set)
    platforms: set = dataclasses.field(default_factory=set)
    looking: bool = False
    merging: dict = dataclasses.field(default_factory=dict)
    moving: dict = dataclasses.field(default_factory=dict)
    calls: list = dataclasses.field(default_factory=list)
    float_masks: set = dataclasses.field(default_factory=set)
    computed: dict = dataclasses.field(default_factory=dict)

    def of_array(self, const: Any) -> Known:
        """What is known of an array that the function holds."""
        if not (jnp.issubdtype(jnp.result_type(const), jnp.floating) and _is_mask(const)):
            return parameter(const, LARGE)
        self.float_masks.add(f"{jnp.result_type(const)} of shape {jnp.shape(const)}")
        return constant(const) if self.trust_masks else parameter(const, LARGE)

    def literal(self, atom: Any) -> Known:
        """A number in the program, which a loop meets at every step."""
        if id(atom) not in self.computed:
            self.computed[id(atom)] = atom, _scalar(self.held, atom.val)
        return self.computed[id(atom)][1]

    def definition(self, eqn: jex.JaxprEqn) -> Any:
        key = "definition", id(eqn)
        if key not in self.computed:
            self.computed[key] = eqn, definition(eqn)
        return self.computed[key][1]

    def line(self, eqn: jex.JaxprEqn) -> str:
        return line_of([*self.calls, eqn])

    def meet(self, path, new: Meeting) -> None:
        """Of a loop's steps, each of which may meet another mask, the strictest."""
        old = self.meetings.get((path, new.operand), new)
        limit, where = min(old.limit, new.limit), old.where | new.where
        self.meetings[path, new.operand] = dataclasses.replace(new, limit=limit, where=where)


def _is_mask(const: Any) -> bool:
    return jnp.ndim(const) > 0 and is_mask(np.asarray(const), alone=True)


def evaluate(context: Context, closed: Any, args: Sequence[Known], path=()) -> list[Known]:
    """What is known of the results of a jaxpr, from what is known of its arguments."""
    jaxpr = opened(closed)
    consts = [context.of_array(const) for const in getattr(closed, "consts", ())]
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not _literal(v)}
    last |= dict.fromkeys((v for v in jaxpr.outvars if not _literal(v)), len(jaxpr.eqns))

    def read(atom):
        return context.literal(atom) if _literal(atom) else values[atom]

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        for atom in set(filter(lambda a: not _literal(a), eqn.invars)):
            if last[atom] == i:
                del values[atom]
        results = _equation(context, eqn, operands, (*path, i))
        values.update((v, x) for v, x in zip(eqn.outvars, results, strict=True) if v in last)
    return [read(atom) for atom in jaxpr.outvars]


def _literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def _equation(context: Context, eqn: jex.JaxprEqn, operands: list[Known], path) -> list[Known]:
    name = eqn.primitive.name.replace("-", "_")
    inner = context.definition(eqn) if name in DEFINED else called(eqn)
    if name == SHARD_MAP and inner is not None:
        operands = [free((), np.int32), *operands]  # whichever device
    if name in _CONTROL or inner is not None:
        context.calls.append(eqn)
        if name in _CONTROL:
            results = _CONTROL[name](evaluate, context, eqn, operands, path)
        else:
            results = evaluate(context, inner, operands, path)
        context.calls.pop()
    else:
        if name == "platform_index":
            context.platforms.add(jax.default_backend())
        signed = _tells_zeros_apart(eqn, operands)
        if signed:
            operands = _with_signs(context, operands, path)
        computed, values = _computed(context, eqn, operands)
        settled = [x for x in computed if x is not None]
        if computed and len(settled) == len(computed):
            return settled
        if name not in RULES:
            context.opaque.add(name)
        results = RULES.get(name, connect_all)(context, eqn, *operands)
        if computed:
            results = list(map(_where_finite, results, values))
        if context.assume_bounded:
            results = assumed(context, eqn, operands, results, path)
        if context.looking:
            merges = _merges(operands, results)
            group = context.merging if merges else context.moving
            group.setdefault(path, (eqn, context.line(eqn)))
            if merges:  # What comes later is judged as if this did not.
                return [x.reading(lambda _: None) for x in results]
    if path in context.cut:
        inputs = context.cut[path]
        results = [x.reading(lambda old: r.restricted(old, inputs)) for x in results]
    return results


_CONTROL = {"scan": _control.scan, "while": _control.loop, "cond": _control.branch}


def _scalar(held: Held, value: Any) -> Known:
    """A number in the program; a parameter, if it equals one that the function holds."""
    if np.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        if held.have(np.asarray(value, jnp.result_type(value))):
            return parameter(value, LARGE)
    return constant(value)


# What tells 0 from -0, which a product with zero does not: of complex numbers, at their branch
# cuts; bits; the angle; and an order of all numbers.
_SIGNS = ("atan2", "bitcast_convert_type", "eq_to", "le_to", "lt_to")
_BRANCHES = "acos acosh asin asinh atan atanh cbrt log log1p log2 pow rsqrt sign sqrt tan tanh"


def _tells_zeros_apart(eqn: jex.JaxprEqn, operands: Sequence[Known]) -> bool:
    name = eqn.primitive.name
    kinds = [x.dtype for x in operands if x.value is None]
    is_complex = any(jnp.issubdtype(kind, jnp.complexfloating) for kind in kinds)
    is_float = any(jnp.issubdtype(kind, jnp.inexact) for kind in kinds)
    return is_float and (name in _SIGNS or (is_complex and name in _BRANCHES.split()))


def _with_signs(context: Context, operands: list[Known], path) -> list[Known]:
    """What decides the signs of zeros is read as well; a pass in which no zero cuts finds it."""
    if not context.zeros_cut:
        found = [x.reads for x in operands]
        old = context.signs.get(path, found)
        context.signs[path] = [r.union(a, b) for a, b in zip(old, found, strict=True)]
        return operands
    rows = context.signs.setdefault(path, [None] * len(operands))
    both = zip(operands, rows, strict=True)
    return [x.reading(lambda old, row=row: r.union(old, row)) for x, row in both]


def _merges(operands: Sequence[Known], results: Sequence[Known]) -> bool:
    """Whether an entry of the results reads together what no entry of some operand does."""
    found = set().union(*(r.distinct_rows(x.reads) for x in results)) - {0}
    return any(x.reads is not None and not found <= r.distinct_rows(x.reads) for x in operands)


def _computed(
    context: Context, eqn: jex.JaxprEqn, operands: Sequence[Known]
) -> tuple[list[Known | None], Sequence[Any]]:
    """The results of constants: `None` in the place of one that another compilation may round
    otherwise; and what they are in this one. Nothing where not all operands are known.
    """
    if not all(x.value is not None for x in operands) or eqn.effects or is_foreign(eqn):
        return [], []
    key = (id(eqn), *map(_name, operands))
    if key not in context.computed:
        args, outs = _bound(eqn, operands)
        results = [
            constant(_wide(out, v)) if exact(eqn, args, out) else None
            for out, v in zip(outs, eqn.outvars, strict=True)
        ]
        if max(math.prod(_shape(v)) for v in eqn.outvars) <= _SMALL:
            return results, outs
        context.computed[key] = eqn, operands, results, outs
    return context.computed[key][2:]


def _shape(var: Any) -> tuple[int, ...]:
    return var.aval.shape


def _name(x: Known) -> Any:
    """What tells a constant from others: a number by its value, because there may be many of it."""
    if x.shape or not is_real(x.dtype):
        return id(x)
    return str(x.dtype), np.asarray(x.value).tobytes()


def _bound(eqn: jex.JaxprEqn, operands: Sequence[Known]) -> tuple[list[Any], Sequence[Any]]:
    """Operands and results; of size 1 along axes on which none of the operands depends."""
    name, params, args = eqn.primitive.name, eqn.params, [x.value for x in operands]
    if all(is_real(v.aval.dtype) for v in [*eqn.invars, *eqn.outvars]):
        if name == "iota":
            params = {**params, "dimension": 0, "shape": (params["shape"][params["dimension"]],)}
            if jnp.issubdtype(params["dtype"], jnp.integer):
                numbers = np.arange(*params["shape"]).astype(params["dtype"])
            else:
                (numbers,) = _bind(eqn, params, [])
            shape = [
                -1 if i == eqn.params["dimension"] else 1 for i in range(len(eqn.params["shape"]))
            ]
            return args, [np.asarray(numbers).reshape(shape)]
        args = [np.asarray(arg) for arg in args]
        if name == "broadcast_in_dim" and len(args) == 1:
            return args, [SHAPE_MOVES[name](args[0], params, args[0].shape)]
        if name in ENTRY_BY_ENTRY:
            args = narrowed(args)
            if (out := in_numpy(eqn, args)) is not None:
                return args, [out]
    return args, _bind(eqn, params, args)


def _bind(eqn: jex.JaxprEqn, params: Mapping[str, Any], args: Sequence[Any]) -> Sequence[Any]:
    outs = eqn.primitive.bind(*map(jnp.asarray, args), **eqn.primitive.get_bind_params(params))
    return outs if eqn.primitive.multiple_results else [outs]


def narrowed(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of size 1 along the axes on which none of them depends; scalars beside them as they are."""
    ndim = max((a.ndim for a in arrays), default=0)
    full = [a for a in arrays if a.ndim == ndim]
    keep = [any(a.strides[i] and a.shape[i] > 1 for a in full) for i in range(ndim)]
    cut = tuple(slice(None) if kept else slice(1) for kept in keep)
    return [a[cut] if a.ndim == ndim and ndim else a for a in arrays]


def _wide(out: Any, var: Any) -> Any:
    return out if out.shape == var.aval.shape else np.broadcast_to(np.asarray(out), var.aval.shape)


def _where_finite(x: Known, value: Any) -> Known:
    """What was computed shows where the result of constants is no number."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    labels, kept = label(np.asarray(np.isfinite(np.asarray(value)), np.uint8))
    labels, i, j = joint(x.labels, labels)
    finite = kept[j] > 0
    low, high = np.where(finite, x.low[i], -np.inf), np.where(finite, x.high[i], np.inf)
    return dataclasses.replace(known(x, x.reads, labels, low, high), assumed=x.assumed)


# The question


@dataclasses.dataclass(frozen=True)
class Proof:
    """What the structure of a function says.

    - `holds`: no forbidden pair is connected.
    - `connected`: `connected[t, j]`, whether a chain of operations leads from input j to output t.
    - `assumptions`: what else has to hold, in sentences.
    - `obstacles`: what connects forbidden pairs, in sentences.
    - `meetings`: what was assumed of scores, by path; `confirmed` says whether it is so.
    """

    holds: bool
    connected: Bool[np.ndarray, "T_out T_in"]
    assumptions: tuple[str, ...]
    obstacles: tuple[str, ...]
    meetings: dict[Any, Meeting] = dataclasses.field(default_factory=dict)

    def confirmed(self, sizes: Float[np.ndarray, "E M"]) -> "Proof":
        """What is left of it, given how large the scores of each meeting are in its limit."""
        largest = np.where(np.isnan(sizes), np.inf, sizes).max(0)
        if (largest < 1).all():
            return self
        broken = [
            f"In {meeting.line} scores that meet a mask of {-10 * meeting.limit:.2g} are of size "
            f"{size * meeting.limit:.2g}, on x or an edit of it. A proof takes them to be below "
            f"{meeting.limit:.2g}."
            for meeting, size in zip(self.meetings.values(), largest, strict=True)
            if not size < 1
        ]
        return dataclasses.replace(
            self, holds=False, assumptions=(), obstacles=tuple(dict.fromkeys(broken)), meetings={}
        )


@dataclasses.dataclass(frozen=True)
class Question:
    """A traced function, its input, and where positions lie in them; if along several axes, how
    long those of the output were. `held` are the numbers that count as parameters.
    """

    closed: Any
    leaves: Sequence[Any]
    in_axes: Sequence[int]
    out_axes: Sequence[int]
    out_lengths: Sequence[int] = ()
    held: Held = dataclasses.field(default_factory=Held)
    computed: dict = dataclasses.field(default_factory=dict)

    def connected(
        self, context: Context, columns=None, copies: int = 1
    ) -> Bool[np.ndarray, "T_out columns"]:
        """Whether a chain of operations leads from input `columns[k]` to output t.

        With several `copies` all of it so often side by side, for `context.cut` to tell apart.
        """
        length = np.shape(self.leaves[0])[self.in_axes[0]]
        columns = np.arange(length) if columns is None else np.asarray(columns)
        context.held, context.computed = self.held, self.computed
        words = -(-len(columns) // 64)
        while True:
            try:
                starts = range(0, len(columns), 64 * words)
                pieces = [columns[start : start + 64 * words] for start in starts]
                return np.concatenate([self._reached(context, c, copies) for c in pieces], 1)
            except r.TooLarge:
                if words == 1:
                    raise
                words = -(-words // 4)

    def _reached(self, context: Context, columns, copies: int) -> Bool[np.ndarray, "T_out some"]:
        pairs = zip(self.leaves, self.in_axes, strict=True)
        args = [_input(x, axis, columns, copies) for x, axis in pairs]
        return _by_position(self._outputs(context, args), self.out_axes, len(columns), copies)

    def _outputs(self, context: Context, args: Sequence[Known]) -> list[Known]:
        context.signs = {}
        outs = evaluate(context, self.closed, args)
        if not context.signs:
            return outs
        strict = Context(
            context.assume_bounded, context.cut, context.trust_masks, False, held=self.held
        )
        strict.computed = self.computed
        evaluate(strict, self.closed, args)
        context.signs = strict.signs
        return evaluate(context, self.closed, args)


def prove(
    question: Question, allowed: Bool[np.ndarray, "T_out T_in"], assume_bounded: bool
) -> Proof:
    """Whether no chain of operations leads from an input to an output that must not read it."""
    if (ref := first_ref(question.closed)) is not None:
        return _without_rule_for_refs(ref, allowed)
    context = Context(assume_bounded)
    found = question.connected(context)
    if (found & ~allowed).any():
        return Proof(False, found, (), _obstacles(question, context, found & ~allowed))
    if context.used:
        alone = Context(assume_bounded=False)
        without = question.connected(alone)
        if not (without & ~allowed).any():
            context, found = alone, without
    meetings = {name: context.meetings[name] for name in context.used}
    return Proof(True, found, _assumptions(context, meetings), (), meetings)


def _without_rule_for_refs(eqn: jex.JaxprEqn, allowed) -> Proof:
    return Proof(
        False,
        np.ones(allowed.shape, bool),
        (),
        (
            f"`{eqn.primitive.name}` in {line_of([eqn])} makes or uses a Ref. The proof does not "
            "follow what is written there, and takes every output to read every input.",
        ),
    )


def _assumptions(context: Context, meetings: dict[Any, Meeting]) -> tuple[str, ...]:
    scores = [
        f"Scores that meet a mask of {-10 * limit:.2g} are below {limit:.2g} in size."
        for limit in sorted(meeting.limit for meeting in meetings.values())
    ]
    platforms = [
        f"The function asks for its platform (lax.platform_dependent): this holds on {name}."
        for name in sorted(context.platforms)
    ]
    return tuple(dict.fromkeys([*scores, *platforms]))


def _obstacles(question: Question, context: Context, forbidden) -> tuple[str, ...]:
    """A smallest set of operations without which nothing forbidden is connected."""
    columns = np.flatnonzero(forbidden.any(0))[:64]
    allowed = ~forbidden[:, columns]
    look = Context(context.assume_bounded, looking=True)
    question.connected(look, columns)

    known: dict[frozenset, np.ndarray] = {}

    def leaking(cuts: Sequence[Sequence]) -> Bool[np.ndarray, "cuts T_out"]:
        names = [frozenset(cut) for cut in cuts]
        new = [name for name in dict.fromkeys(names) if name not in known]
        if new:
            rows = _leaking(question, context.assume_bounded, columns, allowed, new)
            known.update(zip(new, rows, strict=True))
        return np.stack([known[name] for name in names])

    candidates = [_MASKS] * bool(look.float_masks) + list(look.merging)
    blamed = _smallest(leaking, candidates) or _smallest(leaking, candidates + list(look.moving))
    if blamed is None:
        return ("The output is the input, moved.",)
    equations = {**look.moving, **look.merging}
    lines = []
    without = leaking([[other for other in blamed if other != path] for path in blamed])
    for path, reached in zip(blamed, without, strict=True):
        if path == _MASKS:
            lines += map(_of_a_mask, sorted(look.float_masks))
            continue
        eqn, line = equations[path]
        outputs = [place(t, question.out_lengths) for t in np.flatnonzero(reached)]
        lines.append(_sentence(eqn, line, outputs, context.opaque))
    return tuple(dict.fromkeys(lines))


def _leaking(question: Question, assume_bounded: bool, columns, allowed, cuts):
    """For each set of cuts, which outputs still read what they must not: all in one or two passes,
    each set by a word of its own.
    """
    found = np.zeros((len(cuts), len(allowed)), bool)
    for trusted in (False, True):
        mine = [k for k, cut in enumerate(cuts) if (_MASKS in cut) == trusted]
        if not mine:
            continue
        kept: dict[Any, np.ndarray] = {}
        for word, k in enumerate(mine):
            for path in cuts[k]:
                kept.setdefault(path, np.full(len(mine), ~np.uint64(0)))[word] = 0
        context = Context(assume_bounded, kept, trusted)
        reached = question.connected(context, columns, len(mine))
        reached = reached.reshape(len(allowed), len(mine), len(columns))
        found[mine] = (reached & ~allowed[:, None]).any(2).T
    return found


# So many sets of cuts are tried at a time.
_TRIED = 32


def _smallest(leaking, candidates: list) -> list | None:
    """A set of cuts with which nothing leaks and of which none can be left out: the one that
    QuickXplain (Junker 2004) finds. `None` if all of them do not suffice.
    """
    alone = [[one] for one in candidates] if len(candidates) <= _TRIED else []
    needed: list = []
    end = len(candidates)
    while True:
        # The first `end` suffice, or nothing does: how many do, `start` being too few?
        start, known_to_hold = -1, bool(needed)
        while start + 1 < end or not known_to_hold:
            tried = np.unique(np.linspace(start + 1, end, min(_TRIED, end - start)).astype(int))
            sets = [[*needed, *candidates[:n]] for n in tried]
            # Often one is enough, and this is known for all of them at once.
            leaks = leaking(sets + alone).any(1)[: len(sets)]
            if leaks.all():
                return needed[::-1] if known_to_hold else None
            first = int(np.argmin(leaks))
            end, known_to_hold = int(tried[first]), True
            start = int(tried[first - 1]) if first else end - 1
        if end == 0:
            return needed[::-1]
        needed.append(candidates[end - 1])
        end -= 1
        if needed in alone and not leaking([needed]).any():
            return needed[::-1]


def _sentence(eqn: jex.JaxprEqn, line: str, outputs, opaque) -> str:
    which = f"outputs {outputs[0]} to {outputs[-1]}" if len(outputs) > 1 else f"output {outputs[0]}"
    name = eqn.primitive.name
    why = ", which the proof has no rule for," if name in opaque else ""
    more = _PLACES if name.startswith("scatter") or name == "dynamic_update_slice" else ""
    return f"`{name}`{why} in {line} connects {which} with what must not be read.{more}"


_PLACES = (
    " If the input decides where its updates land, as that of experts with a capacity does, any "
    "entry may hold any update, and only the edits can tell."
)


def _of_a_mask(what: str) -> str:
    return (
        f"An array of zeros and ones that fn holds, {what}, counts as a parameter, which may be "
        "any number. If it is a mask, as Flax's make_causal_mask returns, make it one of bools "
        "outside fn: mask > 0."
    )


def _input(leaf: Any, axis: int, columns: np.ndarray, copies: int = 1) -> Known:
    """Position `columns[k]` of the axis reads bit k, of each copy."""
    shape, words = np.shape(leaf), -(-len(columns) // 64)
    bits = np.zeros((len(columns) + 1, words * 64), np.uint8)
    bits[np.arange(len(columns)), np.arange(len(columns))] = 1
    which = np.full(shape[axis], len(columns))
    which[columns] = np.arange(len(columns))
    labels, kept = label(which.reshape([-1 if i == axis else 1 for i in range(len(shape))]))
    return free(shape, leaf.dtype, r.term(labels, np.tile(r.packed(bits)[kept], copies)))


def _by_position(
    outs: Sequence[Known], out_axes, count: int, copies: int = 1
) -> Bool[np.ndarray, "T columns"]:
    length = outs[0].shape[out_axes[0]]
    found = np.zeros((length, copies, count), bool)
    for out, axis in zip(outs, out_axes, strict=True):
        bits = r.by_position(out.reads, axis, length)
        if bits is not None:
            found |= bits.reshape(length, copies, -1)[:, :, :count]
    return found.reshape(length, -1)
