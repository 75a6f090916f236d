# SPDX-License-Identifier: Apache-2.0
"""One tensor as it is kept under a named storage, and read again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_galore.storage.blockwise import ABSMAX_DTYPE, INT4, INT8, Blockwise

DTYPES: dict[str, torch.dtype | None] = {
    "param": None,  # that of the weight
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
CODECS: dict[str, Blockwise] = {"int8": INT8, "int4": INT4}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Plain tensors that stand for one tensor; they say themselves how they are to be read.

    Args:
        codes: The tensor itself, or integer codes: int8 for 8 bits, uint8 for 4.
        absmax: Scales of the blocks of codes; None for the tensor itself.
        shape: Of the tensor.
    """

    codes: Tensor
    absmax: Tensor | None
    shape: tuple[int, ...]

    @property
    def is_coded(self) -> bool:
        """Whether reading decodes."""
        return self.absmax is not None

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor: itself, in its own dtype, where it is kept as it is; else decoded into ``dtype``."""
        if self.absmax is None:
            return self.codes
        codec = INT8 if self.codes.dtype == torch.int8 else INT4
        return codec.decode(self.codes, self.absmax, self.shape, dtype)


def write(value: Tensor, *, storage: str, param_dtype: torch.dtype) -> Stored:
    """Keep ``value`` in fresh contiguous tensors.

    Never views: a slice of an SVD factor would keep the whole factor alive, and be saved whole in a checkpoint.

    Args:
        value: Any tensor.
        storage: A name of ``DTYPES`` or ``CODECS``.
        param_dtype: What ``param`` stands for.
    """
    shape = tuple(value.shape)
    if storage in CODECS:
        codes, absmax = CODECS[storage].encode(value)
        return Stored(codes=codes, absmax=absmax, shape=shape)
    kept = torch.empty(shape, dtype=DTYPES[storage] or param_dtype, device=value.device)
    return Stored(codes=kept.copy_(value), absmax=None, shape=shape)


def allocate(shape: Sequence[int], *, storage: str, device: torch.device) -> Stored:
    """Memory for a tensor of ``shape`` as :func:`write` would keep it, with nothing written yet.

    Args:
        shape: Of the tensor.
        storage: ``fp64`` or a name of ``DTYPES`` (but ``param``) or ``CODECS``.
        device: Where.
    """
    shape = tuple(shape)
    if storage in CODECS:
        empty = torch.zeros(shape, dtype=torch.float32, device=device)
        codes, absmax = CODECS[storage].encode(empty)
        return Stored(codes=codes, absmax=absmax, shape=shape)
    dtype = torch.float64 if storage == "fp64" else DTYPES[storage]
    return Stored(codes=torch.empty(shape, dtype=dtype, device=device), absmax=None, shape=shape)


def stored_bytes(shape: Sequence[int], *, storage: str, param_dtype: torch.dtype) -> int:
    """Bytes that :func:`write` takes for a tensor of ``shape``."""
    numel = math.prod(shape)
    if storage in CODECS:
        return CODECS[storage].nbytes(numel)
    return numel * (DTYPES[storage] or param_dtype).itemsize


def holds(codes: Tensor, absmax: Tensor | None, shape: Sequence[int]) -> bool:
    """Whether the two are codes and scales of a tensor of ``shape``.

    Args:
        codes: Perhaps codes.
        absmax: Perhaps their scales.
        shape: Of the tensor.
    """
    codec = {torch.int8: INT8, torch.uint8: INT4}.get(codes.dtype)
    if codec is None or absmax is None:
        return False
    numel = math.prod(shape)
    coded = tuple(shape) if codec.bits == 8 else (math.ceil(numel / 2),)
    blocks = math.ceil(numel / codec.block_size)
    return codes.shape == coded and absmax.shape == (blocks,) and absmax.dtype == ABSMAX_DTYPE
