#!/usr/bin/env bash
# keras-hub 0.32.0 on JAX: the sliding window of Qwen 2, Qwen 3 and Qwen 3 MoE changes nothing.
#
# We guessed: with `sliding_window_size=3` an output of one layer reads three tokens, as in Mistral.
# We saw: it reads all before it. The window is part of the mask only in the code that computes the scores
# itself; where Keras has a fused attention, as on JAX, the mask goes there without it.
# What follows: the same weights give other logits on backends with and without fused attention, and a
# long context costs what it would without a window.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet keras-hub==0.32.0 keras==3.15.1 jax==0.10.2
KERAS_BACKEND=jax TF_CPP_MIN_LOG_LEVEL=3 "$work/venv/bin/python" - <<'PYTHON'
import keras
import keras_hub
import numpy as np

print("keras-hub", keras_hub.__version__, "keras", keras.__version__)
models = keras_hub.models
common = dict(
    vocabulary_size=23, num_layers=1, num_query_heads=4, num_key_value_heads=2, hidden_dim=16,
    intermediate_dim=24,
)
MODELS = {
    "Mistral": lambda: models.MistralBackbone(sliding_window=3, **common),
    "Qwen2": lambda: models.QwenBackbone(
        sliding_window_size=3, use_sliding_window_attention=True, **common
    ),
    "Qwen3": lambda: models.Qwen3Backbone(sliding_window_size=3, head_dim=4, **common),
    "Qwen3Moe": lambda: models.Qwen3MoeBackbone(
        sliding_window_size=3, head_dim=4, moe_intermediate_dim=8, num_experts=4, top_k=2, **common
    ),
}
tokens = np.array([[3, 5, 7, 11, 13, 17, 19, 2]])


def read_by_the_last(make):
    """How many tokens the last output reads: those whose edit changes it."""
    keras.utils.set_random_seed(0)
    model = make()
    last = lambda ids: np.asarray(
        model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    )[0, -1]
    edits = [np.where(np.arange(8) == j, 21, tokens) for j in range(8)]
    return sum(np.abs(last(edit) - last(tokens)).max() > 0 for edit in edits)


for name, make in MODELS.items():
    read = read_by_the_last(make)
    print(f"{name}: with a window of 3 the last of 8 outputs reads {read} tokens")
    assert read == (3 if name == "Mistral" else 8)
PYTHON
