# SPDX-License-Identifier: Apache-2.0
"""What the tests of every method of the family share: weights, gradients that depend on them, runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from tests.helpers import Matrices

#: Tall, wide and square.
SHAPES = [(20, 12), (12, 20), (12, 12)]
RANKS = [1, 4]
STEPS = 30
LR = 1e-2


def gradient(step: int, weight: Tensor) -> Tensor:
    """A strong part of rank 3 that turns slowly, a pull of the weight to zero, and noise."""
    m, n = weight.shape
    fixed = torch.Generator().manual_seed(7)
    noise = torch.Generator().manual_seed(100 + step)
    left, right, turn = (torch.randn(size, dtype=torch.float64, generator=fixed) for size in ((m, 3), (3, n), (3, n)))
    full = left @ (right + 0.1 * step * turn) + torch.randn(m, n, dtype=torch.float64, generator=noise)
    return full.to(weight.dtype) + 0.3 * weight.detach()


def backward(model: nn.Module, step: int, *, share: float = 1.0) -> None:
    """Give each weight its gradient by a real backward, so that hooks see it."""
    loss = sum((weight * gradient(step, weight)).sum() for weight in model.parameters())
    (share * loss).backward()  # type: ignore[union-attr]


def advance(model: nn.Module, optimizer: GaLoreOptimizer, steps: Iterable[int]) -> None:
    """Train."""
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def made(
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    *shapes: tuple[int, int],
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> tuple[Matrices, GaLoreOptimizer]:
    """Fresh weights and their optimizer."""
    model = Matrices(*shapes, dtype=dtype)
    return model, GaLoreOptimizer(make(model.parameters()), model, **settings)


def saved_and_loaded(value: Any) -> Any:
    """Through a file that holds tensors and numbers only."""
    torch.save(value, buffer := BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def furthest(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Largest difference, relative to the largest entry."""
    return max(float((a.detach() - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))
