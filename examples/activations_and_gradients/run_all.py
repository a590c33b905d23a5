"""Every study of activations and gradients: figures, results.json and a table of claims.

python -m examples.activations_and_gradients.run_all --quick
"""

from ._study import STUDIES, run

if __name__ == "__main__":
    run(STUDIES, doc=__doc__)
