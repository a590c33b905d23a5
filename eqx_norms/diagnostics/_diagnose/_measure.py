"""From a surveyed model to rows of numbers: one a call, one a parameter."""

import functools as ft
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ..._largest import largest
from ..._processes import fetch, fetched, laid_out
from .._capture._instrument import path
from .._capture._interpret import Marked
from .._layer_statistics import (
    as_examples,
    derivative_statistics,
    each_step,
    is_floating,
    layer_statistics,
    non_finite,
    sample,
)
from .._mesh import on_any_mesh
from .._once import jit_once
from .._optimiser import compiled_updates
from .._statistics import activation_stats, saturation_fraction
from ._activations import Activation
from ._survey import Seen, Survey, when
from ._trial import of_update, try_steps

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
    rows: list[Row]  # in the order in which the calls begin
    returns: list[Row]  # those of submodules, in the order in which they return
    parameters: list[Parameter]
    not_taken: list[str]
    held_nan: bool  # in an array that the function holds, without having been given it
    state_non_finite: bool  # in the moments of the optimiser
    linear_pairs: list[tuple[str, str]]
    trial: Numbers


def measure(
    survey: Survey,
    loss_fn: Callable,
    model: PyTree,
    args: tuple,
    optimiser: tuple[Any, PyTree] | None,
) -> Measured:
    """One forward and one backward pass, of which only statistics come back."""
    # As `trace` parts them: NumPy arrays are no operands of its jaxpr.
    dynamic, static = eqx.partition((model, args), eqx.is_array)
    kinds = _kinds_of_inputs(survey)

    @jit_once
    def run(dynamic):
        model, args = eqx.combine(dynamic, static)
        loss, marked, grads, model_grads = survey.backward(model, args)
        of = lambda marks, calls: [marks[call.given] for call in calls]
        ends = [
            _ends(of(marked, calls), of(grads, calls), calls[0].loops, lead, mapped)
            for (*_, lead, mapped), calls in kinds.items()
        ]
        outputs = [(marked[call.output], grads[call.output]) for call in survey.calls]
        inputs = [_activation_input(call, marked) for call in survey.calls]
        return loss, ends, outputs, inputs, model_grads

    # What is not finite is what we are here to see, and a branch that is not taken is NaN.
    with jax.debug_nans(False), jax.debug_infs(False):
        loss, ends, outputs, inputs, model_grads = run(dynamic)
        axes = _unit_axes(survey, model)
        by_call = {id(call): {} for call in survey.calls}
        for alike, found in zip(kinds.values(), fetch(ends), strict=True):
            for i, call in enumerate(alike):
                by_call[id(call)] = {name: numbers[i] for name, numbers in found.items()}
        calls = list(map(_of_call, axes, by_call.values(), outputs, inputs))
        value_fn = lambda params: loss_fn(eqx.combine(params, model), *args)
        trained = eqx.filter(model, eqx.is_inexact_array)
        updates = None
        if optimiser is not None:
            optim, opt_state = optimiser
            updates = compiled_updates(optim, model_grads, opt_state, trained, loss, value_fn)
        params = _of_parameters(model, model_grads, updates, _stacks(survey, model))
    calls, params = fetch((calls, params))
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
        trial = {}
        if updates is not None:
            assert optimiser is not None
            trial = try_steps(
                loss_fn, model, args, optimiser, loss, model_grads, updates, parameters
            )
    return Measured(
        float(loss),
        rows,
        returns,
        parameters,
        not_taken,
        not math.isfinite(loss) and any(map(_has_nan, survey.constants)),
        optimiser is not None and not _moments_are_finite(optimiser[1]),
        _linear_pairs(survey),
        trial,
    )


def _has_nan(x: Any) -> bool:
    return eqx.is_inexact_array_like(x) and bool(np.isnan(fetched(x)).any())


def _moments_are_finite(state: PyTree) -> bool:
    """But for numbers, of which a best value often starts as infinity."""
    moments = [x for x in jtu.tree_leaves(state) if eqx.is_inexact_array(x) and x.ndim > 0]
    return not moments or bool(_all_finite(moments))


