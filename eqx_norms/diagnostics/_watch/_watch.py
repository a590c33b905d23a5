"""What happens inside a model, over the steps of its training."""

import functools as ft
from collections.abc import Callable, Collection, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ..._processes import fetch, fetched
from .._capture._capture import _Program
from .._capture._instrument import Where
from .._capture._interpret import Marked, loops_around
from .._capture._library import as_model
from .._capture._names import as_names
from .._layer_statistics import (
    as_examples,
    derivative_statistics,
    is_floating,
    layer_statistics,
)
from .._once import once
from .._optimiser import next_updates
from .._statistics import activation_stats, dead_unit_fraction
from ._by_kind import Statistics, by_kind
from ._look import BINS_A_DOUBLING, DOUBLINGS, Look


class Watch:
    """Measures a model while it trains, and draws the course of what was measured.

    A look is one forward and one backward pass. It returns statistics, some hundred numbers for
    each layer, whose shapes do not depend on the batch. So it may be inside a jitted step, a
    `jax.lax.scan` or a `jax.vmap` over seeds. Outside of these it compiles itself, on CPUs with
    little optimisation: the first look is there sooner than under `eqx.filter_jit(watch.measure)`,
    and later ones take longer. For hundreds of looks, jit it.

    !!! example

        ```python
        watch = Watch(loss_fn, where=eqx.nn.Linear, optimiser=optim)
        history = []
        for step, batch in enumerate(batches):
            if step % 100 == 0:
                history.append(watch.measure(model, batch, opt_state=opt_state))
            model, opt_state = make_step(model, opt_state, batch)
        figure = watch.plot(history, every=100)
        ```

    If a run is stopped, `history` has what was measured until then.

    **Arguments:**

    - `loss_fn`: a function of a model and more, as for
        [`eqx_norms.diagnostics.capture_grads`][].
    - `where`: which submodules, as for that function. Dead units are counted in all of them, but
        they only mean something for activation functions, such as an `equinox.nn.Lambda`.
    - `names`: values that the model names by `jax.ad_checkpoint.checkpoint_name`, as for that
        function. Each has a row of its own, by its name.
    - `optimiser`: the optax optimiser that trains the model, for the size of its updates. Of an
        `nnx.Optimizer` it is its `tx`, and the state is its `opt_state`.
    """

    def __init__(
        self,
        loss_fn: Callable,
        *,
        where: Where = (),
        names: str | Collection[str] = (),
        optimiser: Any = None,
    ):
        self.loss_fn = loss_fn
        self.where = where
        self.names = as_names(names)
        self.optimiser = optimiser

    def measure(self, model: PyTree, *args: Any, opt_state: PyTree = None) -> Look:
        """Looks at the model as it is, and at the step that it is about to take.

        It costs as much as a few steps under a `jax.jit` of yours, and some ten where it compiles
        itself, because it runs a forward pass, a backward pass and the statistics. Call it once in
        a while.

        **Arguments:**

        - `model`, `args`: those of the loss function. The last axis of what submodules return is
            that of the units. All others count as examples, except those of loops.
        - `opt_state`: the optimiser's state, if there is an optimiser.

        **Returns:**

        An [`eqx_norms.diagnostics.Look`][]. Under `jax.lax.scan` and `jax.vmap` it gets their axes
        in front, like anything that is returned there.

        **Raises:**

        The errors of [`eqx_norms.diagnostics.capture_grads`][], and `ValueError` for an optimiser
        without its state, or a state without an optimiser.
        """
        if (self.optimiser is None) != (opt_state is None):
            raise ValueError(
                "`measure` must have the state of the optimiser that `Watch` was given, and none "
                "without one. Type `Watch(loss_fn, where=where, optimiser=optim)` and "
                "`measure(model, batch, opt_state=opt_state)`."
            )
        if _traced((model, args, opt_state)):
            return self._measure(model, args, opt_state)
        look = self._compiled(as_model(model).apart(), args, opt_state)
        return fetch(look) if jax.process_count() > 1 else look

    @ft.cached_property
    def _compiled(self) -> Callable[..., Look]:
        options: Any = {"compiler_options": once()}  # which the annotations do not know
        return eqx.filter_jit(self._measure, **options)

    def _measure(self, model: PyTree, args: tuple, opt_state: PyTree) -> Look:
        seen = as_model(model)
        program = _Program(self.loss_fn, seen, args, self.where, None, self.names)
        loss, marked, grads, model_grads = program.backward(seen.tree, args)
        params = seen.trained(seen.tree)
        updates = None
        if self.optimiser is not None:
            loss_fn, opt_state = seen.of_tree(self.loss_fn), seen.optimiser_state(opt_state)
            value_fn = lambda params: loss_fn(seen.with_trained(seen.tree, params), *args)
            updates = next_updates(self.optimiser, model_grads, opt_state, params, loss, value_fn)
        values, derivatives = _of_calls(program, marked, grads)
        of_params = _of_params(seen.paths(), params, model_grads, updates)
        return Look(loss, values, derivatives, of_params)

    def plot(
        self,
        history: Look | Sequence[Look],
        *,
        every: int = 1,
        histograms: bool = False,
        layers: int = 8,
    ):
        """Draws what was measured.

        For each layer it draws the percentiles 16, 50 and 84 of its outputs and of the derivatives
        there. For all layers together it draws the loss, the share of dead units, the size of the
        derivatives, and how far a step moves each weight matrix.

        **Arguments:**

        - `history`: looks, in the order in which they were taken: a sequence, or one with an axis
            in front for them, as it comes out of a `jax.lax.scan`.
        - `every`: steps from one look to the next.
        - `histograms`: draw these in place of the percentiles. The scale of their vertical axis is
            linear up to a hundredth of the largest entry, and logarithmic from there.
        - `layers`: how many layers to draw at most, evenly spaced.

        **Returns:**

        A matplotlib figure. It needs `pip install "eqx-norms[plot]"`.

        **Raises:**

        `ValueError` if there is nothing in `history`, or if its looks are of different models.
        """
        from ._plot import draw

        return draw(stacked(history), every=every, histograms=histograms, layers=layers)


