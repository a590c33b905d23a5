"""Which way round a mask is: one boolean array, given to attention in many libraries.

    pip install -e ".[masks]" && python benchmarks/masks.py    # the tables of docs/masks.md
    python benchmarks/masks.py --page    # the blocks of that page, with their traps

Nothing here is from memory. Queries are numbers, the keys and values are x, and who reads whom is
found by editing x one position at a time. Libraries that are not JAX's are called from it. Those
that are not installed are left out, with a line that says so.
"""

import argparse
import importlib.metadata
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqx_norms.causality import check_reads, rules

os.environ.setdefault("KERAS_BACKEND", "jax")

T_OUT, T_IN, D = 6, 8, 4
RNG = np.random.default_rng(0)
Q, X = (RNG.standard_normal((n, D)).astype(np.float32) for n in (T_OUT, T_IN))
# No library's own pattern, turned nor mirrored; every row reads something, and not everything.
R = RNG.random((T_OUT, T_IN)) < 0.5
R[:, 0], R[:, -1] = np.arange(T_OUT) % 2 == 0, np.arange(T_OUT) % 2 == 1
SQUARE = rules.causal(T_IN)
LOWEST = float(np.finfo(np.float32).min)


class Library(NamedTuple):
    """One way to call attention.

    `attend(q, x, mask=..., causal=..., window=...)` has queries (T_out, D), keys and values (T_in,
    D), one head and no batch; what an option does not do it has no argument for. `exact(R)` is the
    mask that reads exactly the boolean array `R`, `written` how that is written.
    """

    name: str
    package: str
    attend: Callable
    exact: Callable[[np.ndarray], Any] = lambda rule: rule
    written: str = "`mask=R`"
    gradient: Callable | None = None  # by default JAX's


LIBRARIES: list[Library] = []
ABSENT: list[str] = []


def library(make: Callable[[], Library | list[Library]]) -> None:
    """Enters what `make` returns, if the library can be imported."""
    try:
        made = make()
    except ImportError as error:
        ABSENT.append(f"{make.__name__}: {error}")
        return
    LIBRARIES.extend(made if isinstance(made, list) else [made])


# ---- In JAX


@library
def jax_nn():
    one = lambda a: jnp.asarray(a)[None, :, None]  # batch and head

    def attend(q, x, mask=None, causal=False, window=None):
        mask = None if mask is None else jnp.asarray(mask)
        out = jax.nn.dot_product_attention(
            one(q), one(x), one(x), mask=mask, is_causal=causal, local_window_size=window
        )
        return out[0, :, 0]

    def biased(q, x, mask=None):
        bias = None if mask is None else jnp.asarray(mask, jnp.float32)
        return jax.nn.dot_product_attention(one(q), one(x), one(x), bias=bias)[0, :, 0]

    return [
        Library("`jax.nn`, `mask=`", "jax", attend),
        Library("`jax.nn`, `bias=`", "jax", biased, rules.additive, "`bias=additive(R)`"),
    ]


@library
def equinox():
    import equinox as eqx

    layer = eqx.nn.MultiheadAttention(2, D, key=jax.random.key(0))
    attend = lambda q, x, mask=None: layer(q, x, x, None if mask is None else jnp.asarray(mask))
    return Library("Equinox", "equinox", attend)


@library
def flax():
    import flax.linen as nn
    from flax import nnx

    one = lambda a: jnp.asarray(a)[None, :, None]
    array = lambda mask: None if mask is None else jnp.asarray(mask)

    def linen(q, x, mask=None):
        return nn.dot_product_attention(one(q), one(x), one(x), mask=array(mask))[0, :, 0]

    def attend(q, x, mask=None, causal=False):
        call = nnx.dot_product_attention
        return call(one(q), one(x), one(x), mask=array(mask), is_causal=causal)[0, :, 0]

    return [
        Library("Flax `linen`", "flax", linen),
        Library("Flax `nnx`", "flax", attend),
    ]


@library
def haiku():
    import haiku as hk

    def forward(q, x, mask):
        return hk.MultiHeadAttention(2, 2, w_init=hk.initializers.RandomNormal())(q, x, x, mask)

    init, apply = hk.without_apply_rng(hk.transform(forward))
    params = init(jax.random.key(0), Q, X, None)
    array = lambda mask: None if mask is None else jnp.asarray(mask)[None]
    attend = lambda q, x, mask=None: apply(params, jnp.asarray(q), jnp.asarray(x), array(mask))
    return Library("Haiku", "dm-haiku", attend, written="`mask=R[None]`")


