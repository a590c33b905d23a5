"""Cases of a parametrised test that only `-m slow` runs, beside those that always do."""

import functools

import pytest

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def few(cases, quick):
    """All of the cases, those that are not `quick` marked slow."""
    return [case if case in quick else slow(case) for case in cases]