@jit_once
def _all_finite(arrays: list[Array]) -> Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def _linear_pairs(survey: Survey) -> list[tuple[str, str]]:
    """Linear layers of which the output goes into another one of the same module, and nowhere else.

    Where the first has fewer units than what is at either end, they are a matrix of low rank.
    """
    pairs = {}
    linear = {k: m for k, m in survey.modules.items() if isinstance(m, eqx.nn.Linear)}
    calls = [call for call in survey.calls if call.path in linear]
    by_mark = {call.returned: call for call in calls if call.returned is not None}
    for call in calls:
        for fact in survey.flow.facts.get(-1 if call.given is None else call.given, []):
            before = by_mark.get(fact.same)
            if before is None or len(survey.flow.readers.get(fact.same, ())) != 1:
                continue
            one, two = linear[before.path], linear[call.path]
            sizes = (one.in_features, one.out_features, two.out_features)
            numbers = [size for size in sizes if size != "scalar"]
            full = len(numbers) == 3 and numbers[1] >= min(numbers[0], numbers[2])
            if full and _parent(before.path) == _parent(call.path):
                pairs[before.path, call.path] = None
    return list(pairs)


def _parent(path: str) -> str:
    return re.sub(r"(^|\.)\w*(\[[^\]]*\])*$", "", path)


def _stacks(survey: Survey, model: PyTree) -> list[int]:
    """For each parameter how many axes ahead it has for layers of a scan or for an ensemble."""
    ahead = {}
    for call in survey.calls:
        if call.applied is None:
            count = sum(kind != "time" for kind in call.kinds)
            ahead[call.path] = max(count, ahead.get(call.path, 0))
    return [
        max((n for where, n in ahead.items() if is_in(each, where)), default=0)
        for each in _parameter_paths(model)
    ]


def is_in(parameter: str, module: str) -> bool:
    inside = parameter[len(module) :][:1] in (".", "[", "")
    return not module or (parameter.startswith(module) and inside)


# ---- Statistics, traced.


def _unit_axes(survey: Survey, model: PyTree) -> list[tuple[Seen, int]]:
    """With each call the axis of its output on which the units stand.

    That is the last one, but the channels of a convolution and of what follows it in that shape.
    """
    modules = jtu.tree_leaves(model, is_leaf=lambda x: isinstance(x, _CONVOLUTIONS))
    ranks = {type(m): m.num_spatial_dims for m in modules if isinstance(m, _CONVOLUTIONS)}
    by_name = {cls.__name__: rank for cls, rank in ranks.items()}
    types = survey.types
    channels = {}
    for call in survey.returns:
        if call.type in by_name:
            channels[types[call.output][0].shape] = -1 - by_name[call.type]
    axes = []
    for call in survey.calls:
        shapes = [kind.shape for kind in types[call.output]]
        axes.append((call, channels.get(shapes[0], -1) if shapes else -1))
    return axes


_CONVOLUTIONS = (eqx.nn.Conv, eqx.nn.ConvTranspose, eqx.nn.Pool)


def _kinds_of_inputs(survey: Survey) -> dict[tuple, list[Seen]]:
    """Calls that are given arrays of the same shapes, in the same loops.

    They are measured by one function, for XLA takes long to compile one for each. With each kind
    stand, last, the shape of the examples and which of the arrays have an axis of them.
    """
    kinds = {}
    for call in survey.calls:
        if call.given is not None:
            types, axes = survey.types[call.given], survey.flow.vmaps.get(call.given, [])
            around = len(call.loops)
            mapped = [i for i, each in enumerate(axes) if "example" in each]
            mapped = tuple(i for i in mapped if types[i].shape[around] >= ALIKE)
            shapes = tuple((kind.shape, kind.dtype) for kind in types)
            lead = _examples_shape(call, survey)
            kinds.setdefault((call.loops, shapes, lead, mapped), []).append(call)
    return kinds