@library
def tokamax():
    import tokamax

    one = lambda a: jnp.asarray(a)[None, :, None]

    def attend(q, x, mask=None, causal=False, window=None):
        mask = None if mask is None else jnp.asarray(mask)
        return tokamax.dot_product_attention(
            *(one(q), one(x), one(x)),
            mask=mask,
            is_causal=causal,
            local_window_size=window,
            implementation="xla",
        )[0, :, 0]

    return Library("tokamax", "tokamax", attend)


@library
def splash():
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def attend(q, x, mask=None, causal=False, window=None):
        """By the reference beside the kernels, which are for TPUs."""
        shape, masks = (len(q), len(x)), []
        if mask is not None:
            masks.append(splash.NumpyMask(np.asarray(mask)))
        if causal:
            masks.append(splash.CausalMask(shape))
        if window is not None:
            masks.append(splash.LocalMask(shape, (window, window), 0))
        whole = masks[0] if masks else splash.FullMask(shape)
        for one in masks[1:]:
            whole = whole & one
        run = splash.make_masked_mha_reference(splash.MultiHeadMask([whole]))
        return run(jnp.asarray(q)[None], jnp.asarray(x)[None], jnp.asarray(x)[None])[0]

    return Library("splash attention", "jax", attend, written="`NumpyMask(R)`")


@library
def keras():
    import keras

    def layer(window=None):
        made = keras.layers.MultiHeadAttention(1, D, sliding_window=window, seed=0)
        made.build((1, T_OUT, D), (1, T_IN, D))
        return made

    layers = {None: layer(), 4: layer(4)}
    array = lambda mask: None if mask is None else jnp.asarray(mask)[None]

    def attend(q, x, mask=None, causal=False, window=None):
        q, x = jnp.asarray(q)[None], jnp.asarray(x)[None]
        run = layers[window]
        return run(q, x, attention_mask=array(mask), use_causal_mask=causal)[0]

    written = "`attention_mask=R[None]`"
    return Library("Keras", "keras", attend, written=written)


@library
def penzai():
    from penzai import pz

    def attend(q, x, mask=None, causal=False, window=None):
        wrap = lambda a, *names: pz.nx.wrap(jnp.asarray(a)).tag(*names)
        scores = wrap(jnp.asarray(q) @ jnp.asarray(x).T, "seq", "kv_seq")
        ends = [wrap(np.arange(len(q)), "seq"), wrap(np.arange(len(x)), "seq")]
        sides = {"mask": mask if mask is None else wrap(mask, "seq", "kv_seq")}
        sides |= {"q": ends[0], "kv": ends[1]}
        names = dict(query_positions_input_name="q", kv_positions_input_name="kv")
        if mask is not None:
            scores = pz.nn.ApplyExplicitAttentionMask("mask", LOWEST)(scores, **sides)
        if causal:
            scores = pz.nn.ApplyCausalAttentionMask(LOWEST, **names)(scores, **sides)
        if window is not None:
            layer = pz.nn.ApplyCausalSlidingWindowAttentionMask(LOWEST, window, **names)
            scores = layer(scores, **sides)
        scores = scores.untag("seq", "kv_seq").unwrap()
        return jax.nn.softmax(scores) @ jnp.asarray(x)

    written = "`mask=R` in `ApplyExplicitAttentionMask`"
    return Library("penzai", "penzai", attend, written=written)


@library
def haliax():
    import haliax as hax
    from haliax.nn.attention import causal_mask, dot_product_attention

    def attend(q, x, mask=None, causal=False):
        q_axis, kv_axis = hax.Axis("q", len(q)), hax.Axis("kv", len(x))
        one, other = (hax.named(jnp.asarray(a), (n, "d")) for n, a in (("q", q), ("kv", x)))
        masks = [] if mask is None else [hax.named(jnp.asarray(mask), ("q", "kv"))]
        masks += [causal_mask(q_axis, kv_axis)] if causal else []
        whole = masks[0] & masks[1] if len(masks) == 2 else masks[0] if masks else None
        return dot_product_attention("kv", "d", one, other, other, mask=whole).array

    return Library("haliax", "haliax", attend, written='`mask=named(R, ("q", "kv"))`')


