#!/usr/bin/env bash
# transformers 5.23.0: packed documents are kept apart by position_ids only with use_cache=False.
#
# We guessed: position_ids that begin again at 0 either mark the borders of packed documents or do not,
# and what `use_cache` says has no part in it: nothing is cached before the first call.
# We saw: with use_cache=False no token reads another document. With use_cache=True, which is the
# default, each token reads all documents before its own, and no warning is given.
# What follows: an evaluation of packed rows with the default reads across documents; training, which
# switches the cache off, does not, so that the two disagree.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__)
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()
places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])  # a document of 3 tokens, then one of 4
tokens = torch.tensor([[3, 5, 7, 11, 13, 17, 19]])
other = tokens.clone()
other[0, :3] += 1  # another first document
moved = {}
for use_cache in (None, True, False):
    with torch.no_grad():
        one, two = (
            model(ids, position_ids=places, use_cache=use_cache).logits[0, 3:]
            for ids in (tokens, other)
        )
    moved[use_cache] = (one - two).abs().max().item()
    print(f"use_cache={use_cache}: the second document's logits move by {moved[use_cache]:.3g}")
assert moved[None] > 1e-3 and moved[True] > 1e-3
assert moved[False] == 0
PYTHON