def _examples_shape(call: Seen, survey: Survey) -> tuple[int, ...]:
    """That of the first array it returns, as of its `Row`."""
    shape = survey.types[call.output][0].shape[len(call.loops) :]
    return _of_examples(shape, call.examples)


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
) -> dict[str, Array]:
    """Of what calls are given, for each call and step: its size, and whether it and the derivative
    there are finite, and all examples the same.
    """
    each = lambda fn: each_step((len(given), *loops), fn)
    stacked = lambda lists: [jnp.stack(arrays) for arrays in zip(*lists, strict=True)]
    of = lambda fn, arrays: each(lambda arrays: _any(fn, arrays))(arrays)
    found = {}
    floats = stacked(map(_floats, given))
    if floats:
        back = stacked(map(_floats, grads))
        found |= {
            "input_non_finite": of(lambda x: ~jnp.isfinite(x), floats),
            "input_nan": of(jnp.isnan, floats),
            "input_inf": of(jnp.isposinf, floats),
            "grad_input_non_finite": of(lambda x: ~jnp.isfinite(x), back),
        }
        found["input_rms"] = each(_largest_rms)(floats)
        around = 1 + len(loops)
        back = [x for x in back if x.shape[around : around + len(lead)] == lead]
        if back:
            where = each(ft.partial(_where_bad, lead=lead))(back)
            found |= {f"grad_input_{name}": number for name, number in where.items()}
    if mapped:
        found["inputs_alike"] = each(_alike)(stacked([x[i] for i in mapped] for x in given))
    return found


@on_any_mesh
def _where_bad(arrays: list[Array], lead: tuple[int, ...]) -> dict[str, Array]:
    """In which share of the examples, which have axes of these lengths in front, there is a NaN;
    if in none, infinity; if in none, -inf. And the number of the first of them, or -1.
    """
    count = math.prod(lead)
    of = lambda fn: jnp.stack([fn(x).reshape(count, -1).any(1) for x in arrays]).any(0)
    nan, inf, bad = of(jnp.isnan), of(jnp.isposinf), of(lambda x: ~jnp.isfinite(x))
    bad = jnp.where(nan.any(), nan, jnp.where(inf.any(), inf, bad))
    return {
        "bad_share": jnp.mean(bad, dtype=jnp.float32),
        "bad_first": jnp.where(bad.any(), jnp.argmax(bad), -1),
    }


ALIKE = 8  # Fewer examples may be the same by chance.


def _alike(arrays: list[Array]) -> Array:
    """Whether the first axis has the same all along, in all arrays."""
    return jnp.stack([jnp.all(x == x[:1]) for x in arrays]).all()


def _largest_rms(arrays: list[Array]) -> Array:
    return largest(jnp.stack([activation_stats(x).rms.astype(jnp.float32) for x in arrays]))


def _activation_input(call: Seen, marked: Marked) -> Array | None:
    """What an `equinox.nn.Lambda` was given, if that looks like what it returned."""
    if call.activation is None or call.given is None or call.returned is None:
        return None
    inputs, outputs = _floats(marked[call.given]), marked[call.returned]
    same = inputs and len(outputs) == 1 and inputs[0].shape == outputs[0].shape
    return inputs[0] if same else None


def _of_call(
    call_and_axis: tuple[Seen, int], ends: dict, output: tuple[Any, Any], x: Array | None
) -> list[dict[str, Array]]:
    """For each array of the output its statistics, each with an axis for each loop."""
    call, axis = call_and_axis
    values, grads = output
    if call.applied is not None:
        given, y = values
        if not is_floating(y):
            return [{}]
        found = _of_activation(y, axis, call.loops)
        return [found | _of_units(given, y, call, axis)]
    parts = [
        _of_output(value, grad, axis, call.loops, call.examples) | ends
        if is_floating(value)
        else {}
        for value, grad in zip(values, grads, strict=True)
    ]
    for numbers, value, grad in zip(parts, values, grads, strict=True):
        if numbers and not call.hidden and value.ndim > len(call.loops) + call.examples:
            numbers |= _of_logits(grad, call.loops)
        if numbers and call.type in _CENTRED:
            numbers |= _of_norm(grad, call.loops, call.examples)
    if x is not None and parts[0]:
        parts[0] |= _of_units(x, values[0], call, axis)
    return parts


