"""Decoders of Keras Hub on JAX, with random weights: who reads whom, and is the cache right?

    pip install -e ".[published-jax]" && python -m benchmarks.published_jax_decoders

makes the second table of docs/published_decoders.md. The options are those of
`benchmarks.published_decoders`, and so is what is asked.

Nothing is downloaded: backbones are small and weights are random, so that what is seen is the code.
"""

import inspect
import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import keras
import keras_hub
import numpy as np

from eqx_norms.causality import check_causal, check_independent, check_reads, check_same, rules

from . import _decoders
from ._decoders import IDS, LAST, Check, T, text

PADS, PIECE = 5, 4
LAYERS, WINDOW = 2, 4
SIZES = {
    **dict.fromkeys(("vocabulary_size", "vocab_size"), LAST + 1),
    "num_layers": LAYERS,
    **dict.fromkeys(("num_heads", "num_attention_heads", "num_query_heads"), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("hidden_dim", "hidden_size"), 32),
    **dict.fromkeys(("head_dim", "head_size"), 8),
    "intermediate_dim": 48,
    **dict.fromkeys(("moe_intermediate_dim", "shared_expert_intermediate_dim"), 16),
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "top_k": 2,
    "image_size": 8,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    **dict.fromkeys(("sliding_window", "sliding_window_size"), WINDOW),
    **dict.fromkeys(("max_sequence_length", "max_position_embeddings"), 64),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("gate_lora", "mv_lora", "aaa_lora", "decay_lora"), 8),
    "attention_bias": False,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-6,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 1.0,
    "rope_layer_enabled_list": [True, False],
}


SLIDING = {"use_sliding_window_attention": True}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
# What a backbone is given beside `SIZES`.
FAMILIES: dict[str, dict[str, Any]] = {
    "Bloom": {},
    "Falcon": {},
    "GPT2": {},
    "GPTNeoX": {"rotary_percentage": 0.5},
    "Gemma": {},
    "Gemma, windows": SLIDING,
    "Gemma3": {},
    "Gemma3, windows": SLIDING | {"num_layers": 6},
    "Gemma4": {"layer_types": ["sliding_attention", "full_attention"]},
    "GptOss": {},
    "Llama": {},
    "Llama3": {},
    "Mistral": {},
    "Mixtral": {},
    "OPT": {},
    "Phi3": {},
    "Qwen": {},
    "Qwen, windows": SLIDING,
    "Qwen3": {},
    "Qwen3Moe": {},
    "Qwen3_5": LINEAR,
    "Qwen3_5Moe": LINEAR,
    "QwenMoe": {},
    "QwenMoe, windows": SLIDING,
    "RWKV7": {},
    "SmolLM3": {"layer_types": ["full_attention"] * LAYERS},
}
# Here every layer should have one.
WINDOWS = {"Mistral", "Mixtral", "Qwen, windows", "Qwen3", "Qwen3Moe", "QwenMoe, windows"}


class Decoder(NamedTuple):
    """Functions of tokens (batch, time): logits of all, and of a piece with what was kept."""

    full: Callable[[Any, Any], jax.Array]  # of ids and a mask of padding
    empty: Callable[[Any], Any]  # the cache, of a batch like these tokens
    piece: Callable[[Any, Any, Any], tuple[jax.Array, Any]]  # of ids, a cache and a place
    windows: bool  # of `WINDOW` tokens, in every layer


def built(family: str) -> Decoder:
    """With every weight moved, so that what begins at 0 or 1 matters as well."""
    cls = getattr(keras_hub.models, family.split(",")[0] + "CausalLM")
    takes = inspect.signature(cls.backbone_cls.__init__).parameters
    sizes = {name: size for name, size in SIZES.items() if name in takes} | FAMILIES[family]
    keras.utils.set_random_seed(0)
    backbone = cls.backbone_cls(**sizes, dtype="float32")
    rng = np.random.default_rng(0)
    for weight in backbone.weights:
        if jnp.issubdtype(weight.dtype, jnp.floating):
            size = 0.15 if len(weight.shape) > 1 else 0.1
            weight.assign(np.asarray(weight) + size * rng.normal(size=weight.shape))
    model = cls(backbone=backbone, preprocessor=None)
    names = [one.name for one in model.inputs]

    def full(ids, mask):
        given = {"token_ids": ids, "padding_mask": mask}
        if "position_ids" in names:
            given["position_ids"] = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        return model({name: given[name] for name in names})

    # What they take beside tokens is the mask, and images, of which there are none.
    wants = list(inspect.signature(model._build_cache).parameters.values())[1:]
    stepped = inspect.signature(model.call_with_cache).parameters

    def empty(ids):
        mask = jnp.ones_like(ids)
        more = {p.name: mask if p.name == "padding_mask" else None for p in wants}
        shapes = jax.eval_shape(lambda: model._build_cache(jnp.zeros_like(ids), **more)[1])
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)

    def piece(ids, cache, place):
        at = {"cache_update_index": place} if "cache_update_index" in stepped else {}
        logits, _, cache = model.call_with_cache(ids, cache, **at)
        return logits, cache

    return Decoder(full, empty, piece, family in WINDOWS)


