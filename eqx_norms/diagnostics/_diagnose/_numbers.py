"""Statistics of what a model has computed, in NumPy, which compiles nothing: XLA takes longer to
compile them, for each shape, than the model.

Each function takes arrays with an axis of steps in front, and returns a vector for each number.
What has 16 bits or fewer is measured in float32, and sums are in float64.
"""

import math
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from ..._processes import fetched
from .._capture._activations import Activation
from .._layer_statistics import RANK_EXAMPLES, drawn_rows

Statistics = dict[str, np.ndarray]
Steps = Float[np.ndarray, "steps *shape"]
_CHUNK = 2**18  # So many entries stay in a processor's cache.


def in_steps(x: Array, loops: tuple[int, ...]) -> np.ndarray:
    """On the host, with one axis for all the loops."""
    found = host(x)
    return found.reshape(math.prod(loops), *found.shape[len(loops) :])


def host(x: Array | np.ndarray) -> np.ndarray:
    found = fetched(x)
    return found.astype(np.float32) if found.dtype.itemsize < 4 else found


def ignoring(fn: Callable) -> Callable:
    """What is not finite is what we are here to see."""
    return np.errstate(all="ignore")(fn)


@ignoring
def of_array(x: Steps) -> Statistics:
    """`mean`, `std`, `rms`, `largest` and `non_finite`, the share of entries."""
    x = x.reshape(len(x), -1)
    n = x.shape[1]
    total = lambda fn: sum(fn(chunk) for chunk in _chunks(x))
    largest = np.max([np.abs(chunk).max(1) for chunk in _chunks(x)], axis=0).astype(float)
    scale = np.where(np.isfinite(largest) & (largest > 0), largest, 1.0)[:, None]
    mean = total(lambda u: np.sum(u / scale, 1)) / n
    squares = total(lambda u: np.sum((u / scale) ** 2, 1)) / n
    variance = total(lambda u: np.sum((u / scale - mean[:, None]) ** 2, 1)) / n
    scale = scale[:, 0]
    return {
        "mean": mean * scale,
        "std": np.sqrt(variance) * scale,
        "rms": np.sqrt(squares) * scale,
        "largest": largest,
        "non_finite": total(lambda u: np.sum(~np.isfinite(u), 1)) / n,
    }


def _chunks(x: Float[np.ndarray, "steps entries"]) -> Iterator[np.ndarray]:
    size = max(1, _CHUNK // len(x))
    return (x[:, i : i + size] for i in range(0, x.shape[1], size))


def rms(x: Steps) -> np.ndarray:
    return of_array(x)["rms"]


@ignoring
def effective_rank(x: Steps, axis: int) -> np.ndarray:
    """That of `RANK_EXAMPLES` examples, of units on this axis; NaN where there are not two of
    either.
    """
    x = _by_unit(x, axis)
    if min(x.shape[1:]) < 2:
        return np.full(len(x), np.nan)
    x = x[:, drawn_rows(x.shape[1], RANK_EXAMPLES)]
    finite = np.isfinite(x).all((1, 2))
    scale = np.abs(x).max((1, 2), keepdims=True)
    # Of what is not finite LAPACK complains on stderr.
    x = np.where(finite.reshape(-1, 1, 1) & (scale > 0), x / scale, 0)
    singular = np.linalg.svd(x, compute_uv=False)
    p = singular / singular.sum(1, keepdims=True)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), 1)
    return np.where(finite, np.exp(entropy), np.nan)


def _by_unit(x: Steps, axis: int) -> Float[np.ndarray, "steps examples units"]:
    x = x[..., None] if x.ndim == 1 else np.moveaxis(x, axis, -1)
    return x.reshape(len(x), -1, x.shape[-1])


def silent(x: Steps, axis: int) -> np.ndarray:
    """The share of units that are 0 in every example."""
    return np.mean((_by_unit(x, axis) == 0).all(1), 1)


def share_below(x: Steps, limit: float) -> np.ndarray:
    """The share of entries that are smaller than this, the smallest normal number, but not 0."""
    size = np.abs(x.reshape(len(x), -1))
    return np.mean((size > 0) & (size < limit), 1)


MINUS_INF, INF, NAN = 1, 2, 4  # Bits of what is not finite in the entries of an example.


def where_bad(x: Steps, lead: tuple[int, ...]) -> Statistics:
    """`nan`, `inf`, `bad_share` and `bad_first` of examples that have axes of these lengths."""
    rows = x.reshape(len(x), math.prod(lead), -1)
    kinds = {MINUS_INF: np.isneginf, INF: np.isposinf, NAN: np.isnan}
    found = _of_bits(np.sum([bit * is_kind(rows).any(2) for bit, is_kind in kinds.items()], 0))
    del found["non_finite"]
    return found