_CENTRED = ("LayerNorm", "GroupNorm")  # A constant derivative at their output cancels.


def _of_units(x: Array, y: Array, call: Seen, axis: int) -> dict[str, Array]:
    if not call.units or y.ndim <= len(call.loops) + call.examples:
        return {}
    time = tuple(i for i, kind in enumerate(call.kinds) if kind == "time")
    return _dead_and_saturated(x, y, call.activation, axis, call.loops, time, call.examples)


# Jitted one by one: a deep model has many layers, but few shapes, and one program of all their
# statistics would take XLA longer to compile than the model itself.
@ft.partial(jit_once, static_argnums=(2, 3, 4))
def _of_output(
    value: Array, grad: Array, axis: int, loops: tuple[int, ...], examples: int
) -> dict[str, Array]:
    def one(value, grad):
        derivative = derivative_statistics(grad, axis)
        found = {f"grad_{name}": number for name, number in derivative.items()}
        which = {"nan": jnp.isnan(value).any(), "inf": jnp.isposinf(value).any()}
        which |= _where_bad([value], _of_examples(value.shape, examples))
        return layer_statistics(value, axis) | found | which | {"tiny": _tiny(grad)}

    return each_step(loops, one)(value, grad)


@ft.partial(jit_once, static_argnums=(1, 2))
def _of_activation(y: Array, axis: int, loops: tuple[int, ...]) -> dict[str, Array]:
    return each_step(loops, ft.partial(layer_statistics, unit_axis=axis))(y)


@ft.partial(jit_once, static_argnums=(2, 3, 4, 5, 6))
def _dead_and_saturated(
    x: Array,
    y: Array,
    activation: Activation,
    axis: int,
    loops: tuple[int, ...],
    time: tuple[int, ...],
    examples: int,
) -> dict[str, Array]:
    """`dead`, of units that are silent at all positions of all examples, in all steps in time.

    `firing` is the share of examples in which the others are not, on average, `distinct` how many
    of a sample of the examples differ.
    """

    @on_any_mesh
    def one(x, y):
        active = jnp.moveaxis(~(jnp.abs(y) < SILENT), axis, -1)  # which a NaN is
        if examples:
            active = active.any(tuple(range(examples, y.ndim - 1)))
        fires = jnp.mean(active.reshape(-1, active.shape[-1]), axis=0, dtype=jnp.float32)
        rows = x.reshape(-1, *x.shape[examples:]) if examples else as_examples(x, axis)
        found = {"fires": fires, "distinct": _distinct(rows)}
        if activation.flat is not None and activation.fn is not None:
            found["saturated"] = saturation_fraction(activation.fn, x, activation.flat)
        return found

    found = each_step(loops, one)(x, y)
    fires = found.pop("fires")
    fires = jnp.broadcast_to(jnp.mean(fires, time, keepdims=True), fires.shape)
    return found | {
        "dead": jnp.mean(fires == 0, axis=-1, dtype=jnp.float32),
        "firing": jnp.mean(fires, axis=-1, where=fires > 0),
    }


SILENT = 1e-8
_SAMPLE = 64


def _distinct(rows: Array) -> Array:
    rows = sample(rows.reshape(len(rows), -1), _SAMPLE).astype(jnp.float32)
    weights = np.random.default_rng(0).normal(size=rows.shape[1])
    sums = jnp.sum(rows * jnp.asarray(weights[None], rows.dtype), axis=1)
    # What is the same may be summed in another order. (A sort takes XLA longer to compile.)
    rounding = 16 * float(jnp.finfo(rows.dtype).eps) * largest(sums)
    same = jnp.abs(sums[:, None] - sums[None]) <= rounding
    return jnp.sum(~jnp.tril(same, -1).any(axis=1))


