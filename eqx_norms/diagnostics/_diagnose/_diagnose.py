"""What is wrong with a model, in one call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from .._capture._instrument import Where, everything
from .._capture._library import as_model
from .._mesh import on_any_mesh
from .._once import jit_once
from ._findings import Finding, find
from ._measure import Parameter, Row, measure
from ._plot import plot
from ._survey import Survey
from ._text import as_text


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What [`eqx_norms.diagnostics.diagnose`][] returns; `print` shows it.

    - `loss`: a float.
    - `findings`: a tuple of [`eqx_norms.diagnostics.Finding`][], the worst first.
    - `calls`: a row for each call of a submodule or of an activation function, and for each step
        of a scan, in the order in which they begin. A row has `path`, `type`, `shape`, `dtype`,
        a `name` that no other row has, and `statistics`, a dictionary of floats.
    - `parameters`: such a row for each array that the loss is differentiated with respect to.
    - `not_looked_at`: for each path at which nothing was measured, the reason.
    """

    loss: float
    findings: tuple[Finding, ...]
    calls: tuple[Row, ...]
    parameters: tuple[Parameter, ...]
    not_looked_at: dict[str, str]

    def __str__(self) -> str:
        return as_text(self)

    def plot(self):
        """One figure, with a line for each row: outputs, derivatives there, shares, parameters.

        It needs matplotlib, and returns the `matplotlib.figure.Figure`.
        """
        return plot(self)

    def scalars(self) -> dict[str, float]:
        """All statistics under flat names such as `"layers[0]/grad_rms"`, for any logger.

        Parameters have theirs under `"layers[0].weight/rms"`; the loss is `"loss"`, the number of
        findings `"findings"`.
        """
        numbers = {"loss": self.loss, "findings": float(len(self.findings))}
        for row in self.calls:
            numbers |= {f"{row.name or 'model'}/{k}": v for k, v in row.statistics.items()}
        for row in self.parameters:
            numbers |= {f"{row.path}/{k}": v for k, v in row.statistics.items()}
        return numbers


