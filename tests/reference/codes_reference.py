# SPDX-License-Identifier: Apache-2.0
"""Integer codes by trying them all, and the plain quantisers that ours are compared with. Loops and fp64 throughout."""

from __future__ import annotations

import torch
from torch import Tensor

SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def groups(value: Tensor, size: int) -> list[Tensor]:
    """Runs of ``size`` entries of the flattened tensor, the last one perhaps shorter, in fp64."""
    flat = value.double().flatten()
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def nearest(value: Tensor, grid: Tensor) -> Tensor:
    """Each entry's nearest number of ``grid``: the argmin over all of them."""
    return grid[(value[:, None] - grid[None, :]).abs().argmin(1)]


def signed_grid(absmax: float) -> Tensor:
    """The 16 numbers that 4 bits stand for: -8 to 7 times ``-absmax / 8``."""
    return torch.arange(-8, 8, dtype=torch.float64) * (-absmax / 8)


def symmetric_grid(absmax: float) -> Tensor:
    """The 255 numbers that 8 bits stand for: -127 to 127 times ``absmax / 127``."""
    return torch.arange(-127, 128, dtype=torch.float64) * (absmax / 127)


def candidates(group: Tensor) -> list[float]:
    """Ends of the 4-bit grid: shares of the entry that is largest in magnitude, with its sign, in bf16."""
    largest = float(group[group.abs().argmax()])
    return [float(torch.tensor(largest * share, dtype=torch.bfloat16)) for share in SHARES]


def min_max(value: Tensor, *, size: int = 256, bits: int = 4) -> Tensor:
    """The textbook asymmetric quantiser: ``2^bits`` numbers from the least to the largest entry of each group."""
    parts = []
    for group in groups(value, size):
        low, high = float(group.min()), float(group.max())
        step = (high - low) / (2**bits - 1) or 1.0
        parts.append(((group - low) / step).round() * step + low)
    return torch.cat(parts).view(value.shape)


def polar(basis: Tensor) -> Tensor:
    """The orthonormal polar factor ``U V^T`` from a plain SVD."""
    u, _, vh = torch.linalg.svd(basis.double(), full_matrices=False)
    return u @ vh


def departure(basis: Tensor) -> float:
    """``|B^T B - I|_F / sqrt(r)``."""
    basis = basis.double()
    rank = basis.shape[1]
    return float((basis.mT @ basis - torch.eye(rank, dtype=torch.float64)).norm()) / rank**0.5
