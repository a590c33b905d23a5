"""Statistics of many layers by one function for all that are alike.

XLA would take longer to compile the statistics of each layer than the layers themselves, and as
long for each number that it returns on its own: on a CPU, each is a kernel.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .._mesh import on_any_mesh


class _Place(NamedTuple):
    """Where the statistics of one array are: of which kind, and from which row on."""

    kind: int
    start: int
    loops: tuple[int, ...]


class _Kind(eqx.Module):
    """What was measured of the layers of one kind, a row for each layer and step of a loop.

    Of each the numbers that are called `names`, and, if there is one, a vector that is called
    `vector`.
    """

    numbers: Any
    vectors: Any
    names: tuple[str, ...] = eqx.field(static=True)
    vector: str | None = eqx.field(static=True)

    def of(self, place: _Place) -> dict[str, Any]:
        rows = slice(place.start, place.start + math.prod(place.loops))

        def cut(x):
            *around, _, entries = x.shape  # of a `jax.vmap` or a `jax.lax.scan` over the look
            return x[..., rows, :].reshape(*around, *place.loops, entries)

        numbers = cut(self.numbers)
        found = {name: numbers[..., i] for i, name in enumerate(self.names)}
        return found if self.vector is None else found | {self.vector: cut(self.vectors)}


class Statistics(Mapping, eqx.Module):
    """By the name of each array a dictionary of its statistics, in the order of the calls.

    As a pytree it has a few arrays for all layers, so that it is soon compiled, and soon on the
    host; `{**statistics}` is a dictionary with an array for each number.
    """

    _kinds: list[_Kind]
    _places: dict[str, _Place] = eqx.field(static=True)

    def __getitem__(self, name: str) -> dict[str, Any]:
        place = self._places[name]
        return self._kinds[place.kind].of(place)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def by_kind(
    fn: Callable[..., Sequence[dict[str, Array]]],
    layers: Mapping[str, tuple[Array, ...]],
    loops: Mapping[str, tuple[int, ...]],
    *,
    parts: int = 1,
    flat: bool = False,
) -> list[Statistics]:
    """The statistics of all layers, and of each step of the loops around them.

    **Arguments:**

    - `fn`: of the arrays of all layers of a kind, with an axis in front for these, it returns
        so many `parts`: dictionaries of vectors, with a number for each layer, and of one matrix
        at most.
    - `layers`: of each its arrays, with an axis in front for each of the loops around.
    - `flat`: the function is given the entries of each along one axis.
    """
    alike = {}
    for name, arrays in layers.items():
        around = len(loops[name])
        entries = lambda x: (x.size // math.prod(loops[name]),) if flat else x.shape[around:]  # noqa: B023
        alike.setdefault(tuple((entries(x), x.dtype) for x in arrays), []).append(name)
    kinds, places = [], {}
    for number, (kind, names) in enumerate(alike.items()):
        shapes = [entries for entries, _ in kind]
        kinds.append(_measured(fn, [layers[name] for name in names], shapes))
        start = 0
        for name in names:
            places[name] = _Place(number, start, loops[name])
            start += math.prod(loops[name])
    places = {name: places[name] for name in layers}
    return [Statistics([kind[part] for kind in kinds], places) for part in range(parts)]


def _measured(
    fn: Callable, layers: list[tuple[Array, ...]], shapes: list[tuple[int, ...]]
) -> list[_Kind]:
    names = []

    @on_any_mesh
    def measured(layers):
        rows = [
            [x.reshape(-1, *shape) for x, shape in zip(arrays, shapes, strict=True)]
            for arrays in layers
        ]
        parts = fn(*map(jnp.concatenate, zip(*rows, strict=True)))
        names[:] = [[[k for k, x in part.items() if x.ndim == n] for n in (1, 2)] for part in parts]
        return [
            (jnp.stack([part[k] for k in numbers], -1), [part[k] for k in vector])
            for part, (numbers, vector) in zip(parts, names, strict=True)
        ]

    return [
        _Kind(found, next(iter(vectors), None), tuple(numbers), next(iter(vector), None))
        for (found, vectors), (numbers, vector) in zip(measured(layers), names, strict=True)
    ]
