"""What is wrong with a model, in one call."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from ._diagnosis_text import as_text
from ._findings import Finding, find
from ._instrument import Where
from ._measure import Parameter, Row, measure
from ._survey import Survey


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What [`eqx_norms.diagnostics.diagnose`][] returns; `print` shows it.

    - `loss`: a float.
    - `findings`: a tuple of [`eqx_norms.diagnostics.Finding`][], the worst first.
    - `calls`: a row for each call of a submodule or of an activation function, and for each step
        of a scan, in the order in which they begin. A row has `path`, `type`, `shape`, `dtype`,
        `name`, which tells it from all others, and `statistics`, a dictionary of floats.
    - `parameters`: likewise, for each array that the loss is differentiated with respect to.
    - `not_looked_at`: for each path at which nothing was measured the reason.
    """

    loss: float
    findings: tuple[Finding, ...]
    calls: tuple[Row, ...]
    parameters: tuple[Parameter, ...]
    not_looked_at: dict[str, str]

    def __str__(self) -> str:
        return as_text(self)

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

    One forward and one backward pass, of which statistics are kept. Only figures are judged, by
    the thresholds below: no finding says that a model will learn, and each names what to look at.

    !!! example

        ```python
        mlp = eqx.nn.MLP(2, 8, 32, 3, key=key)
        loss_fn = lambda mlp, x: jnp.mean(jax.vmap(mlp)(x) ** 2)
        print(diagnose(loss_fn, mlp, x))
        ```

    Kinds of findings, the worst first, and their thresholds:

    - `"non-finite"`: the first call, forward or else backward, of which what goes in is finite and
        what comes out is not; else a parameter, or `args`. Only where the loss or a gradient is
        not finite: infinities that mask are none.
    - `"no gradient"`: parameters of which the whole gradient is 0, also where arrays that start as
        zeros, as the factor of a branch does, are not.
    - `"dead"`: more than half of the units behind an activation function are 0 in 95% of 16
        examples or more. Or no example sends a gradient to so many units of a linear layer or
        convolution.
    - `"saturated"`: more than half of the inputs of a function that is flat at both ends, such as
        tanh, are where its slope is below a tenth of its largest.
    - `"exploding gradient"`, `"vanishing gradient"`: going back through 4 layers or more, its rms
        changes 1000-fold, by the slope of its logarithm. Update ratios that train span less.
    - `"rank collapse"`: an effective rank below 1.1, of 8 examples and 8 units or more, where it
        was 2 before.
    - `"growing activations"`: over 4 layers or more, their rms grows 100-fold, by the slope of its
        logarithm. A sum of 100 blocks of equal size grows 10-fold.
    - `"range"`: in float16, an entry beyond a quarter of the largest number; in float16 and
        bfloat16, a quarter of a derivative below the smallest normal number; in bfloat16, a spread
        of less than 1/512 of the mean. Of a parameter, a row 100 times the median row.
    - `"update ratio"`: the rms of a step over that of the weight, of the median weight, above .1 or
        below 1e-5: 1e-3 is usual. Rounding loses half of a parameter's updates. Two parameters hold
        the same numbers.
    - `"initial loss"`: the loss is more than 1 above log(`classes`), which takes logits of standard
        deviation 1.4.

    **Arguments:**

    - `loss_fn`: a function of the model and `args` that returns a floating-point scalar.
    - `model`, `args`: as for [`eqx_norms.diagnostics.capture`][].
    - `where`: likewise; by default everything that can be called.
    - `optimiser`: a pair of an optax optimiser and its state, for the update that comes next.
    - `classes`: of how many a classifier chooses one.

    **Returns:**

    A [`eqx_norms.diagnostics.Diagnosis`][]. What `capture_grads` refuses is in its
    `not_looked_at`, and the rest is there.

    **Raises:**

    - `TypeError` if `loss_fn` does not return a floating-point scalar, or if `optimiser` is no such
        pair.
    - `ValueError` if `where` matches nothing, if `classes` is not above 1, or under `jax.jit` and
        other transformations: it returns floats.
    """
    _check(model, args, optimiser, classes)
    survey = Survey(loss_fn, model, args, where or (lambda path, module: True))
    measured = measure(survey, loss_fn, model, args, optimiser)
    not_looked_at = dict(survey.not_looked_at)
    not_looked_at |= dict.fromkeys(survey.never_called, "it is never called")
    not_looked_at |= dict.fromkeys(measured.not_taken, "its branch was not taken")
    findings = find(measured, _not_finite(args), classes)
    rows, parameters = tuple(measured.rows), tuple(measured.parameters)
    return Diagnosis(measured.loss, findings, rows, parameters, not_looked_at)


def _check(model: PyTree, args: tuple, optimiser: Any, classes: int | None) -> None:
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jtu.tree_leaves((model, args))):
        raise ValueError(
            "`diagnose` must be called outside `jax.jit` and other transformations, for it returns "
            "floats, but `model` or `args` hold traced arrays. `loss_fn` may be jitted; inside a "
            "jitted step type `capture_grads`."
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


def _not_finite(args: tuple) -> bool:
    arrays = [x for x in jtu.tree_leaves(args) if eqx.is_inexact_array_like(x)]
    return any(not bool(jnp.isfinite(x).all()) for x in arrays)
