"""Bytes an element that LayerNorm costs, in every library: `python -m benchmarks --only bytes`.

Run as `python benchmarks/memory.py`. Exact figures from XLA, no timing.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["--only", "bytes", "--out", str(ROOT / "benchmarks" / "results" / "memory")])
