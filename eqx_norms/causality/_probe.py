"""Runs a function on its input and on edited copies of it, and measures what changed.

One compiled function does every run. It maps over a batch of inputs with `jax.lax.map`, not
`vmap`: a loop body is the same code for every slot, so that equal inputs give equal bits and a
baseline can be compared with an edit bit for bit, and it holds one forward pass at a time.
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxtyping import Array, Bool, Float

from .._largest import largest
from .._processes import fetch, fetched, jit, laid_out
from ._edits import Edit, Editor


class Changes(NamedTuple):
    """How far each of T outputs moved under each of E edits, against the unedited input.

    - `size`: the largest absolute change of an entry that stayed finite.
    - `ulps`: `size` in units of eps * `scale`; infinite for a change of an integer output.
    - `scale`: the largest magnitude of the output, edited or not; an edit of size 100 passes
        through the same sums as the rest and rounds them accordingly.
    - `unedited`: the largest magnitude of the unedited output.
    - `hidden`: how many times larger than `scale` the numbers inside may have been. A norm brings
        an edit of size 100 back to 1, but not what was rounded before it.
    - `broken`: an entry is no longer finite.
    """

    size: Float[np.ndarray, "E T"]
    ulps: Float[np.ndarray, "E T"]
    scale: Float[np.ndarray, "E T"]
    unedited: Float[np.ndarray, "E T"]
    hidden: Float[np.ndarray, "E T"]
    broken: Bool[np.ndarray, "E T"]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A function of flat leaves, ready to be measured; `dtype` is that of its floats if not x's."""

    run: Callable[..., tuple[Array, ...]]
    editor: Editor
    out_axes: tuple[int, ...]
    eps: float
    batch_size: int
    dtype: np.dtype | None = None

    def measure(self, edits: Sequence[Edit], label: str = "causality check") -> Changes:
        """Applies every edit; the first of them must be the empty one."""
        rows, base = [], None
        with jax.enable_x64(True) if self.dtype else contextlib.nullcontext():
            for outs in self._runs(edits, label):
                base = tuple(out[0] for out in outs) if base is None else base
                rows.append(jax.block_until_ready(_distances(base, outs, self.out_axes)))
            rows = fetch(rows)
        leaves = [
            _Leaf(*map(np.concatenate, zip(*leaf, strict=True))) for leaf in zip(*rows, strict=True)
        ]
        sizes = np.array([self.editor.size(edit) for edit in edits])
        return _combine(leaves, sizes, self.eps)

    def _runs(self, edits: Sequence[Edit], label: str) -> Iterator[Sequence[np.ndarray | Array]]:
        """What each batch of edits gives. The device runs one while the next is drawn."""
        running = None
        for batch in _progress(list(_batches(edits, self.batch_size)), label):
            inputs = self._inputs(batch)
            if running is not None:
                yield _on_host(running)
            running = self.run(inputs)
        if running is not None:
            yield _on_host(running)

    def evaluate(self, edits: Sequence[Edit]) -> np.ndarray:
        """What the function, which here returns one array, gives for each edit."""
        rows = [self.run(self._inputs(batch)) for batch in _batches(edits, self.batch_size)]
        return np.concatenate([*map(fetched, rows)])[: len(edits)]

    def outputs(self, edits: Sequence[Edit]) -> list[np.ndarray]:
        """Of some edits every output, a leaf each; floats as float64."""
        with jax.enable_x64(True) if self.dtype else contextlib.nullcontext():
            batches = _batches(edits, self.batch_size)
            rows = [fetch(self.run(self._inputs(batch))) for batch in batches]
        outs = [np.concatenate(leaf)[: len(edits)] for leaf in zip(*rows, strict=True)]
        return [out if np.iscomplexobj(out) else out.astype(np.float64) for out in outs]

    def _inputs(self, batch: Sequence[Edit]) -> tuple[np.ndarray | Array, ...]:
        # A short last batch repeats its last edit: another shape would be another executable.
        full = [*batch, *[batch[-1]] * (self.batch_size - len(batch))]
        stacked = [np.stack(leaf) for leaf in zip(*map(self.editor.apply, full), strict=True)]
        stacked = [_cast(leaf, self.dtype) if self.dtype else leaf for leaf in stacked]
        lies = [leaf.sharding for leaf in self.editor.leaves]
        return tuple(placed(leaf, where, None) for leaf, where in zip(stacked, lies, strict=True))


def make_probe(
    fn, editor: Editor, out_axes, eps: float, batch_size: int, dtype=None, beside=None
) -> Probe:
    """A probe of `fn`, which takes and returns flat leaves; `beside` runs batches of it."""
    mapped = jit(lambda batch: jax.lax.map(lambda leaves: fn(*leaves), batch))
    of_probe = editor, tuple(out_axes), eps, batch_size, dtype and np.dtype(dtype)
    return Probe(mapped if beside is None else beside, *of_probe)


