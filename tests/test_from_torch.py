"""Torch modules: who reads whom, in train mode and not, with a cache and not.

What a module reads is known by the way it is made.
"""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from draws import seed
from refused import refused

from eqx_norms.causality import (
    assert_causal,
    assert_independent,
    assert_same,
    check_causal,
    check_same,
    from_torch,
    stepped,
)

if sys.version_info < (3, 12):
    import torch
    from torch import nn
else:
    pytest.skip(
        "torch is pinned to its small CPU build, which exists for Python 3.11",
        allow_module_level=True,
    )

IDS, T, D = 11, 8, 4
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def same_weights():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed(0))
        yield
    torch.set_num_threads(threads)


def words(report):
    return " ".join(str(report).split())


def tokens(examples=1):
    return torch.randint(1, IDS, (examples, T))


class Decoder(nn.Module):
    """One block of attention over a prefix, with a cache in Hugging Face's manner.

    `cast`: scores in float32 whatever x is, as many decoders have them. `forgets` says which cache.
    """

    def __init__(self, cast=False, forgets=False, reads_all=False):
        super().__init__()
        self.embed, self.qkv = nn.Embedding(IDS, D), nn.Linear(D, 3 * D)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(IDS)
        self.head = nn.Linear(D, IDS)
        self.cast, self.forgets, self.reads_all = cast, forgets, reads_all

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        q, k, v = self.qkv(self.embed(input_ids)).chunk(3, -1)
        if past_key_values is not None:
            k, v = (torch.cat(pair, 1) for pair in zip(past_key_values, (k, v), strict=True))
        past = k.shape[1] - q.shape[1]
        hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(past + 1)
        scores = q @ k.transpose(1, 2)
        if self.cast:
            scores = scores.float()
        if not self.reads_all:
            scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
        y = self.head(self.drop(scores.softmax(-1).to(v.dtype) @ v))
        cache = (k[:, -1:], v[:, -1:]) if self.forgets else (k, v)
        return Output(self.norm(y.transpose(1, 2)).transpose(1, 2), cache if use_cache else None)


class Output(dict):
    def __init__(self, logits, past_key_values):
        super().__init__(logits=logits, past_key_values=past_key_values)
        self.logits = logits


def test_a_decoder_and_one_that_reads_all():
    assert check_causal(from_torch(Decoder().eval()), tokens(), axis=1).status.startswith("clear")
    report = check_causal(from_torch(Decoder(reads_all=True).eval()), tokens(), axis=1)
    assert report.leak and len(report.pairs()) == T * (T - 1) // 2
    # A bare module, and tokens as JAX has them, of 32 bits.
    ids = jnp.asarray(tokens().numpy(), jnp.int32)
    assert check_causal(Decoder(reads_all=True).eval(), ids, axis=1).leak


class Total(nn.Module):
    """A prefix sum as the total minus the rest: its rounding reads the future."""

    def __init__(self, cast):
        super().__init__()
        self.cast, self.scale = cast, nn.Parameter(torch.randn(D))

    def forward(self, x):
        x = x * self.scale
        x = self.cast(x) if self.cast else x
        return x.sum(1, keepdim=True) - x.flip(1).cumsum(1).flip(1) + x


