"""Every study of activations and gradients: figures, results.json and a table of claims.

python -m examples.activations_and_gradients.run_all --quick
"""

import sys
from pathlib import Path

if not __package__:  # run as a file, not with -m
    sys.path.insert(0, str(Path(__file__).parents[2]))
    __package__ = "examples.activations_and_gradients"

from ._study import STUDIES, run

if __name__ == "__main__":
    run(STUDIES, doc=__doc__)
