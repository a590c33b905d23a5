"""Training on many devices: `--mesh 8` splits the batch in eight, `--mesh 4x2` in four, and the
features of every token in two.

The model and its step are written for one device. Here arrays are placed, and XLA adds what the
devices have to tell each other.
"""

import contextlib
import math
import re
from typing import TypeVar

import equinox as eqx
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import Int, PyTree

from .data import AnyArray
from .settings import Settings

T = TypeVar("T", bound=PyTree)


def make_mesh(sizes: str) -> Mesh:
    """Of the axis "data", and "features" if there are two sizes. On CPU, of devices made for it."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", sizes):
        raise ValueError(
            f"--mesh is one number of devices, or two with an x between them, got {sizes!r}; "
            "type --mesh 8, or --mesh 4x2"
        )
    shape = tuple(map(int, sizes.split("x")))
    count = math.prod(shape)
    with contextlib.suppress(RuntimeError):  # once JAX computes, what there is must do
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices()
    if len(found) < count:
        raise ValueError(
            f"--mesh {sizes} wants {count} devices, but there are {len(found)} of platform "
            f"{found[0].platform!r}; type --mesh {len(found)}, or, to try it on a CPU, "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count} JAX_PLATFORMS=cpu in front"
        )
    axes = ("data", "features")[: len(shape)]
    return jax.make_mesh(
        shape, axes, axis_types=(AxisType.Auto,) * len(shape), devices=found[:count]
    )


def check_fits(mesh: Mesh, settings: Settings) -> None:
    """The width is a multiple of the heads."""
    batch, rows, parts = settings.batch, mesh.shape["data"], mesh.shape.get("features", 1)
    if batch % rows:
        raise ValueError(
            f"batch must be a multiple of the {rows} devices it is split over, got {batch}; "
            f"try --batch {-(-batch // rows) * rows}"
        )
    if settings.heads % parts:
        raise ValueError(
            f"the {settings.heads} heads of the model cannot be split over {parts} devices; "
            f"try --mesh {rows}x{math.gcd(settings.heads, parts)}"
        )


# Of a pair of matrices the first is split by what it computes, the second by what it reads. So
# heads and hidden units stay where they are; what is passed on is the residual stream alone.
BY_LAST_AXIS = re.compile(r"(embedding|output_proj|layers\[1\]|readout)\.weight$|\.position$")
WHOLE = re.compile(r"readout\.bias$")  # one for each letter, any number


def _spec(path: tuple, leaf: jax.Array) -> P:
    name = jax.tree_util.keystr(path)
    if not leaf.ndim or WHOLE.search(name):
        return P()
    return P(None, "features") if BY_LAST_AXIS.search(name) else P("features")


def place(tree: T, mesh: Mesh | None) -> T:
    """A model, or the optimiser's state, whose paths end like the model's. In and out of jit."""
    if mesh is None:
        return tree
    sharding = lambda path, leaf: NamedSharding(
        mesh, _spec(path, leaf) if "features" in mesh.shape else P()
    )
    arrays, static = eqx.partition(tree, eqx.is_array)
    shardings = jax.tree_util.tree_map_with_path(sharding, arrays)
    return eqx.combine(eqx.filter_shard(arrays, shardings), static)


def place_batch(names: Int[AnyArray, "batch context"], mesh: Mesh | None):
    return names if mesh is None else jax.device_put(names, NamedSharding(mesh, P("data")))


def on_one_device(tree: T, mesh: Mesh | None) -> T:
    """What was trained on many, as if on one."""
    if mesh is None:
        return tree
    arrays, static = eqx.partition(tree, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, mesh.devices.flat[0]), static)
