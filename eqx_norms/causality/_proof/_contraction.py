"""Products of matrices, and what solves with them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import _reads as r
from ._flow import connect_all, finite_as, rule
from ._known import Known, everything, is_real, known
from ._labels import Mask, any_along, both, joint, mask_of, moved_mask, others
from ._reads import Reads

# Products of zeros are looked at entry by entry, over what is summed as well, up to so many.
_MANY = 2**24


@rule("dot_general")
def _dot_general(context, eqn, a, b):
    """Row and column, except for products of what is finite with zero.

    Both operands are laid out over the axes of the result and, behind these, what is summed.
    """
    (ca, cb), (ba, bb) = eqn.params["dimension_numbers"]
    aval = eqn.outvars[0].aval
    if 0 in (*a.shape, *b.shape):
        return [finite_as(aval, None, a, b)]
    rows = [i for i in range(len(a.shape)) if i not in (*ca, *ba)]
    columns = [i for i in range(len(b.shape)) if i not in (*cb, *bb)]
    lay_a = _layout([*ba, *rows, *ca], (len(ba) + len(rows), len(columns)))
    lay_b = _layout([*bb, *columns, *cb], (len(bb), len(rows)))
    summed = tuple(range(len(aval.shape), len(aval.shape) + len(ca)))
    finite = [x.finite for x in (a, b)]
    zero = [moved_mask(x.zero, *lay) for x, lay in ((a, lay_a), (b, lay_b))]
    reads = []
    for x, lay, ok, other in ((a, lay_a, finite[0], zero[1]), (b, lay_b, finite[1], zero[0])):
        cut = other if context.zeros_cut and ok else False
        reads.append(_summed(r.moved(x.reads, *lay), others(cut), summed))
    out = finite_as(aval, r.union(*reads), a, b)
    if not is_real(aval.dtype) or not all(finite):
        return [out]
    return [_zero_at(out, _products_of_zero(zero, summed, len(aval.shape)))]


def _layout(order: Sequence[int], space: tuple[int, int]) -> tuple[Callable, Any]:
    """These axes in this order, with so many new ones from a place on: the move and its name."""
    place, count = space
    new = tuple(range(place, place + count))
    return lambda x: np.expand_dims(x.transpose(order), new), ("layout", *order, space)


def _summed(reads: Reads, where: Mask | bool, axes: tuple[int, ...]) -> Reads:
    """What is read along the axes, where it meets no zero."""
    if reads is None or where is True:
        return r.reduced(reads, axes)
    if isinstance(where, Mask) and any(isinstance(t.where, Mask) for t in reads):
        reads = (r.folded(reads),)  # so that two masks need not be brought together
    return r.reduced(r.without(reads, others(where)), axes)


def _products_of_zero(zero: list, summed: tuple[int, ...], ndim: int) -> Mask | bool:
    """Which entries are sums of products with a zero alone."""
    a, b = map(others, zero)
    if isinstance(a, Mask) and isinstance(b, Mask):
        shapes = a.labels.index.shape, b.labels.index.shape
        if math.prod(np.maximum(*map(np.array, shapes)).tolist()) <= _MANY:
            a, b = both(a, b), True
    found = [any_along(x, summed) if isinstance(x, Mask) else x for x in (a, b)]
    return _squeezed(others(both(*found)), ndim)


def _squeezed(where: Mask | bool, ndim: int) -> Mask | bool:
    if not isinstance(where, Mask):
        return where
    return where._replace(labels=where.labels.reshaped(where.labels.index.shape[:ndim]))


def _zero_at(x: Known, where: Mask | bool) -> Known:
    if where is False:
        return x
    if where is True:
        return known(x, x.reads, None, 0.0, 0.0)
    labels, i, j = joint(x.labels, where.labels)
    zero = j == where.yes
    low, high = (np.where(zero, 0.0, end[i]) for end in (x.low, x.high))
    return known(x, x.reads, labels, low, high)


@rule("ragged_dot_general")
def _ragged_dot(context, eqn, a, b, sizes):
    """Rows of a by the matrix of their group: which one that is, all of the sizes decide."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    one_by_one = numbers.dot_dimension_numbers == (((1,), (1,)), ((), ()))
    if not one_by_one or numbers.lhs_ragged_dimensions != (0,) or len(sizes.shape) != 1:
        return connect_all(context, eqn, a, b, sizes)
    aval = eqn.outvars[0].aval
    reads = r.reduced(a.reads, (1,), keepdims=True)
    row = r.spread(everything(b, sizes), 2)
    return [finite_as(aval, r.union(reads, row), a, b, sizes)]


