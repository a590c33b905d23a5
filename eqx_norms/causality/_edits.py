"""What the inputs are replaced by: the edits that a leak must react to."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PRNGKeyArray

from .._real import Real


class Edit(NamedTuple):
    """Replace the positions where `where` holds, in the way numbered `kind`.

    `seed` names the random draw, so that an edit can be made again in another precision.
    """

    where: Bool[np.ndarray, " T"]
    kind: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Editor:
    """Makes edited copies of input leaves that share the axis of length `length`.

    Kind 0 mixes everything: each position draws its own scale and sign, or its own token.
    Kinds above 0 are pure. Floats: one scale and one sign, so that every entry is moved both
    towards and across zero at every scale; a sign alone moves a saturated tanh, a large scale
    alone wakes a dead ReLU. Tokens: one special id everywhere, because uniform draws all but
    never hit what a model does with its padding id, and then fresh uniform draws.
    """

    leaves: tuple[np.ndarray, ...]
    axes: tuple[int, ...]
    scales: tuple[float, ...]
    token_values: tuple[int, ...]
    entropy: tuple[int, ...]
    units: tuple[float, ...]
    signed: tuple[bool, ...]

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.leaves[0].shape[self.axes[0]]

    @property
    def kinds(self) -> int:
        """How many kinds of edit there are; the longest leaf decides, the others take turns."""
        return 1 + max(_pure_kinds(self, leaf) for leaf in self.leaves)

    def apply(self, edit: Edit) -> tuple[np.ndarray, ...]:
        """The leaves after `edit`."""
        rng = np.random.default_rng([*self.entropy, edit.seed])
        return tuple(self._leaf(number, edit, rng) for number in range(len(self.leaves)))

    def _leaf(self, number: int, edit: Edit, rng: np.random.Generator) -> np.ndarray:
        leaf, axis = self.leaves[number], self.axes[number]
        pure = (edit.kind - 1) % _pure_kinds(self, leaf) if edit.kind else None
        replaced = (slice(None),) * axis + (edit.where,)
        edited = leaf.copy()
        if _is_discrete(leaf):
            edited[replaced] = _tokens(self, leaf, leaf[replaced], pure, rng)
        else:
            edited[replaced] = _floats(self, number, leaf[replaced], pure, rng)
        return edited


def make_editor(
    leaves: Sequence[np.ndarray],
    axes: Sequence[int],
    scales: Sequence[Real],
    token_values: Sequence[int] | None,
    key: PRNGKeyArray | None,
) -> Editor:
    """Checks `scales` and `token_values`, and that every discrete leaf can be edited at all."""
    scales = tuple(float(scale) for scale in scales)
    if not scales or not all(0 < scale < np.inf for scale in scales):
        raise ValueError(f"scales must be positive and finite, got {scales}; try (1., 10., 100.)")
    editor = Editor(
        leaves=tuple(leaves),
        axes=tuple(axes),
        scales=scales,
        token_values=tuple(token_values or ()),
        entropy=_entropy(key),
        units=tuple(1.0 if _is_discrete(leaf) else _unit(leaf) for leaf in leaves),
        signed=tuple(bool((np.real(leaf) < 0).any()) for leaf in leaves),
    )
    for leaf in filter(_is_discrete, leaves):
        _check_vocabulary(editor, leaf)
    return editor


def nothing(editor: Editor) -> Edit:
    """The edit that leaves the input as it is."""
    return Edit(np.zeros(editor.length, bool), 0, 0)


def single_edits(editor: Editor, positions: Sequence[int]) -> Iterator[Edit]:
    """Each position alone: in every kind if they are few, else mixed and in turn the others."""
    each = max(2, min(editor.kinds, 512 // len(positions)))
    for number, position in enumerate(positions):
        where = np.arange(editor.length) == position
        for turn in range(each):
            kind = 1 + (number * (each - 1) + turn - 1) % (editor.kinds - 1) if turn else 0
            yield Edit(where, kind, seed=1_000_000 + position * editor.kinds + turn)


def mixing_edits(length: int) -> Iterator[Edit]:
    """The edits that show whether an output reads any earlier input, about log2(length) of them.

    Number `b` replaces every position whose binary digit `b` is 0. The highest digit in which
    two positions differ is 1 in the later one, so some edit replaces the earlier and keeps
    the later.
    """
    for digit in range((length - 1).bit_length()):
        yield Edit((np.arange(length) >> digit) % 2 == 0, 0, seed=2_000_000 + digit)


def vocabulary(editor: Editor, leaf: np.ndarray) -> range:
    """The ids that uniform draws take: from 0, or the smallest id if negative, to the largest."""
    if leaf.dtype == np.bool_:
        return range(2)
    return range(min(0, int(leaf.min())), max(int(leaf.max()), *editor.token_values, 0) + 1)


def _specials(editor: Editor, leaf: np.ndarray) -> list[int]:
    # Padding is usually 0, the largest id, a negative one, or what x ends with.
    ids = vocabulary(editor, leaf)
    last = int(leaf.reshape(-1)[-1])
    return list(dict.fromkeys([*editor.token_values, 0, ids[-1], ids[0], last]))


def _pure_kinds(editor: Editor, leaf: np.ndarray) -> int:
    if _is_discrete(leaf):
        return len(_specials(editor, leaf)) + 2
    return 2 * len(editor.scales)


def _floats(editor, number: int, old: np.ndarray, pure, rng) -> np.ndarray:
    noise = rng.standard_normal(old.shape, np.float32)
    if pure is None:
        axis = editor.axes[number]
        shape = [size if i == axis else 1 for i, size in enumerate(old.shape)]
        scale = rng.choice(editor.scales, size=shape)
    else:
        scale = np.float64(editor.scales[pure // 2])
        same = bool(pure % 2)
        noise = np.copysign(noise, np.where((np.real(old) < 0) == same, -1, 1).astype(np.float32))
    if np.iscomplexobj(old):
        noise = noise * np.exp(1j * rng.uniform(-1.5, 1.5, size=old.shape))
    elif not editor.signed[number]:
        noise = np.abs(noise)  # a model of probabilities may take the logarithm of its input
    # No normal draw exceeds 64, so that edits stay finite in float16 too.
    limit = float(jnp.finfo(old.dtype).max) / 64
    size = np.minimum(editor.units[number], limit / scale) * scale
    wide = old.dtype in (np.float64, np.complex128)
    return (noise * (size if wide else size.astype(np.float32))).astype(old.dtype)


def _tokens(editor, leaf: np.ndarray, old: np.ndarray, pure, rng) -> np.ndarray:
    ids, specials = vocabulary(editor, leaf), _specials(editor, leaf)
    if pure is not None and pure < len(specials):
        return np.full(old.shape, specials[pure]).astype(old.dtype)
    # Stepping 1 to len - 1 places round the ring of ids, never back onto the id that was there.
    step = rng.integers(1, len(ids), size=old.shape)
    new = (old.astype(np.int64) - ids[0] + step) % len(ids) + ids[0]
    if pure is None:
        new = np.where(rng.random(old.shape) < 0.5, rng.choice(specials, size=old.shape), new)
    return new.astype(old.dtype)


def _unit(leaf: np.ndarray) -> float:
    """The size of an input entry: the root mean square, 1 for an input of zeros."""
    size = np.abs(leaf[np.isfinite(leaf)]).astype(np.float64)
    largest = size.max(initial=0.0)
    return float(largest * np.sqrt(np.mean(np.square(size / largest)))) if largest > 0 else 1.0


def _check_vocabulary(editor: Editor, leaf: np.ndarray) -> None:
    if len(vocabulary(editor, leaf)) < 2:
        raise ValueError(
            f"every token of x is {int(leaf.max())}, so no edit of it could differ; pass an x "
            "with several ids, or the ids to try as token_values=(0, 1, ...)"
        )
    if leaf.dtype == np.bool_:
        return
    limits = np.iinfo(leaf.dtype)
    if not all(limits.min <= value <= limits.max for value in editor.token_values):
        raise ValueError(
            f"token_values must fit the dtype of x, {leaf.dtype}, got {editor.token_values}"
        )


def _entropy(key: PRNGKeyArray | None) -> tuple[int, ...]:
    if key is None:
        return (0,)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return tuple(int(word) for word in np.asarray(key).reshape(-1))


def _is_discrete(leaf: np.ndarray) -> bool:
    return not jnp.issubdtype(leaf.dtype, jnp.inexact)