def diagnose(
    loss_fn: Callable[..., Float[Array, ""]],
    model: PyTree,
    *args: Any,
    where: Where | None = None,
    optimiser: tuple[Any, PyTree] | None = None,
    classes: int | None = None,
) -> Diagnosis:
    """Looks at everything that a model computes for one batch, and says what is wrong with it.

    It runs one forward and one backward pass, and keeps statistics of them. It judges these figures
    by the thresholds below. No finding says that a model will learn. Each names what to look at.

    !!! example

        ```python
        mlp = eqx.nn.MLP(2, 8, 32, 3, key=key)
        loss_fn = lambda mlp, x: jnp.mean(jax.vmap(mlp)(x) ** 2)
        print(diagnose(loss_fn, mlp, x))
        ```

    Kinds of findings, the worst first, and their thresholds:

    - `"non-finite"`: the first call, forward or else backward, whose inputs are finite and whose
        outputs are not. It may also be a parameter, `args`, `"loss_fn"`, or `"optimiser"` if its
        update or moments are not finite. It is found only if the loss, a gradient or an update is
        not finite. Infinities that mask are no finding. It names the first step of the loops
        around it, the first example, and how many examples are like it.
    - `"identical examples"`: 8 examples or more are the same at the input of every submodule that
        no BatchNorm precedes.
    - `"dead"`: more than three quarters of the units of a hidden layer are 0 behind their
        activation function, at all positions of the whole batch. There must be 16 examples or more
        that differ, and the other units must fire in a tenth of them or more. Each member of an
        ensemble is judged by itself.
    - `"cancelled gradient"`: the derivative at the output of a LayerNorm or GroupNorm is the same
        for all entries of an example, or of each of its groups, to 1e-5. It cancels, because the
        sum of the outputs is constant.
    - `"no gradient"`: the whole gradient of a parameter is 0, even after all parameters that have a
        gradient have moved. It is not found if no parameter has a gradient and the loss is below
        1e-6, nor for a bias that shifts all outputs.
    - `"identical units"`: all rows of a weight are the same, and each row of its gradient is the
        same as another one.
    - `"no activation"`: the output of a `Linear` goes unchanged, or through a `Dropout`, into
        another `Linear` of the same module, and nowhere else, or that of a `Conv` into one with the
        same kernel. A bottleneck between wider layers, groups and kernels of width 1 are no
        finding.
    - `"saturated"`: a hidden layer has a function that is flat at both ends, such as tanh, and more
        than three quarters of its inputs are where its slope is below a tenth of its largest.
        Gates, layers in a loop over time, and the last function of a module with two weight
        matrices or more, as of a generator, are not judged. Or in three quarters of the rows of
        the softmax of an attention one weight is 1 and all others are 0, in float32, in all heads
        of one member of an ensemble.
    - `"exploding gradient"`, `"vanishing gradient"`: going back through 4 layers or more, each
        computed from the one before, the rms of the gradient changes 1000-fold, by the slope of its
        logarithm. Update ratios that train span less. The layers have the same path except for a
        number, or are steps of a scan that has parameters for each step. Steps in time have no
        trend.
    - `"rank collapse"`: the effective rank of 8 examples and 8 units or more is below 1.1 in a
        hidden layer and in all that follow, and was 2 before.
    - `"growing activations"`: over 4 layers or more, their rms grows 100-fold, by the slope of its
        logarithm, or one call returns 1e6 times the largest number that it is given, and as much as
        any of `args`. A sum of 100 blocks of equal size grows 10-fold.
    - `"range"`: in float16, an entry is beyond a quarter of the largest number. In float16 and
        bfloat16, a quarter of a derivative is below the smallest normal number. In bfloat16,
        outputs have a spread of less than 1/512 of their mean. In a parameter, a row is 100 times
        one at the upper quartile, of those that get a gradient.
    - `"update ratio"`: the rms of a step, divided by that of the weight, is above 0.2 for the
        median weight; 1e-3 is usual. Or it is below 1e-5 wherever a schedule may stand, and at the
        end of a step of the usual size the loss is half as steep at least. Or there are gradients,
        and every update is 0 wherever a schedule may stand. Or rounding to 16 bits loses half of a
        parameter's updates, or the decay of a quarter of the optimiser's state. Or its steps of a
        parameter at 0 would be 30 times as large at 1. Or it makes a matrix of the vectors of
        several layers, so that the step of one turns with the gradient of another. Or two
        parameters hold the same random numbers.
    - `"initial loss"`: the loss is more than 1 above log(`classes`), which takes logits of standard
        deviation 1.4. Without `classes`, it is a cross-entropy, and in most examples the model is
        sure of one class, and wrong; or a binary one, and of most entries the model is sure, and
        wrong in a quarter of these.

    Of a model that has learnt, `"dead"`, `"saturated"` and a small update are no findings: its loss
    is a twentieth of what it is with the entries of each parameter shuffled.

    **Arguments:**

    - `loss_fn`: a function of the model and `args` that returns a floating-point scalar.
    - `model`, `args`: as for [`eqx_norms.diagnostics.capture`][].
    - `where`: as for [`eqx_norms.diagnostics.capture`][]. By default everything that can be called.
    - `optimiser`: a pair of an optax optimiser and its state, for the update that comes next. Of
        an `nnx.Optimizer` type `(optimizer.tx, optimizer.opt_state)`.
    - `classes`: the number of classes of a classifier.

    **Returns:**

    A [`eqx_norms.diagnostics.Diagnosis`][]. Its `not_looked_at` has what `capture_grads` refuses.
    Everything else is measured.

    **Raises:**

    - `TypeError` if `loss_fn` does not return a floating-point scalar, or if `optimiser` is no such
        pair.
    - `ValueError` if `where` matches nothing, if `classes` is not above 1, or under `jax.jit` and
        other transformations, because it returns floats.
    """
    _check(model, args, optimiser, classes)
    seen = as_model(model)
    survey = Survey(loss_fn, seen, args, where or everything)
    optimiser = None if optimiser is None else (optimiser[0], seen.optimiser_state(optimiser[1]))
    measured = measure(survey, seen.of_tree(loss_fn), args, optimiser)
    not_looked_at = dict(survey.not_looked_at)
    not_looked_at |= dict.fromkeys(survey.never_called, "it is never called")
    not_looked_at |= dict.fromkeys(measured.not_taken, "its branch was not taken")
    unseen = [where for where in not_looked_at if where in survey.not_looked_at]
    findings = find(measured, _not_finite(args), classes, unseen)
    rows, parameters = tuple(measured.rows), tuple(measured.parameters)
    return Diagnosis(measured.loss, findings, rows, parameters, not_looked_at)


def _check(model: PyTree, args: tuple, optimiser: Any, classes: int | None) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jtu.tree_leaves((model, args))):
        raise ValueError(
            "`diagnose` must be called outside `jax.jit` and other transformations, because it "
            "returns floats, but `model` or `args` hold traced arrays. `loss_fn` may be jitted. "
            "Inside a jitted step type `capture_grads`."
        )
    if optimiser is not None:
        pair = isinstance(optimiser, tuple) and len(optimiser) == 2
        if not pair or not hasattr(optimiser[0], "update"):
            raise TypeError(
                "`optimiser` must be a pair of an optax optimiser and its state, but it is "
                f"{optimiser!r}. Type `optimiser=(optim, opt_state)`."
            )
    if classes is not None and classes < 2:
        raise ValueError(f"`classes` must be above 1, but it is {classes}.")


def _not_finite(args: tuple) -> str:
    """Where `args` are NaN or infinite, but for -inf, with which people mask; or `""`."""
    leaves, _ = jtu.tree_flatten_with_path(args)
    for keys, x in leaves:
        if eqx.is_inexact_array_like(x):
            bad = jnp.isnan(x) | jnp.isposinf(jnp.real(x))
            if bool(bad.any()):
                return f"`args{jtu.keystr(keys)}`{_place(bad)}"
    return ""


def _place(bad: Bool[Array, "*shape"]) -> str:
    if not bad.shape:
        return ""
    first, count = _first_and_count(bad)
    index = ", ".join(map(str, np.unravel_index(int(first), bad.shape)))
    return f" at [{index}]; {count} of {len(bad)} along its first axis"


@jit_once
@on_any_mesh
def _first_and_count(bad: Bool[Array, "examples *shape"]) -> tuple[Array, Array]:
    return bad.argmax(), bad.reshape(len(bad), -1).any(1).sum()