@ft.partial(jit_once, static_argnums=1)
def _of_logits(grad: Array, loops: tuple[int, ...]) -> dict[str, Array]:
    """Of the derivative of a loss that is a cross-entropy of these logits: probabilities, less one
    at the label, of a common factor.

    `wrong` is the mean probability of the wrong classes, over the largest of any example, and
    `confident` the mean share of one class among these; NaN if it is not of that kind.
    """

    @on_any_mesh
    def one(grad):
        g = grad.reshape(-1, grad.shape[-1]).astype(jnp.float32)
        size = jnp.abs(g).sum(-1)
        most = largest(size)
        negative = g < -1e-6 * most
        rounding = 8 * float(jnp.finfo(grad.dtype).eps)
        kind = (negative.sum(-1) <= 1) & (jnp.abs(g.sum(-1)) <= rounding * most)
        ups = jnp.maximum(g, 0)
        seen = size > 1e-3 * most
        share = jnp.mean(ups.max(-1) / ups.sum(-1), where=seen)
        ok = jnp.all(kind) & (g.shape[-1] >= 3) & (most > 0)
        return {
            "wrong": jnp.where(ok, jnp.mean(size) / most, jnp.nan),
            "confident": jnp.where(ok, share, jnp.nan),
        }

    return each_step(loops, one)(grad)


@ft.partial(jit_once, static_argnums=(1, 2))
def _of_norm(grad: Array, loops: tuple[int, ...], examples: int) -> dict[str, Array]:
    """How much the derivative at the output of a norm differs over the entries of an example."""

    @on_any_mesh
    def one(grad):
        g = grad.reshape(*grad.shape[:examples], -1).astype(jnp.float32)
        rest = activation_stats(g - g[..., :1]).rms
        return {"grad_spread": rest / activation_stats(g).rms}

    return each_step(loops, one)(grad)


def _of_parameters(
    model: PyTree, grads: PyTree, updates: PyTree | None, stacks: list[int]
) -> list[dict[str, Array]]:
    params = eqx.filter(model, eqx.is_inexact_array)
    leaves = jtu.tree_leaves(params)
    found = [
        _of_parameter(param, grad, stack) if is_floating(param) else {}
        for param, grad, stack in zip(leaves, jtu.tree_leaves(grads), stacks, strict=True)
    ]
    if updates is not None:
        for param, update, numbers in zip(leaves, jtu.tree_leaves(updates), found, strict=True):
            if numbers:
                numbers |= of_update(param, update)
    return found


@ft.partial(jit_once, static_argnums=2)
@on_any_mesh
def _of_parameter(param: Array, grad: Array, stack: int) -> dict[str, Array]:
    of_param, of_grad = activation_stats(param), activation_stats(grad)
    apart = lambda fn: each_step(param.shape[:stack], fn)
    return {
        "mean": of_param.mean,
        "std": of_param.std,
        "rms": of_param.rms,
        "largest": of_param.absmax,
        "non_finite": non_finite(param),
        "row_rms": apart(_row_rms)(param),
        "identical_units": jnp.max(apart(_identical)(param, grad)),
        "grad_rms": of_grad.rms,
        "grad_largest": of_grad.absmax,
        "grad_non_finite": non_finite(grad),
        "tiny": _tiny(grad),
    }


def _row_rms(param: Array) -> Array:
    if param.ndim < 2 or param.shape[0] < 8:
        return jnp.full(1, jnp.nan)
    return jax.vmap(lambda row: activation_stats(row).rms)(param)


def _outlier(rows: np.ndarray) -> float:
    """How many times the rms of the row at the upper quartile the largest row's is."""
    with np.errstate(all="ignore"):
        return float(np.max(rows.max(-1) / np.quantile(rows, 0.75, axis=-1)))


