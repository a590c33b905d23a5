"""Who reads whom? Does the model see the future? Checks for any function that JAX can trace."""

from . import rules as rules
from ._check import (
    CausalityError as CausalityError,
    assert_causal as assert_causal,
    assert_independent as assert_independent,
    assert_reads as assert_reads,
    check_causal as check_causal,
    check_independent as check_independent,
    check_reads as check_reads,
)
from ._host import host as host
from ._matrix import dependency_matrix as dependency_matrix
from ._question import CausalityWarning as CausalityWarning
from ._report import CausalityReport as CausalityReport, Pair as Pair
from ._same import (
    DifferenceError as DifferenceError,
    SameReport as SameReport,
    assert_same as assert_same,
    check_same as check_same,
)
from ._torch import from_torch as from_torch, stepped as stepped
