"""Every norm class of transformers: its formula, the lines here that give its bits, and how many.

    pip install -e ".[published]" && python -m benchmarks.published_norms

One class stands for all whose code is the same but for names. The lines are text, so that the page
docs/published_norms.md has what was run. `x` is one token and `heads` of it are `(heads, size)`;
`weight`, `bias`, `gate`, `eps` are the class's. What is written as a layer is called on `x`.
"""

import ast
import functools as ft
import importlib
import pathlib
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import eqx_norms
from eqx_norms import layer_norm, rms_norm, rounded

WIDTH, HEADS, EPS = 256, 4, 1e-5
TOKENS = 512
DTYPES = ("bfloat16", "float16")
RMS, LAYER = "RMSNorm(use_bias=False)", "LayerNorm()"
ROUNDED_RMS = "RMSNorm(use_bias=False, round_before_weight=True)"


class Formula(NamedTuple):
    """What stands for it, `module.Class`; ours; and the layer that one would guess it is."""

    what: str
    lines: str
    guess: str
    classes: dict[str, Callable[[Any], Any]]  # How to make each.
    call: Callable[..., Any] = lambda module, x, gate: module(x)
    shape: tuple[int, ...] = (WIDTH,)  # Of `x` here, (WIDTH,) there.


def sized(cls):
    return cls(WIDTH, eps=EPS)


def gated(module, x, gate):
    return module(x, gate)


def channels_first(module, x, gate):
    return module(x.T[None, :, :, None])[0, :, :, 0].T


