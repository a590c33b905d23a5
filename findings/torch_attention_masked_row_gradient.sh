#!/usr/bin/env bash
# torch 2.13.0 (CPU): a row masked by `finfo.min` has the same output by two kernels, another gradient.
#
# We guessed: `scaled_dot_product_attention` has the same gradient whichever backend computes it.
# We saw: a row of which all keys are masked is the average of the values, by both. By MATH the output's
# derivative by each value is 1 / keys; by FLASH_ATTENTION, the default on a CPU, it is 1.
# What follows: padding that is masked so sends back gradients that are as many times too large as there
# are keys, unless the loss leaves these rows out.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

print("torch", torch.__version__)
KEYS = 5
torch.manual_seed(0)
query, key, value = (torch.randn(1, 1, KEYS, 4) for _ in range(3))
mask = torch.zeros(KEYS, KEYS)
mask[2] = torch.finfo(torch.float32).min
for name, expected in (("MATH", 1 / KEYS), ("FLASH_ATTENTION", 1.0)):
    leaf = value.clone().requires_grad_()
    with sdpa_kernel(getattr(SDPBackend, name)):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, leaf, attn_mask=mask)
    out[0, 0, 2, 0].backward()
    gradient = leaf.grad[0, 0, :, 0]
    off = float((out[0, 0, 2] - value.mean(2)).detach().abs().max())
    print(f"{name}: output off the average by {off:.0e}, gradient {gradient.tolist()}")
    assert off < 1e-6
    assert torch.allclose(gradient, torch.full((KEYS,), expected))
PYTHON
