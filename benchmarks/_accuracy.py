"""The worst error of LayerNorm in float32, and of its gradients, against float64."""

import numpy as np

from ._cases import EPS, OFFSETS, SCALES, Case
from ._rivals import example_shape
from ._works import work_of

ROWS, N = 64, 1024


def accuracy_of(rival: str) -> list[dict]:
    """`y` is the worst absolute error; those of dx, dweight, dbias are over the largest entry."""
    rng = np.random.default_rng(0)
    g = rng.standard_normal((ROWS, N), np.float32)
    at = [("offset", offset, 1.0, offset) for offset in OFFSETS]
    at += [("scale", scale, scale, 0.0) for scale in SCALES]
    rows = []
    for kind, value, scale, offset in at:
        x = (scale * rng.standard_normal((ROWS, N)) + offset).astype(np.float32)
        got, want = outputs(rival, x, g), exact(x, g)
        errors = {name: _error(got[name], want[name], name != "y") for name in want}
        rows.append({"rival": rival, "at": kind, "value": value} | errors)
    return rows


def exact(x, g) -> dict[str, np.ndarray]:
    """The output y and the gradients, in float64, with weight 1 and bias 0."""
    x, g = np.float64(x), np.float64(g)
    mean = lambda a: a.mean(-1, keepdims=True)
    xc = x - mean(x)
    rstd = 1 / np.sqrt(mean(xc**2) + EPS)
    xhat = xc * rstd
    dx = rstd * (g - mean(g) - xhat * mean(g * xhat))
    return {"y": xhat, "dx": dx, "dweight": (g * xhat).sum(0), "dbias": g.sum(0)}


def outputs(rival: str, x, g, layer: str = "LayerNorm") -> dict[str, np.ndarray]:
    """What the rival computes in float32, for x and g of shape (rows, n); weight 1 and bias 0."""
    shape = example_shape(layer, *x.shape)
    work = work_of(rival, Case(layer, f"{x.shape[0]}x{x.shape[1]}", "float32", "backward"))
    y, dx, pair = work.run(work.take(x.reshape(shape)), work.take(g.reshape(shape)))
    names = ("y", "dx", "dweight", "dbias")
    results = zip(names, map(work.give, (y, dx, *pair)), strict=False)
    return {name: np.float64(a).reshape(x.shape if a.ndim > 1 else -1) for name, a in results}


def _error(got, want, relative: bool) -> float | None:
    """None if anything is not finite."""
    error = np.abs(got - want).max() / (np.abs(want).max() if relative else 1)
    return float(f"{error:.3g}") if np.isfinite(error) else None