def by_heads(module, x, gate):
    return module(x.reshape(1, -1, HEADS, WIDTH // HEADS)).reshape(x.shape)


CONFIG = SimpleNamespace(eps=EPS, hidden_size=WIDTH, d_model=WIDTH, rms_norm_eps=EPS)

FORMULAS = {
    "before": Formula(
        "RMS norm, rounded before the weight",
        ROUNDED_RMS,
        RMS,
        {
            "llama.LlamaRMSNorm": sized,
            "llama4.Llama4TextRMSNorm": sized,
            "cpmant.CpmAntLayerNorm": lambda cls: cls(CONFIG),
            "xlstm.xLSTMRMSNorm": sized,
            "t5.T5LayerNorm": sized,
        },
    ),
    "float32": Formula(
        "RMS norm, all in float32",
        RMS,
        ROUNDED_RMS,
        {
            "olmo2.Olmo2RMSNorm": sized,
            "helium.HeliumRMSNorm": sized,
            "moshi.MoshiRMSNorm": sized,
            "gemma3n.Gemma3nRMSNorm": sized,
        },
    ),
    "offset": Formula(
        "RMS norm, times 1 + weight in float32",
        "RMSNorm(use_bias=False, unit_offset=True)",
        "RMSNorm(use_bias=False, unit_offset=True, round_before_weight=True)",
        {"gemma3.Gemma3RMSNorm": sized},
    ),
    "offset of groups": Formula(
        "the same over groups",
        "jax.vmap(lambda x, w: rms_norm(x, 1 + f32(w), eps=eps))"
        "(heads(x), heads(weight)).reshape(-1)",
        "RMSNorm(use_bias=False, unit_offset=True)",
        {"qwen4_exp.Qwen4ExpTextRMSNorm": lambda cls: cls(WIDTH, WIDTH // HEADS, eps=EPS)},
    ),
    "offset in its dtype": Formula(
        "RMS norm, times 1 + weight in the weight's dtype",
        "rms_norm(x, rounded(1 + weight), eps=eps)",
        "RMSNorm(use_bias=False, unit_offset=True)",
        {"muse_spark.MuseSparkTextCenteredRMSNorm": sized},
    ),
    "scaled input": Formula(
        "1 + weight on the input",
        "rms_norm((f32(x) * f32(rounded(1 + weight))).astype(x.dtype), eps=eps)",
        "RMSNorm(use_bias=False, unit_offset=True)",
        {"muse_spark.MuseSparkTextInputScaledRMSNorm": sized},
    ),
    "no weight": Formula(
        "RMS norm without a weight",
        "rms_norm(x, eps=eps)",
        "rms_norm(x, eps=eps)",
        {"llama4.Llama4TextL2Norm": lambda cls: cls(eps=EPS)},
    ),
    "rounded factor": Formula(
        "times 1 / rms, itself rounded",
        "x * jax.lax.rsqrt(jnp.mean(f32(x) ** 2) + eps).astype(x.dtype)",
        "rms_norm(x, eps=eps)",
        {"deepseek_v4.DeepseekV4UnweightedRMSNorm": lambda cls: cls(eps=EPS)},
    ),
    "op by op": Formula(
        "RMS norm, operation by operation",
        "rounded(weight * x) * rounded(jax.lax.rsqrt("
        "(f32(rounded(jnp.mean(rounded(x * x)))) + eps).astype(x.dtype)))",
        RMS,
        {"gradium_phonon_tts.GradiumPhononTTSTimestepNorm": sized},
    ),
    "gate before": Formula(
        "gate, then RMS norm of each group, rounded before the weight",
        "jax.vmap(lambda x: rms_norm(x, eps=eps))"
        "(heads(f32(x) * jax.nn.silu(f32(gate)))).reshape(-1).astype(x.dtype) * weight",
        "RMSNorm(use_bias=False)(x * jax.nn.silu(gate))",
        {"mamba2.MambaRMSNormGated": lambda cls: cls(WIDTH, WIDTH // HEADS, eps=EPS)},
        gated,
    ),
    "gate behind, rounded": Formula(
        "RMS norm, rounded before the weight, then the gate",
        "(f32(rounded(rms_norm(x, eps=eps) * weight)) * jax.nn.silu(f32(gate))).astype(x.dtype)",
        "RMSNorm(use_bias=False)(x) * jax.nn.silu(gate)",
        {"qwen3_next.Qwen3NextRMSNormGated": sized},
        gated,
    ),
    "gate behind": Formula(
        "RMS norm and gate in float32",
        "(rms_norm(f32(x), weight, eps=eps) * jax.nn.sigmoid(f32(gate))).astype(x.dtype)",
        "RMSNorm(use_bias=False)(x) * jax.nn.sigmoid(gate)",
        {"kimi_linear.KimiLinearRMSNormGated": sized},
        gated,
    ),
    "gate of groups": Formula(
        "RMS norm of each group and gate in float32",
        "(jax.vmap(lambda x, w: rms_norm(x, w, eps=eps))(heads(f32(x)), heads(weight))"
        ".reshape(-1) * jax.nn.silu(f32(gate))).astype(x.dtype)",
        "RMSNorm(use_bias=False)(x) * jax.nn.silu(gate)",
        {"falcon_h1.FalconH1RMSNormGated": lambda cls: cls(WIDTH, eps=EPS, n_groups=HEADS)},
        gated,
    ),
    "layer": Formula(
        "LayerNorm, all in float32",
        LAYER,
        "LayerNorm(round_before_weight=True)",
        {
            "convnext.ConvNextLayerNorm": sized,
            "esmc.EsmcLayerNorm": sized,
            "esm.EsmFoldLayerNorm": sized,
        },
    ),
    "layer, channels first": Formula(
        "the same, channels first",
        LAYER,
        "LayerNorm(round_before_weight=True)",
        {"eomt.EomtLayerNorm2d": sized},
        channels_first,
    ),
    "layer, (batch, channels, time)": Formula(
        "the same, channels before time",
        LAYER,
        "LayerNorm(round_before_weight=True)",
        {"squeezebert.SqueezeBertLayerNorm": sized},
        lambda module, x, gate: module(x.T[None])[0].T,
    ),
    "layer without bias": Formula(
        "LayerNorm without a bias, all in float32",
        "LayerNorm(use_bias=False)",
        "LayerNorm(use_bias=False, round_before_weight=True)",
        {"cohere.CohereLayerNorm": sized},
    ),
    "layer, bare": Formula(
        "LayerNorm without parameters, eps 1e-5 in the code",
        "layer_norm(x, eps=1e-5)",
        "layer_norm(x, eps=1e-5)",
        {"olmo.OlmoLayerNorm": lambda cls: cls(WIDTH)},
    ),
    "layer of each head": Formula(
        "LayerNorm with a weight for each head",
        "jax.vmap(lambda x, w: layer_norm(x, w, eps=eps))(heads(x), weights).reshape(-1)",
        "layer_norm(x, weights.reshape(-1), eps=eps)",
        {"stablelm.StableLmLayerNormPerHead": lambda cls: cls(WIDTH // HEADS, HEADS, eps=EPS)},
        lambda module, x, gate: module(x.reshape(len(x), HEADS, -1)).reshape(x.shape),
    ),
    "layer, before": Formula(
        "LayerNorm, rounded before weight and bias",
        "LayerNorm(round_before_weight=True)",
        LAYER,
        {"deberta.DebertaLayerNorm": sized},
    ),
    "layer of heads, before": Formula(
        "LayerNorm of each head, rounded before weight and bias, eps 1e-5 in the code",
        "rounded(jax.vmap(lambda x: layer_norm(x, eps=1e-5))(heads(x)) * weight) + bias",
        "jax.vmap(lambda x, w, b: layer_norm(x, w, b, eps=1e-5))(heads(x), weight, bias)",
        {"chameleon.ChameleonLayerNorm": lambda cls: cls((HEADS, WIDTH // HEADS))},
        by_heads,
    ),
    "layer of heads, flat weight": Formula(
        "LayerNorm of each head, rounded before a flat weight",
        "jax.vmap(lambda x: layer_norm(x, eps=eps))(heads(x)).reshape(-1) * weight",
        "LayerNorm(use_bias=False)",
        {"xlstm.xLSTMMultiHeadLayerNorm": lambda cls: cls(HEADS, WIDTH // HEADS, eps=EPS)},
        by_heads,
    ),
    "layer, offset": Formula(
        "LayerNorm, times 1 + weight in the weight's dtype",
        "layer_norm(x, rounded(weight + 1), bias, eps=eps)",
        "LayerNorm(unit_offset=True)",
        {"nemotron.NemotronLayerNorm1P": sized, "videoprism.VideoPrismLayerNorm": sized},
    ),
    "layer, offset, before": Formula(
        "LayerNorm, rounded before 1 + gamma, eps 1e-5 in the code",
        "layer_norm(x, eps=1e-5) * rounded(gamma + 1)",
        "layer_norm(x, 1 + f32(gamma), eps=1e-5)",
        {"moonshine_streaming.MoonshineStreamingLayerNorm": lambda cls: cls(WIDTH)},
    ),
    "group": Formula(
        "GroupNorm, all in float32",
        "eqx_norms.group_norm(x[:, None], 1, weight, bias, eps=eps)[:, 0]",
        "eqx_norms.group_norm(x[:, None], 1, weight, bias, eps=eps)[:, 0]",
        {"poolformer.PoolFormerGroupNorm": sized},
        lambda module, x, gate: module(x[:, :, None])[:, :, 0],
    ),
}

# Of the same code as others in their formula, but not run: (what, why).
NOT_RUN = {
    "imagegpt.ImageGPTLayerNorm": "op by op, with a square root and a division",
    "pocket_tts.PocketTTSTimestepNorm": "over the unbiased standard deviation, op by op",
    "pocket_tts.PocketTTSFlowLayerNorm": "LayerNorm op by op",
    "vitdet.VitDetLayerNorm": "LayerNorm over channels op by op, with a square root",
    "zaya.ZayaQKNorm": "l2 norm op by op, clamped at the dtype's eps",
    "hy_v4.HYV4UnweightedRMSNorm": "returns the factor alone",
    "axk2.AXK2GatedRMSNorm": "LlamaRMSNorm and a gate of its own output",
    "esmfold2.EsmFold2LayerNorm": "LayerNorm in float32; raises with a weight in bfloat16",
    "esmfold2.EsmFold2AdaptiveLayerNorm": "LayerNorm and a gate and shift of a condition",
    "qwen2_5_omni.Qwen2_5_OmniAdaLayerNormZero": "LayerNorm, rounded, and scales of a condition",
    "qwen2_5_omni.Qwen2_5_OmniAdaLayerNormZero_Final": "the same with two of them",
    "vibevoice.VibeVoiceDiffusionHeadAdaLayerNorm": "a block: LlamaRMSNorm, scales, an MLP",
    "autoformer.AutoformerLayernorm": "LayerNorm less its mean over time: it reads the future",
    "bit.BitGroupNormActivation": "GroupNorm and an activation",
    "emu3.Emu3VQVAEGroupNorm": "torch.nn.GroupNorm",
    "emu3.Emu3VQVAESpatialNorm": "GroupNorm, scaled and shifted by convolutions",
    "pe_audio.PeAudioMaskedGroupNorm": "GroupNorm under a mask op by op",
    "gemma3n.Gemma3nAudioCumulativeGroupNorm": "over all channels and all time up to now",
    "detr.DetrFrozenBatchNorm2d": "a * x + b of buffers",
    "patchtst.PatchTSTBatchNorm": "torch.nn.BatchNorm1d",
    "mobilebert.NoNorm": "x * weight + bias",
    "phi4_multimodal.Phi4MultimodalAudioMeanVarianceNormLayer": "buffers",
}
# Names that speak of norms, of blocks that hold one or of something else.
OTHERS = re.compile(
    r"(Conv\w*Layer|ConvNormLayer|NormedEmbedding|StableLayerNorm|For[A-Z]\w+|NormAttentionNorm|"
    r"Unnormed|NormalEstimatorOutput|AdaRmsNorm|PatchTSMixerNormLayer|ConvDropoutLayerNorm)$|"
    r"RobertaPreLayerNorm"
)


# The classes of the installed version


def norm_classes() -> Iterator[tuple[str, str]]:
    """`module.Class` and its code, without what names are called, of all that are called norms."""
    import transformers

    root = pathlib.Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.ClassDef) and re.search("norm", node.name, re.IGNORECASE)
            if named and not OTHERS.search(node.name):
                yield f"{path.parent.name}.{node.name}", _code(node)


def _code(node: ast.ClassDef) -> str:
    """Its bases and methods, with names in the order in which they come."""
    skipped = ("__init__", "extra_repr", "reset_parameters")
    methods = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name not in skipped]
    parts = [ast.unparse(base).removeprefix("torch.") for base in node.bases]
    return "\n".join([*parts, *(_renamed(f) for f in sorted(methods, key=lambda f: f.name))])


def _renamed(method: ast.FunctionDef) -> str:
    method = ast.parse(ast.unparse(method)).body[0]  # A copy.
    method.returns, method.decorator_list, method.args.defaults = None, [], []
    is_text = lambda b: isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    method.body = [line for line in method.body if not is_text(line)]
    names: dict[str, str] = {}
    rename = lambda name: names.setdefault(name, f"_{len(names)}")
    for node in ast.walk(method):
        if isinstance(node, ast.arg):
            node.arg, node.annotation = rename(node.arg), None
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            node.attr = rename(f"self.{node.attr}")
    for node in ast.walk(method):
        if isinstance(node, ast.Name) and node.id not in ("torch", "nn", "F", "super"):
            node.id = rename(node.id)
    return ast.unparse(method)


def of_each_class() -> dict[str, str | None]:
    """The class that stands for each; `None` for a class with code that none here has."""
    stands = {name for formula in FORMULAS.values() for name in formula.classes} | {*NOT_RUN}
    found = dict(norm_classes())
    by_code = {found[name]: name for name in sorted(stands) if name in found}
    return {name: by_code.get(code) for name, code in found.items()}


# Theirs and ours


def real_class(name: str) -> Any:
    module, cls = name.split(".")
    stem = "esmfold" if cls.startswith("EsmFoldLayer") else module
    return getattr(importlib.import_module(f"transformers.models.{module}.modeling_{stem}"), cls)


def theirs_and_ours(formula: Formula, name: str, dtype: str, lines: str | None = None):
    """What the class gives and what the lines give, for the same numbers, as NumPy arrays."""
    import torch

    rng = np.random.default_rng(0)
    half = getattr(torch, dtype)
    draw = lambda *shape: torch.tensor(rng.normal(size=shape)).to(half)
    scale = torch.tensor(rng.choice([0.01, 1, 30], size=(TOKENS, 1))).to(half)
    x, gate = draw(TOKENS, WIDTH) * scale, draw(TOKENS, WIDTH)
    module = formula.classes[name](real_class(name)).to(half)
    with torch.no_grad():
        for key, param in module.named_parameters():
            offset = 0 if "offset" in formula.what or "1 + " in formula.what else "bias" not in key
            param.copy_(offset + 0.3 * draw(*param.shape))
        theirs = formula.call(module, x, gate)
    params = {key: to_jax(param) for key, param in module.named_parameters()}
    if "norms.0.weight" in params:
        params = {"weights": jnp.stack([*params.values()])}
    run = jax.jit(jax.vmap(ft.partial(evaluated, lines or formula.lines), in_axes=(0, 0, None)))
    ours = run(to_jax(x), to_jax(gate), params)
    return np.asarray(to_jax(theirs)), np.asarray(ours).reshape(theirs.shape)


def to_jax(tensor: Any) -> jax.Array:
    """Without NumPy, which has no bfloat16 of torch's."""
    tensor = tensor.detach()
    return jnp.asarray(tensor.float().numpy()).astype(str(tensor.dtype).removeprefix("torch."))


def evaluated(lines: str, x, gate, params: dict[str, jax.Array]):
    def layer(cls, **options):
        given = [params.get("weight"), params.get("bias")]
        norm = cls(WIDTH, EPS, **options)
        return eqx.tree_at(lambda m: [m.weight, m.bias], norm, given, is_leaf=lambda m: m is None)

    names = {
        **{"x": x, "gate": gate, "eps": EPS, "jax": jax, "jnp": jnp, "eqx_norms": eqx_norms},
        **{"rms_norm": rms_norm, "layer_norm": layer_norm, "rounded": rounded},
        "RMSNorm": ft.partial(layer, eqx_norms.RMSNorm),
        "LayerNorm": ft.partial(layer, eqx_norms.LayerNorm),
        "f32": lambda a: a.astype(jnp.float32),
        "heads": lambda a: a.reshape(HEADS, -1),
        **params,
    }
    y = eval(lines, names)
    return y(x) if callable(y) else y


class Share(NamedTuple):
    equal: float
    most_ulps: int


def share(theirs: np.ndarray, ours: np.ndarray) -> Share:
    """Of entries with the same bits, and how many numbers of the dtype lie between the others."""
    assert theirs.dtype == ours.dtype and np.isfinite(np.float32(theirs)).all()
    order = lambda a: np.where(a.view(np.int16) < 0, -32768 - a.view(np.int16), a.view(np.int16))
    apart = np.abs(order(theirs).astype(int) - order(ours).astype(int))
    return Share(float(np.mean(apart == 0)), int(apart.max()))


def main() -> None:
    print("| | classes | the lines | bf16 | f16 | a guess, bf16 |\n|---|---:|---|---:|---:|---:|")
    stands = [*of_each_class().values()]
    for formula in FORMULAS.values():
        worst = {}
        for dtype in DTYPES:
            runs = [share(*theirs_and_ours(formula, name, dtype)) for name in formula.classes]
            worst[dtype] = min(runs)
        name = next(iter(formula.classes))
        guess = share(*theirs_and_ours(formula, name, "bfloat16", formula.guess))
        count = sum(stands.count(name) for name in formula.classes)
        shares = " | ".join(f"{100 * worst[dtype].equal:.3f}" for dtype in DTYPES)
        guessed = f"{100 * guess.equal:.0f}" if formula.guess != formula.lines else ""
        print(
            f"| {formula.what}: `{name}` | {count} | `{formula.lines}` | {shares} | {guessed} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
