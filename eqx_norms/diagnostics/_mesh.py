"""Statistics of arrays on a mesh with explicit axes, where most operations refuse what is split."""

import functools as ft
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.tree_util as jtu

F = TypeVar("F", bound=Callable[..., Any])


def on_any_mesh(fn: F) -> F:
    """`fn`, computed as on automatic axes; its results, which are small, are whole everywhere."""

    @ft.wraps(fn)
    def anywhere(*args, **kwargs):
        leaves, structure = jtu.tree_flatten((args, kwargs))
        at = [i for i, leaf in enumerate(leaves) if _explicit(leaf)]
        if not at:
            return fn(*args, **kwargs)
        mesh = _mesh(leaves[at[0]])

        def automatic(*arrays):
            for i, x in zip(at, arrays, strict=True):
                leaves[i] = x
            args, kwargs = jtu.tree_unflatten(structure, leaves)
            return fn(*args, **kwargs)

        whole = jax.sharding.NamedSharding(mesh, jax.P())
        axes = _explicit(leaves[at[0]])
        run = jax.sharding.auto_axes(automatic, axes=axes, out_sharding=whole)
        return run(*[leaves[i] for i in at])

    return anywhere  # pyright: ignore[reportReturnType]


def _explicit(x: Any) -> tuple[str, ...]:
    """The explicit axes of the mesh that an array lies on."""
    if not isinstance(x, jax.Array):
        return ()
    mesh = _mesh(x)
    pairs = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in pairs if kind == jax.sharding.AxisType.Explicit)


def _mesh(x: Any) -> Any:
    return jax.typeof(x).sharding.mesh
