"""Three small decoders of transformers, random and in bfloat16, and the same in JAX with our norms.

    pip install -e ".[published]" && python -m benchmarks.published_models

Prints how many of the logits have equal bits, and how many with the norm that one would guess: the
other order of roundings; and how far they are apart in float32, where both orders are the same.
torch rounds each result to bfloat16, and XLA drops such roundings inside of a program: hence
`rounded` behind every product and sum here.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from eqx_norms import RMSNorm, rounded

from .published_norms import share, to_jax

WIDTH, VOCABULARY, TOKENS = 128, 256, 64
Params = dict[str, Array]
Tokens = Float[Array, "tokens width"]
Rotary = tuple[Array, Array]  # Cosines and sines, (tokens, rotated).


class Family(NamedTuple):
    """`norms` are options of all norms but the gated one; `guess` is what replaces them."""

    config: str
    options: dict[str, Any]
    norms: dict[str, Any]
    guess: dict[str, Any]


SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "attn_implementation": "eager",
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "experts_implementation": "eager", "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
ONCE, BEFORE = {"round_before_weight": False}, {"round_before_weight": True}
FAMILIES = {
    "Llama": Family("LlamaConfig", {"num_hidden_layers": 2}, BEFORE, ONCE),
    "Gemma 3": Family(
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 24,
        },
        {"unit_offset": True},
        {"unit_offset": True} | BEFORE,
    ),
    "Qwen3-Next": Family(
        "Qwen3NextConfig",
        {"num_hidden_layers": 2} | LINEAR,
        {"unit_offset": True},
        {"unit_offset": True} | BEFORE,
    ),
}


def theirs(family: Family, dtype: str) -> Any:
    """The torch model, with norms as after training, as it is when it is loaded in that dtype."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, family.config)(**SMALL | family.options)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    # `to` would round the frequencies of the rotary embedding, and loading does not.
    kept = {name: b.clone() for name, b in model.named_buffers() if "inv_freq" in name}
    model = model.to(getattr(torch, dtype))
    for name, buffer in kept.items():
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, buffer)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.add_(0.3 * torch.randn(param.shape))
    return model


# ---- The pieces.


def float32(a: Array) -> Array:
    return a.astype(jnp.float32)


def linear(weight: Array, x: Array) -> Array:
    return rounded(x @ weight.T)


def silu(x: Array) -> Array:
    return jax.nn.silu(float32(x)).astype(x.dtype)


def gelu(x: Array) -> Array:
    return jax.nn.gelu(float32(x), approximate=True).astype(x.dtype)


def sigmoid(x: Array) -> Array:
    return jax.nn.sigmoid(float32(x)).astype(x.dtype)


def below(params: Params, name: str) -> Params:
    """The parameters of a submodule."""
    return {key.removeprefix(name): p for key, p in params.items() if key.startswith(name)}


def norm_of(params: Params, name: str, eps: float, options: dict[str, Any]) -> RMSNorm:
    weight = params[f"{name}.weight"]
    layer = RMSNorm(len(weight), eps, use_bias=False, **options)
    return eqx.tree_at(lambda norm: norm.weight, layer, weight)


def rotated(a: Array, rotary: Rotary) -> Array:
    """The first of the features of each head, (tokens, heads, features); the rest as they are."""
    cos, sin = (r[:, None] for r in rotary)
    a, rest = jnp.split(a, [cos.shape[-1]], axis=-1)
    one, two = jnp.split(a, 2, axis=-1)
    turned = jnp.concatenate([-two, one], axis=-1)
    return jnp.concatenate([rounded(rounded(a * cos) + rounded(turned * sin)), rest], axis=-1)


