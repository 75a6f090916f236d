# SPDX-License-Identifier: Apache-2.0
"""Counting bytes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def nbytes(obj: object) -> int:
    """Bytes of all tensors in ``obj``: a tensor, or any nesting of mappings and iterables of them.

    A tensor class that is made of other tensors (integer codes and their scales) counts as those.

    Example:
        >>> import torch
        >>> nbytes({"exp_avg": torch.zeros(4, 2), "step": 3})
        32
    """
    if isinstance(obj, Tensor):
        if is_traceable_wrapper_subclass(obj):
            return sum(nbytes(getattr(obj, name)) for name in obj.__tensor_flatten__()[0])
        return obj.numel() * obj.element_size()
    if isinstance(obj, Mapping):
        return sum(nbytes(value) for value in obj.values())
    if isinstance(obj, Iterable) and not isinstance(obj, (str, bytes)):
        return sum(nbytes(value) for value in obj)
    return 0
