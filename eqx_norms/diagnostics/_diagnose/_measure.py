"""From a surveyed model to rows of numbers: one a call, one a parameter."""

import functools as ft
import itertools
import math
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ..._processes import fetch, fetched, laid_out
from .._capture._interpret import Marked
from .._capture._model import Model
from .._layer_statistics import is_floating
from .._mesh import on_any_mesh
from .._once import jit_once
from .._optimiser import compiled_updates
from . import _numbers, _scores
from ._dataflow import NOTHING, Fact
from ._doubts import Doubt, doubts
from ._survey import Seen, Survey, is_in, when
from ._trial import has_learnt, try_steps

Numbers = dict[str, float]


class Row(NamedTuple):
    """One call of a submodule or of an activation function; one for each step of a scan.

    - `path`: of the submodule; of an activation function, that of the submodule whose output it
        takes, or else in which it is called.
    - `type`: of the submodule, or the name of the function.
    - `call`, `step`: how many calls of it came before, and in which step of the scans around it and
        of which member of an ensemble.
    - `part`: which array of the output, where there are several.
    - `statistics`: by name; what does not apply is missing.
    - `seen`: what the traced program says of the call.
    """

    path: str
    type: str
    call: int
    step: tuple[int, ...]
    part: str
    shape: tuple[int, ...]
    dtype: str
    is_function: bool
    statistics: Numbers
    seen: Seen

    @property
    def examples(self) -> int:
        """How many examples; where nothing is vmapped, all but the last axis may be those."""
        return math.prod(self.examples_shape)

    @property
    def examples_shape(self) -> tuple[int, ...]:
        return _of_examples(self.shape, self.seen.examples)

    @property
    def places_shape(self) -> tuple[int, ...]:
        """Of the examples, or else positions, that a finding names."""
        return _places_shape(self.shape, self.seen)

    @property
    def has_units(self) -> bool:
        return len(self.shape) > self.seen.examples

    @property
    def name(self) -> str:
        """The path with all that tells this row from others."""
        name = f"{self.path}:{self.type}" if self.is_function else self.path
        name += f"#{self.call}" if self.call else ""
        name += "{" + ", ".join(map(str, self.step)) + "}" if self.step else ""
        return name + (f" -> {self.part}" if self.part else "")