@rule("triangular_solve")
def _triangular_solve(context, eqn, a, b):
    """By substitution: what came before in the order in which the triangle is gone through, of the
    right-hand side and of the triangle; of what lies beyond that nothing. As long as the
    right-hand side is zero so is the result.
    """
    aval, p = eqn.outvars[0].aval, eqn.params
    if not (a.finite and b.finite) or 0 in b.shape:
        return connect_all(context, eqn, a, b)
    last = len(a.shape) - 1
    kept = _triangle(a.shape, p["lower"], p["unit_diagonal"])
    forward = (p["lower"] != p["transpose_a"]) == p["left_side"]
    # An equation is a row of the matrix as it is applied, from the right a column.
    by_row = p["left_side"] != p["transpose_a"]
    equations = r.reduced(r.without(a.reads, others(kept)), (last if by_row else last - 1,))
    solved = last - 1 if p["left_side"] else last
    other = last if p["left_side"] else last - 1
    equations = r.reshaped(equations, lambda shape: (*shape[:other], 1, *shape[other:]))
    reads = r.accumulated(r.union(equations, b.reads), solved, reverse=not forward)
    return [_zero_at(finite_as(aval, reads, a, b), _zero_so_far(b.zero, solved, forward))]


def _zero_so_far(zero: Mask | bool, axis: int, forward: bool) -> Mask | bool:
    """Where all entries before, along the axis, are zero, and the entry itself."""
    if not isinstance(zero, Mask):
        return zero
    turn = (lambda a: a) if forward else (lambda a: np.flip(a, axis))
    return mask_of(turn(np.logical_and.accumulate(turn(zero.array()), axis)))


def _triangle(shape: tuple[int, ...], lower: bool, strictly: bool = False) -> Mask | bool:
    below = np.tri(shape[-1], k=-int(strictly), dtype=bool)
    below = below if lower else below.T
    return mask_of(below.reshape((1,) * (len(shape) - 2) + below.shape))


@rule("cholesky")
def _cholesky(context, eqn, a):
    """Up to row i what lies in the first i rows and columns; a matrix that has none gives NaN."""
    aval, last = eqn.outvars[0].aval, len(a.shape) - 1
    if not a.finite or 0 in a.shape:
        return connect_all(context, eqn, a)
    rows, columns = (
        r.reduced(r.without(a.reads, others(_triangle(a.shape, lower))), (axis,))
        for lower, axis in ((True, last), (False, last - 1))
    )
    first = r.accumulated(r.union(rows, columns), last - 1, reverse=False)
    along = [r.reshaped(first, lambda shape: (*shape, 1))]
    along += [r.reshaped(first, lambda shape: (*shape[:-1], 1, shape[-1]))]
    return [finite_as(aval, r.union(*along), a)]


# How many axes the first operand's matrix, or its vector, has. A matrix is done with alone, or in
# as many steps as its size says. Not so those of eigh and svd: on some devices they are turned
# together, until the last of them has converged.
_OF_MATRICES = {
    "cholesky_update eig geqp3 geqrf hessenberg householder_product lu ormqr qr schur "
    "symmetric_product tridiagonal": 2,
    "lu_pivots_to_permutation tridiagonal_solve": 1,
}
_AXES = {name: count for names, count in _OF_MATRICES.items() for name in names.split()}


@rule(*_AXES)
def _each_matrix(context, eqn, *operands):
    """All of a matrix, and of what stands beside it; of the others of the batch nothing."""
    first = operands[0].shape
    batch = first[: len(first) - _AXES[eqn.primitive.name]]
    count = len(batch)
    if any(x.shape[:count] != batch for x in (*operands, *(v.aval for v in eqn.outvars))):
        return connect_all(context, eqn, *operands)
    parts = [r.reduced(x.reads, range(count, len(x.shape))) for x in operands]
    reads = None if 0 in first else r.union(*parts)
    results = []
    for v in eqn.outvars:
        inside = (1,) * (len(v.aval.shape) - count)
        mine = r.reshaped(reads, lambda shape, inside=inside: (*shape, *inside))
        results.append(finite_as(v.aval, mine, *operands))
    return results
