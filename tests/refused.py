"""What tests of bad input expect."""

import contextlib
import re

import jaxtyping
import pytest


@contextlib.contextmanager
def refused(error, match, *texts):
    """`pytest.raises`, with further texts that the message must have.

    Under `pytest --jaxtyping-packages=eqx_norms,beartype.beartype` the type checker may refuse the
    input before the package does, in its own words.
    """
    errors = error if isinstance(error, tuple) else (error,)
    with pytest.raises((*errors, jaxtyping.TypeCheckError)) as info:
        yield info
    if not info.errisinstance(jaxtyping.TypeCheckError):
        message = str(info.value)
        assert re.search(match, message), message
        assert all(text in message for text in texts), message
