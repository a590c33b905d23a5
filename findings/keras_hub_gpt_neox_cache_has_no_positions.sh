#!/usr/bin/env bash
# keras-hub 0.32.0: GPT-NeoX (Pythia) rotates a token that it decodes with the cache as if it were the first.
#
# We guessed: `call_with_cache`, which `generate` calls for each token, gives the logits of one call of all
# tokens, up to rounding, as it does in Llama.
# We saw: it does so where it gets all tokens at once, and not one at a time: the query is rotated from
# position 0 at each step, while the keys of the cache are rotated from where they stand.
# What follows: what such a model writes is not what it was trained to write, and no error says so.
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
common = dict(vocabulary_size=23, num_layers=2, hidden_dim=32, intermediate_dim=48)
MODELS = {
    "GPTNeoX": lambda: models.GPTNeoXCausalLM(
        models.GPTNeoXBackbone(num_heads=4, **common), preprocessor=None
    ),
    "Llama": lambda: models.LlamaCausalLM(
        models.LlamaBackbone(num_query_heads=4, num_key_value_heads=2, **common),
        preprocessor=None,
    ),
}
tokens = np.array([[3, 5, 7, 11, 13, 17, 19, 2]])


def differences(make):
    """Of the logits of one call, over their size: all through the cache, and one at a time."""
    keras.utils.set_random_seed(0)
    model = make()
    rng = np.random.default_rng(0)
    for weight in model.weights:  # as small as they begin, positions hardly matter
        if "kernel" in weight.path:
            weight.assign(rng.normal(size=weight.shape) * 0.3)
    whole = np.asarray(model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}))
    off = lambda logits: np.abs(logits - whole).max() / np.abs(whole).max()
    _, empty = model._build_cache(np.zeros_like(tokens))
    at_once, _, _ = model.call_with_cache(tokens, empty, 0)
    cache, steps = empty, []
    for t in range(tokens.shape[1]):
        logits, _, cache = model.call_with_cache(tokens[:, t : t + 1], cache, t)
        steps.append(np.asarray(logits))
    return off(np.asarray(at_once)), off(np.concatenate(steps, 1))


for name, make in MODELS.items():
    at_once, stepped = differences(make)
    print(f"{name}: off by {at_once:.1g} at once and by {stepped:.1g} one token at a time")
    assert at_once < 1e-5
    assert stepped > 0.05 if name == "GPTNeoX" else stepped < 1e-5
PYTHON
