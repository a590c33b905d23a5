"""What submodules return: tagged in the traced program, read or replaced there."""

from ._capture import capture as capture, capture_grads as capture_grads