def stacked(history: Look | Sequence[Look]) -> Look:
    """The looks as one, with an axis in front, in NumPy."""
    if not isinstance(history, Look):
        if len(history) == 0:
            raise ValueError("`history` must have at least one look, but it is empty.")
        if len({jtu.tree_structure(look) for look in history}) > 1:
            raise ValueError(
                "`history` must have looks at one model, with the same submodules, but these "
                "differ. Plot them apart."
            )
        history = jtu.tree_map(lambda *leaves: np.stack([*map(fetched, leaves)]), *history)
    look: Look = jtu.tree_map(fetched, history)
    if look.loss.ndim != 1:
        raise ValueError(
            "`history` must be looks one after the other, but the shape of their losses is "
            f"{look.loss.shape}. Type `jax.tree.map(lambda x: x[0], history)` for the first of "
            "several runs."
        )
    return look


def _traced(tree: PyTree) -> bool:
    """Whether this is under a transformation, be it that of a function without arguments."""
    return any(isinstance(x, jax.core.Tracer) for x in (*jtu.tree_leaves(tree), jnp.zeros(())))


# ---- Statistics, traced.


def _of_calls(program: _Program, marked: Marked, grads: Marked) -> list[Statistics]:
    """Of each floating-point array, by the key of its call, and its place in what that returned."""
    values, derivatives = program.by_path(marked), program.by_path(grads)
    arrays, loops = {}, {}
    for key, around in zip(program.keys, loops_around(program.plan), strict=True):
        of_grads = dict(jtu.tree_flatten_with_path(derivatives[key])[0])
        for place, x in jtu.tree_flatten_with_path(values[key])[0]:
            if is_floating(x):
                arrays[key + jtu.keystr(place)] = x, of_grads[place]
                loops[key + jtu.keystr(place)] = around
    return by_kind(_of_outputs, arrays, loops, parts=2)


def _of_outputs(values: Array, grads: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    both = jax.lax.map(_of_array, jnp.concatenate([values, grads]))
    of_values = {name: x[: len(values)] for name, x in both.items() if name != "silent"}
    of_values["effective_rank"] = jax.lax.map(_rank, values)
    names = ("rms", "non_finite", "silent", "largest", "counts")
    of_grads = {name: both[name][len(values) :] for name in names}
    # Behind a linear layer, the activation function that follows has no row of its own.
    of_values["dead"] = jnp.maximum(of_values["dead"], of_grads["silent"])
    return of_values, of_grads


def _of_array(x: Float[Array, "*shape"]) -> dict[str, Array]:
    """Of an output or a derivative there; the rank, which takes longer, is only of an output."""
    found = layer_statistics(x) | derivative_statistics(x)
    del found["effective_rank"]
    found["dead"] = dead_unit_fraction(as_examples(x))
    return found | {"counts": _counts(x, found["largest"])}


def _rank(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    return layer_statistics(x)["effective_rank"]


def _counts(x: Float[Array, "*shape"], largest: Float[Array, ""]) -> Int[Array, " bins"]:
    """By the sign and the size of the entries of one array, over the largest.

    The bin is read off the exponent and the mantissa: a search among the edges takes ten times as
    long, and half as long again to compile.
    """
    share = jnp.abs(x.astype(largest.dtype).ravel()) / jnp.where(largest > 0, largest, 1)
    bits = jax.lax.bitcast_convert_type(share.astype(jnp.float32), jnp.int32)
    exponent = (bits >> 23) - 127
    quarters = 2.0 ** (np.arange(1, BINS_A_DOUBLING) / BINS_A_DOUBLING)
    quarters = quarters.astype(np.float32).view(np.int32)
    above = sum((bits & _MANTISSA >= q & _MANTISSA).astype(jnp.int32) for q in quarters)
    middle = BINS_A_DOUBLING * DOUBLINGS
    size = jnp.clip(BINS_A_DOUBLING * exponent + above, -middle - 1, -1) + middle + 1
    places = middle + jnp.where(x.ravel() < 0, -size, size)
    counts = jnp.zeros(2 * middle + 1, jnp.int32)
    return counts.at[places].add(jnp.isfinite(share).astype(jnp.int32))


_MANTISSA = 0x7FFFFF  # of a float32


def _of_params(
    paths: list[str], params: PyTree, grads: PyTree, updates: PyTree | None
) -> Statistics:
    trees = (params, grads) if updates is None else (params, grads, updates)
    rows = zip(paths, *map(jtu.tree_leaves, trees), strict=True)
    arrays = {where: (param, *others) for where, param, *others in rows if is_floating(param)}
    [statistics] = by_kind(_of_params_alike, arrays, dict.fromkeys(arrays, ()), flat=True)
    return statistics


def _of_params_alike(*arrays: Array) -> list[dict[str, Array]]:
    wide = jnp.float64 if jnp.float64 in [x.dtype for x in arrays] else jnp.float32
    rms = jax.vmap(lambda x: activation_stats(x).rms)(
        jnp.concatenate([x.astype(wide) for x in arrays])
    )
    of_param, of_grad, *of_update = rms.reshape(len(arrays), -1)
    found = {"rms": of_param, "grad_rms": of_grad}
    for update in of_update:
        found["update_ratio"] = update / of_param
    return [found]
