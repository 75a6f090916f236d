# SPDX-License-Identifier: Apache-2.0
"""Weights of order > 2 with gradients that are given, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer

#: Tall and wide kernels, grouped and depthwise ones, one to three dimensions of space.
SHAPES = {
    "tall": (20, 3, 3, 3),
    "wide": (4, 24, 3, 2),
    "depthwise": (16, 1, 3, 3),
    "conv1d": (9, 12, 5),
    "conv3d": (6, 5, 2, 3, 4),
}
MODES: list[Any] = ["step", "project", "layerwise"]


class Tensors(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
        )


def gradient(shape: tuple[int, ...], step: int, *, seed: int = 0) -> Tensor:
    """A gradient whose subspaces turn slowly: a few outer products that last, and noise of the step."""
    lasting = torch.Generator().manual_seed(seed)
    total = torch.zeros(shape, dtype=torch.float64)
    for term in range(4):
        part = torch.ones((), dtype=torch.float64)
        for size in shape:
            ends = torch.randn(2, size, generator=lasting, dtype=torch.float64)
            vector = ends[0] + 0.1 * step * ends[1]
            part = part[..., None] * (vector / vector.norm())
        total += part * 2.0**-term
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step), dtype=torch.float64)
    return total + 0.02 * noise


def give(weight: Tensor, grad: Tensor) -> None:
    """Let backward leave ``grad``, so that the hooks of the backward modes see it too."""
    (weight * grad.to(weight.dtype).contiguous(memory_format=torch.preserve_format)).sum().backward()


def wrapped(model: nn.Module, base: Any = None, **settings: Any) -> GaLoreOptimizer:
    """The optimizer over all parameters of ``model``."""
    base = base or torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    return GaLoreOptimizer(base, model, **{"target_modules": ".*", **settings})
