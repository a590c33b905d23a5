"""replace_norms: the norms of `equinox.nn` in a model, exchanged for those of this package."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._checks import check_implementation
from ._group_norm import GroupNorm
from ._layer_norm import LayerNorm
from ._rms_norm import RMSNorm

_ours = {eqx.nn.LayerNorm: LayerNorm, eqx.nn.RMSNorm: RMSNorm, eqx.nn.GroupNorm: GroupNorm}


def replace_norms(
    model: PyTree,
    *,
    where: Callable[[str, eqx.Module], bool] | None = None,
    implementation: str = "xla",
    round_before_weight: bool = False,
    at_least: int = 0,
) -> PyTree:
    """Exchanges every `equinox.nn.LayerNorm`, `RMSNorm` and `GroupNorm` in a model for ours.

    Shape, `eps` and parameters stay as they are, including the leading axes of an ensemble. The
    number and order of the leaves do not change either, so checkpoints still load. A layer object
    that stands at several places is exchanged for one object.

    What was made from the model before, such as an optimiser's state, has the old classes in its
    structure, and JAX compares these. In the middle of a run exchange them there as well:
    ```python
    model, opt_state = replace_norms((model, opt_state))
    ```

    **Arguments:**

    - `model`: any pytree with `equinox.Module`s in it. It is not changed.
    - `where`: a function of `(path, norm)` that says whether to exchange a norm. A path looks like
        `blocks[0].norm`. `None` exchanges all.
    - `implementation`: that of the new layers, as for [`eqx_norms.LayerNorm`][].
    - `round_before_weight`: that of the LayerNorms and RMSNorms, as for the same class.
    - `at_least`: how many norms must be exchanged. The default is 0, because a state of plain SGD
        has no norms, and a model whose norms were exchanged has none left.

    **Returns:**

    The new model. Subclasses of the Equinox layers are left alone, because nobody knows what they
    have changed.

    **Raises:** `ValueError` if fewer than `at_least` norms are exchanged, or for a bad
    `implementation`.
    """
    check_implementation("replace_norms", implementation)
    of_ours = {"implementation": implementation, "round_before_weight": round_before_weight}
    exchanged: dict[int, eqx.Module] = {}

    def exchange(path, node):
        readable = jtu.keystr(path).removeprefix(".")
        if type(node) not in _ours or not (where is None or where(readable, node)):
            return node
        if id(node) not in exchanged:
            exchanged[id(node)] = _converted(node, of_ours)
        return exchanged[id(node)]

    new = jtu.tree_map_with_path(exchange, model, is_leaf=lambda node: type(node) in _ours)
    if len(exchanged) < at_least:
        raise ValueError(
            f"`replace_norms(model, at_least={at_least})` found {len(exchanged)} of "
            "equinox.nn.LayerNorm, RMSNorm and GroupNorm to exchange"
            + ("." if where is None else " for which `where(path, norm)` is true.")
        )
    return new


def _converted(norm: Any, of_ours: dict[str, Any]) -> eqx.Module:
    params = norm.weight, norm.bias
    fields = {k: v for k, v in vars(norm).items() if k not in ("weight", "bias")}
    if type(norm) is eqx.nn.GroupNorm:
        of_ours = {"implementation": of_ours["implementation"]}
    fields |= of_ours
    # Fields by closure: as arguments, NumPy's numbers among them would be traced.
    ours = eqx.filter_eval_shape(lambda: _ours[type(norm)](**fields))
    # Theirs as they are: not of `shape` in an ensemble, and None in a model that was partitioned.
    return eqx.tree_at(
        lambda layer: (layer.weight, layer.bias), ours, params, is_leaf=lambda node: node is None
    )
