"""What is taken where a real number is asked for: `eps=0` as well as `eps=0.0`."""

import numpy as np

Real = float | int | np.floating | np.integer
