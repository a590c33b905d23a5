"""Worst errors against float64, of every library: `python -m benchmarks --only accuracy`.

Run as `python benchmarks/accuracy.py`; a library that is not installed is left out, and said so.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["--only", "accuracy", "--out", str(ROOT / "benchmarks" / "results" / "accuracy")])
