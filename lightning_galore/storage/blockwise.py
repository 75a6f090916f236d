# SPDX-License-Identifier: Apache-2.0
"""Blocks of integer codes with one scale each: any tensor in 8 or 4 bits an entry.

In plain torch, so that codes are the same on every device, are plain tensors in a state dict, and need no package.
bitsandbytes' 4-bit types reach the same error (NF4 at the same block size: 9.2 % against 9.1 % here, of a Gaussian) but
have no unbiased rounding, and its 8-bit map is made for moments; torchao's are tensor classes, which a checkpoint that
is read without torchao could not hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

#: Scales are kept in half of fp32: rounded up first, so that no entry is cut off.
ABSMAX_DTYPE = torch.bfloat16
#: A block keeps its scale as long as its largest entry is at least this share of it, and grows by the headroom.
_KEEP_FROM, _HEADROOM = 0.75, 1.0625
#: Shares of the largest entry that are tried as the end of the 4-bit grid: a finer grid may be worth cutting it off.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True, kw_only=True)
class Blockwise:
    """Symmetric codes: blocks of ``block_size`` entries of the flattened tensor, of which the last may be shorter.

    ``bits=8``: codes -127 to 127 times ``absmax / 127``, int8 of the tensor's shape. ``bits=4``: codes -8 to 7 times
    ``-absmax / 8``, two in a byte of uint8 (``absmax`` has the sign of the entry that it was taken from, so that the
    code which has no opposite is the one that is needed). Zero stays zero, and a block need not contain it.

    Args:
        bits: Of one entry.
        block_size: Entries that share one scale.
    """

    bits: Literal[4, 8]
    block_size: int

    def nbytes(self, numel: int) -> int:
        """Bytes of codes and scales of ``numel`` entries."""
        blocks = math.ceil(numel / self.block_size)
        return math.ceil(numel * self.bits / 8) + blocks * ABSMAX_DTYPE.itemsize

    def encode(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and ``absmax`` ``(blocks,)`` of ``value``, rounded to the nearest code.

        With 4 bits the scale of a block is that of a few candidates which errs least in the mean of squares.
        """
        blocks = self._blocks(value)
        if self.bits == 8:
            absmax = _upward(blocks.abs().amax(1))
            return self._pack((blocks * _inverse(absmax, 127)).round_(), value.shape), absmax
        codes, absmax = _least_error(blocks)
        return self._pack(codes, value.shape), absmax

    def encode_stochastically(
        self, value: Tensor, generator: torch.Generator, *, absmax: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Codes that are ``value`` in the mean: up or down to a neighbour, by how near it is.

        A scale that moved a little at every step would take all entries of its block off the grid each time, and random
        rounding would make noise of that. So a block keeps its scale while its entries fit and use most of it.

        Args:
            value: What is rounded.
            generator: On its device.
            absmax: The scales so far ``(blocks,)``; None for fresh ones.

        Raises:
            ValueError: With 4 bits, whose scales cut entries off.
        """
        if self.bits != 8:
            raise ValueError(f"bits={self.bits} cannot be rounded stochastically; use bits=8.")
        blocks = self._blocks(value)
        largest = blocks.abs().amax(1)
        if absmax is None:
            absmax = _upward(largest)
        else:
            fits = (largest <= absmax) & (largest >= _KEEP_FROM * absmax)
            absmax = torch.where(fits, absmax, _upward(largest * _HEADROOM))
        scaled = blocks * _inverse(absmax, 127)
        noise = torch.rand(scaled.shape, generator=generator, dtype=scaled.dtype, device=scaled.device)
        # 127 - 1e-16 + noise may round to 128 in floating point.
        return self._pack(scaled.add_(noise).floor_().clamp_(-127, 127), value.shape), absmax

    def decode(self, codes: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor of ``shape`` that the codes stand for.

        Args:
            codes: As :meth:`encode` gives them.
            absmax: Likewise.
            shape: Of the tensor.
            dtype: Of the result, computed in fp32 at least and rounded once.
        """
        wide = torch.promote_types(dtype, torch.float32)
        numel = math.prod(shape)
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten()[:numel]
        flat = codes.flatten().to(wide)
        blocks, whole = absmax.to(wide), numel // self.block_size
        unit = blocks / (127 if self.bits == 8 else -8)
        if self.bits == 4:
            flat -= 8
        # The whole blocks, then the shorter one: padding would copy the tensor.
        flat[: whole * self.block_size].view(whole, self.block_size).mul_(unit[:whole, None])
        flat[whole * self.block_size :].mul_(unit[whole:])
        return flat.view(*shape).to(dtype)

    def _blocks(self, value: Tensor) -> Tensor:
        """``(blocks, block_size)`` in fp32 at least, a fresh tensor or a view of ``value``; padded with zeros."""
        flat = value.detach().flatten().to(torch.promote_types(value.dtype, torch.float32))
        rest = -flat.numel() % self.block_size
        return torch.cat([flat, flat.new_zeros(rest)] if rest else [flat]).view(-1, self.block_size)

    def _pack(self, codes: Tensor, shape: torch.Size) -> Tensor:
        """Whole numbers as they are kept, without the padding."""
        flat = codes.flatten()[: math.prod(shape)]
        if self.bits == 8:
            return flat.to(torch.int8).view(shape)
        nibbles = (flat + 8).to(torch.uint8)
        if nibbles.numel() % 2:
            nibbles = torch.cat([nibbles, nibbles.new_full((1,), 8)])
        low, high = nibbles.view(-1, 2).unbind(1)
        return low | (high << 4)


INT8 = Blockwise(bits=8, block_size=256)  # the blocks of Q-GaLore (arXiv 2407.08296)
INT4 = Blockwise(bits=4, block_size=64)


def _upward(largest: Tensor) -> Tensor:
    """In the scales' dtype, rounded up."""
    rounded = largest.to(ABSMAX_DTYPE)
    above = torch.nextafter(rounded, rounded.new_full((), torch.inf))
    return torch.where(rounded.to(largest.dtype) < largest, above, rounded)


def _inverse(absmax: Tensor, steps: int) -> Tensor:
    """Steps to one, ``(blocks, 1)`` in fp32; 0 for a block of zeros."""
    wide = absmax.float()
    return torch.where(wide == 0, torch.zeros_like(wide), steps / wide)[:, None]


def _least_error(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit codes and scales, whichever share of the largest entry errs least."""
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
    best_codes, best_absmax, best_error = blocks, largest.to(ABSMAX_DTYPE), torch.full_like(largest, torch.inf)
    for share in _SHARES:
        absmax = (largest * share).to(ABSMAX_DTYPE)
        unit = absmax.to(blocks.dtype)[:, None] / -8
        codes = (blocks * _inverse(absmax, -8)).round_().clamp_(-8, 7)
        error = (codes * unit - blocks).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_absmax = torch.where(better, absmax, best_absmax)
        best_codes = torch.where(better[:, None], codes, best_codes)
    return best_codes, best_absmax