# ---- Not in JAX


def no_gradient(*_):
    raise NotImplementedError


def hosted(attend: Callable, convert: Callable, back: Callable) -> Callable:
    """`attend` of another library's arrays as a function of JAX's."""

    def run(q, x, mask=None, **options):
        mask = None if mask is None else convert(np.asarray(mask))
        # An error is to be seen as one, and no callback may raise.
        call = lambda q, x: back(
            attend(convert(np.asarray(q)), convert(np.asarray(x)), mask, **options)
        )
        if not isinstance(x, jax.core.Tracer):
            return call(q, x)
        return jax.pure_callback(call, jax.ShapeDtypeStruct(q.shape, jnp.float32), q, x)

    return run


@library
def torch():
    import torch
    from torch.nn import functional

    sdpa = functional.scaled_dot_product_attention
    one = lambda a: a[None, None]
    back = lambda a: a.detach().numpy()

    def attend(q, x, mask=None, causal=False):
        return sdpa(one(q), one(x), one(x), attn_mask=mask, is_causal=causal)[0, 0]

    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(D, 1, batch_first=True)

    def multihead(q, x, mask=None, causal=False):
        if causal and mask is None:
            raise TypeError("needs a mask beside the flag")
        options = dict(attn_mask=mask, is_causal=causal, need_weights=False)
        return layer(q[None], x[None], x[None], **options)[0][0]

    def flexible(q, x, mask=None):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        block = None
        if mask is not None:
            may = lambda batch, head, t, j: mask[t, j]
            block = create_block_mask(may, 1, 1, len(q), len(x), device="cpu")
        return flex_attention(one(q), one(x), one(x), block_mask=block)[0, 0]

    def gradient(attend, q, x, mask, cotangent):
        x = torch.tensor(x, requires_grad=True)
        attend(torch.tensor(q), x, torch.tensor(mask)).backward(torch.tensor(cotangent))
        return x.grad.numpy()

    def entry(name, attend, *more):
        run = hosted(attend, lambda a: torch.tensor(a), back)
        return Library(name, "torch", run, *more, gradient=lambda *a: gradient(attend, *a))

    return [
        entry("torch SDPA", attend, lambda rule: rule, "`attn_mask=R`"),
        entry("torch `MultiheadAttention`", multihead, np.logical_not, "`attn_mask=~R`"),
        entry("torch `flex_attention`", flexible, lambda rule: rule, "`mask_mod` of `R[t, j]`"),
    ]


@library
def mlx():
    import mlx.core as mx

    one = lambda a: a[None, None]

    def attend(q, x, mask=None, causal=False):
        if causal and mask is not None:
            raise TypeError("one argument for both")
        mask = "causal" if causal else mask
        sdpa = mx.fast.scaled_dot_product_attention
        return sdpa(one(q), one(x), one(x), scale=D**-0.5, mask=mask)[0, 0]

    def gradient(q, x, mask, cotangent):
        q, x, mask, cotangent = map(mx.array, (q, x, mask, cotangent))
        return np.array(mx.grad(lambda x: (attend(q, x, mask) * cotangent).sum())(x))

    return Library("MLX", "mlx", hosted(attend, mx.array, np.array), gradient=gradient)


@library
def tinygrad():
    os.environ.setdefault("DEV", "PYTHON")  # which asks for no compiler
    from tinygrad import Tensor

    def attend(q, x, mask=None, causal=False):
        one = lambda a: a.reshape(1, 1, *a.shape)
        sdpa = one(q).scaled_dot_product_attention
        return sdpa(one(x), one(x), attn_mask=mask, is_causal=causal).reshape(*q.shape)

    def gradient(q, x, mask, cotangent):
        x = Tensor(x)
        weighted = (attend(Tensor(q), x, Tensor(mask)) * Tensor(cotangent)).sum()
        return weighted.gradient(x)[0].numpy()

    run = hosted(attend, Tensor, lambda a: a.numpy())
    return Library("tinygrad", "tinygrad", run, written="`attn_mask=R`", gradient=gradient)


