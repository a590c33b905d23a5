"""From a surveyed model to rows of numbers: one a call, one a parameter."""

import functools as ft
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from ._activations import Activation
from ._instrument import path
from ._interpret import Marked
from ._layer_statistics import (
    as_examples,
    derivative_statistics,
    each_step,
    is_floating,
    layer_statistics,
    non_finite,
)
from ._mesh import on_any_mesh
from ._once import jit_once
from ._optimiser import next_updates
from ._statistics import activation_stats, dead_unit_fraction, saturation_fraction
from ._survey import Seen, Survey

Numbers = dict[str, float]


class Row(NamedTuple):
    """One call of a submodule or of an activation function; one for each step of a scan.

    - `path`: of the submodule; of an activation function, that of the submodule whose output it
        takes, or else in which it is called.
    - `type`: of the submodule, or the name of the function.
    - `call`, `step`: how many calls of it came before, and in which step of the scans around it.
    - `part`: which array of the output, where there are several.
    - `statistics`: by name; what does not apply is missing.
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

    @jit_once
    def run(dynamic):
        model, args = eqx.combine(dynamic, static)
        loss, marked, grads, model_grads = survey.backward(model, args)
        ends = [_not_finite_inputs(call, marked, grads) for call in survey.calls]
        outputs = [(marked[call.output], grads[call.output]) for call in survey.calls]
        inputs = [_activation_input(call, marked) for call in survey.calls]
        return loss, ends, outputs, inputs, model_grads

    # What is not finite is what we are here to see, and a branch that is not taken is NaN.
    with jax.debug_nans(False), jax.debug_infs(False):
        loss, ends, outputs, inputs, model_grads = run(dynamic)
        axes = _unit_axes(survey, model)
        calls = list(map(_of_call, axes, ends, outputs, inputs))
        value_fn = lambda params: loss_fn(eqx.combine(params, model), *args)
        params = _of_parameters(model, model_grads, optimiser, loss, value_fn)
    calls, params = jax.device_get((calls, params))
    rows, by_call, not_taken = [], {}, []
    for call, parts in zip(survey.calls, calls, strict=True):
        made = _rows(call, parts, survey)
        not_taken += [row.name for row in made if not (_taken(row) or row.is_function)]
        by_call[id(call)] = [row for row in made if _taken(row)]
        rows += by_call[id(call)]
    returns = [row for call in survey.returns for row in by_call[id(call)]]
    parameters = _parameters(model, params)
    idle = [p for p in parameters if p.statistics["grad_largest"] == 0]
    if idle and any(p.statistics["largest"] == 0 for p in parameters):
        reached = _reached_from_elsewhere(loss_fn, model, args)
        for p in idle:
            p.statistics["reached"] = reached[p.path]
    return Measured(float(loss), rows, returns, parameters, not_taken)


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


def _not_finite_inputs(call: Seen, marked: Marked, grads: Marked) -> dict[str, Array]:
    """Whether any input is not finite, and any derivative there, for each step."""
    if call.given is None:
        return {}
    any_non_finite = each_step(call.loops, _any_non_finite)
    return {
        "input_non_finite": any_non_finite(_floats(marked[call.given])),
        "grad_input_non_finite": any_non_finite(_floats(grads[call.given])),
    }


def _activation_input(call: Seen, marked: Marked) -> Array | None:
    """What an `equinox.nn.Lambda` was given, if that looks like what it returned."""
    if call.activation is None or call.given is None or call.returned is None:
        return None
    inputs, outputs = _floats(marked[call.given]), marked[call.returned]
    same = inputs and len(outputs) == 1 and inputs[0].shape == outputs[0].shape
    return inputs[0] if same else None


def _of_call(
    call_and_axis: tuple[Seen, int], ends: dict, output: tuple[list, list], x: Array | None
) -> list[dict[str, Array]]:
    """For each array of the output its statistics, each with an axis for each loop."""
    call, axis = call_and_axis
    values, grads = output
    if call.applied is not None:
        x, y = values
        return [_of_activation(x, y, call.activation, axis, call.loops) if is_floating(y) else {}]
    parts = [
        _of_output(value, grad, axis, call.loops) | ends if is_floating(value) else {}
        for value, grad in zip(values, grads, strict=True)
    ]
    if x is not None and parts[0]:
        parts[0] |= _dead_and_saturated(x, values[0], call.activation, axis, call.loops)
    return parts


# Jitted one by one: a deep model has many layers, but few shapes, and one program of all their
# statistics would take XLA longer to compile than the model itself.
@ft.partial(jax.jit, static_argnums=(2, 3))
def _of_output(value: Array, grad: Array, axis: int, loops: tuple[int, ...]) -> dict[str, Array]:
    def one(value, grad):
        derivative = derivative_statistics(grad, axis)
        found = {f"grad_{name}": number for name, number in derivative.items()}
        return layer_statistics(value, axis) | found | {"tiny": _tiny(grad)}

    return each_step(loops, one)(value, grad)


@ft.partial(jax.jit, static_argnums=(2, 3, 4))
def _of_activation(
    x: Array, y: Array, activation: Activation, axis: int, loops: tuple[int, ...]
) -> dict[str, Array]:
    found = each_step(loops, ft.partial(layer_statistics, unit_axis=axis))(y)
    return found | _dead_and_saturated(x, y, activation, axis, loops)


@ft.partial(jax.jit, static_argnums=(2, 3, 4))
def _dead_and_saturated(
    x: Array, y: Array, activation: Activation, axis: int, loops: tuple[int, ...]
) -> dict[str, Array]:
    @on_any_mesh
    def one(x, y):
        found = {}
        examples = as_examples(y, axis)
        if len(examples) > 1:
            found["dead"] = dead_unit_fraction(examples)
        if activation.flat is not None and activation.fn is not None:
            found["saturated"] = saturation_fraction(activation.fn, x, activation.flat)
        return found

    return each_step(loops, one)(x, y)


def _of_parameters(
    model: PyTree,
    grads: PyTree,
    optimiser: tuple[Any, PyTree] | None,
    loss: Array,
    value_fn: Callable,
) -> list[dict[str, Array]]:
    params = eqx.filter(model, eqx.is_inexact_array)
    leaves = jtu.tree_leaves(params)
    found = [
        _of_parameter(param, grad) if is_floating(param) else {}
        for param, grad in zip(leaves, jtu.tree_leaves(grads), strict=True)
    ]
    if optimiser is not None:
        optim, opt_state = optimiser
        updates = eqx.filter_jit(next_updates)(optim, grads, opt_state, params, loss, value_fn)
        for param, update, numbers in zip(leaves, jtu.tree_leaves(updates), found, strict=True):
            if numbers:
                numbers |= _of_update(param, update)
    return found


@jax.jit
def _of_parameter(param: Array, grad: Array) -> dict[str, Array]:
    of_param, of_grad = activation_stats(param), activation_stats(grad)
    return {
        "mean": of_param.mean,
        "std": of_param.std,
        "rms": of_param.rms,
        "largest": of_param.absmax,
        "non_finite": non_finite(param),
        "outlier": _outlier(param),
        "grad_rms": of_grad.rms,
        "grad_largest": of_grad.absmax,
        "grad_non_finite": non_finite(grad),
        "tiny": _tiny(grad),
    }


@jax.jit
def _of_update(param: Array, update: Array) -> dict[str, Array]:
    moved = (param + update.astype(param.dtype)).astype(param.dtype) != param
    meant = update != 0
    lost = jnp.sum(meant & ~moved) / jnp.maximum(jnp.sum(meant), 1)
    rms = activation_stats(update).rms
    return {"update_rms": rms, "update_ratio": rms / activation_stats(param).rms, "lost": lost}


def _outlier(param: Array) -> Array:
    """How many times the median row's rms the largest row's is."""
    if param.ndim < 2 or param.shape[0] < 8:
        return jnp.asarray(jnp.nan)
    rows = jax.vmap(lambda row: activation_stats(row).rms)(param)
    return jnp.max(rows) / jnp.median(rows)


def _tiny(x: Array) -> Array:
    """The share of entries that are below the smallest normal number of their dtype, but not 0."""
    size = jnp.abs(x)
    return jnp.mean((size > 0) & (size < jnp.finfo(x.dtype).tiny), dtype=jnp.float32)


def _any_non_finite(arrays: list[Array]) -> Array:
    return jnp.stack([non_finite(x) > 0 for x in arrays]).any() if arrays else jnp.asarray(False)


def _floats(arrays: list[Any]) -> list[Array]:
    return [x for x in arrays if is_floating(x)]


def _reached_from_elsewhere(loss_fn: Callable, model: PyTree, args: tuple) -> dict[str, bool]:
    """Which parameters get a gradient where no array is all zero.

    A branch that is switched on by a factor that starts at zero has no gradient in the first step,
    on purpose.
    """
    leaves, structure = jtu.tree_flatten(eqx.filter(model, eqx.is_inexact_array))
    keys = jr.split(jr.key(0), len(leaves))
    noisy = [
        jnp.where(jnp.any(leaf != 0), leaf, 0.01 * jr.normal(key, leaf.shape, leaf.dtype))
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    elsewhere = eqx.combine(jtu.tree_unflatten(structure, noisy), model)

    dynamic, static = eqx.partition((elsewhere, args), eqx.is_array)

    @jit_once
    def reached(dynamic):
        model, args = eqx.combine(dynamic, static)
        grads = eqx.filter_grad(loss_fn)(model, *args)
        return [jnp.any(grad != 0) for grad in jtu.tree_leaves(grads)]

    with jax.debug_nans(False), jax.debug_infs(False):
        found = reached(dynamic)
    return dict(zip(_parameter_paths(model), map(bool, found), strict=True))


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
                    {name: number for name, number in here.items() if not _missing(name, number)},
                )
            )
    return rows


def _missing(name: str, number: float) -> bool:
    return name == "effective_rank" and math.isnan(number)


def _taken(row: Row) -> bool:
    """Whether it was computed at all, and not in the branch of a `cond` that was not taken."""
    numbers = row.statistics
    if numbers["non_finite"] < 1:
        return True
    return bool(numbers.get("grad_rms", 0.0) != 0 or not numbers.get("input_non_finite", True))


def _parameters(model: PyTree, found: list[dict]) -> list[Parameter]:
    leaves = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))
    made, alike = [], {}
    for where, leaf, numbers in zip(_parameter_paths(model), leaves, found, strict=True):
        if not numbers:
            continue
        statistics = {name: float(number) for name, number in numbers.items()}
        # Only what has the same statistics is compared, number by number; ones and zeros are alike.
        key = (leaf.shape, leaf.dtype, *(statistics[name] for name in ("mean", "std", "largest")))
        others = alike.setdefault(key, []) if statistics["std"] > 0 else []
        same = next((path for path, other in others if jnp.array_equal(leaf, other)), None)
        others.append((where, leaf))
        made.append(Parameter(where, leaf.shape, str(leaf.dtype), statistics, same))
    return made


def _parameter_paths(model: PyTree) -> list[str]:
    leaves, _ = jtu.tree_flatten_with_path(eqx.filter(model, eqx.is_inexact_array))
    return [path(keys) for keys, _ in leaves]
