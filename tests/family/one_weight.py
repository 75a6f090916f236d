# SPDX-License-Identifier: Apache-2.0
"""What the tests of the published methods share: a weight with gradients of its own, trained by the package."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_galore import GaLoreOptimizer
from tests.helpers import Matrices

TALL, WIDE, SQUARE = (14, 9), (9, 14), (10, 10)
SHAPES = [TALL, WIDE, SQUARE]
Base = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def adamw(params: Iterable[Tensor]) -> torch.optim.Optimizer:
    """With a decoupled decay."""
    return torch.optim.AdamW(params, lr=0.02, weight_decay=0.1)


def gradient(shape: tuple[int, int], step: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """A part that stays and one that depends on the step, less and less, and now and then ten times as much."""
    fixed = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + step))
    return ((fixed + noise) * 0.9**step * (10.0 if step % 10 == 6 else 1.0)).to(dtype)


def one_weight(
    shape: tuple[int, int], base: Base = adamw, *, dtype: torch.dtype = torch.float64, **settings: Any
) -> tuple[Tensor, GaLoreOptimizer]:
    """A weight and an optimizer over it alone."""
    model = Matrices(shape, dtype=dtype)
    (weight,) = model.parameters()
    # In a group with a rank, so that rank = min(m, n) is honoured too.
    optimizer = GaLoreOptimizer(base([weight]), model, **settings)
    return weight, optimizer


def steps(weight: Tensor, optimizer: torch.optim.Optimizer, which: Iterable[int]) -> None:
    """Hand out gradients and step."""
    for step in which:
        weight.grad = gradient((weight.shape[0], weight.shape[1]), step, dtype=weight.dtype)
        optimizer.step()
