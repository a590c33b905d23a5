"""Is this the same function? Two of them on the same inputs, judged as changes of one are."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..._processes import fetched
from ..._real import Integer, Real
from .._call import call, options_by_name
from .._edits import Edit, TokenValues, make_editor
from .._host import compiled, is_beside, learn, remarks, running, within_reach
from .._inputs import Given, named_leaves, output_leaf, require_agreement, split_input, traced
from .._judge import DIFFERS_FROM_ITSELF
from .._probe import placed
from .._torch import understood
from .._widen import coarsest, same_trace
from ._compare import Judge, Row, gaps, host
from ._report import SameReport, make_report


class DifferenceError(AssertionError):
    """Two functions differ by more than rounding, or nothing can tell; see its `report`."""

    def __init__(self, report: SameReport, err_msg: str = ""):
        self.report = report
        super().__init__(f"{err_msg}\n{report}" if err_msg else str(report))


@options_by_name
def assert_same(
    one: Callable[[PyTree], PyTree],
    two: Callable[[PyTree], PyTree],
    x: PyTree,
    *,
    axis: int = 0,
    inputs: Integer = 7,
    scales: Sequence[Real] = (0.01, 1.0, 10.0),
    token_values: TokenValues = None,
    allowed_values: TokenValues = None,
    fixed: str | Iterable[str] = (),
    noise_ulps: Real = 64,
    confirm_x64: bool = True,
    allow_imprecise: bool = False,
    key: PRNGKeyArray | None = None,
    err_msg: str = "",
) -> SameReport:
    """Raises `DifferenceError` if the two functions differ by more than rounding.

    Both run on `x` and on edits of it. If all values are equal, they are the same. Otherwise both
    run again with every float in float64, including parameters in closures and casts inside.
    Rounding shrinks there, and a difference does not. You need not guess a tolerance: what rounding
    can be in float64 is measured. Use it for caches, refactorings, `replace_norms` and fused forms.

    Two functions that are the same in float64 may still give other numbers in their own precision,
    for example if one overflows or cancels. If that is more than rounding can be, it is an error:
    see `allow_imprecise`.

    ```python
    import jax
    from eqx_norms.causality import assert_same

    x = jax.random.normal(jax.random.key(0), (8, 4))
    print(assert_same(lambda x: (x @ x.T) @ x, lambda x: x @ (x.T @ x), x))
    ```

    It cannot see a difference at inputs of other values or shapes, a difference below the last bit
    of outputs that are equal otherwise, or one below the `limit` in the report.

    **Arguments:**

    - `one`, `two`: functions of one argument that JAX can trace. Parameters, masks and keys go in
        by closure.
    - `x`: their input, an array or a pytree of arrays: floats of any dtype, complex numbers,
        integer tokens, bools. Its values should be typical ones.
    - `axis`: the axis of the positions in the outputs. Only the report uses it, to say from which
        position on they differ.
    - `inputs`: how many edits of `x` are tried beside it. Each edit replaces all of `x`. 0 tries
        `x` alone.
    - `scales`: how large the replaced floats are, in units of the root mean square of `x`. Small
        ones show what is added under a square root. Large ones show a mask that is too weak.
    - `token_values`, `allowed_values`, `fixed`, `key`: as for
        [`eqx_norms.causality.assert_causal`][].
    - `noise_ulps`: how many eps of float64, times the size of the outputs, always count as
        rounding. Also how many times the outputs may move as far as they do when inputs and
        constants move by an eps.
    - `confirm_x64`: whether to run in float64. If not, size decides: what is below `noise_ulps` eps
        of the least precise dtype in the functions is rounding, and what is above is a difference.
    - `allow_imprecise`: whether it is enough that the two are the same in exact arithmetic. If not,
        it is an error if one of them loses so much in its own precision that the two differ by
        more than 1024 eps of the outputs (or a quarter of them, in half precision; or
        `noise_ulps`, if that is more), and by more than 8 times what half an ulp in inputs and
        constants does to them. The report says which of the two it is, and names the operation if
        there is one to blame. This is not checked for functions of float64, nor with
        `confirm_x64=False`.
    - `err_msg`: a line to begin the error message with.

    **Returns:**

    The [`eqx_norms.causality.SameReport`][]. Floats may be of different dtypes, and so may
    integers, because values are compared.

    **Raises:**

    - `DifferenceError`, an `AssertionError`, if the status is `"different"`, `"undecided"` or,
        unless allowed, `"imprecise"`; it carries `.report`.
    - `ValueError` or `TypeError` if the question cannot be answered, because the outputs have other
        structures, shapes or kinds of numbers, a function differs from itself, or an option is
        wrong.
    """
    if inputs < 0 or not noise_ulps >= 0:
        raise ValueError(
            f"inputs and noise_ulps must be at least 0, got inputs={inputs}, "
            f"noise_ulps={noise_ulps}"
        )
    one, two = understood(one), understood(two)
    with running(one, two):
        given = split_input(within_reach(x, one, two), fixed)
        first, second = (_traced(fn, given) for fn in (one, two))
        require_agreement(given, first.closed, second.closed)
        _require_alike(first, second, axis)
        edits = (
            _edits(given, int(inputs), scales, token_values, allowed_values, key)
            if inputs and given.leaves
            else []
        )
        rows = [[*given.leaves.values()], *edits]
        judge = Judge(first.closed, second.closed, rows, noise_ulps, confirm_x64)
        verdict = judge.verdict()
        if verdict.status not in ("same bits", "rounding"):
            for function, before in ((first, verdict.own.one), (second, verdict.own.two)):
                _require_same_again(function, rows[0], before[0], noise_ulps * judge.eps)
        dtype = str(coarsest(first.closed, second.closed))
        notes = remarks(first.closed) + remarks(second.closed)
        report = make_report(
            verdict._replace(notes=[*verdict.notes, *notes]),
            dtype,
            [given.whole([*map(jnp.asarray, row)]) for row in rows],
            first.names,
            axis,
        )
    passes = ("same bits", "rounding", *["imprecise"] * allow_imprecise)
    if report.status not in passes:
        raise DifferenceError(report, err_msg)
    return report


@options_by_name
def check_same(
    one: Callable[[PyTree], PyTree], two: Callable[[PyTree], PyTree], x: PyTree, **options
) -> SameReport:
    """The report of [`eqx_norms.causality.assert_same`][], of any status; the same options."""
    try:
        return assert_same(one, two, x, **options)
    except DifferenceError as error:
        return error.report


class _Traced(NamedTuple):
    """A function of flat leaves, its trace, and its outputs: their tree and their paths."""

    flat: Callable[..., tuple[Array, ...]]
    closed: jex.ClosedJaxpr
    tree: Any
    names: tuple[str, ...]


def _traced(fn: Callable, given: Given) -> _Traced:
    if not callable(fn):
        raise TypeError(f"one and two must be functions of one argument, got {type(fn).__name__}")
    shape = {}

    def flat(*values: Array) -> tuple[Array, ...]:
        out = call(fn, given.whole(values))
        named, shape["tree"] = named_leaves(out)
        shape["names"] = tuple(named)
        return tuple(map(output_leaf, named.values()))

    learn(fn, given.whole([*given.leaves.values()]))
    closed = traced(flat, [*given.leaves.values()])
    if not closed.out_avals:
        raise TypeError("one and two must return an array or a pytree of arrays, got none in it")
    return _Traced(flat, closed, shape["tree"], shape["names"])


def _require_alike(one: _Traced, two: _Traced, axis: int) -> None:
    if one.tree != two.tree:
        raise ValueError(
            f"one and two must return pytrees of the same structure, got {one.tree} and {two.tree}"
        )
    for name, a, b in zip(one.names, one.closed.out_avals, two.closed.out_avals, strict=True):
        what = f"output {name!r}" if name else "the output"
        if a.shape != b.shape:
            raise ValueError(
                f"{what} must have the same shape from one and two, got {a.shape} and {b.shape}"
            )
        if _kind(a.dtype) != _kind(b.dtype):
            raise TypeError(
                f"{what} must hold the same kind of numbers, got {a.dtype} and {b.dtype}; floats "
                "of any precision can be compared, and integers of any size"
            )
    dims = [aval.ndim for aval in one.closed.out_avals]
    if not any(-dim <= axis < dim for dim in dims) and any(dims):
        raise ValueError(f"axis={axis} does not exist in any output, which have {dims} axes")


def _kind(dtype: Any) -> str:
    kinds = {"bool": jnp.bool_, "integer": jnp.integer, "float": jnp.floating}
    return next((kind for kind, of in kinds.items() if jnp.issubdtype(dtype, of)), "complex")


def _edits(given: Given, count: int, scales, token_values, allowed_values, key) -> Iterator[Row]:
    """Every leaf replaced as a whole, each time in another way."""
    flat = [fetched(leaf).reshape(-1) for leaf in given.leaves.values()]
    names = [*given.leaves]
    together = make_editor(flat, [0] * len(flat), scales, token_values, key, names, allowed_values)
    editors = [dataclasses.replace(together, leaves=(leaf,)) for leaf in together.leaves]
    for number in range(count):
        row = []
        for place, (editor, leaf) in enumerate(zip(editors, given.leaves.values(), strict=True)):
            where = np.ones(editor.length, bool)
            edit = Edit(where, number % editor.kinds, seed=3_000_000 + number * len(flat) + place)
            (new,) = editor.apply(edit)
            row.append(placed(new.reshape(leaf.shape), leaf.sharding))
        yield row


def _require_same_again(
    function: _Traced, row: Row, before: Sequence[np.ndarray], eps: Real
) -> None:
    """Refuses a function that is another when it is traced again: it draws random numbers.

    Or, beside JAX, when it is called again: it keeps something from one call to the next.
    """
    again = traced(function.flat, [*map(jnp.asarray, row)])
    if same_trace(function.closed, again) and not is_beside(again):
        return
    # The text of a trace may also differ by an address. Then only the values can tell.
    run = compiled(jex.jaxpr_as_fun(again), again)
    for _ in range(2):  # the first may go on from a call of the other function
        found = gaps([[*before]], [host(run(*row))])
        if (found.size > eps * found.scale).any():
            raise ValueError(DIFFERS_FROM_ITSELF)
