"""What is taken where a number is asked for: `eps=0` as well as `eps=0.0`, and NumPy's."""

import numbers
from typing import SupportsFloat

import numpy as np
from jaxtyping import Array, Num

Real = float | int | np.floating | np.integer
Integer = int | np.integer
# Also bfloat16's scalars, as of `jnp.finfo(jnp.bfloat16).eps`, and arrays without axes.
Number = Real | numbers.Real | np.generic | Num[Array | np.ndarray, ""] | SupportsFloat
