#!/usr/bin/env bash
# transformers 5.23.0: NemotronH and Zamba2 take other steps of their state space once there is a cache.
#
# We guessed: one token at a time with the cache gives what one call of all tokens gives, up to
# rounding, in float64 too.
# We saw: the whole call raises each step to at least `time_step_min` (0.001), one token with the cache
# does not. Where steps are smaller the logits differ, and are the same with `time_step_min=0`. The
# config's `time_step_limit`, (0, inf) by default in NemotronH, has no part in it.
# What follows: what a model writes token by token differs from what its own whole call, as in training or
# in an evaluation, gives.
# This script fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import NemotronHConfig, NemotronHForCausalLM, Zamba2Config, Zamba2ForCausalLM

print("transformers", transformers.__version__)
transformers.logging.set_verbosity_error()
MAMBA = dict(mamba_d_state=8, mamba_expand=2)
CONFIGS = {
    NemotronHForCausalLM: lambda least: NemotronHConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8,
        num_key_value_heads=4, layer_types=["linear_attention", "full_attention"],
        num_hidden_layers=2, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=1,
        time_step_min=least,
    ),
    Zamba2ForCausalLM: lambda least: Zamba2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1,
        hybrid_layer_ids=[1, 3], n_mamba_heads=8, mamba_headdim=8, mamba_ngroups=1,
        time_step_min=least, **MAMBA,
    ),
}
tokens = torch.tensor([[3, 5, 7, 11, 13, 17, 19, 23]])


def difference(cls, least):
    """Of one call from one token at a time, in float64."""
    torch.manual_seed(0)
    model = cls(CONFIGS[cls](0.001)).double().eval()
    for parameter in model.parameters():  # weights as small as they begin hide everything
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    for module in model.modules():
        if hasattr(module, "dt_bias"):
            module.time_step_limit = (least, float("inf"))
            module.dt_bias.data.fill_(-9.0)  # softplus of it is a step of 0.0001
    with torch.no_grad():
        whole, cache, steps = model(tokens, use_cache=False).logits, None, []
        for t in range(tokens.shape[1]):
            out = model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    return (whole - torch.cat(steps, 1)).abs().max().item()


for cls in CONFIGS:
    at, without = difference(cls, 0.001), difference(cls, 0.0)
    print(f"{cls.__name__}: whole and cached logits differ by {at:.2g}, without a least step {without:.2g}")
    assert at > 1e-3 and without < 1e-4  # some of the code is in float32 all the same
PYTHON
