# SPDX-License-Identifier: Apache-2.0
"""How a tensor is kept: the data type of a stored basis, reading it back, and counting bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype | None] = {
    "param": None,  # that of the weight
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def storage_dtype(storage: str, param_dtype: torch.dtype) -> torch.dtype:
    """The data type in which ``storage`` keeps a tensor that belongs to a weight of ``param_dtype``."""
    return DTYPES[storage] or param_dtype


def write(value: Tensor, *, storage: str, param_dtype: torch.dtype) -> Tensor:
    """A fresh contiguous tensor in the storage dtype.

    Never a view: a slice of an SVD factor would keep the whole factor alive, and be saved whole in a checkpoint.
    """
    stored = torch.empty(value.shape, dtype=storage_dtype(storage, param_dtype), device=value.device)
    return stored.copy_(value)


def nbytes(obj: object) -> int:
    """Bytes of all tensors in ``obj``: a tensor, or any nesting of mappings and iterables of them.

    Example:
        >>> nbytes({"exp_avg": torch.zeros(4, 2), "step": 3})
        32
    """
    if isinstance(obj, Tensor):
        return obj.numel() * obj.element_size()
    if isinstance(obj, Mapping):
        return sum(nbytes(value) for value in obj.values())
    if isinstance(obj, Iterable) and not isinstance(obj, (str, bytes)):
        return sum(nbytes(value) for value in obj)
    return 0