def _of_bits(bits: Integer[np.ndarray, "steps examples"]) -> Statistics:
    """Whether there is a `nan`, an `inf` and anything `non_finite`. `bad_share` is the share of
    examples with a NaN; if none has any, with infinity; if none, with -inf. `bad_first` is the
    number of the first of them, or -1.
    """
    kinds = np.bitwise_or.reduce(bits, 1)
    worst = np.where(kinds & NAN, NAN, np.where(kinds & INF, INF, MINUS_INF))
    bad = (bits & worst[:, None]) != 0
    return {
        "nan": (kinds & NAN) != 0,
        "inf": (kinds & INF) != 0,
        "non_finite": kinds != 0,
        "bad_share": bad.mean(1),
        "bad_first": np.where(bad.any(1), bad.argmax(1), -1),
    }


def of_ends(
    bits: list[np.ndarray],
    grad_bits: list[np.ndarray],
    largest: list[np.ndarray],
    alike: list[np.ndarray],
    loops: tuple[int, ...],
    lead: tuple[int, ...],
) -> Statistics:
    """Of what `_ends` in `_measure.py` says of the arrays that one call is given."""
    found, steps = {}, math.prod(loops)
    together = lambda arrays: np.concatenate([x.reshape(steps, -1) for x in arrays], axis=1)
    if bits:
        kinds = _of_bits(together(bits))
        found |= {f"input_{name}": kinds[name] for name in ("non_finite", "nan", "inf")}
        found["input_largest"] = together(largest).max(1)
        found["grad_input_non_finite"] = _of_bits(together(grad_bits))["non_finite"]
        # Others have no axis of the examples.
        rows = [x.reshape(steps, -1) for x in grad_bits if x.shape[len(loops) :] == lead]
        if rows:
            where = _of_bits(np.bitwise_or.reduce(rows))
            found |= {f"grad_input_{name}": where[name] for name in ("bad_share", "bad_first")}
    if alike:
        found["inputs_alike"] = together(alike).all(1)
    return found


@ignoring
def of_logits(grad: Steps, eps: float) -> Statistics:
    """Of the derivative of a loss that is a cross-entropy of these logits: probabilities, less one
    at the label, of a common factor.

    `wrong` is the mean probability of the wrong classes, over the largest of any example, and
    `confident` the mean share of one class among these; NaN if it is not of that kind.
    """
    g = _by_unit(grad, -1).astype(float)
    if g.shape[2] < 3:
        return {}
    size = np.abs(g).sum(2)
    most = size.max(1, keepdims=True)
    kind = (g < -1e-6 * most[..., None]).sum(2) <= 1
    kind &= np.abs(g.sum(2)) <= 8 * eps * most
    ups = np.maximum(g, 0)
    share = np.where(size > 1e-3 * most, ups.max(2) / ups.sum(2), np.nan)
    ok = kind.all(1) & (most[:, 0] > 0) & np.isfinite(most[:, 0])
    seen = np.isfinite(share)
    mean = np.where(seen, share, 0).sum(1) / seen.sum(1)
    return {
        "wrong": np.where(ok, size.mean(1) / most[:, 0], np.nan),
        "confident": np.where(ok, mean, np.nan),
    }


@ignoring
def of_binary_logits(z: Steps, grad: Steps) -> Statistics:
    """Of the derivative of a loss that is a binary cross-entropy of these logits: where they are
    sure, 0 if they are right, and the same for all that are wrong, with the sign of the logit.

    `sure` is the share of entries that are, `wrong_and_sure` of these the share that is wrong; NaN
    if it is not of that kind.
    """
    z, g = (x.reshape(len(x), -1).astype(float) for x in (z, grad))
    sure = np.abs(z) > _SURE
    largest = np.abs(g).max(1, keepdims=True)
    share = g * np.sign(z) / largest
    right, wrong = (np.abs(share - to) < 1e-3 for to in (0, 1))
    count = sure.sum(1)
    both = [(sure & which).sum(1) / count for which in (right, wrong)]
    ok = ((right | wrong) | ~sure).all(1) & (largest[:, 0] > 0) & (np.min(both, axis=0) > 0.1)
    return {
        "sure": np.where(ok, sure.mean(1), np.nan),
        "wrong_and_sure": np.where(ok, both[1], np.nan),
    }


_SURE = 10  # Its sigmoid is within 5e-5 of 0 or 1.


@ignoring
def of_norm(grad: Steps, examples: int, groups: int) -> Statistics:
    """How much the derivative at the output of a norm differs over what it averages: the entries
    of an example, or of each group of its channels.
    """
    g = grad.reshape(*grad.shape[: 1 + examples], groups, -1)
    return {"grad_spread": rms(g - g[..., :1]) / rms(g)}


SILENT = 1e-8
_SAMPLE = 64


