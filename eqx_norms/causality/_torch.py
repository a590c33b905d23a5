"""Torch modules as functions of arrays, and in float64; torch is imported where it is used."""

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from .._real import Integer, Real
from ._host import Host
from ._tensors import from_numpy, the_torch, to_numpy

# What Hugging Face calls the argument that holds what earlier tokens left, and the output.
_CACHES = ("past_key_values", "cache_params", "state", "mems")


def from_torch(
    model: Any,
    call: Callable[[Any, PyTree], PyTree] | None = None,
    *,
    batch_axis: Integer | None = None,
) -> "TorchFunction":
    """A `torch.nn.Module` as a function of arrays, for all the checks of this module.

    `x` is what the module is called with, as an array or a torch tensor, including its batch axis.
    The axis of time is then `axis=1`.

    ```python
    import torch
    from eqx_norms.causality import assert_causal, from_torch

    model = torch.nn.LSTM(4, 8, batch_first=True).eval()
    fn = from_torch(model, call=lambda model, x: model(x)[0])
    assert_causal(fn, torch.randn(1, 12, 4), axis=1)
    ```

    It runs eagerly, without gradients, on the device of its parameters, in the mode that it is
    in, `model.eval()` or `model.train()`. In train mode dropout draws the same numbers in each
    call (the report says so), and buffers, such as the statistics of batch norm, are restored.

    The second precision is a copy of the module in float64. What its code casts to float32, or
    makes in float32, is float64 as well. Parameters and tables keep the values that they were
    rounded to. If the copy cannot run, for example because of a kernel of its own, the report says
    why, and what is no larger than rounding is `"undecided"`. Experts of Hugging Face's models run
    one by one there, because grouped products refuse float64.

    **Arguments:**

    - `model`: the module. `perturb_params` adds noise to a copy of its parameters.
    - `call`: `call(model, x)` is what to run, with tensors in `x`, and returns tensors. It must use
        the `model` that it is given, which may be the copy. The default is `model(x)`, or
        `model(**x)` for a dict, with `use_cache=False` if there is such an argument. It returns the
        `logits` or the `last_hidden_state` of the output if it has one of these, else the whole.
    - `batch_axis`: as for [`eqx_norms.causality.host`][]: 0 for a model that treats the examples
        of a batch each by itself, as language models do. Edits then run together, which is many
        times as fast.

    **Returns:**

    A function of `x`. Integers of 32 bits, as JAX has them, reach the model with 64 bits, as torch
    has them.

    **Raises:**

    What torch raises, unchanged.
    """
    torch = the_torch()
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return TorchFunction(model, _plain_call if call is None else call, batch_axis)


