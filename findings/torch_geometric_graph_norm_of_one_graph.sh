#!/usr/bin/env bash
# torch_geometric 2.8.1: LayerNorm in its mode "graph" is another function if it is told that there is one graph.
#
# We guessed: `norm(x)` and `norm(x, batch)` with a batch of zeros, which is one graph, differ by rounding.
# We saw: without `batch`, eps is added to the standard deviation; with it, to the variance. At a standard
# deviation of 0.001, with the default eps of 1e-5, outputs differ by more than 1.
# What follows: a model that was trained on batches of graphs gives other results for a single graph that
# comes without `batch`, where activations are small.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 torch_geometric==2.8.1
"$work/venv/bin/python" - <<'PYTHON'
import torch
import torch_geometric
from torch_geometric.nn import LayerNorm

print("torch_geometric", torch_geometric.__version__, "torch", torch.__version__)
torch.manual_seed(0)
norm = LayerNorm(6, mode="graph").double()
for spread, least, most in (1.0, 0, 1e-4), (1e-3, 1, 10):
    x = spread * torch.randn(50, 6, dtype=torch.float64)
    alone, told = norm(x), norm(x, torch.zeros(50, dtype=torch.long))
    centred = x - x.mean()
    variance = centred.square().mean()
    torch.testing.assert_close(alone, centred / (variance.sqrt() + norm.eps))
    torch.testing.assert_close(told, centred / (variance + norm.eps).sqrt())
    difference = (alone - told).abs().max().item()
    print(f"standard deviation {spread}: off by {difference:.2g}")
    assert least <= difference <= most
PYTHON
