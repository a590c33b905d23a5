"""Are two functions the same up to rounding?"""

from ._report import SameReport as SameReport
from ._same import (
    DifferenceError as DifferenceError,
    assert_same as assert_same,
    check_same as check_same,
)