@library
def onnx():
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def attend(q, x, mask=None, causal=False):
        floats = lambda name, a: helper.make_tensor_value_info(name, TensorProto.FLOAT, a)
        names = ["q", "k", "k"] + ["mask"] * (mask is not None)
        node = helper.make_node("Attention", names, ["y"], is_causal=int(causal))
        held = [] if mask is None else [numpy_helper.from_array(mask, "mask")]
        ends = [floats("q", (1, 1, *q.shape)), floats("k", (1, 1, *x.shape))]
        out = [floats("y", (1, 1, *q.shape))]
        graph = helper.make_graph([node], "attention", ends, out, held)
        opset = [helper.make_opsetid("", 24)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=10)
        session = onnxruntime.InferenceSession(model.SerializeToString())
        return session.run(None, {"q": q[None, None], "k": x[None, None]})[0][0, 0]

    run = hosted(attend, lambda a: a, lambda a: a)
    written = "`attn_mask` = `R`"
    return Library("ONNX `Attention`", "onnxruntime", run, written=written, gradient=no_gradient)


@library
def transformers():
    import torch
    from transformers import DynamicCache, GPT2Config, MistralConfig, masking_utils
    from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

    module = torch.nn.Module().eval()
    one = lambda a: a[None, None]

    def attend(q, x, mask=None, causal=False, window=None):
        if causal or window:
            if mask is not None:
                raise TypeError("one argument for both")
            make = "create_sliding_window_causal_mask" if window else "create_causal_mask"
            config = MistralConfig(sliding_window=window) if window else GPT2Config()
            config._attn_implementation = "eager"
            cache = DynamicCache()
            if len(x) > len(q):  # What came before the queries lies in a cache.
                cache.update(*[one(x[: len(x) - len(q)])] * 2, 0)
            mask = getattr(masking_utils, make)(config, one(q)[0], None, cache)[0, 0]
        mask = None if mask is None else one(mask)
        return eager_attention_forward(module, one(q), one(x), one(x), mask)[0][0, :, 0]

    def gradient(q, x, mask, cotangent):
        x = torch.tensor(x, requires_grad=True)
        attend(torch.tensor(q), x, torch.tensor(mask)).backward(torch.tensor(cotangent))
        return x.grad.numpy()

    run = hosted(attend, lambda a: torch.tensor(a), lambda a: a.detach().numpy())
    lowest = lambda rule: np.where(rule, np.float32(0), np.float32(LOWEST))  # as its own masks
    written = "`where(R, 0, finfo.min)`"
    return Library("transformers, eager", "transformers", run, lowest, written, gradient)


# ---- What is found


def who(fn: Callable, x: np.ndarray = X) -> np.ndarray:
    """`[t, j]`: whether an edit of input j moves output t. By the rows that softmax makes of it."""
    base = np.asarray(fn(x))
    found = np.zeros((len(base), len(x)), bool)
    for j in range(len(x)):
        edited = x.copy()
        edited[j] += 1.0
        out = np.asarray(fn(edited))
        found[:, j] = (out != base).any(1) & ~(np.isnan(out) & np.isnan(base)).all(1)
    return found


def tried(run: Callable[[], str]) -> str:
    """A cell of the table; an error is a finding, the lack of an argument none."""
    try:
        return run()
    except (TypeError, KeyError) as error:
        lacks = "unexpected keyword" in str(error) or "beside the flag" in str(error)
        lacks = lacks or isinstance(error, KeyError) or "one argument" in str(error)
        return "" if lacks else "error"
    except NotImplementedError:
        return ""
    except Exception:
        return "error"


def meaning(one: Library, mask: np.ndarray) -> str:
    """Who is read under `mask`, where `R` is what was meant."""
    reads = who(lambda x: one.attend(Q, x, mask=mask))
    if np.array_equal(reads, R):
        return "R"
    if np.array_equal(reads, ~R):
        return "**the opposite**"
    return "**no mask**" if reads.all() else "something else"


def alignment(one: Library) -> str:
    reads = who(lambda x: one.attend(Q, x, causal=True))
    for align in ("start", "end"):
        if np.array_equal(reads, rules.causal(T_OUT, T_IN, align=align)):
            return align
    return "something else"


def both(one: Library) -> str:
    """A mask and the flag, of as many outputs as inputs."""
    mask = R[np.arange(T_IN) % T_OUT] | np.eye(T_IN, dtype=bool)
    reads = who(lambda x: one.attend(X, x, mask=one.exact(mask), causal=True))
    for words, found in {"both": mask & SQUARE, "**the flag**": SQUARE, "the mask": mask}.items():
        if np.array_equal(reads, found):
            return words
    return "something else"


