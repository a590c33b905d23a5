"""Trees of arrays, compared leaf by leaf."""

import equinox as eqx
import jax.tree_util as jtu
import numpy as np


def assert_trees_close(a, b, *, rtol, atol):
    """The same structure, shapes and dtypes of arrays; what is no array is not looked at."""
    a, b = eqx.filter(a, eqx.is_array), eqx.filter(b, eqx.is_array)
    assert jtu.tree_structure(a) == jtu.tree_structure(b)
    for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)
