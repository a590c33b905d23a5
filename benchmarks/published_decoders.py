"""The decoders of transformers, with random weights: who reads whom, and is the cache right?

    pip install -e ".[published]" && python -m benchmarks.published_decoders    # on Python 3.11

makes the table of docs/published_decoders.md. `--family mamba` (again for more) runs these alone
and prints the reports of what is not as hoped for. `--json FILE` keeps the answers and goes on from
there; `--against FILE` says whose are others, as with another version of transformers.

Nothing is downloaded: configurations are small and weights are random, so that what is seen is the
code. Models are float32; rounding is told from the rest by a copy in float64.
"""

import contextlib
import inspect
import os
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from eqx_norms.causality import (
    check_causal,
    check_independent,
    check_reads,
    check_same,
    dependency_matrix,
    from_torch,
    rules,
    stepped,
)

from . import _decoders
from ._decoders import IDS, LAST, PIECE, Check, T, text

VOCABULARY, PADS, PAD = LAST + 1, 5, 1
LARGEST = 4_000_000  # parameters
EDITS = 100  # at one time
# Sizes that configurations call by these names; what a family has beside them is in `OWN`.
SIZES = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "d_ff"), 48),
    **dict.fromkeys(
        ("encoder_ffn_dim", "d_inner", "feed_forward_size", "dff", "ffn_hidden_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_head_dim", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "mamba_d_head"), 8),
    **dict.fromkeys(("mamba_d_state", "mamba_n_heads", "state_size"), 8),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "index_n_heads"), 1),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("swa_head_dim", "dim_head", "router_hidden_size", "hc_lowrank"), 8),
    **dict.fromkeys(("mamba_num_heads", "ssm_state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("dim_ff", "shared_intermediate_size", "dense_intermediate_size"), 48),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_global": 32,
    **dict.fromkeys(("input_embedding_size", "output_embedding_size"), 32),
    "rotary_dim": 4,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "is_decoder": True,
    "is_encoder_decoder": False,
}
# None leaves to the family what `SIZES` would say.
OWN: dict[str, dict[str, Any]] = {
    "prophetnet": {"num_hidden_layers": None, "pad_token_id": 0},
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "expand": 2, "n_groups": 1},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "reformer": {"axial_pos_shape": (4, 6), "axial_pos_embds_dim": (16, 16), "head_dim": None},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3},
    "moshi": {"sliding_window": 8},
    "xlnet": {"max_position_embeddings": None},
    "zamba": {"num_hidden_layers": 6, "layer_types": ["linear_attention"] * 2 + ["hybrid"] * 4},
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3],
    },
    "longcat_flash": {"num_layers": 1},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"languages": ("en_XX",), "default_language": "en_XX"},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    **{name: {"layer_types": ["conv", "full_attention"]} for name in ("lfm2_moe", "lfm3")},
    **{
        name: {"layer_types": ["linear_attention", "full_attention"]}
        for name in (
            "bailing_hybrid",
            "qwen3_5",
            "qwen3_5_moe",
            "qwen3_5_moe_text",
            "qwen3_5_text",
            "qwen3_next",
        )
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    **{name: {"num_codebooks": 1} for name in ("musicgen", "musicgen_melody")},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 32, "ext_pw_out_channel": 32}},
}


class Decoder(NamedTuple):
    """A model, the names of the arguments that its `forward` takes, and what gives its logits."""

    model: Any
    accepts: frozenset[str]
    full: Any

    @property
    def cache(self) -> str | None:
        names = ("past_key_values", "cache_params", "state", "mems")
        return next((name for name in names if name in self.accepts), None)


def causal(decoder: Decoder) -> Any:
    return check_causal(decoder.full, text(), axis=1, allowed_values=IDS, batch_size=EDITS)


def batch(decoder: Decoder) -> Any:
    x = text(3, length=8)
    return check_independent(from_torch(decoder.model), x, allowed_values=IDS)


def _padded(decoder: Decoder, left: bool, positions: bool) -> Any:
    """The same text with padding on one side, masked, against the text alone."""
    if "attention_mask" not in decoder.accepts or positions > ("position_ids" in decoder.accepts):
        return None

    def call(model, ids):
        pads = torch.full((len(ids), PADS), getattr(model.config, "pad_token_id", PAD))
        mask = [torch.zeros_like(pads), torch.ones_like(ids)]
        ids, mask = ([pads, ids], mask) if left else ([ids, pads], mask[::-1])
        given = {"input_ids": torch.cat(ids, 1), "attention_mask": torch.cat(mask, 1)}
        if positions:  # as `generate` makes them
            given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
        logits = model(**given, **_uncached(decoder)).logits
        return logits[:, PADS:] if left else logits[:, :-PADS]

    return _same(decoder.full, from_torch(decoder.model, call, batch_axis=0))


