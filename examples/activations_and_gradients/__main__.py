"""As `run_all`: python -m examples.activations_and_gradients --quick"""

import runpy

runpy.run_module("examples.activations_and_gradients.run_all", run_name="__main__")