class _Leaf(NamedTuple):
    size: Any
    scale: Any
    unedited: Any
    broken: Any
    discrete: Any


def _on_host(outs: Sequence[np.ndarray | Array]) -> Sequence[np.ndarray | Array]:
    """Small outputs as NumPy's: to compile what is measured of them takes .2 to .5 s a shape."""
    return fetch(outs) if sum(out.size for out in outs) <= _SMALL else outs


_SMALL = 2**20


def _distances(base, outs, out_axes: tuple[int, ...]) -> list[_Leaf]:
    in_numpy = all(isinstance(out, np.ndarray) for out in outs)
    return (_measured if in_numpy else _compiled)(base, outs, out_axes)


def _measured(base, outs, out_axes: tuple[int, ...]) -> list[_Leaf]:
    with np.errstate(invalid="ignore", over="ignore"):
        return [_distance(*leaf) for leaf in zip(base, outs, out_axes, strict=True)]


_compiled = jit(_measured, static_argnums=2)


def _distance(base, outs, axis: int) -> _Leaf:
    xp = np if isinstance(outs, np.ndarray) else jnp
    a, b = _comparable(outs), _comparable(base)[None]
    discrete = not jnp.issubdtype(base.dtype, jnp.inexact)
    # Of two large integers the float difference may round to 0.
    change = xp.maximum(xp.abs(a - b), 1 if discrete else 0)
    # A maximum may lose a NaN: there is none below, unless in `base`, which is refused.
    finite = xp.isfinite(a)
    change = xp.where((outs == base[None]) | ~finite, 0, change)
    others = tuple(i for i in range(1, a.ndim) if i != axis + 1)
    entries = tuple(range(1, a.ndim))
    magnitude = xp.maximum(xp.abs(a), xp.abs(b))
    unedited = largest(b) if xp is jnp else np.abs(b).max(initial=0)  # NumPy's keeps a NaN
    return _Leaf(
        size=change.max(others, initial=0),
        scale=xp.where(finite, magnitude, 0).max(entries, initial=0),
        unedited=xp.broadcast_to(unedited, a.shape[:1]),
        broken=~finite.all(others),
        discrete=xp.full(a.shape[:1], discrete),
    )


def _comparable(leaf):
    kept = (jnp.float64, jnp.complex64, jnp.complex128)
    return leaf if leaf.dtype in kept else leaf.astype(jnp.float32)


def _combine(leaves: Sequence[_Leaf], sizes: np.ndarray, eps: float) -> Changes:
    count = len(sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        ulps = np.stack([_ulps(leaf, eps)[:count] for leaf in leaves])
        hidden = [sizes * _f64(leaf.unedited)[:count] / _f64(leaf.scale)[:count] for leaf in leaves]
    worst = ulps.argmax(0)
    of_worst = lambda rows: np.stack(rows)[worst, np.arange(count)[:, None]]
    return Changes(
        size=np.max([_f64(leaf.size)[:count] for leaf in leaves], axis=0),
        ulps=ulps.max(0),
        scale=of_worst([_f64(leaf.scale)[:count] for leaf in leaves]),
        unedited=of_worst([_f64(leaf.unedited)[:count] for leaf in leaves]),
        hidden=np.fmax(of_worst(hidden), 1.0),
        broken=np.any([leaf.broken[:count] for leaf in leaves], axis=0),
    )


def _ulps(leaf: _Leaf, eps: float) -> np.ndarray:
    size = _f64(leaf.size)
    ulps = np.where(leaf.discrete[:, None], np.inf, size / (eps * _f64(leaf.scale)[:, None]))
    return np.where(size > 0, ulps, 0.0)


def _f64(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float64)


def _cast(leaf: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    return leaf.astype(np.result_type(dtype, np.complex64) if np.iscomplexobj(leaf) else dtype)


def placed(values: np.ndarray, sharding: Any, *lead: None) -> np.ndarray | Array:
    """`values` laid over devices as an input of that `sharding` is: `fn` may rely on it.

    `lead` are further axes in front.
    """
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(*lead, *sharding.spec))
    return laid_out(values, sharding)


def _batches(edits: Sequence[Edit], size: int) -> Iterator[list[Edit]]:
    rest = iter(edits)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _progress(batches: list, label: str):
    if "PYTEST_CURRENT_TEST" in os.environ or jax.process_index() > 0:
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return tqdm(batches, desc=label, delay=5, leave=False)