def _identical(param: Array, grad: Array) -> Array:
    """Whether all rows are the same, and not 0, and get the same gradient, which is not 0."""
    if param.ndim < 2 or param.shape[0] < 2:
        return jnp.asarray(False)
    size = activation_stats(grad).rms
    same = jnp.all(param == param[:1]) & jnp.any(param != 0) & (size > 0)
    # Units that are the same may be summed in another order.
    return same & jnp.all(
        jnp.abs(grad - grad[:1]).astype(size.dtype)
        <= max(1e-3, 4 * float(jnp.finfo(grad.dtype).eps)) * size
    )


def _tiny(x: Array) -> Array:
    """The share of entries that are below the smallest normal number of their dtype, but not 0."""
    size = jnp.abs(x)
    return jnp.mean((size > 0) & (size < jnp.finfo(x.dtype).tiny), dtype=jnp.float32)


def _any(fn: Callable, arrays: list[Array]) -> Array:
    return jnp.stack([fn(x).any() for x in arrays]).any()


def _floats(arrays: list[Any]) -> list[Array]:
    return [x for x in arrays if is_floating(x)]


def _reached_from_elsewhere(
    loss_fn: Callable, model: PyTree, args: tuple, idle: set[str]
) -> set[str]:
    """Which of the parameters without a gradient get one when the others have moved.

    A branch that is switched on by a factor that starts at zero has no gradient in the first step,
    on purpose, and an expert may be chosen by no example of a batch. Two factors that are both
    zero never move.
    """
    paths = _parameter_paths(model)
    leaves, structure = jtu.tree_flatten(eqx.filter(model, eqx.is_inexact_array))
    dynamic, static = eqx.partition((model, args), eqx.is_array)

    @jit_once
    def grads_are_there(leaves, dynamic):
        model, args = eqx.combine(dynamic, static)
        model = eqx.combine(jtu.tree_unflatten(structure, leaves), model)
        grads = eqx.filter_grad(loss_fn)(model, *args)
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
    by = np.asarray(noise.normal(size=leaf.shape), leaf.dtype)
    return leaf + _size(leaf) * laid_out(by, leaf.sharding)


@jit_once
def _size(leaf: Array) -> Array:
    """Its rms; of zeros 0.1."""
    rms = activation_stats(leaf).rms
    return jnp.where(rms > 0, rms, 0.1).astype(leaf.dtype)


# ---- Rows, on the host.


def _rows(call: Seen, parts: list[dict], survey: Survey) -> list[Row]:
    kinds = survey.types[call.output]
    kinds = kinds[-1:] if call.applied is not None else kinds
    rows = []
    for step in itertools.product(*map(range, call.loops)):
        for part, (numbers, kind) in enumerate(zip(parts, kinds, strict=True)):
            if not numbers:
                continue
            here = {name: float(np.asarray(number)[step]) for name, number in numbers.items()}
            rows.append(
                Row(
                    call.path,
                    call.type,
                    call.number,
                    step,
                    f"[{part}]" if len(parts) > 1 else "",
                    kind.shape[len(call.loops) :],
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
    return name in sometimes and math.isnan(number)


def _taken(row: Row) -> bool:
    """Whether it was computed at all, and not in the branch of a `cond` that was not taken."""
    numbers = row.statistics
    if not row.seen.conditional or numbers["non_finite"] < 1:
        return True
    return bool(numbers.get("grad_rms", 0.0) != 0 or not numbers.get("input_non_finite", True))


def _parameters(model: PyTree, found: list[dict]) -> list[Parameter]:
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    made, alike = [], {}
    for where, leaf, numbers in zip(_parameter_paths(model), leaves, found, strict=True):
        if not numbers:
            continue
        outlier = _outlier(numbers.pop("row_rms"))
        statistics = {name: float(number) for name, number in numbers.items()}
        statistics["outlier"] = outlier
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


def _parameter_paths(model: PyTree) -> list[str]:
    leaves, _ = jtu.tree_flatten_with_path(eqx.filter(model, eqx.is_inexact_array))
    return [path(keys) for keys, _ in leaves]
