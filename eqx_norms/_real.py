"""What is taken where a number is asked for: `eps=0` as well as `eps=0.0`, and NumPy's."""

import numpy as np

Real = float | int | np.floating | np.integer
Integer = int | np.integer