def _uncached(decoder: Decoder) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in decoder.accepts else {}


def _same(one: Any, two: Any) -> Any:
    return check_same(one, two, text(), axis=1, inputs=1, allowed_values=IDS, allow_imprecise=True)


def left(decoder: Decoder) -> Any:
    return _padded(decoder, left=True, positions=False)


def left_with_positions(decoder: Decoder) -> Any:
    return _padded(decoder, left=True, positions=True)


def right(decoder: Decoder) -> Any:
    return _padded(decoder, left=False, positions=False)


def packed(decoder: Decoder) -> Any:
    """Two documents in a row, told by positions that start again."""
    if "position_ids" not in decoder.accepts:
        return None
    segments = np.arange(T) // (T // 2)
    rule = rules.causal(T) & rules.segments(segments)

    def call(model, ids):
        positions = (torch.arange(T) % (T // 2)).expand(len(ids), T)
        return model(ids, position_ids=positions, **_uncached(decoder)).logits

    fn = from_torch(decoder.model, call, batch_axis=0)
    return check_reads(fn, text(), rule, axis=1, allowed_values=IDS, batch_size=EDITS)


def _cached(decoder: Decoder, **how: Any) -> Any:
    if not decoder.cache:
        return None
    call = _cache_of_ours if "RecurrentGemma" in type(decoder.model).__name__ else None
    return _same(decoder.full, stepped(decoder.model, call=call, batch_axis=0, **how))


def _cache_of_ours(model: Any, ids: Any, cache: Any) -> tuple[Any, Any]:
    """For a model that does not return its cache."""
    cache = cache or transformers.DynamicCache(config=model.config)
    return model(ids, past_key_values=cache, use_cache=True).logits, cache


def _cached_with_positions(decoder: Decoder, cuts: int) -> Any:
    """With the positions said, as `generate` does."""
    if not decoder.cache or "position_ids" not in decoder.accepts:
        return None
    name = decoder.cache

    def call(model, ids, cache):
        done = 0 if cache is None else cache[1]
        positions = torch.arange(done, done + ids.shape[1]).expand(ids.shape)
        given = {name: None if cache is None else cache[0], "position_ids": positions}
        if cache is None and "RecurrentGemma" in type(model).__name__:
            given[name] = transformers.DynamicCache(config=model.config)
        out = model(ids, use_cache=True, **given)
        return out.logits, (out.get(name, given[name]), done + ids.shape[1])

    return _same(decoder.full, stepped(decoder.model, cuts, call=call, batch_axis=0))


CHECKS = [
    Check("no output reads a later token", causal),
    Check("no example reads another", batch),
    Check("padding on the left does not matter", left),
    Check("... with `position_ids` said, as `generate` does", left_with_positions),
    Check("padding on the right does not matter", right),
    Check("documents in a row are apart", packed),
    Check("the cache, one token at a time", lambda decoder: _cached(decoder)),
    Check("... with `position_ids` said", lambda decoder: _cached_with_positions(decoder, 1)),
    Check("the cache, in pieces", lambda decoder: _cached(decoder, cuts=PIECE)),
    Check("... with `position_ids` said", lambda decoder: _cached_with_positions(decoder, PIECE)),
    Check(
        "the cache, with another request in between",
        lambda decoder: _cached(decoder, beside=text(seed=1)),
    ),
]


def built(family: str) -> Decoder:
    """A small model of the family, in evaluation mode, with weights large enough to matter."""
    torch.manual_seed(0)
    cls, config = getattr(transformers, NAMES[family]), transformers.AutoConfig.for_model(family)
    if not isinstance(config, cls.config_class):  # the decoder beside an encoder, alone
        config = config.get_text_config(decoder=True)
    config = _small(config, OWN.get(family, {}))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters: other SIZES or OWN are needed")
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.2 * torch.randn_like(parameter))
    accepts = frozenset(inspect.signature(model.forward).parameters)
    return Decoder(model, accepts, from_torch(model, batch_axis=0))


def _small(config: Any, own: dict[str, Any]) -> Any:
    """With `SIZES`, those of the parts that it is made of, as a decoder beside an encoder, too."""
    options = {name: size for name, size in SIZES.items() if _takes(config, name)} | own
    if "kv_lora_rank" in options:
        options["num_key_value_heads"] = options["num_attention_heads"]
    for name in getattr(config, "sub_configs", {}):
        if isinstance(part := getattr(config, name, None), transformers.PreTrainedConfig):
            options[name] = _small(part, own.get(name, {}))
    return type(config)(**{name: one for name, one in options.items() if one is not None})


def _takes(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        return hasattr(config, name)
    except Exception:  # it is another one in some layers
        return True


def answers(family: str, verbose: bool) -> dict[str, str]:
    return _decoders.answers(family, built, CHECKS, verbose)


# What is understood of a row, in the code of transformers 5.23.0.
SCAN = "a piece of several tokens is scanned from an empty state, not from that in the cache"
WHY = {
    "prophetnet": "**defect**: the bias of relative positions is read in another order, above",
    "mamba": f"**defect**: {SCAN}",
    "falcon_mamba": f"**defect**: {SCAN}",
    "jamba": f"**defect**: {SCAN}",
    "zamba": f"**defect**: {SCAN}",
    "recurrent_gemma": (
        "**defects**: the state is kept in the module, for whichever request comes; the "
        "convolution starts anew with each piece, and reads padding"
    ),
    "minimax": (
        "**defect**: the cache's length is asked of its first layer, which is linear and says 0: "
        "positions and masks of cached calls are wrong"
    ),
    "moshi": (
        "**defect**: `sliding_window` (8 here, 3000 by default) cuts the cache and not the mask"
    ),
    "bamba": "**defect**: positions start at 0 in cached calls that do not say them",
    "biogpt": (
        "**defect**: the code that takes positions from the mask is never reached, for others are "
        "made before"
    ),
    **dict.fromkeys(
        ("nemotron_h", "zamba2"),
        "**defect**: the steps of the state space are at least `time_step_min` in a full pass and "
        "in pieces, and are not in one token with a cache",
    ),
    **dict.fromkeys(
        ("kimi_linear", "qwen4_exp", "qwen4_exp_text"),
        "refused: the layers of this small model are all linear, and their cache has no length",
    ),
    "blt": (
        "**defect**: its cache, which is the default, asks the configuration for "
        "`num_hidden_layers`, which it has not. Padding is text to the hashes of bytes, and to the "
        "attention over patches"
    ),
    "cpmant": "reads in both directions by design, as a prefix",
    "xlm": "bidirectional by design, unless `causal=True`",
    "xlnet": "bidirectional by design, unless `attn_type` or `perm_mask` says otherwise",
}


# Why a family is not built.
UNBUILT = {
    "gemma3n": "its encoder of images needs timm; its decoder is gemma3n_text",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "by design: it reads the keys and values of the model for which it drafts",
    ),
}


@contextlib.contextmanager
def mended_prophetnet() -> Iterator[None]:
    """With the order of axes in which the bias of the predicting stream is read later."""
    from transformers.models.prophetnet import modeling_prophetnet as module

    cls, name = module.ProphetNetNgramSelfAttention, "get_predict_relative_pos_embeddings"
    before = getattr(cls, name)
    source = textwrap.dedent(inspect.getsource(before))
    assert source.count("permute(0, 2, 1, 4, 3)") == 1, "ProphetNet is not what it was"
    scope: dict[str, Any] = dict(vars(module))
    exec(source.replace("permute(0, 2, 1, 4, 3)", "permute(0, 1, 4, 2, 3)"), scope)
    setattr(cls, name, scope[name])
    try:
        yield
    finally:
        setattr(cls, name, before)


def picture(path: pathlib.Path) -> None:
    """Who reads whom in ProphetNet, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decoder, ids = built("prophetnet"), text(length=24)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.4), layout="constrained")
    read = lambda: dependency_matrix(decoder.full, ids, axis=1) > 0
    with mended_prophetnet():
        after = read()
    future = ~np.tri(24, dtype=bool)
    for axis, matrix, title in zip(
        axes, (read(), after), ("5.23.0", "one line mended"), strict=True
    ):
        axis.imshow(np.where(matrix & future, 2, matrix), cmap="Blues", vmin=0, vmax=2)
        axis.set(title=f"{title}: {(matrix & future).sum()} pairs of the future", xlabel="input")
    axes[0].set_ylabel("output")
    figure.savefig(path, dpi=120)


def prepare() -> None:
    """In each process."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # of models this small
    os.environ["PYTEST_CURRENT_TEST"] = "no bars of the single checks"


def main() -> None:
    parser = _decoders.parser(__doc__, NAMES)
    parser.add_argument("--picture", type=pathlib.Path, help="draw ProphetNet's, and no more")
    args = parser.parse_args()
    prepare()
    if args.picture:
        return picture(args.picture)
    table = lambda found: _decoders.table(found, CHECKS, WHY, UNBUILT)
    _decoders.sweep(args, NAMES, answers, prepare, table, ("transformers", "torch", "jax"))


if __name__ == "__main__":
    main()
