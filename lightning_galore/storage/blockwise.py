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
from torch import Tensor, nn

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

    def encode(self, value: Tensor, *, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes and ``absmax`` ``(blocks,)`` of ``value``, rounded to the nearest code.

        With 4 bits the scale of a block is that of a few candidates which errs least in the mean of squares.

        Args:
            value: What is rounded.
            absmax: With 8 bits the scales so far, which are kept where they serve; None for fresh ones.
        """
        blocks = self._blocks(value)
        if self.bits == 8:
            absmax = self._scales(blocks, absmax)
            return self._pack(self._steps(blocks, absmax).round_().clamp_(-127, 127), value.shape), absmax
        codes, absmax = self._least_error(blocks)
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
        absmax = self._scales(blocks, absmax)
        steps = self._steps(blocks, absmax)
        nearest = steps.round()
        # Decoding rounds, and so do the steps: what is no farther from a code than that was this code, and stays.
        off = nn.functional.hardshrink(steps.sub_(nearest), 127 * torch.finfo(steps.dtype).eps)
        # Not floor(steps + noise): there the sum is rounded, which next to 127 is a step up once in 300,000 times.
        noise = torch.rand(off.shape, generator=generator, dtype=off.dtype, device=off.device)
        codes = nearest.add_(off.add_(noise).floor_())
        return self._pack(codes.clamp_(-127, 127), value.shape), absmax

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
        whole, unit = numel // self.block_size, self._unit(absmax, wide)
        if self.bits == 4:
            flat -= 8
        # The whole blocks, then the shorter one: padding would copy the tensor.
        flat[: whole * self.block_size].view(whole, self.block_size).mul_(unit[:whole, None])
        flat[whole * self.block_size :].mul_(unit[whole:])
        return flat.view(tuple(shape)).to(dtype)

    def _scales(self, blocks: Tensor, absmax: Tensor | None) -> Tensor:
        """Scales that hold the blocks: those so far where they fit, else new ones with headroom; or all fresh."""
        largest = blocks.abs().amax(1)
        if absmax is None:
            return _upward(largest)
        fits = (largest <= absmax) & (largest >= _KEEP_FROM * absmax.to(largest.dtype))
        return torch.where(fits, absmax, _upward(largest, _HEADROOM))

    def _unit(self, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        """What one step of a code stands for, ``(blocks,)``."""
        return absmax.to(dtype) / (127 if self.bits == 8 else -8)

    def _steps(self, blocks: Tensor, absmax: Tensor) -> Tensor:
        """Entries as multiples of their block's unit, a fresh tensor; zeros for a block of zeros.

        Divided by the unit, not multiplied by its inverse: that of a unit below 3e-39 is infinite.
        """
        unit = self._unit(absmax, blocks.dtype)[:, None]
        return blocks / torch.where(unit == 0, torch.inf, unit)

    def _blocks(self, value: Tensor) -> Tensor:
        """``(blocks, block_size)`` in fp32 at least, a fresh tensor or a view of ``value``; padded with zeros."""
        flat = value.detach().flatten().to(torch.promote_types(value.dtype, torch.float32))
        count = math.ceil(flat.numel() / self.block_size)
        rest = count * self.block_size - flat.numel()
        return (torch.cat([flat, flat.new_zeros(rest)]) if rest else flat).view(count, self.block_size)

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

    def _least_error(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """4-bit codes and scales, whichever share of the largest entry errs least."""
        largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
        # No error of a block of zeros is a number, nor of one that is not finite, which becomes zeros times its scale.
        best_codes, best_absmax = torch.zeros_like(blocks), largest.to(ABSMAX_DTYPE)
        best_error = torch.full_like(largest, torch.inf)
        for share in _SHARES:
            absmax = (largest * share).to(ABSMAX_DTYPE)
            codes = self._steps(blocks, absmax).round_().clamp_(-8, 7)
            # In parts of the largest entry, whose square may be out of range.
            off = (codes * self._unit(absmax, blocks.dtype)[:, None]).sub_(blocks).div_(largest[:, None])
            error = off.square_().sum(1)
            better = error < best_error  # never NaN's
            best_error = torch.where(better, error, best_error)
            best_absmax = torch.where(better, absmax, best_absmax)
            best_codes = torch.where(better[:, None], codes, best_codes)
        return best_codes, best_absmax


INT8 = Blockwise(bits=8, block_size=256)  # the blocks of Q-GaLore (arXiv 2407.08296)
INT4 = Blockwise(bits=4, block_size=64)


def _upward(largest: Tensor, headroom: float = 1.0) -> Tensor:
    """``headroom`` times the largest entries in the scales' dtype, rounded up; infinite only where fp32 is."""
    wide = largest * headroom
    rounded = wide.to(ABSMAX_DTYPE)
    above = torch.nextafter(rounded, rounded.new_full((), torch.inf))
    scales = torch.where(rounded.to(wide.dtype) < wide, above, rounded)
    # The last fp32 numbers are beyond the last bf16 one, by less than half a code.
    within = largest <= torch.finfo(torch.float32).max
    return torch.where(within, scales.clamp(max=torch.finfo(ABSMAX_DTYPE).max), scales)
