"""Normalization and its gradients in float64 numpy, written from the definition."""

from typing import NamedTuple

import numpy as np


class Exact(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray


def exact_norm(x, weight, bias, g, *, eps=1e-5, centre=True) -> Exact:
    """Rows of `x` normalised, and the vector-Jacobian product with the cotangent `g`.

    The gradient is the derivative of each step in turn, not the closed form of the package:
    y = xhat * weight + bias, xhat = xc * rstd, rstd = (mean(xc^2) + eps)^(-1/2), xc = x - mean(x).
    """
    x, weight, bias, g = (np.asarray(a, np.float64) for a in (x, weight, bias, g))
    mean = lambda a: a.mean(-1, keepdims=True)
    xc = x - mean(x) if centre else x
    rstd = 1 / np.sqrt(mean(xc**2) + eps)
    xhat = xc * rstd
    dxhat = g * weight
    drstd = (dxhat * xc).sum(-1, keepdims=True)
    dvar = -0.5 * rstd**3 * drstd
    dxc = dxhat * rstd + dvar * 2 * xc / x.shape[-1]
    dx = dxc - mean(dxc) if centre else dxc
    return Exact(xhat * weight + bias, dx, (g * xhat).sum(0), g.sum(0))


def error(got, want, *, absolute=False) -> float:
    """The largest difference, in units of the largest entry of `want` (`absolute`: at least 1)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    scale = max(np.abs(want).max(), 1.0 if absolute else 0.0)
    difference = np.abs(got - want).max()
    return float(difference / scale) if difference else 0.0
