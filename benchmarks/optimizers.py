# SPDX-License-Identifier: Apache-2.0
"""The optimizers that are compared: ours around torch's AdamW, galore-torch's, and AdamW at full rank.

Each has weights of its own; the gradients are shared, for none of them writes into a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks import peers
from benchmarks.weights import SEED, WeightSet
from lightning_galore import GaLoreOptimizer

OURS, FULL_RANK = "lightning-galore", "AdamW, fused"
LR = 1e-3


def random_gradients(weights: WeightSet, *, device: torch.device) -> list[Tensor]:
    """Gaussian gradients: an ordinary step costs the same on any."""
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(shape, generator=generator).to(device) for shape in weights.shapes]


def parameters(grads: Sequence[Tensor]) -> list[nn.Parameter]:
    """New weights, each with its gradient."""
    generator = torch.Generator().manual_seed(SEED)
    made = []
    for grad in grads:
        param = nn.Parameter(torch.randn(grad.shape, generator=generator).mul_(0.02).to(grad.device))
        param.grad = grad
        made.append(param)
    return made


def ours(grads: Sequence[Tensor], *, rank: int, gap: int, stagger: bool) -> Optimizer:
    """This package around fused AdamW, with its other settings as they are by default.

    Args:
        grads: The gradients of the weights.
        rank: Of the subspace.
        gap: Steps between two refreshes.
        stagger: Whether refreshes are spread over the gap; else all weights refresh at steps 0, gap, ...
    """
    return GaLoreOptimizer(AdamW(_groups(grads, rank, gap), lr=LR, fused=True), stagger=stagger)


def galore_torch(grads: Sequence[Tensor], *, rank: int, gap: int) -> Optimizer | None:
    """The peer's own AdamW on the same param group; None where it is not installed."""
    package = peers.galore_torch()
    if package is None:
        return None
    groups = [{**group, "proj_type": "std"} for group in _groups(grads, rank, gap)]
    return package.GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True)


def full_rank(grads: Sequence[Tensor]) -> Optimizer:
    """Torch's AdamW as it is."""
    return AdamW(parameters(grads), lr=LR, fused=True)


def _groups(grads: Sequence[Tensor], rank: int, gap: int) -> list[dict[str, Any]]:
    return [{"params": parameters(grads), "rank": rank, "update_proj_gap": gap, "scale": 0.25}]
