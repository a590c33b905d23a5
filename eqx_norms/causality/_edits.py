"""What the inputs are replaced by: the edits that a leak must react to."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PRNGKeyArray

from .._processes import fetched
from .._real import Real

TokenValues = Sequence[int] | Mapping[str, Sequence[int]] | None


class Edit(NamedTuple):
    """Replace the positions where `where` holds, in the way numbered `kind`.

    `seed` names the random draw, so that an edit can be made again in another precision. Values are
    drawn for the positions `drawn`, for those of `where` if that is None. Of several leaves all are
    edited, or `only` the one of that number.
    """

    where: Bool[np.ndarray, " T"]
    kind: int
    seed: int
    drawn: Bool[np.ndarray, " T"] | None = None
    only: int | None = None


class Ids(NamedTuple):
    """What a discrete leaf is edited to: ids `drawn` uniformly, and `special` ones."""

    drawn: Sequence[int]  # in order
    special: tuple[int, ...]
    given: tuple[int, ...]  # by token_values
    allowed: bool = False  # whether allowed_values says which are drawn


MASK = Ids(range(2), (0, 1), ())  # what holds only 0 and 1
_TIMES = 10  # how many times as large as usual another input may be


class Leaf(NamedTuple):
    """An array of the input. `unit` is the size of its entries, `ids` is None for floats."""

    name: str
    values: np.ndarray
    axis: int
    unit: float
    signed: bool
    ids: Ids | None
    sharding: Any = None


@dataclasses.dataclass(frozen=True)
class Editor:
    """Makes edited copies of input leaves that share the axis of length `length`.

    Kind 0 mixes everything: each position draws its own scale and sign, or its own token.
    Kinds above 0 are pure. Floats: one scale and one sign, so that every entry is moved both
    towards and across zero at every scale; a sign alone moves a saturated tanh, a large scale
    alone wakes a dead ReLU. The last kind is zero itself, as padding is. Tokens: one special id
    everywhere, because uniform draws all but never hit what a model does with its padding id, and
    then fresh uniform draws.
    """

    leaves: tuple[Leaf, ...]
    scales: tuple[float, ...]
    entropy: tuple[int, ...]

    @property
    def length(self) -> int:
        """The number of positions."""
        first = self.leaves[0]
        return first.values.shape[first.axis]

    @property
    def kinds(self) -> int:
        """How many kinds of edit there are; the longest leaf decides, the others take turns."""
        return 1 + max(self._pure_kinds(leaf) for leaf in self.leaves)

    def size(self, edit: Edit) -> float:
        """How many times as large as usual the floats may be after `edit`, at least 1."""
        if not edit.where.any() or all(leaf.ids for leaf in self.leaves):
            return 1.0
        return max(1.0, self._scale(edit))

    def zeros(self, edit: Edit) -> bool:
        """Whether floats are replaced by zero, where a logarithm or a division has no value."""
        return self._scale(edit) == 0 and any(leaf.ids is None for leaf in self.leaves)

    def _scale(self, edit: Edit) -> float:
        """The largest of the edit, for floats."""
        of_kinds = (*np.repeat(self.scales, 2).tolist(), 0.0)
        return of_kinds[(edit.kind - 1) % len(of_kinds)] if edit.kind else max(self.scales)

    def apply(self, edit: Edit) -> tuple[np.ndarray, ...]:
        """The leaves after `edit`."""
        rng = np.random.default_rng([*self.entropy, edit.seed])
        edited = [self._edited(leaf, edit, rng) for leaf in self.leaves]
        kept = lambda number: edit.only is not None and number != edit.only
        pairs = enumerate(zip(self.leaves, edited, strict=True))
        return tuple(leaf.values if kept(i) else new for i, (leaf, new) in pairs)

    def _edited(self, leaf: Leaf, edit: Edit, rng: np.random.Generator) -> np.ndarray:
        pure = (edit.kind - 1) % self._pure_kinds(leaf) if edit.kind else None
        drawn = edit.where if edit.drawn is None else edit.drawn
        before = (slice(None),) * leaf.axis
        old = leaf.values[*before, drawn]
        if leaf.ids is None:
            new = _floats(leaf, self.scales, old, pure, rng)
        else:
            new = _tokens(leaf.ids, old, pure, rng)
        edited = leaf.values.copy()
        edited[*before, edit.where] = new[*before, edit.where[drawn]]
        return edited

    def _pure_kinds(self, leaf: Leaf) -> int:
        return 2 * len(self.scales) + 1 if leaf.ids is None else len(leaf.ids.special) + 2


def make_editor(
    leaves: Sequence[Array | np.ndarray],
    axes: Sequence[int],
    scales: Sequence[Real],
    token_values: TokenValues,
    key: PRNGKeyArray | None,
    names: Sequence[str] | None = None,
    allowed_values: TokenValues = None,
) -> Editor:
    """Checks `scales` and both options of ids, and that every discrete leaf can be edited at all.

    `names` are what these options may call the leaves: their numbers, unless given.
    """
    scales = tuple(float(scale) for scale in scales)
    if not scales or not all(0 < scale < np.inf for scale in scales):
        raise ValueError(f"scales must be positive and finite, got {scales}; try (1., 10., 100.)")
    numbers = map(str, range(len(leaves)))
    named = dict(zip(names or numbers, map(fetched, leaves), strict=True))
    given = _given_values("token_values", token_values, named)
    allowed = _given_values("allowed_values", allowed_values, named)
    described = []
    for (name, values), axis, leaf in zip(named.items(), axes, leaves, strict=True):
        alone = len(named) == 1
        ids = _ids(name, values, given.get(name, ()), allowed.get(name, ()), alone)
        unit = _unit(values) if ids is None else 1
        signed = bool((np.real(values) < 0).any())
        sharding = getattr(leaf, "sharding", None)
        described.append(Leaf(name, values, axis, unit, signed, ids, sharding))
    return Editor(tuple(described), scales, _entropy(key))


def nothing(editor: Editor) -> Edit:
    """The edit that leaves the input as it is."""
    return Edit(np.zeros(editor.length, bool), 0, 0)


def elsewhere(editor: Editor, number: int) -> Editor:
    """Edits of another input, that of this `number`, as large as this one and ten times that.

    They are no larger either: scores, which are products, are as large as ever. Tokens and masks
    stay: drawn at random they are no text, such as one with padding in front, of which a softmax
    makes an average of everything.
    """
    scales = tuple(s for s in editor.scales if s <= _TIMES) or editor.scales[:1]
    near = dataclasses.replace(editor, scales=scales)
    drawn = near.apply(Edit(np.ones(editor.length, bool), 0, 3_000_000 + number))
    leaves = [
        leaf if leaf.ids else leaf._replace(values=values)
        for leaf, values in zip(editor.leaves, drawn, strict=True)
    ]
    return dataclasses.replace(near, leaves=tuple(leaves))


def single_edits(
    editor: Editor, positions: Sequence[int], every_kind: bool = False, budget: int = 512
) -> Iterator[Edit]:
    """Each position alone: in every kind if they are few, else mixed and in turn the others."""
    each = editor.kinds if every_kind else max(2, min(editor.kinds, budget // len(positions)))
    for number, position in enumerate(positions):
        where = np.arange(editor.length) == position
        for turn in range(each):
            kind = 1 + (number * (each - 1) + turn - 1) % (editor.kinds - 1) if turn else 0
            yield Edit(where, kind, seed=1_000_000 + position * editor.kinds + turn)


def at_one(edit: Edit, position: int) -> Edit:
    """Of `edit` the value at one position alone."""
    return edit._replace(where=np.arange(len(edit.where)) == position, drawn=edit.where)


def mixing_edits(length: int, both: bool = False) -> Iterator[Edit]:
    """The edits that show whether an output reads any earlier input, about log2(length) of them.

    Number `b` replaces every position whose binary digit `b` is 0. The highest digit in which
    two positions differ is 1 in the later one, so some edit replaces the earlier and keeps
    the later. If an output may read later ones as well, `both` adds those where the digit is 1.
    """
    digits = (length - 1).bit_length()
    for number in range(2 * digits if both else digits):
        digit = (np.arange(length) >> number % digits) % 2
        yield Edit(digit == number // digits, 0, seed=2_000_000 + number)


def pure_mixing_edits(length: int, kinds: int) -> Iterator[Edit]:
    """One of each pure kind, in turn at the places of `mixing_edits`: they wake what those miss."""
    places = [edit.where for edit in mixing_edits(length)]
    for kind in range(1, kinds):
        yield Edit(places[kind % len(places)], kind, seed=2_500_000 + kind)


def called(name: str) -> str:
    """A leaf in a message; a bare array has no name but that of the argument."""
    return repr(name) if name else "x"


def require_names(option: str, given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuses a name that no leaf has."""
    known = [*known]
    if unknown := [name for name in given if name not in known]:
        if known == [""]:
            raise ValueError(f"x is one array, without a name, got {option}={unknown[0]!r}")
        has = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"x has no {what} called {unknown[0]!r}; {option} may name {has}")