def understood(fn: Any) -> Any:
    """`fn`; a bare torch module as the function that it is."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(fn, torch.nn.Module):
        return fn
    return from_torch(fn)


def stepped(
    model: Any,
    cuts: Integer | Sequence[Integer] = 1,
    *,
    axis: Integer = 1,
    call: Callable[[Any, PyTree, Any], tuple[Any, Any]] | None = None,
    beside: PyTree | None = None,
    batch_axis: Integer | None = None,
) -> "TorchFunction":
    """A torch model with a cache, as one function that feeds it all tokens in pieces.

    `assert_same(from_torch(model), stepped(model), tokens, axis=1)` tests the cache.

    **Arguments:**

    - `model`: a `torch.nn.Module`.
    - `cuts`: how many tokens come at a time, by default one; or where to cut, as in `(5, 12)`.
    - `axis`: the axis of the positions, in all inputs and in the output.
    - `call`: `call(model, x, cache)` runs one piece and returns its output and the new cache. The
        first cache is None. The default is that of Hugging Face: `past_key_values=`, or
        `cache_params=`, `state=`, `mems=`, with `use_cache=True`. It returns the `logits` of the
        output. In a dict an `attention_mask` reaches from the first position to the end of the
        piece, as these models require, and all else is cut.
    - `beside`: the input of a second request, as long as the first. Its pieces run in between, with
        a cache of their own. That must not change the result.
    - `batch_axis`: as for `from_torch`.

    **Returns:**

    A function of the whole input, which returns the outputs of the pieces, put together.
    """
    pieces = functools.partial(_in_pieces, cuts=cuts, axis=int(axis), step=call or _cached_call)

    def run(model: Any, x: PyTree) -> Any:
        torch = the_torch()
        others = iter(())
        if beside is not None:
            others = pieces(model, jax.tree.map(lambda leaf: _like(leaf, model), beside))
        outs = []
        for out in pieces(model, x):
            outs.append(out)
            next(others, None)
        return torch.cat(outs, dim=int(axis))

    return from_torch(model, call=run, batch_axis=batch_axis)


class TorchFunction(Host):
    """A torch module beside JAX."""

    def __init__(
        self,
        model: Any,
        call: Callable[[Any, PyTree], PyTree],
        batch_axis: Integer | None = None,
    ):
        super().__init__(self._run, type(model).__name__, batch_axis)
        self.model, self.call = model, call
        self._copies: dict[np.dtype, Any] = {}

    def perturbed(self, sigma: Real, rng: np.random.Generator) -> tuple["TorchFunction", list[str]]:
        """A copy with normal noise on its parameters, and the names of the float buffers."""
        torch = the_torch()
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    noise = sigma * rng.standard_normal(tuple(parameter.shape))
                    parameter.add_(torch.as_tensor(noise).to(parameter))
        kept = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        return TorchFunction(model, self.call, self.batch_axis), kept

    def _run(self, x: PyTree, to: np.dtype | None) -> PyTree:
        torch = the_torch()
        model = self.model if to is None else self._in(to)
        x = jax.tree.map(lambda leaf: _like(leaf, model), x)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_buffers_kept(model))
            if to is not None:
                stack.enter_context(_all_floats_as(_dtype(to)))
            out = self.call(model, x)
        return jax.tree.map(lambda leaf: to_numpy(leaf) if torch.is_tensor(leaf) else leaf, out)

    def _in(self, to: np.dtype) -> Any:
        """A copy of the module in this precision."""
        if to not in self._copies:
            model = copy.deepcopy(self.model).to(_dtype(to))
            for module in model.modules():
                for name, value in vars(module).items():
                    if the_torch().is_tensor(value) and value.is_floating_point():
                        setattr(module, name, value.to(_dtype(to)))
            if hasattr(model, "set_experts_implementation"):
                model.set_experts_implementation("eager")
            self._copies[to] = model
        return self._copies[to]


def _like(leaf: Any, model: Any) -> Any:
    """A tensor on the device of the model."""
    if isinstance(leaf, np.ndarray | jax.Array):
        leaf = from_numpy(np.asarray(leaf))
    if not the_torch().is_tensor(leaf):
        return leaf
    parameter = next(model.parameters(), None)
    return leaf if parameter is None else leaf.to(parameter.device)


def _plain_call(model: Any, x: PyTree) -> Any:
    accepts = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in accepts else {}
    return _told(model(**x, **options) if isinstance(x, Mapping) else model(x, **options))


def _cached_call(model: Any, x: PyTree, cache: Any) -> tuple[Any, Any]:
    accepts = inspect.signature(model.forward).parameters
    name = next((name for name in _CACHES if name in accepts), None)
    how = "say how: stepped(model, call=lambda model, x, cache: (output, cache))"
    if name is None:
        raise TypeError(f"{type(model).__name__} takes none of {', '.join(_CACHES)}; {how}")
    options = {name: cache} | ({"use_cache": True} if "use_cache" in accepts else {})
    out = model(**x, **options) if isinstance(x, Mapping) else model(x, **options)
    if name not in out:
        raise TypeError(f"{type(model).__name__} takes {name}= and does not return it; {how}")
    return _told(out), out[name]


def _told(out: Any) -> Any:
    names = [name for name in ("logits", "last_hidden_state") if hasattr(out, name)]
    return getattr(out, names[0]) if names else out


def _in_pieces(model: Any, x: PyTree, cuts, axis: int, step: Callable) -> Iterator[Any]:
    length = jax.tree.leaves(x)[0].shape[axis]
    if np.ndim(cuts) == 0:
        ends = [*range(int(cuts), length, int(cuts)), length]
    else:
        ends = [*map(int, cuts), length]
    if not all(a < b for a, b in zip([0, *ends], ends, strict=False)):
        raise ValueError(
            f"cuts must be a positive number of tokens, or rise between 0 and {length}, got {cuts}"
        )
    cache = None
    for start, end in zip([0, *ends], ends, strict=False):
        cut = lambda leaf, start=start, end=end: leaf.narrow(axis, start, end - start)
        piece = jax.tree.map(cut, x)
        if isinstance(x, Mapping) and "attention_mask" in x:
            piece = {**piece, "attention_mask": x["attention_mask"].narrow(axis, 0, end)}
        out, cache = step(model, piece, cache)
        yield out


@contextmanager
def _buffers_kept(model: Any) -> Iterator[None]:
    """Puts back what a module in train mode writes into its buffers."""
    training = any(module.training for module in model.modules())
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


@contextmanager
def _all_floats_as(dtype: Any) -> Iterator[None]:
    """In which casts to any float, and what is made in one, give this one."""
    torch = the_torch()
    from torch.overrides import TorchFunctionMode

    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    complexes = (torch.complex64, torch.complex128)
    to_complex = torch.complex128 if dtype == torch.float64 else torch.complex64
    casts = tuple(getattr(torch.Tensor, name) for name in ("half", "bfloat16", "float", "double"))
    reads_bits = (torch.Tensor.view,)

    def other(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype if value in floats else to_complex if value in complexes else value
        return value

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func in casts:
                return args[0].to(dtype)
            if func not in reads_bits:
                args = tuple(map(other, args))
                kwargs = {name: other(value) for name, value in kwargs.items()}
            out = func(*args, **kwargs)
            if torch.is_tensor(out) and out.dtype in floats and out.dtype != dtype:
                raise TypeError(f"{getattr(func, '__name__', func)} gave {out.dtype}, not {dtype}")
            return out

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with Mode():
            yield
    finally:
        torch.set_default_dtype(before)


def _dtype(to: np.dtype) -> Any:
    torch = the_torch()
    return {"float64": torch.float64, "float32": torch.float32}[np.dtype(to).name]
