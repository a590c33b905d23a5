#!/usr/bin/env bash
# transformers 5.23.0: `ProphetNetForCausalLM` reads tokens that come later.
#
# We guessed: of the decoders in a library this widely used, none reads the future in evaluation mode.
# We saw: one does. With random weights and 24 tokens, to change a token changes logits at earlier
# positions, in float64, by up to half of the largest logit. BartForCausalLM, made alike, does not
# change by one bit.
# Why: the bias of relative positions of the predicting stream is flattened in the order (batch, time,
# stream, head), and read in the order (batch, stream, head, time): a position gets what was computed
# from the hidden states of another.
# What follows: teacher-forced loss and what is generated token by token are of two different models.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.23.0 torch==2.13.0 numpy==2.4.6
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers

print("transformers", transformers.__version__)
T = 24
prophet = transformers.ProphetNetConfig(
    vocab_size=50, hidden_size=32, encoder_ffn_dim=32, decoder_ffn_dim=32, num_encoder_layers=2,
    num_decoder_layers=2, num_encoder_attention_heads=4, num_decoder_attention_heads=4,
    max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False, init_std=1.0,
)
bart = transformers.BartConfig(
    vocab_size=50, d_model=32, decoder_ffn_dim=32, decoder_layers=2, decoder_attention_heads=4,
    max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False, init_std=1.0,
)


def reads(model):
    """The largest change of an earlier logit, and the pairs (output, later input) that change."""
    model = model.double().eval()
    tokens = torch.randint(4, 50, (1, T), generator=torch.Generator().manual_seed(0))
    pairs, largest = 0, 0.0
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0]
        for later in range(1, T):
            edited = tokens.clone()
            edited[0, later] = 4 + (edited[0, later] - 3) % 46
            change = (model(edited, use_cache=False).logits[0] - logits).abs().amax(-1)[:later]
            pairs += int((change > 1e-9).sum())
            largest = max(largest, float(change.max()))
    return largest / float(logits.abs().max()), pairs


torch.manual_seed(0)
for cls, config, leaks in (
    (transformers.ProphetNetForCausalLM, prophet, True),
    (transformers.BartForCausalLM, bart, False),
):
    change, pairs = reads(cls(config))
    print(f"{cls.__name__}: {pairs} pairs; the largest change is {change:.2g} of the largest logit")
    assert (pairs > 0) == leaks
PYTHON