def _given_values(
    option: str, told: TokenValues, named: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """The ids told of each integer leaf: those under its name, or all if it is no mask."""
    integers = {name: v for name, v in named.items() if jnp.issubdtype(v.dtype, jnp.integer)}
    if isinstance(told, Mapping):
        given = {name: tuple(values) for name, values in told.items()}
        require_names(option, given, integers, "integers")
    else:
        values = () if told is None else tuple(told)
        tokens = [name for name, leaf in integers.items() if not is_mask(leaf, len(named) == 1)]
        given = dict.fromkeys(tokens or integers, values)
        if values and len(given) > len(tokens) + 1:
            raise ValueError(
                f"every array of integers in x holds only 0 and 1; say which one {option} are "
                f"for: {_by_name(option, given)}"
            )
    for name, values in given.items():
        dtype = integers[name].dtype
        if not all(jnp.iinfo(dtype).min <= value <= jnp.iinfo(dtype).max for value in values):
            which = f"; say which array they are for: {_by_name(option, given)}"
            cure = which if len(given) > 1 else ""
            raise ValueError(
                f"{option} must fit the dtype of {called(name)}, {dtype}, got {values}{cure}"
            )
    return given


def _by_name(option: str, given: Mapping[str, tuple[int, ...]]) -> str:
    return f"{option}={dict([next(iter(given.items()))])}"


def _ids(
    name: str, leaf: np.ndarray, given: tuple[int, ...], allowed: tuple[int, ...], alone: bool
) -> Ids | None:
    if leaf.dtype == np.bool_ or (not given and not allowed and is_mask(leaf, alone)):
        return MASK
    if not jnp.issubdtype(leaf.dtype, jnp.integer):
        return None
    values = leaf.astype(np.int64)
    if allowed:
        return _allowed_ids(name, values, given, allowed)
    drawn = range(min(0, int(values.min())), max(int(values.max()), *given, 0) + 1)
    if len(drawn) < 2:
        raise ValueError(
            f"every token of {called(name)} is 0, so no edit of it could differ; pass an x with "
            "several ids, or the ids to try as token_values=(0, 1, ...)"
        )
    # Padding is usually 0, the largest id, a negative one, or what x ends with.
    usual = (0, drawn[-1], drawn[0], int(values.reshape(-1)[-1]))
    return Ids(drawn, tuple(dict.fromkeys([*given, *usual])), given)


def _allowed_ids(
    name: str, values: np.ndarray, given: tuple[int, ...], allowed: tuple[int, ...]
) -> Ids:
    drawn = sorted({*map(int, allowed), *map(int, given)})
    if len(drawn) < 2:
        raise ValueError(
            f"allowed_values of {called(name)} must hold at least two ids, so that an edit of one "
            f"can differ from it, got {allowed}"
        )
    usual = (drawn[0], drawn[-1], int(values.reshape(-1)[-1]))
    special = [one for one in (*given, *usual) if one in drawn]
    return Ids(drawn, tuple(dict.fromkeys(special)), given, allowed=True)


def is_mask(leaf: np.ndarray, alone: bool) -> bool:
    """Whether a leaf holds only 0 and 1, so that edits should keep to them.

    In an input that is one array both must occur: ones alone stand for any floats.
    """
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return False
    ones = leaf == 1
    return bool((ones | (leaf == 0)).all()) and not (alone and (ones.all() or not ones.any()))


def _floats(leaf: Leaf, scales: tuple[float, ...], old: np.ndarray, pure, rng) -> np.ndarray:
    if pure == 2 * len(scales):
        return np.zeros_like(old)
    noise = rng.standard_normal(old.shape, np.float32)
    if pure is None:
        shape = [size if i == leaf.axis else 1 for i, size in enumerate(old.shape)]
        scale = rng.choice(scales, size=shape)
    else:
        scale = np.float64(scales[pure // 2])
        same = bool(pure % 2)
        noise = np.copysign(noise, np.where((np.real(old) < 0) == same, -1, 1).astype(np.float32))
    if np.iscomplexobj(old):
        noise = noise * np.exp(1j * rng.uniform(-1.5, 1.5, size=old.shape))
    elif not leaf.signed:
        noise = np.abs(noise)  # a model of probabilities may take the logarithm of its input
    # No normal draw exceeds 64, so that edits stay finite in float16 too. In 4 bits there is no
    # such room above the smallest number: there, and only there, large draws are cut off.
    limits = jnp.finfo(old.dtype)
    largest = float(limits.max)
    with np.errstate(over="ignore"):
        size = np.minimum(leaf.unit * scale, max(largest / 64, 4 * float(limits.tiny)))
    wide = old.dtype in (np.float64, np.complex128)
    new = noise * (size if wide else size.astype(np.float32))
    return (new if np.iscomplexobj(old) else np.clip(new, -largest, largest)).astype(old.dtype)


def _tokens(ids: Ids, old: np.ndarray, pure, rng) -> np.ndarray:
    if pure is not None and pure < len(ids.special):
        return np.full(old.shape, ids.special[pure]).astype(old.dtype)
    # Stepping 1 to len - 1 places round the ring of ids, never back onto the id that was there.
    step = rng.integers(1, len(ids.drawn), size=old.shape)
    if isinstance(ids.drawn, range):
        new = (old.astype(np.int64) - ids.drawn[0] + step) % len(ids.drawn) + ids.drawn[0]
    else:
        drawn = np.asarray(ids.drawn)
        new = drawn[(np.searchsorted(drawn, old.astype(np.int64)) + step) % len(drawn)]
    if pure is None:
        new = np.where(rng.random(old.shape) < 0.5, rng.choice(ids.special, size=old.shape), new)
    return new.astype(old.dtype)


def _unit(leaf: np.ndarray) -> float:
    """The size of an input entry: the root mean square, 1 for an input of zeros."""
    size = np.abs(leaf[np.isfinite(leaf)]).astype(np.float64)
    largest = size.max(initial=0.0)
    return float(largest * np.sqrt(np.mean(np.square(size / largest)))) if largest > 0 else 1.0


def _entropy(key: PRNGKeyArray | None) -> tuple[int, ...]:
    if key is None:
        return (0,)
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    return tuple(int(word) for word in fetched(key).reshape(-1))
