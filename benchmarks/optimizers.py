# SPDX-License-Identifier: Apache-2.0
"""The optimizers that are compared: ours around torch's AdamW, those of other packages, and AdamW at full rank.

Each has weights of its own; the gradients are shared, for none of them writes into a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    return _ours(_groups(parameters(grads), (), rank, gap), stagger=stagger)


def galore_torch(grads: Sequence[Tensor], *, rank: int, gap: int) -> Optimizer | None:
    """The peer's own AdamW on the same param group; None where it is not installed."""
    if peers.galore_torch() is None:
        return None
    return make(peers.GALORE_TORCH, parameters(grads), rank=rank, gap=gap)


def full_rank(grads: Sequence[Tensor]) -> Optimizer:
    """Torch's AdamW as it is."""
    return make(FULL_RANK, parameters(grads), rank=0, gap=0)


def make(
    name: str, targets: Sequence[nn.Parameter], *, rank: int, gap: int, others: Sequence[nn.Parameter] = ()
) -> Optimizer:
    """One of the optimizers that are compared, each with its own defaults where a setting is not given.

    Args:
        name: Of :data:`MAKERS`.
        targets: The weights that are projected.
        rank: Of their subspaces.
        gap: Steps between two refreshes, which come for all weights at once.
        others: What is not projected.
    """
    return MAKERS[name](_groups(targets, others, rank, gap))


def runnable(device: torch.device) -> tuple[list[str], list[str]]:
    """The names of :data:`MAKERS` that work here, and a line for each that does not.

    A peer may be installed and still not run: on a CPU, or beside another version of what it is built on.
    """
    names, notes = [], []
    for name in MAKERS:
        weight = nn.Parameter(torch.ones(32, 16, device=device))
        weight.grad = torch.ones_like(weight)
        try:
            make(name, [weight], rank=2, gap=10).step()
        except ModuleNotFoundError as error:
            notes += peers.missing(name) or [f"{name} needs {error.name}, so its rows are left out"]
        except Exception as error:  # a peer's own fault, of any kind
            notes.append(f"{name} does not run here, so its rows are left out: {type(error).__name__}: {error}")
        else:
            names.append(name)
    return names, notes


def _groups(
    targets: Sequence[nn.Parameter], others: Sequence[nn.Parameter], rank: int, gap: int
) -> list[dict[str, Any]]:
    projected = {"params": list(targets), "rank": rank, "update_proj_gap": gap, "scale": 0.25}
    return [projected, *([{"params": list(others)}] if others else [])]


def _with(groups: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    return [{**groups[0], **settings}, *groups[1:]]


def _ours(groups: list[dict[str, Any]], *, stagger: bool = False) -> Optimizer:
    return GaLoreOptimizer(AdamW(groups, lr=LR, fused=True), stagger=stagger)


def _galore_torch(groups: list[dict[str, Any]]) -> Optimizer:
    package = peers.required(peers.GALORE_TORCH)
    made: Optimizer = package.GaLoreAdamW(_with(groups, proj_type="std"), lr=LR, no_deprecation_warning=True)
    return made


def _apollo_torch(groups: list[dict[str, Any]]) -> Optimizer:
    package = peers.required(peers.APOLLO_TORCH)
    groups = _with(groups, proj="random", scale_type="channel", proj_type="std", scale=1.0)
    made: Optimizer = package.APOLLOAdamW(groups, lr=LR, no_deprecation_warning=True)
    return made


def _q_galore_torch(groups: list[dict[str, Any]]) -> Optimizer:
    package = peers.required(peers.Q_GALORE_TORCH)
    groups = _with(
        groups, proj_type="std", quant=True, quant_n_bit=4, quant_group_size=256, cos_threshold=0.4, gamma_proj=2,
        queue_size=5,
    )  # fmt: skip
    made: Optimizer = package.QGaLoreAdamW8bit(groups, lr=LR)
    return made


def _full_rank(groups: list[dict[str, Any]]) -> Optimizer:
    return AdamW([{"params": group["params"]} for group in groups], lr=LR, fused=True)


#: What is compared. All but the last are given the rank, the gap and the scale.
MAKERS: dict[str, Callable[[list[dict[str, Any]]], Optimizer]] = {
    OURS: _ours,
    peers.GALORE_TORCH: _galore_torch,
    peers.APOLLO_TORCH: _apollo_torch,
    peers.Q_GALORE_TORCH: _q_galore_torch,
    FULL_RANK: _full_rank,
}