class Attention(eqx.Module):
    params: Params
    norms: list[RMSNorm]  # Of queries and keys, of each head; or none.
    size: int = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    gated: bool = eqx.field(static=True)

    def __call__(self, x: Tokens, rotary: Rotary) -> Tokens:
        q, k, v = (linear(self.params[f"{p}_proj.weight"], x) for p in "qkv")
        q, k, v = (a.reshape(len(x), -1, self.size) for a in (q, k, v))
        gate = None
        if self.gated:  # Of each head first the query, then the gate.
            q, gate = jnp.split(q.reshape(len(x), -1, 2 * self.size), 2, axis=-1)
        if self.norms:
            q, k = (jax.vmap(jax.vmap(n))(a) for n, a in zip(self.norms, (q, k), strict=True))
        q, k = rotated(q, rotary), rotated(k, rotary)
        k, v = (jnp.repeat(a, q.shape[1] // k.shape[1], axis=1) for a in (k, v))
        scores = rounded(jnp.einsum("qhf,khf->hqk", q, k))
        # A Python number is not rounded to bfloat16 there, as JAX would have it.
        scores = (float32(scores) * self.scale).astype(x.dtype)
        back = jnp.arange(len(x))[:, None] - jnp.arange(len(x))
        seen = (back >= 0) & (back < (self.window or len(x)))
        weights = jax.nn.softmax(float32(jnp.where(seen, scores, -jnp.inf))).astype(x.dtype)
        mixed = rounded(jnp.einsum("hqk,khf->qhf", weights, v))
        if gate is not None:
            mixed = rounded(mixed * sigmoid(gate))
        return linear(self.params["o_proj.weight"], mixed.reshape(len(x), -1))


class DeltaNet(eqx.Module):
    """Qwen3-Next's gated delta rule, one token after the other; theirs goes in chunks."""

    params: Params
    norm: RMSNorm
    heads: tuple[int, int] = eqx.field(static=True)  # Of keys, of values.
    sizes: tuple[int, int] = eqx.field(static=True)

    def __call__(self, x: Tokens, rotary: Rotary) -> Tokens:
        (of_keys, of_values), (key, value) = self.heads, self.sizes
        each = of_values // of_keys
        qkvz = linear(self.params["in_proj_qkvz.weight"], x).reshape(len(x), of_keys, -1)
        q, k, v, z = jnp.split(qkvz, np.cumsum([key, key, each * value]), axis=-1)
        ba = linear(self.params["in_proj_ba.weight"], x).reshape(len(x), of_keys, -1)
        b, a = (p.reshape(len(x), -1) for p in jnp.split(ba, 2, axis=-1))

        flat = [p.reshape(len(x), -1) for p in (q, k, v)]
        mixed = self._convolved(jnp.concatenate(flat, axis=-1))
        ends = np.cumsum([p.shape[-1] for p in flat])[:2]
        q, k, v = jnp.split(mixed, ends, axis=-1)
        q, k = (self._unit(p.reshape(len(x), of_keys, key)) for p in (q, k))
        q, k = (jnp.repeat(p, each, axis=1) for p in (q * key**-0.5, k))
        v = float32(v).reshape(len(x), of_values, value)
        rate = float32(a) + float32(self.params["dt_bias"])
        decay = -jnp.exp(float32(self.params["A_log"])) * jax.nn.softplus(rate)

        out = self._delta_rule(q, k, v, jnp.exp(decay), float32(sigmoid(b)))
        normed = jax.vmap(jax.vmap(self.norm))(out.astype(x.dtype))
        gate = jax.nn.silu(float32(z).reshape(out.shape))
        gated = (float32(normed) * gate).astype(x.dtype)
        return linear(self.params["out_proj.weight"], gated.reshape(len(x), -1))

    def _convolved(self, x: Array) -> Array:
        """Over the tokens so far, each channel by itself."""
        kernel = float32(self.params["conv1d.weight"][:, 0])
        taps = kernel.shape[-1]
        padded = jnp.pad(float32(x), ((taps - 1, 0), (0, 0)))
        each = [padded[i : i + len(x)] * kernel[:, i] for i in range(taps)]
        return silu(sum(each[1:], each[0]).astype(x.dtype))

    @staticmethod
    def _unit(a: Array) -> Array:
        a = float32(a)
        return a * jax.lax.rsqrt(jnp.sum(a * a, axis=-1, keepdims=True) + 1e-6)

    @staticmethod
    def _delta_rule(q: Array, k: Array, v: Array, kept: Array, beta: Array) -> Array:
        def step(state, token):
            q, k, v, kept, beta = token
            state = state * kept[:, None, None]
            change = (v - jnp.einsum("hkv,hk->hv", state, k)) * beta[:, None]
            state = state + jnp.einsum("hk,hv->hkv", k, change)
            return state, jnp.einsum("hkv,hk->hv", state, q)

        start = jnp.zeros((*k.shape[1:], v.shape[-1]))
        return jax.lax.scan(step, start, (q, k, v, kept, beta))[1]


class MLP(eqx.Module):
    params: Params
    gelu: bool = eqx.field(static=True)

    def __call__(self, x: Array) -> Array:
        gate, up, down = (self.params[f"{name}_proj.weight"] for name in ("gate", "up", "down"))
        gate = (gelu if self.gelu else silu)(linear(gate, x))
        return linear(down, rounded(gate * linear(up, x)))


class Experts(eqx.Module):
    """All of them see all tokens, and what was not chosen counts for nothing."""

    params: Params
    shared: MLP
    chosen: int = eqx.field(static=True)

    def __call__(self, x: Tokens) -> Tokens:
        probabilities = jax.nn.softmax(float32(linear(self.params["gate.weight"], x)))
        top, which = jax.lax.top_k(probabilities, self.chosen)
        top = (top / top.sum(axis=-1, keepdims=True)).astype(x.dtype)
        total = jnp.zeros_like(x)
        of_each = self.params["experts.gate_up_proj"], self.params["experts.down_proj"]
        for i, (gate_up, down) in enumerate(zip(*of_each, strict=True)):
            gate, up = jnp.split(linear(gate_up, x), 2, axis=-1)
            one = linear(down, rounded(silu(gate) * up))
            weight = jnp.where(which == i, top, 0).sum(axis=-1, keepdims=True)
            total = rounded(total + rounded(one * weight))
        share_of_all = sigmoid(linear(self.params["shared_expert_gate.weight"], x))
        return rounded(total + rounded(share_of_all * self.shared(x)))


class Block(eqx.Module):
    """With two norms before its parts, and in Gemma 3 two more behind them."""

    mixer: Attention | DeltaNet
    mlp: MLP | Experts
    norms: list[RMSNorm]

    def __call__(self, x: Tokens, rotary: Rotary) -> Tokens:
        norms = [jax.vmap(norm) for norm in self.norms]
        if len(norms) == 2:
            x = rounded(x + self.mixer(norms[0](x), rotary))
            return rounded(x + self.mlp(norms[1](x)))
        x = rounded(x + norms[1](self.mixer(norms[0](x), rotary)))
        return rounded(x + norms[3](self.mlp(norms[2](x))))


class Decoder(eqx.Module):
    embedding: Array
    head: Array
    blocks: list[Block]
    norm: RMSNorm
    rotary: list[Rotary]  # Of each block.
    scaled: bool = eqx.field(static=True)  # The embedding, as Gemma does, by a rounded number.

    def __call__(self, tokens: Array) -> Array:
        x = self.embedding[tokens]
        if self.scaled:
            x = rounded(x * jnp.asarray(x.shape[-1] ** 0.5, x.dtype))
        for block, rotary in zip(self.blocks, self.rotary, strict=True):
            x = block(x, rotary)
        return linear(self.head, jax.vmap(self.norm)(x))


# ---- The same model here.


def ours(model: Any, norms: dict[str, Any]) -> Decoder:
    """Of theirs, with the parameters of its state_dict."""
    config = model.config
    params = {name: to_jax(p) for name, p in model.state_dict().items()}
    eps, gemma = config.rms_norm_eps, "gemma" in config.model_type
    names = ["input_layernorm", "post_attention_layernorm"]
    names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if gemma else []
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers

    def block(i: int, kind: str) -> Block:
        own = below(params, f"model.layers.{i}.")
        mlp = below(own, "mlp.")
        if "gate.weight" in mlp:
            shared = MLP(below(mlp, "shared_expert."), gelu=False)
            mlp = Experts(mlp, shared, config.num_experts_per_tok)
        else:
            mlp = MLP(mlp, gelu=gemma)
        mixer = _delta_net(own, config) if kind == "linear_attention" else attention(own, kind)
        return Block(mixer, mlp, [norm_of(own, name, eps, norms) for name in names])

    def attention(own: Params, kind: str) -> Attention:
        own = below(own, "self_attn.")
        each = [norm_of(own, n, eps, norms) for n in ("q_norm", "k_norm") if f"{n}.weight" in own]
        scale = getattr(config, "query_pre_attn_scalar", config.head_dim) ** -0.5
        window = config.sliding_window if kind == "sliding_attention" else None
        gated = config.model_type == "qwen3_next"
        return Attention(own, each, config.head_dim, scale, window, gated)

    head = params["lm_head.weight"]
    return Decoder(
        embedding=params["model.embed_tokens.weight"],
        head=head,
        blocks=[block(i, kind) for i, kind in enumerate(kinds)],
        norm=norm_of(params, "model.norm", eps, norms),
        rotary=[_rotary(model.model.rotary_emb, kind, head.dtype) for kind in kinds],
        scaled=gemma,
    )


def _delta_net(own: Params, config: Any) -> DeltaNet:
    own = below(own, "linear_attn.")
    return DeltaNet(
        own,
        norm_of(own, "norm", config.rms_norm_eps, BEFORE),
        (config.linear_num_key_heads, config.linear_num_value_heads),
        (config.linear_key_head_dim, config.linear_value_head_dim),
    )


def _rotary(module: Any, kind: str, dtype: Any) -> Rotary:
    name = "inv_freq" if hasattr(module, "inv_freq") else f"{kind}_inv_freq"
    frequencies = np.tile(getattr(module, name).numpy(), 2)
    angles = np.outer(np.arange(TOKENS, dtype=np.float32), frequencies)
    return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


class Compared(NamedTuple):
    """The shares of logits with equal bits; and the largest difference, over the largest logit."""

    right: float
    guess: float
    in_float32: float


def compared(name: str) -> Compared:
    family = FAMILIES[name]
    right, guess = (share(*_logits(family, "bfloat16", n)).equal for n in family[2:])
    want, got = _logits(family, "float32", family.norms)
    return Compared(right, guess, float(np.abs(want - got).max() / np.abs(want).max()))


def _logits(family: Family, dtype: str, norms: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Theirs and ours, of some tokens."""
    import torch

    model = theirs(family, dtype)
    tokens = torch.randint(1, VOCABULARY, (4, TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = np.asarray(to_jax(model(tokens).logits))
    run = eqx.filter_jit(lambda decoder, tokens: jax.vmap(decoder)(tokens))
    return want, np.asarray(run(ours(model, norms), jnp.asarray(tokens.numpy())))


def main() -> None:
    print("| | equal bits | with the other order | float32 |\n|---|---:|---:|---:|")
    with jax.numpy_dtype_promotion("standard"):
        for name in FAMILIES:
            right, guess, apart = compared(name)
            print(f"| {name} | {100 * right:.1f}% | {100 * guess:.1f}% | {apart:.0e} |", flush=True)


if __name__ == "__main__":
    main()