@ignoring
def of_units(
    x: Steps,
    y: Steps,
    activation: Activation,
    axis: int,
    loops: tuple[int, ...],
    time: tuple[int, ...],
    examples: int,
) -> Statistics:
    """`dead`, of units that are silent at all positions of all examples, in all steps in time.

    `firing` is the share of examples in which the others are not, on average, `distinct` how many
    of a sample of the examples differ.
    """
    active = np.moveaxis(~(np.abs(y) < SILENT), axis, -1)  # which a NaN is
    if examples:
        active = active.any(tuple(range(1 + examples, active.ndim - 1)))
    fires = active.reshape(len(y), -1, y.shape[axis]).mean(1).reshape(*loops, -1)
    fires = np.broadcast_to(fires.mean(time, keepdims=True), fires.shape)
    fires = fires.reshape(len(y), -1)
    rows = x.reshape(len(x), math.prod(x.shape[1 : 1 + examples]), -1)
    found = {
        "dead": (fires == 0).mean(1),
        "firing": fires.sum(1) / (fires > 0).sum(1),
        "distinct": _distinct(rows if examples else _by_unit(x, axis)),
    }
    if activation.flat is not None and activation.slopes is not None:
        z, slopes = activation.slopes
        flat = np.interp(x.reshape(len(x), -1), z, slopes) < activation.flat  # no NaN is
        found["saturated"] = flat.mean(1)
    return found


def _distinct(rows: Float[np.ndarray, "steps examples entries"]) -> np.ndarray:
    rows = rows[:, drawn_rows(rows.shape[1], _SAMPLE)].astype(float)
    sums = rows @ np.random.default_rng(0).normal(size=rows.shape[2])
    # What is the same may have been summed in another order.
    rounding = 16 * np.finfo(np.float32).eps * np.abs(sums).max(1)[:, None, None]
    same = np.abs(sums[:, :, None] - sums[:, None]) <= rounding
    return np.sum(~np.tril(same, -1).any(2), 1)


# ---- Parameters.


@ignoring
def of_parameter(
    param: Array, grad: Array, stack: int, units_last: bool = False
) -> dict[str, float]:
    """Of which so many axes in front are for layers or members. The next one, or the last, is that
    of the units.
    """
    p, g = host(param), host(grad)
    one, of_grad = ({k: float(v[0]) for k, v in of_array(x[None]).items()} for x in (p, g))
    tiny = share_below(g[None], float(jnp.finfo(grad.dtype).tiny))
    apart = lambda x: x.reshape(math.prod(x.shape[:stack]), *x.shape[stack:])
    p, g = apart(p), apart(g)
    if units_last:
        p, g = np.moveaxis(p, -1, 1), np.moveaxis(g, -1, 1)
    return one | {
        "outlier": _outlier(p, g),
        "identical_units": float(_identical(p, g, grad.dtype).any()),
        "grad_rms": of_grad["rms"],
        "grad_largest": of_grad["largest"],
        "grad_non_finite": of_grad["non_finite"],
        "tiny": float(tiny[0]),
    }


def _outlier(p: Steps, g: Steps) -> float:
    """How many times the rms of the row at the upper quartile the largest row's is, of those that
    get a gradient: an embedding has rows for what this batch does not hold.
    """
    if p.ndim < 3:
        return np.nan
    sizes = rms(p.reshape(p.shape[0] * p.shape[1], -1)).reshape(p.shape[:2])
    used = (g != 0).any(tuple(range(2, g.ndim)))
    ratios = [
        rows.max() / np.quantile(rows, 0.75)
        for rows in (size[which] for size, which in zip(sizes, used, strict=True))
        if len(rows) >= 8
    ]
    return float(np.max(ratios, initial=0.0))


def _identical(p: Steps, g: Steps, dtype: np.dtype) -> Bool[np.ndarray, " steps"]:
    """Whether all rows are the same, and not 0, and each that gets a gradient has a twin that gets
    the same: of a cell that holds its gates in one array, rows are alike in each gate.
    """
    found = np.zeros(len(p), bool)
    if p.ndim < 3 or p.shape[1] < 2:
        return found
    p, g = (x.reshape(*x.shape[:2], -1) for x in (p, g))
    # Units that are the same may be summed in another order.
    rounding = max(1e-3, 4 * float(jnp.finfo(dtype).eps)) * rms(g)
    for step in np.flatnonzero((p == p[:, :1]).all((1, 2)) & (p != 0).any((1, 2))):
        rows = g[step][(g[step] != 0).any(1)]
        found[step] = len(rows) > 1 and all(
            np.sum((np.abs(rows - row) <= rounding[step]).all(1)) > 1 for row in rows
        )
    return found


@ignoring
def of_update(param: Array, update: Array) -> dict[str, float]:
    """How large a step is, and which share of the entries does not move, though it should."""
    p, u = fetched(param), fetched(update)
    meant = u != 0
    lost = np.sum(meant & (p + u.astype(p.dtype) == p)) / max(np.sum(meant), 1)
    of_step = of_array(host(u)[None])
    size, step = float(rms(host(p)[None])[0]), float(of_step["rms"][0])
    return {
        "update_rms": step,
        "update_ratio": float(np.divide(step, size)),
        "update_non_finite": float(of_step["non_finite"][0]),
        "lost": float(lost),
    }
