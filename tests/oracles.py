"""Normalisation and its gradients in float64 numpy, written from the definition."""

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
    xc = _centred(x) if centre else x
    rstd = 1 / np.sqrt(mean(xc**2) + eps)
    xhat = xc * rstd
    dxhat = g * weight
    drstd = (dxhat * xc).sum(-1, keepdims=True)
    dvar = -0.5 * rstd**3 * drstd
    dxc = dxhat * rstd + dvar * 2 * xc / x.shape[-1]
    dx = dxc - mean(dxc) if centre else dxc
    return Exact(xhat * weight + bias, dx, (g * xhat).sum(0), g.sum(0))


def _centred(x):
    """`x - mean(x)`; numpy's mean is itself off, by some ulps of the largest entry."""
    xc = x - x.mean(-1, keepdims=True)
    return xc - xc.mean(-1, keepdims=True)


def terms(x, weight, bias, g, *, eps=1e-5, centre=True) -> Exact:
    """How large the numbers are that each result is the sum of.

    Rounding is in proportion to these, however little is left when they cancel. With a mean, each
    xc has the mean's error, which is in proportion to mean|xc|. (A first mean, at an offset, is off
    by ulps of x. These do no harm: the differences from it are whole numbers of ulps of x, and the
    sum of few of them is exact.)
    """
    x, weight, bias, g = (np.asarray(a, np.float64) for a in (x, weight, bias, g))
    mean = lambda a: np.abs(a).mean(-1, keepdims=True)
    xc = _centred(x) if centre else x
    rstd = 1 / np.sqrt(mean(xc**2) + eps)
    xhat, gw = xc * rstd, g * weight
    mean_gw = mean(gw) if centre else 0
    seen = np.abs(xhat) + (mean(xhat) if centre else 0)
    return Exact(
        seen * np.abs(weight) + np.abs(bias),
        rstd * (np.abs(gw) + mean_gw + seen * mean(gw * xhat)),
        (np.abs(g) * seen).sum(0),
        np.abs(g).sum(0),
    )


def ulps(n: int) -> float:
    """Of the terms: how far the op on n entries may be off, in float32 or float64.

    An entry of y or dx goes through some 30 roundings of half an ulp at most, in its own
    arithmetic and in three factors rstd. The sums of n add theirs: n roundings, each of half an
    ulp of a partial sum at most, of either sign. From left to right they make 0.12 sqrt(n) ulps of
    the variance (one standard deviation), and less in the other orders that compilers choose. So
    sqrt(n) is six standard deviations of rstd**3. Found: up to 4 ulps in all.
    """
    return 16 + n**0.5


def assert_close(got, want: Exact, size: Exact, n: int, *, margin=1.0):
    """Every entry, within `margin * ulps(n)` ulps of its terms in the dtype that it has."""
    for name, a, b, terms in zip(want._fields, got, want, size, strict=True):
        assert a.shape == b.shape
        bound = margin * ulps(n) * np.finfo(a.dtype).eps * terms
        wrong = ~(np.abs(np.asarray(a, np.float64) - b) <= bound)
        assert not wrong.any(), (name, np.asarray(a)[wrong], b[wrong], bound[wrong])


def assert_alike(got, want, n: int):
    """Two computations of the same in one dtype, neither exact; in units of the largest entry.

    For arrays that have an entry as large as their terms; else `assert_close`.
    """
    got, want = np.asarray(got), np.asarray(want)
    atol = 4 * ulps(n) * np.finfo(got.dtype).eps * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def assert_rounded_once(got, want, margin):
    """In a narrow dtype: what `want` gives when rounded, had it been off by at most `margin`.

    Rounding is monotonic, so that is all between these two. They are the same number, except where
    a tie between two neighbours lies within `margin` of `want`: then it is one of the two. (But for
    entries that have cancelled to less than their margin.)
    """
    got = np.asarray(got)
    low, high = ((want + sign * margin).astype(got.dtype) for sign in (-1, 1))
    outside = ~((low <= got) & (got <= high))
    assert not outside.any(), (got[outside], want[outside], margin[outside])
    # Of what is drawn few lie so near to a tie: else the test would say little.
    assert np.mean(low == high) > 0.5


def error(got, want, *, absolute=False) -> float:
    """The largest difference, in units of the largest entry of `want` (`absolute`: at least 1)."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    scale = max(np.abs(want).max(), 1.0 if absolute else 0.0)
    difference = np.abs(got - want).max()
    return float(difference / scale) if difference else 0.0