def _alone(decoder: Decoder) -> Callable:
    return lambda ids: decoder.full(ids, jnp.ones_like(ids))


def causal(decoder: Decoder) -> Any:
    return check_causal(_alone(decoder), jnp.asarray(text()), axis=1, allowed_values=IDS)


def batch(decoder: Decoder) -> Any:
    return check_independent(_alone(decoder), jnp.asarray(text(3, length=8)), allowed_values=IDS)


def _same(decoder: Decoder, other: Callable) -> Any:
    how = {"axis": 1, "inputs": 1, "allowed_values": IDS, "allow_imprecise": True}
    return check_same(_alone(decoder), other, jnp.asarray(text()), **how)


def _padded(decoder: Decoder, left: bool) -> Any:
    def call(ids):
        pads = jnp.zeros((len(ids), PADS), ids.dtype)
        join = lambda a, b: jnp.concatenate((a, b) if left else (b, a), 1)
        logits = decoder.full(join(pads, ids), join(pads, jnp.ones_like(ids)))
        return logits[:, PADS:] if left else logits[:, :-PADS]

    return _same(decoder, call)


def _cached(decoder: Decoder, size: int) -> Any:
    """In a loop, as `generate` has it, of which one piece is compiled."""

    def call(ids):
        def read(cache, at):
            piece = jax.lax.dynamic_slice_in_dim(ids, at, size, axis=1)
            return decoder.piece(piece, cache, at)[::-1]

        places = jnp.arange(0, T, size, dtype=jnp.int32)
        _, logits = jax.lax.scan(read, decoder.empty(ids), places)
        return jnp.concatenate([*logits], 1)

    return _same(decoder, call)


def window(decoder: Decoder) -> Any:
    """Of as many layers, one window behind the other."""
    if not decoder.windows:
        return None
    rule = rules.window(T, (LAYERS * (WINDOW - 1), 0))
    return check_reads(_alone(decoder), jnp.asarray(text()), rule, axis=1, allowed_values=IDS)


CHECKS = [
    Check("no output reads a later token", causal),
    Check("no example reads another", batch),
    Check("padding on the left does not matter", lambda decoder: _padded(decoder, left=True)),
    Check("padding on the right does not matter", lambda decoder: _padded(decoder, left=False)),
    Check("the cache, all tokens at once", lambda decoder: _cached(decoder, T)),
    Check("the cache, one token at a time", lambda decoder: _cached(decoder, 1)),
    Check("the cache, in pieces", lambda decoder: _cached(decoder, PIECE)),
    Check("nothing is read from beyond the windows", window),
]
# What is understood of a row, in the code of Keras Hub 0.32.0.
WHY = {
    "GPTNeoX": "**defect**: the query is rotated as at position 0 in each cached call",
    **dict.fromkeys(
        ("Qwen, windows", "Qwen3", "Qwen3Moe"),
        "**defect**: the window is not in the mask that fused attention is given",
    ),
    **dict.fromkeys(("GPT2", "OPT"), "absolute positions: further right it is another text"),
}


def answers(family: str, verbose: bool) -> dict[str, str]:
    return _decoders.answers(family, built, CHECKS, verbose)


def prepare() -> None:
    """In each process."""
    os.environ["PYTEST_CURRENT_TEST"] = "no bars of the single checks"


def main() -> None:
    args = _decoders.parser(__doc__, FAMILIES).parse_args()
    prepare()
    table = lambda found: _decoders.table(found, CHECKS, WHY)
    _decoders.sweep(args, FAMILIES, answers, prepare, table, ("keras-hub", "keras", "jax"))


if __name__ == "__main__":
    main()
