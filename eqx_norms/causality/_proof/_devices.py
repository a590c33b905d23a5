"""Programs of several devices, `shard_map`, as programs of one that does what each of them does.

`vmap` with the names of a mesh's axes is all devices side by side: `axis_index` becomes an iota,
and what passes between devices operations along an axis. These the proof has rules for.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import source_info_util
from jax.sharding import PartitionSpec

from ..._jaxprs import called, first_ref, opened
from .._lines import of_a_library
from .._loops import BODIES, rewritten

SHARD_MAP = "shard_map"
# These say where arrays lie, and change none of their numbers.
_IDENTITIES = ("pvary", "pcast", "reshard", "sharding_constraint")

Place = list[tuple[str, ...]]  # the mesh's axes along each axis of an array


def on_one_device(eqn: jex.JaxprEqn, device: Any, *args: Any) -> list[Any]:
    """What a `shard_map` computes, of its operands and the number of a device.

    A result that counts as the same on all devices is that of the numbered one: whether it is the
    same, nobody has checked if `check_vma=False`.
    """
    p = eqn.params
    if first_ref(p["jaxpr"]) is not None:
        raise NotImplementedError("A Ref of one device is none of all.")
    sizes = {name: n for name, n in p["mesh"].shape.items() if name in p["newly_manual_axes"]}
    ins = [_place(*pair, sizes) for pair in zip(p["in_specs"], eqn.invars, strict=True)]
    outs = [_place(*pair, sizes) for pair in zip(p["out_specs"], eqn.outvars, strict=True)]
    fn = lambda *parts: _Device(device).run(p["jaxpr"], parts)
    for name in reversed(sizes):
        axes = tuple(0 if any(name in names for names in place) else None for place in ins)
        fn = jax.vmap(fn, in_axes=axes, axis_name=name, axis_size=sizes[name])
    parts = fn(*(_split(x, place, sizes) for x, place in zip(args, ins, strict=True)))
    return [_joined(x, place, sizes, device) for x, place in zip(parts, outs, strict=True)]


def _place(spec: PartitionSpec, var: Any, sizes: dict[str, int]) -> Place:
    if getattr(spec, "unreduced", None) or getattr(spec, "reduced", None):
        raise NotImplementedError("A sum that is yet to be made has no value.")
    entries = [*spec, *[None] * (len(var.aval.shape) - len(spec))]
    tuples = [names if isinstance(names, tuple) else (names,) for names in entries]
    return [tuple(name for name in names if name in sizes) for names in tuples]


def _split(x: Any, place: Place, sizes: dict[str, int]) -> Any:
    """With an axis in front for each axis of the mesh that it is split along."""
    shape, axes, rest = [], {}, []
    for n, names in zip(x.shape, place, strict=True):
        for name in names:
            axes[name] = len(shape)
            shape.append(sizes[name])
        rest.append(len(shape))
        shape.append(n // int(np.prod([sizes[name] for name in names])))
    front = [axes[name] for name in sizes if name in axes]
    return x.reshape(shape).transpose(*front, *rest)


def _joined(x: Any, place: Place, sizes: dict[str, int], device: Any) -> Any:
    """Of an array that has an axis in front for each axis of the mesh."""
    used = [name for names in place for name in names]
    for axis, name in reversed([*enumerate(sizes)]):
        if name not in used:
            x = lax.dynamic_index_in_dim(x, device, axis, keepdims=False)
    front = [name for name in sizes if name in used]
    order, shape = [], []
    for axis, names in enumerate(place, len(front)):
        order += [*map(front.index, names), axis]
        shape.append(x.shape[axis] * int(np.prod([sizes[name] for name in names])))
    return x.transpose(order).reshape(shape)


class _Device:
    """One of the devices: evaluates its programs, but for what says where arrays lie."""

    def __init__(self, number: Any):
        self.number = number  # for each `shard_map` in there

    def run(self, closed: Any, args: Sequence[Any], known_lines: bool = True) -> list[Any]:
        jaxpr = opened(closed)
        consts = getattr(closed, "consts", ())
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        read = lambda atom: atom.val if isinstance(atom, jex.Literal) else values[atom]
        for eqn in jaxpr.eqns:
            with at_line_of(eqn) if known_lines else contextlib.nullcontext():
                outs = self.equation(eqn, list(map(read, eqn.invars)), known_lines)
            values.update(zip(eqn.outvars, outs, strict=True))
        return list(map(read, jaxpr.outvars))

    def equation(self, eqn: jex.JaxprEqn, args: list[Any], known_lines: bool) -> Sequence[Any]:
        name = eqn.primitive.name
        if name in _IDENTITIES:
            return args
        if name == SHARD_MAP:
            return on_one_device(eqn, self.number, *args)
        if name in BODIES:
            inside = lambda body, xs, path: (self.run(body, xs, known_lines), None)
            return rewritten(eqn, args, inside)[0]
        if (inner := called(eqn)) is not None:
            return self.run(inner, args, known_lines and not of_a_library(eqn))
        if name in _COLLECTIVES:
            params = {k: v for k, v in eqn.params.items() if k != "axis_index_groups" or v}
            return [_COLLECTIVES[name](*args, **params)]  # groups are unknown to all of them
        anywhere = dict.fromkeys({"sharding", "out_sharding"} & {*eqn.params})
        params = eqn.primitive.get_bind_params({**eqn.params, **anywhere})
        outs = eqn.primitive.bind(*map(jnp.asarray, args), **params)
        return outs if eqn.primitive.multiple_results else [outs]


def at_line_of(eqn: jex.JaxprEqn):
    """What is traced in this context comes from the line of the equation."""
    return source_info_util.user_context(eqn.source_info.traceback)


# What passes between devices, of what all of them have: its place along `axis`, or in a new axis.


def _everyone(x: Any, names: str | tuple[str, ...]) -> Any:
    """The arrays of all devices along these axes of the mesh, in a new first axis."""
    names, each = (names,) if isinstance(names, str) else names, x
    for name in reversed(names):
        each = lax.all_gather(each, name)
    return each.reshape(-1, *x.shape)


def _sum(x, axes):
    return _everyone(x, axes).sum(0, dtype=x.dtype)


def _permuted(x, axis_name, perm):
    """From each source to its destination; zeros where there is none."""
    each = _everyone(x, axis_name)
    sources = np.full(len(each), -1)
    for source, destination in perm:
        sources[destination] = source
    source = jnp.asarray(sources)[lax.axis_index(axis_name)]
    found = lax.dynamic_index_in_dim(each, jnp.maximum(source, 0), keepdims=False)
    return jnp.where(source < 0, jnp.zeros_like(found), found)


def _gathered(x, axis_name, all_gather_dimension, axis_size, tiled):
    return _put(_everyone(x, axis_name), all_gather_dimension, tiled)


def _put(each: Any, axis: int, tiled: bool) -> Any:
    """The first axis elsewhere, or the arrays one behind the other along an axis."""
    there = jnp.moveaxis(each, 0, axis)
    shape = there.shape
    return there.reshape(*shape[:axis], -1, *shape[axis + 2 :]) if tiled else there


def _own(x: Any, axis_name, axis: int, count: int, tiled: bool) -> Any:
    """The part of this device, of `count` along an axis."""
    index, size = lax.axis_index(axis_name), x.shape[axis] // count
    if not tiled:
        return lax.dynamic_index_in_dim(x, index, axis, keepdims=False)
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _scattered(x, axis_name, scatter_dimension, axis_size, tiled):
    return _own(_sum(x, axis_name), axis_name, scatter_dimension, axis_size, tiled)


def _exchanged(x, axis_name, split_axis, concat_axis, tiled):
    each = _everyone(x, axis_name)
    return _put(_own(each, axis_name, split_axis + 1, len(each), True), concat_axis, True)


_COLLECTIVES = {
    "psum": _sum,
    "psum_invariant": _sum,
    "pmax": lambda x, axes: _everyone(x, axes).max(0),
    "pmin": lambda x, axes: _everyone(x, axes).min(0),
    "ppermute": _permuted,
    "all_gather": _gathered,
    "all_gather_invariant": _gathered,
    "reduce_scatter": _scattered,
    "all_to_all": _exchanged,
}