def keys(one: Library) -> str:
    """How many keys an output in the middle of 12 reads under a window of 4."""
    x = RNG.standard_normal((12, D)).astype(np.float32)
    row = who(lambda edited: one.attend(x, edited, window=4), x)[6]
    return f"{row[:7].sum()} keys" + f", {row[7:].sum()} after" * bool(row[7:].any())


DEAD = R & (np.arange(T_OUT) != 2)[:, None]


def dead_row(one: Library) -> str:
    out = np.asarray(one.attend(Q, X, mask=one.exact(DEAD)))[2]
    if np.isnan(out).all():
        return "NaN"
    if not out.any():
        return "zeros"
    reads = who(lambda x: one.attend(Q, x, mask=one.exact(DEAD)))[2]
    of_others = np.asarray(one.attend(Q + 1, X, mask=one.exact(DEAD)))[2]
    # What reads everything, whatever the query is, is an average.
    average = reads.all() and np.allclose(out, of_others, atol=1e-5)
    return "average of all" if average else "something else"


def dead_gradient(one: Library) -> str:
    """Of the output at a dead row: beside differences of that output."""
    cotangent = np.zeros((T_OUT, D), np.float32)
    cotangent[2] = RNG.standard_normal(D)
    mask = one.exact(DEAD)
    if one.gradient is not None:
        found = one.gradient(Q, X, mask, cotangent)
    else:
        found = jax.vjp(lambda x: one.attend(Q, x, mask=mask), jnp.asarray(X))[1](cotangent)[0]
    if np.isnan(found).any():
        return "NaN"
    value = lambda x: (np.asarray(one.attend(Q, x, mask=mask), np.float64) * cotangent).sum()
    true, step = np.zeros_like(X), 0.1
    for at in np.ndindex(*X.shape):
        moved = np.zeros_like(X)
        moved[at] = step
        true[at] = (value(X + moved) - value(X - moved)) / (2 * step)
    if np.allclose(found, true, atol=1e-3):
        return "right" if found.any() else "0"
    return "wrong"


def reads_exactly(one: Library) -> str:
    """The check of R, passed so that it reads exactly R."""
    mask = one.exact(R)
    fn = lambda x: one.attend(Q, x, mask=mask)
    report = check_reads(fn, X, R, required=R, confirm_x64=one.package in JAX)
    return one.written if report.status.startswith("clear") else f"**{report.status}**"


JAX = ("jax", "equinox", "flax", "dm-haiku", "keras", "penzai", "haliax", "tokamax")
MEANING = {
    "`R`": lambda one: meaning(one, R),
    "1. and 0.": lambda one: meaning(one, R.astype(np.float32)),
    "0. and lowest": lambda one: meaning(one, np.where(R, 0, LOWEST).astype(np.float32)),
    "reads exactly R by": reads_exactly,
}
REST = {
    "flag aligns at": alignment,
    "mask and flag": both,
    "4 is": keys,
    "a dead row": dead_row,
    "its gradient": dead_gradient,
}


def row(one: Library, columns: dict[str, Callable]) -> str:
    cells = [tried(lambda cell=cell: cell(one)) for cell in columns.values()]
    return f"| {' | '.join([one.name, *cells])} |"


def table(columns: dict[str, Callable]) -> str:
    head = ["", *columns]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(row(one, columns) for one in LIBRARIES)])


# ---- The blocks of the page

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "masks.md"


def run_page() -> None:
    """From top to bottom, `python` and `py`, without those that need a package."""
    namespace = {"__name__": "__docs__"}
    for block in re.findall(r"```py(?:thon)?\n(.*?)```", PAGE.read_text(), re.DOTALL):
        try:
            exec(compile(block, str(PAGE), "exec"), namespace)
        except ImportError as error:
            print(f"Left out, {error}:\n{block}")


def main() -> None:
    """Prints both tables, the versions, and what could not be imported."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--page", action="store_true", help="run the blocks of the page instead")
    options = parser.parse_args()
    del sys.argv[1:]  # tokamax parses it as well, and refuses what it does not know
    if options.page:
        run_page()
    else:
        print(table(MEANING), table(REST), sep="\n\n")
    packages = dict.fromkeys(one.package for one in LIBRARIES)
    print("\n" + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages) + ".")
    print(*(f"Not imported: {absent}" for absent in ABSENT), sep="\n")


if __name__ == "__main__":
    main()
