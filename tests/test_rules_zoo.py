"""Functions under rules: every verdict, every pair and every proof.

The oracle is the zoo's own statement of who reads whom, in plain NumPy.
"""

import numpy as np
import pytest
from rules_zoo import ZOO, make_input

from eqx_norms.causality import check_reads
from eqx_norms.causality._inputs import make_problem
from eqx_norms.causality._proof._prove import Question, prove

# One of each kind; the others are slow.
QUICK = ("packed_and_the_mask_forgotten padding_under_a_norm reads_what_has_all_but_faded").split()
RIGHT = [name for name, case in ZOO.items() if case.right]
WRONG = [name for name, case in ZOO.items() if not case.right]


def each(names, quick_dtype="float32"):
    """In two dtypes; slow but for the quick ones in one of them."""
    pairs = [(name, dtype) for name in names for dtype in ("float32", "bfloat16")]
    is_quick = lambda name, dtype: name in QUICK and dtype == quick_dtype
    mark = lambda name, dtype: () if is_quick(name, dtype) else pytest.mark.slow
    return [pytest.param(*pair, id="-".join(pair), marks=mark(*pair)) for pair in pairs]


def check(name, dtype, **options):
    case = ZOO[name]
    x = make_input(case.x, dtype)
    return check_reads(case.fn, x, case.allowed, **case.options, **options)


def test_the_zoo_is_large_enough():
    cases = ZOO.values()
    assert len(cases) >= 40 and set(QUICK) <= set(ZOO)
    assert min(len(RIGHT), sum(case.leaking.any() for case in cases)) >= 20
    assert sum(case.blind.any() for case in cases) >= 10


@pytest.mark.parametrize("name, dtype", each(ZOO))
def test_verdict_and_pairs(name, dtype):
    """No false alarm, every leak and every blindness, and the pairs are exactly these."""
    case = ZOO[name]
    report = check(name, dtype, required=case.required)
    np.testing.assert_array_equal(report.leaking(), case.leaking, str(report))
    np.testing.assert_array_equal(report.missing(), case.blind, str(report))
    assert (report.leak, report.blind) == (case.leaking.any(), case.blind.any())
    assert report.status.split()[0] == (
        "leak" if report.leak else "blind" if report.blind else "clear"
    )
    assert not report.joint


def proof(name, dtype):
    case = ZOO[name]
    where = {"axis": 0, "out_axis": None, "fixed": (), **case.options}
    problem = make_problem(case.fn, make_input(case.x, dtype), **where)
    question = Question(problem.closed, problem.leaves, problem.in_axes, problem.out_axes)
    return prove(question, case.allowed, assume_bounded=True)


@pytest.mark.parametrize("name, dtype", each(RIGHT))
def test_what_is_right_is_proved(name, dtype):
    """Or the operation in the way is named, and its line."""
    found, unproved = proof(name, dtype), ZOO[name].unproved
    assert found.holds == (not unproved) == (not found.obstacles)
    if unproved:
        said = f"`{unproved}` in " if unproved.isidentifier() else unproved
        assert said in found.obstacles[0]
        assert "rules_zoo.py:" in found.obstacles[0] or said == unproved


@pytest.mark.parametrize("name, dtype", each(name for name in ZOO if ZOO[name].leaking.any()))
def test_no_leak_is_proved(name, dtype):
    assert not proof(name, dtype).holds


def test_a_proof_through_the_check():
    """What is required beside it is asked by edits."""
    report = check("packed", "float32", prove=True)
    assert report.status == "proved" and not report.edits
    name = "window_one_too_short"
    report = check(name, "float32", required=ZOO[name].required, prove=True)
    assert report.status == "blind" and not report.edits
