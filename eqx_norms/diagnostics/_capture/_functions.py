"""Functions in between submodules, such as a relu or a softmax: `functions=` asks for what they
return.

They are found in the traced program, as `diagnose` finds them, and have the path of the submodule
whose output they take. So the calls of all submodules are marked, and what nobody asked for is left
out again (`Plan.only_wanted`) before the program runs.
"""

from collections.abc import Collection, Sequence
from typing import Any

import jax.tree_util as jtu

from ._activations import NAMES, recognised, result_of_softmax
from ._tag import Call, Inputs, Place


class Function(Call):
    """Marks what a function in between returns."""

    def __init__(self, name: str, level: int):
        super().__init__(Place(()), level, jtu.tree_structure(0), None, f"what the {name} returns")
        self.name = name


def as_functions(functions: str | Collection[str]) -> frozenset[str]:
    functions = (functions,) if isinstance(functions, str) else tuple(functions)
    for name in functions:
        if name not in NAMES:
            raise ValueError(
                f"`functions` must be among {', '.join(map(repr, NAMES))}, but one is {name!r}. "
                "Any other value has a key if `jax.ad_checkpoint.checkpoint_name` names it, and "
                "`names=` asks for it."
            )
    return frozenset(functions)


def found_in(jaxpr: Any, functions: Collection[str]) -> dict[int, str]:
    """The equations of which the result is what such a function returns."""
    found = {}
    for i in range(len(jaxpr.eqns)) if functions else ():
        known = recognised(jaxpr, i)
        if known is not None and known[0].name in functions:
            softmax = known[0].axis is not None
            found[result_of_softmax(jaxpr, i) if softmax else i] = known[0].name
    return found


def placed(outputs: Sequence[Any], types: Sequence[list[Any]]) -> list[str]:
    """The path of each output that is a function's, such as `layers[0]:relu`.

    That is the submodule that has returned last in the same call, if its output has the same shape,
    or else the one that is being called.
    """
    paths, open_, last = [], [""], [(None, "")]
    for output, kinds in zip(outputs, types, strict=True):
        at, shape = output.paths[0], kinds[0].shape
        if isinstance(output.call, Function):
            like, feeds = last[-1]
            at = feeds if len(open_) == 1 or like == shape else open_[-1]
            paths.append(f"{at}:{output.call.name}")
            continue
        if isinstance(output.call, Inputs):
            open_.append(at)
            last.append((None, at))
        else:
            if at in open_[1:]:  # What was given no array is not among them.
                ends = len(open_) - 1 - open_[::-1].index(at)
                del open_[ends:], last[ends:]
            last[-1] = shape, at
    return paths