CASTS = {
    "none": None,
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float32),
    "dtype=": lambda x: x + torch.zeros(D, dtype=torch.float32),
    "default": lambda x: x * torch.arange(1, D + 1).sqrt(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_rounding_is_told_by_a_copy_in_float64(cast):
    module, x = Total(CASTS[cast]), torch.randn(1, T, D)
    assert check_causal(module, x, axis=1).status == "clear (float noise)"
    assert module.scale.dtype == torch.float32 and torch.get_default_dtype() == torch.float32


def test_what_has_no_copy_in_float64_is_undecided_and_says_why():
    class Kernel(Total):
        def forward(self, x):
            if x.dtype != torch.float32:
                raise RuntimeError("this kernel takes float32")
            return super().forward(x)

    report = check_causal(Kernel(None), torch.randn(1, T, D), axis=1)
    assert report.status == "undecided"
    assert "RuntimeError: this kernel takes float32" in words(report)


def test_modes_and_state():
    decoder = Decoder().train()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    report = check_causal(from_torch(decoder), tokens(2), axis=1)
    assert report.leak  # batch norm averages over time as well
    assert "drew random numbers" in words(report)
    after = decoder.state_dict()
    assert decoder.training and all(torch.equal(after[name], before[name]) for name in before)
    assert check_causal(from_torch(decoder.eval()), tokens(2), axis=1).status.startswith("clear")
    assert_independent(from_torch(decoder), tokens(3))

    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with refused(ValueError, "gives different outputs for the same x"):
        assert_causal(Counts(), torch.randn(1, T, D), axis=1)


def test_errors_are_those_of_torch():
    with pytest.raises(IndexError, match="index out of range in self"):
        assert_causal(Decoder().eval(), tokens(), axis=1, token_values=(IDS,))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        assert_causal(nn.LSTM(D, D), torch.randn(1, T, D + 1), axis=1)
    with refused(TypeError, "model must be a torch.nn.Module, got function"):
        from_torch(lambda x: x)


def test_a_dict_of_arrays_and_a_call_of_ones_own():
    class Masked(nn.Module):
        def forward(self, input_ids, attention_mask, scale):
            return ((input_ids * attention_mask).cumsum(1)[..., None] * scale.double(),)

    x = {"input_ids": tokens(), "attention_mask": torch.ones(1, T, dtype=torch.int64)}
    x |= {"scale": torch.tensor([2.0])}
    fn = from_torch(Masked(), call=lambda model, x: model(**x)[0])
    options = dict(axis=1, fixed=("attention_mask", "scale"))
    assert check_causal(fn, x, **options).status == "clear"


def test_bfloat16():
    lstm = nn.Linear(D, D).bfloat16()
    call = lambda model, x: model(x).cumsum(1)
    x = torch.randn(1, T, D).bfloat16()
    assert check_causal(from_torch(lstm, call), x, axis=1).status.startswith("clear")


def test_perturbed_parameters_wake_a_branch_of_zeros():
    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return x.cumsum(1) + self.gate * x.mean(1, keepdim=True)

    module, x = Zero(), torch.randn(1, T, D)
    assert check_causal(module, x, axis=1).status == "clear"
    assert check_causal(module, x, axis=1, perturb_params=0.02).leak
    assert module.gate == 0


@pytest.mark.parametrize("cast", [False, True])
def test_a_cache_in_pieces(cast):
    right, wrong = Decoder(cast).eval(), Decoder(cast, forgets=True).eval()
    ids, other = tokens(2), tokens(2)
    for cuts in (1, 3, (2, 7)):
        cached = stepped(right, cuts, beside=other)
        assert assert_same(from_torch(right), cached, ids, axis=1)
        report = check_same(from_torch(wrong), stepped(wrong, cuts), ids, axis=1)
        assert report.status == "different" and report.position > 0
    with refused(ValueError, "cuts must be a positive number of tokens, or rise between 0 and 8"):
        assert_same(from_torch(right), stepped(right, (5, 5)), ids)
    with refused(TypeError, "Linear takes none of past_key_values, cache_params"):
        assert_same(nn.Linear(D, D), stepped(nn.Linear(D, D)), torch.randn(1, T, D))


def test_requests_that_share_their_state():
    class Shared(Decoder):
        """Keeps its cache in itself, as if there were one request."""

        def forward(self, input_ids, past_key_values=None, use_cache=True):
            past = None if past_key_values is None else self.kept
            out = super().forward(input_ids, past, use_cache)
            self.kept = out["past_key_values"]
            return out

    model, ids = Shared().eval(), tokens()
    assert_same(from_torch(model), stepped(model), ids)
    report = check_same(from_torch(model), stepped(model, beside=tokens()), ids, axis=1)
    assert report.status == "different"

    class Remembers(Decoder):
        """Goes on from the last request."""

        kept = None

        def forward(self, input_ids, past_key_values=None, use_cache=True):
            out = super().forward(input_ids, self.kept)
            self.kept = out["past_key_values"]
            return out

    with refused(ValueError, "gives different outputs for the same x"):
        assert_same(from_torch(Decoder().eval()), from_torch(Remembers().eval()), ids)


def test_a_port_is_the_same():
    theirs = nn.Linear(D, D)
    weight, bias = (p.detach().numpy() for p in theirs.parameters())
    x = np.random.default_rng(seed(0)).standard_normal((T, D)).astype(np.float32)
    assert_same(theirs, lambda x: x @ weight.T + bias[None], x)
    assert check_same(theirs, lambda x: x @ weight + bias[None], x).status == "different"


def test_the_package_does_not_import_torch():
    code = "import sys, eqx_norms.causality; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