class Parameter(NamedTuple):
    """One array of the model that is trained; `same_as` is an earlier one with the same numbers."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    statistics: Numbers
    same_as: str | None


class Measured(NamedTuple):
    loss: float
    to_share: str  # what people type to have one parameter at two places
    rows: list[Row]  # in the order in which the calls begin
    returns: list[Row]  # those of submodules, in the order in which they return
    parameters: list[Parameter]
    not_taken: list[str]
    held_nan: bool  # in an array that the function holds, without having been given it
    state_non_finite: bool  # in the moments of the optimiser
    data_rms: float  # the largest of what the function is given besides the model
    linear_pairs: list[tuple[str, str]]
    trial: Numbers
    doubts: list[Doubt]  # of the optimiser and its state
    has_learnt: Callable[[], bool]  # which compiles the loss once more


def measure(
    survey: Survey,
    loss_fn: Callable,
    args: tuple,
    optimiser: tuple[Any, PyTree] | None,
) -> Measured:
    """One forward and one backward pass, of which only statistics come back.

    **Arguments:**

    - `loss_fn`: of the model's tree of arrays, and of `args`.
    """
    model = survey.model
    # As `trace` parts them: NumPy arrays are no operands of its jaxpr.
    dynamic, static = eqx.partition((model.tree, args), eqx.is_array)
    kinds = _kinds_of_inputs(survey)

    @jit_once
    def run(dynamic):
        loss, marked, grads, model_grads = survey.backward(*eqx.combine(dynamic, static))
        of = lambda marks, calls: [marks[call.given] for call in calls]
        ends = [
            _ends(of(marked, calls), of(grads, calls), calls[0].loops, lead, mapped, computed)
            for (*_, lead, mapped, computed), calls in kinds.items()
        ]
        outputs = [(marked[call.output], grads[call.output]) for call in survey.calls]
        inputs = [_activation_input(call, marked) for call in survey.calls]
        return loss, ends, outputs, inputs, model_grads

    # What is not finite is what we are here to see, and a branch that is not taken is NaN.
    with jax.debug_nans(False), jax.debug_infs(False):
        loss, ends, outputs, inputs, model_grads = run(dynamic)
        by_call = {id(call): {} for call in survey.calls}
        for alike, found in zip(kinds.values(), fetch(ends), strict=True):
            for i, call in enumerate(alike):
                here = {name: [x[i, ...] for x in arrays] for name, arrays in found.items()}
                lead = _examples_shape(call, survey)
                by_call[id(call)] = _numbers.of_ends(**here, loops=call.loops, lead=lead)
        units = _units(survey)
        calls = list(map(_of_call, survey.calls, units, by_call.values(), outputs, inputs))
        value_fn = lambda params: loss_fn(model.with_trained(model.tree, params), *args)
        trained = model.trained(model.tree)
        updates = None
        if optimiser is not None:
            optim, opt_state = optimiser
            updates = compiled_updates(optim, model_grads, opt_state, trained, loss, value_fn)
        stacks = _stacks(survey)
        params = _of_parameters(model, model_grads, updates, stacks)
    rows, by_call, not_taken = [], {}, []
    for call, parts in zip(survey.calls, calls, strict=True):
        made = _rows(call, parts, survey)
        not_taken += [row.name for row in made if not (_taken(row) or row.is_function)]
        by_call[id(call)] = [row for row in made if _taken(row)]
        rows += by_call[id(call)]
    returns = [row for call in survey.returns for row in by_call[id(call)]]
    returns.sort(key=lambda row: when(row.seen.returns, row.step))
    parameters = _parameters(model, params)
    idle = [p for p in parameters if p.statistics["grad_largest"] == 0]
    with jax.debug_nans(False), jax.debug_infs(False):
        if 0 < len(idle) < len(parameters):
            reached = _reached_from_elsewhere(loss_fn, model, args, {p.path for p in idle})
            for p in idle:
                p.statistics["reached"] = p.path in reached
        trial, doubtful = {}, []
        if updates is not None:
            assert optimiser is not None
            sizes = [figures.get("rms", math.nan) for figures in params]
            doubtful = doubts(optimiser, model_grads, trained, model.paths(), stacks, sizes)
            trial = try_steps(
                loss_fn, model, args, optimiser, loss, model_grads, updates, parameters
            )
    return Measured(
        float(loss),
        model.to_share,
        rows,
        returns,
        parameters,
        not_taken,
        not math.isfinite(loss) and any(map(_has_nan, survey.constants)),
        optimiser is not None and not _moments_are_finite(optimiser[1]),
        max((r for r in map(_size, jtu.tree_leaves(args)) if math.isfinite(r)), default=0.0),
        _linear_pairs(survey),
        trial,
        doubtful,
        ft.cache(lambda: has_learnt(loss_fn, model, args, float(loss))),
    )


def _has_nan(x: Any) -> bool:
    return eqx.is_inexact_array_like(x) and bool(np.isnan(_numbers.host(jnp.asarray(x))).any())


def _size(x: Any) -> float:
    is_data = eqx.is_inexact_array_like(x) and np.size(x) > 0
    return float(_numbers.rms(np.abs(_numbers.host(jnp.asarray(x)))[None])[0]) if is_data else 0.0


def _moments_are_finite(state: PyTree) -> bool:
    """But for numbers, of which a best value often starts as infinity."""
    moments = [x for x in jtu.tree_leaves(state) if eqx.is_inexact_array(x) and x.ndim > 0]
    return all(bool(np.isfinite(_numbers.host(x)).all()) for x in moments)


def _linear_pairs(survey: Survey) -> list[tuple[str, str]]:
    """Linear layers of which the output goes into another one of the same module, and nowhere else.

    Where the first has fewer units than what is at either end, they are a matrix of low rank. Of
    convolutions only such as have one kernel are meant: others are factors of one, on purpose.
    """
    pairs = {}
    # Convolutions of width 1 are often factors of one matrix, on purpose.
    linear = {k: s for k, s in survey.linear.items() if not s.kernel or min(s.kernel) > 1}
    calls = [call for call in survey.calls if call.path in linear]
    by_mark = {call.returned: call for call in survey.calls if call.returned is not None}
    for call in calls:
        for fact in survey.flow.facts.get(-1 if call.given is None else call.given, []):
            before = _linear_before(fact, by_mark, linear, survey)
            if before is None:
                continue
            one, two = linear[before.path], linear[call.path]
            full = one.outs >= min(one.ins, two.outs) and one.kernel == two.kernel
            if full and _parent(before.path) == _parent(call.path):
                pairs[before.path, call.path] = None
    return list(pairs)


def _linear_before(
    fact: Fact, by_mark: dict[int, Seen], linear: Collection[str], survey: Survey
) -> Seen | None:
    """The linear layer of which this is the output, if nothing else reads it: also through a
    Dropout, and through what returns its input, as an `equinox.nn.Identity`.
    """
    before = by_mark.get(fact.same)
    while before is not None and before.path not in linear:
        through = before.given if before.type == "Dropout" else before.returned
        facts = survey.flow.facts.get(NOTHING if through is None else through)
        fact = facts[0] if facts else Fact()
        before = by_mark.get(fact.same)
    return before if len(survey.flow.readers.get(fact.same, ())) == 1 else None


def _parent(path: str) -> str:
    return re.sub(r"(^|\.)\w*(\[[^\]]*\])*$", "", path)


def _stacks(survey: Survey) -> list[int]:
    """For each parameter how many axes ahead it has for layers of a scan or for an ensemble."""
    ahead = {}
    for call in survey.calls:
        if call.applied is None:
            count = sum(kind != "time" for kind in call.kinds)
            ahead[call.path] = max(count, ahead.get(call.path, 0))
    return [
        max((n for where, n in ahead.items() if is_in(each, where)), default=0)
        for each in survey.model.paths()
    ]


# ---- Statistics, traced.


class _Units(NamedTuple):
    """On which axis of its output a call has its units; `groups` are those of `_cancelling`."""

    axis: int
    groups: int | None


def _units(survey: Survey) -> list[_Units]:
    """Of each call. The axis is the last one, but that of the channels of a convolution, and of
    what follows it in that shape.
    """
    modules = survey.modules.values()
    ranks = {type(m): m.num_spatial_dims for m in modules if isinstance(m, _CONVOLUTIONS)}
    by_name = {cls.__name__: rank for cls, rank in ranks.items()}
    types = survey.types
    channels = {}
    for call in survey.returns:
        if call.type in by_name:
            channels[types[call.output][0].shape] = -1 - by_name[call.type]
    found = []
    for call in survey.calls:
        shapes = [kind.shape for kind in types[call.output]]
        module = survey.modules.get(call.path) if call.applied is None else None
        axis = channels.get(shapes[0], -1) if shapes else -1
        found.append(_Units(axis, _cancelling(module)))
    return found


_CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Pool)


def _kinds_of_inputs(survey: Survey) -> dict[tuple, list[Seen]]:
    """Calls that are given arrays of the same shapes, in the same loops.

    They are measured by one function, for XLA takes long to compile one for each. With each kind
    stand, last, the shape of the examples, which of the arrays have an axis of them, and whether
    other calls have computed them.
    """
    kinds = {}
    for call in survey.calls:
        if call.given is not None:
            types, axes = survey.types[call.given], survey.flow.vmaps.get(call.given, [])
            around = len(call.loops)
            mapped = [i for i, each in enumerate(axes) if "example" in each]
            if survey.model.batches_first and not any(axes):
                mapped = [i for i, kind in enumerate(types) if len(kind.shape) > around + 1]
            mapped = tuple(i for i in mapped if types[i].shape[around] >= ALIKE)
            shapes = tuple((kind.shape, kind.dtype) for kind in types)
            lead = _examples_shape(call, survey)
            key = (call.loops, shapes, lead, mapped, call.inputs != 0)
            kinds.setdefault(key, []).append(call)
    return kinds


def _examples_shape(call: Seen, survey: Survey) -> tuple[int, ...]:
    """That of the first array it returns, as of its `Row`."""
    shape = survey.types[call.output][0].shape[len(call.loops) :]
    return _places_shape(shape, call)


def _places_shape(shape: tuple[int, ...], call: Seen) -> tuple[int, ...]:
    first = call.batched and len(shape) > 1
    return shape[:1] if first else _of_examples(shape, call.examples)


def _of_examples(shape: tuple[int, ...], vmapped: int) -> tuple[int, ...]:
    """The axes in front that are vmapped; where none is, all but the last."""
    return shape[:vmapped] or shape[:-1]


@on_any_mesh
def _ends(
    given: Marked,
    grads: Marked,
    loops: tuple[int, ...],
    lead: tuple[int, ...],
    mapped: tuple[int, ...],
    computed: bool,
) -> dict[str, list[Array]]:
    """Of each array that calls are given, for each call and step: what is not finite, in each
    example if it has an axis of these, and in the derivative there; its largest entry; and whether
    all examples are the same. So few numbers, for XLA compiles a kernel for each.
    """
    around = 1 + len(loops)
    found = {"bits": [], "grad_bits": [], "largest": [], "alike": []}
    columns = enumerate(zip(zip(*given, strict=True), zip(*grads, strict=True), strict=True))
    for i, (arrays, derivatives) in columns:
        x, size = jnp.stack(arrays), None
        if is_floating(x):
            kept = around + len(lead) if x.shape[around:][: len(lead)] == lead else around
            bits = _bits(jnp.concatenate([x, jnp.stack(derivatives)]), kept)
            size = jnp.max(jnp.abs(x), tuple(range(around, x.ndim)))
            found["bits"].append(bits[: len(arrays)])
            found["grad_bits"].append(bits[len(arrays) :])
            found["largest"].append(size)
        if i in mapped:
            found["alike"].append(_alike(x, around, size if computed else None))
    return found


def _bits(x: Array, kept: int) -> Array:
    """Along the first axes, as `of_bits` in `_numbers.py` takes them."""
    kinds = (jnp.isneginf(x), jnp.isposinf(x), jnp.isnan(x))
    bits = sum(kind.astype(jnp.uint8) << i for i, kind in enumerate(kinds))
    return jax.lax.reduce_or(bits, tuple(range(kept, x.ndim)))


ALIKE = 8  # Fewer examples may be the same by chance.


def _alike(x: Array, around: int, size: Array | None) -> Array:
    """Whether the axis behind so many has the same all along; of what is computed, of this size,
    but for rounding, which differs from example to example in a convolution.
    """
    first, axes = jax.lax.slice_in_dim(x, 0, 1, axis=around), tuple(range(around, x.ndim))
    if size is None:
        return jnp.all(x == first, axes)
    rounding = max(1e-4, 16 * float(jnp.finfo(x.dtype).eps))
    return jnp.max(jnp.abs(x - first), axes) <= (rounding * size).astype(x.dtype)


def _activation_input(call: Seen, marked: Marked) -> Array | None:
    """What an `equinox.nn.Lambda` was given, if that looks like what it returned."""
    if call.activation is None or call.given is None or call.returned is None:
        return None
    inputs, outputs = _floats(marked[call.given]), marked[call.returned]
    same = inputs and len(outputs) == 1 and inputs[0].shape == outputs[0].shape
    return inputs[0] if same else None


def _of_call(
    call: Seen, units: _Units, ends: dict, output: tuple[Any, Any], x: Array | None
) -> list[_numbers.Statistics]:
    """For each array of the output its statistics, each with a number for each step."""
    axis, (values, grads) = units.axis, output
    if call.shape is not None:
        assert call.activation is not None and call.activation.axis is not None
        in_steps = _numbers.in_steps(values[0], call.loops)
        found = _scores.pooled(in_steps, call.shape, call.activation.axis)
        return [found if call.units else {k: v for k, v in found.items() if k != "saturated"}]
    if call.applied is not None:
        given, y = values
        if not is_floating(y):
            return [{}]
        y = _numbers.in_steps(y, call.loops)
        return [_of_output(y, axis) | _of_units(given, y, call, axis)]
    parts = [
        _of_value(_numbers.in_steps(value, call.loops), grad, call, units) | ends
        if is_floating(value)
        else {}
        for value, grad in zip(values, grads, strict=True)
    ]
    if x is not None and parts[0]:
        parts[0] |= _of_units(x, _numbers.in_steps(values[0], call.loops), call, axis)
    return parts


def _cancelling(module: Any) -> int | None:
    """In how many groups a norm averages, in each of which a derivative at its output that is the
    same everywhere cancels; `None` if its weight makes it uneven, or it is no such norm.
    """
    groups = {"LayerNorm": 1, "GroupNorm": getattr(module, "groups", None)}
    count, weight = groups.get(type(module).__name__), getattr(module, "weight", None)
    if count is None or weight is None:
        return count
    shape = getattr(module, "shape", weight.shape[-1:])  # which layers of a scan have axes ahead of
    each = _numbers.host(weight).reshape(-1, count, math.prod(shape) // count)
    return count if np.all(each == each[..., :1]) else None


def _of_output(value: np.ndarray, axis: int) -> _numbers.Statistics:
    return _numbers.of_array(value) | {"effective_rank": _numbers.effective_rank(value, axis)}


def _of_value(
    value: np.ndarray, derivative: Array, call: Seen, units: _Units
) -> _numbers.Statistics:
    grad, of_type = _numbers.in_steps(derivative, call.loops), jnp.finfo(derivative.dtype)
    axis = units.axis
    of_grad = _numbers.of_array(grad)
    found = _of_output(value, axis) | {
        "grad_rms": of_grad["rms"],
        "grad_non_finite": of_grad["non_finite"],
        "grad_silent": _numbers.silent(grad, axis),
        "tiny": _numbers.share_below(grad, float(of_type.tiny)),
    }
    found |= _numbers.where_bad(value, _places_shape(value.shape[1:], call))
    if not call.hidden:
        found |= _numbers.of_binary_logits(value, grad)
    if not call.hidden and value.ndim > 1 + call.examples:
        found |= _numbers.of_logits(grad, float(of_type.eps))
    if units.groups is not None:
        found |= _numbers.of_norm(grad, call.examples, units.groups)
    return found


def _of_units(x: Array, y: np.ndarray, call: Seen, axis: int) -> _numbers.Statistics:
    if not call.units or call.activation is None or y.ndim <= 1 + call.examples:
        return {}
    time = tuple(i for i, kind in enumerate(call.kinds) if kind == "time")
    given = _numbers.in_steps(x, call.loops)
    return _numbers.of_units(given, y, call.activation, axis, call.loops, time, call.examples)


def _of_parameters(
    model: Model, grads: PyTree, updates: PyTree | None, stacks: list[int]
) -> list[dict[str, float]]:
    leaves = jtu.tree_leaves(model.trained(model.tree))
    rows = zip(model.paths(), leaves, jtu.tree_leaves(grads), stacks, strict=True)
    found = [
        _numbers.of_parameter(param, grad, stack, model.has_units_last(where))
        if is_floating(param)
        else {}
        for where, param, grad, stack in rows
    ]
    if updates is not None:
        for param, update, figures in zip(leaves, jtu.tree_leaves(updates), found, strict=True):
            if figures:
                figures |= _numbers.of_update(param, update)
    return found


def _floats(arrays: list[Any]) -> list[Array]:
    return [x for x in arrays if is_floating(x)]


def _reached_from_elsewhere(
    loss_fn: Callable, model: Model, args: tuple, idle: set[str]
) -> set[str]:
    """Which of the parameters without a gradient get one when the others have moved.

    A branch that is switched on by a factor that starts at zero has no gradient in the first step,
    on purpose, and an expert may be chosen by no example of a batch. Two factors that are both
    zero never move.
    """
    paths = model.paths()
    leaves, structure = jtu.tree_flatten(model.trained(model.tree))
    dynamic, static = eqx.partition((model.tree, args), eqx.is_array)

    @jit_once
    def grads_are_there(leaves, dynamic):
        tree, args = eqx.combine(dynamic, static)
        loss = lambda trained: loss_fn(model.with_trained(tree, trained), *args)
        grads = eqx.filter_grad(loss)(jtu.tree_unflatten(structure, leaves))
        return [jnp.any((grad != 0) & jnp.isfinite(grad)) for grad in jtu.tree_leaves(grads)]

    reached, noise = set(), np.random.default_rng(0)
    for _ in range(_TRIES):
        moved = [
            leaf if path in idle - reached else _moved(leaf, noise)
            for path, leaf in zip(paths, leaves, strict=True)
        ]
        found = fetch(grads_are_there(moved, dynamic))
        reached |= {path for path, there in zip(paths, found, strict=True) if there} & idle
        if reached == idle:
            break
    return reached


_TRIES = 4  # Of three factors in a row that start at zero, the last is reached in the third.


def _moved(leaf: Array, noise: np.random.Generator) -> Array:
    size = float(_numbers.rms(np.abs(_numbers.host(leaf))[None])[0]) or 0.1
    by = size * noise.normal(size=leaf.shape)
    return leaf + laid_out(by.astype(leaf.dtype), leaf.sharding)


# ---- Rows, on the host.


def _rows(call: Seen, parts: list[dict], survey: Survey) -> list[Row]:
    kinds = survey.types[call.output]
    kinds = kinds[-1:] if call.applied is not None else kinds
    rows = []
    for i, step in enumerate(itertools.product(*map(range, call.loops))):
        for part, (numbers, kind) in enumerate(zip(parts, kinds, strict=True)):
            if not numbers:
                continue
            here = {name: float(number[i]) for name, number in numbers.items()}
            rows.append(
                Row(
                    call.path,
                    call.type,
                    call.number,
                    step,
                    f"[{part}]" if len(parts) > 1 else "",
                    kind.shape[len(call.loops) :] if call.shape is None else call.shape,
                    str(kind.dtype),
                    call.applied is not None,
                    {name: n for name, n in here.items() if not _missing(name, n, call, kind)},
                    call,
                )
            )
    return rows


def _missing(name: str, number: float, call: Seen, kind: Any) -> bool:
    """A statistic of units, where there are none, or that does not apply."""
    of_units = name in ("effective_rank", "grad_silent")
    if of_units and len(kind.shape) <= len(call.loops) + call.examples:
        return True
    if "bad_" in name and number <= 0 and (number < 0 or name.endswith("share")):
        return True  # The number of the first example may be 0.
    sometimes = ("effective_rank", "firing", "wrong", "confident", "grad_spread")
    sometimes += ("sure", "wrong_and_sure")
    return name in sometimes and math.isnan(number)


def _taken(row: Row) -> bool:
    """Whether it was computed at all, and not in the branch of a `cond` that was not taken."""
    numbers = row.statistics
    if not row.seen.conditional or numbers["non_finite"] < 1:
        return True
    return bool(numbers.get("grad_rms", 0.0) != 0 or not numbers.get("input_non_finite", True))


def _parameters(model: Model, found: list[dict]) -> list[Parameter]:
    leaves = jtu.tree_leaves(model.trained(model.tree))
    made, alike = [], {}
    for where, leaf, statistics in zip(model.paths(), leaves, found, strict=True):
        if not statistics:
            continue
        # Only what has the same statistics is compared, number by number.
        key = (leaf.shape, leaf.dtype, *(statistics[name] for name in ("mean", "std", "largest")))
        others = alike.setdefault(key, []) if statistics["std"] > 0 else []
        same = next((path for path, other in others if jnp.array_equal(leaf, other)), None)
        same = same if same is not None and _looks_drawn(fetched(leaf).astype(np.float64)) else None
        others.append((where, leaf))
        made.append(Parameter(where, leaf.shape, str(leaf.dtype), statistics, same))
    return made


def _looks_drawn(x: np.ndarray) -> bool:
    """Whether it is a matrix of random numbers, and none that a formula gives, as of decays or
    positions, which every layer may have the same.
    """
    if x.ndim < 2 or len(np.unique(x)) <= max(x.shape):
        return False
    return all(abs(_neighbours(np.moveaxis(x, axis, -1))) < 0.5 for axis in range(x.ndim))


def _neighbours(x: np.ndarray) -> float:
    """The correlation of each entry with the next one along the last axis."""
    x = x - x.mean()
    return float(np.mean(x[..., 1:] * x[..., :-1]) / np.mean(x**2)) if x.shape[-1] > 2 else 0.0
