"""Torch's tensors as NumPy's arrays and back; torch is never imported for somebody who has not."""

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np


def the_torch() -> Any:
    import torch

    return torch


def as_array(leaf: Any) -> Any:
    """`leaf`; a tensor as an array."""
    torch = sys.modules.get("torch")
    return to_numpy(leaf) if torch is not None and torch.is_tensor(leaf) else leaf


def to_numpy(tensor: Any) -> np.ndarray:
    """The same numbers in the same dtype."""
    torch = the_torch()
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()


def from_numpy(values: np.ndarray) -> Any:
    torch = the_torch()
    if values.dtype == jnp.bfloat16:
        return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(values.astype(np.int64 if values.dtype == np.int32 else values.dtype))
