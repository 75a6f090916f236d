# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding of fp32 to bf16."""

from __future__ import annotations

import torch
from torch import Tensor

# A multiple of the four entries that one draw serves, so that pieces change no bits.
_PIECE = 2**22


def round_stochastically_(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write ``value`` into a bf16 ``target`` so that it is ``value`` in the mean: up or down, by how near it is.

    A bf16 number is the upper half of an fp32 one. Adding a random number of 16 bits to the lower half carries into the
    upper one with a probability of ``lower / 2^16``, which is just the distance to the neighbour; then the lower half
    is cut off. What bf16 holds already does not change, and signs need no care: both halves are a magnitude.

    Args:
        target: bf16, written in place.
        value: fp32, of its shape.
        generator: On its device.
    """
    if not target.is_contiguous():
        whole = target.contiguous()
        round_stochastically_(whole, value, generator)
        target.copy_(whole)
        return
    # Piece by piece, for what this takes is four times the target.
    for part, piece in zip(target.view(-1).split(_PIECE), value.contiguous().view(-1).split(_PIECE), strict=True):
        bits = piece.view(torch.int32)
        noise = _sixteen_bits(bits.numel(), generator)
        rounded = noise.add_(bits).bitwise_and_(-1 << 16).view(torch.float32)
        # Infinity and NaN have other bits: the carry would make NaN of the one and anything of the other.
        part.copy_(torch.where(torch.isfinite(piece), rounded, piece))


def _sixteen_bits(count: int, generator: torch.Generator) -> Tensor:
    """Random numbers from 0 to 65,535 as int32, four of one draw: a draw is most of the time that rounding takes."""
    draws = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    draws.random_(-(1 << 63), None, generator=generator)
    return draws.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)
