# SPDX-License-Identifier: Apache-2.0
"""How each kind of row becomes an optimizer, and what an optimizer holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.convergence.variants import BETAS, DENSE_LR, EPS, GAP, Kind, Variant, config_of
from lightning_galore import GaLoreOptimizer


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a variant gets to make its optimizer of.

    Args:
        model: The model.
        matrices: The weights inside its layers, which the variant trains.
        lr: Of the matrices.
        common: Settings of this package that every variant has unless it says otherwise; ``rank`` among them.
        dense_lr: Of the other weights.
        seed: Of random subspaces.
    """

    model: nn.Module
    matrices: list[nn.Parameter]
    lr: float
    common: Mapping[str, Any]
    dense_lr: float = DENSE_LR
    seed: int = 0

    @property
    def rank(self) -> int:
        """Of the low-rank variants."""
        return int(self.common["rank"])

    @property
    def dense(self) -> list[nn.Parameter]:
        """All others: embedding, head, norms."""
        chosen = {id(weight) for weight in self.matrices}
        return [weight for weight in self.model.parameters() if id(weight) not in chosen]

    def groups(self, **keys: Any) -> list[dict[str, Any]]:
        """Param groups of one optimizer over all; ``keys`` go into the group of the matrices."""
        return [
            {"params": self.matrices, "lr": self.lr, **keys},
            {"params": self.dense, "lr": self.dense_lr},
        ]


def build(variant: Variant, task: Task) -> list[Optimizer]:
    """The optimizers of a variant, over every weight of the model once.

    Args:
        variant: Which.
        task: Model and learning rate.

    Raises:
        ValueError: If the package would project other weights than those that are compared.
    """
    return _BUILDERS[variant.kind](variant, task)


def _adamw(groups: list[dict[str, Any]]) -> Optimizer:
    return torch.optim.AdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)


def _dense(task: Task) -> Optimizer:
    return _adamw([{"params": task.dense, "lr": task.dense_lr}])


def _adamw8bit(groups: list[dict[str, Any]]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(groups, betas=BETAS, eps=EPS, weight_decay=0.0)
    return optimizer


def _full_rank(variant: Variant, task: Task) -> list[Optimizer]:
    return [_adamw8bit(task.groups()) if variant.moments_in_8bit else _adamw(task.groups())]


def _muon(variant: Variant, task: Task) -> list[Optimizer]:
    # Updates with the root mean square of AdamW's, so that one grid of learning rates serves both.
    muon = torch.optim.Muon(task.matrices, lr=task.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, _dense(task)]


def _soap(variant: Variant, task: Task) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    # The paper's and the library's own betas and frequency.
    soap = SOAP(task.matrices, lr=task.lr, betas=(0.95, 0.95), eps=EPS, weight_decay=0.0, precondition_frequency=10)
    return [soap, _dense(task)]


def _galore_torch(variant: Variant, task: Task) -> list[Optimizer]:
    from galore_torch import GaLoreAdamW

    gap = task.common.get("update_proj_gap", GAP)
    groups = task.groups(rank=task.rank, update_proj_gap=gap, scale=1.0, proj_type="std")
    return [GaLoreAdamW(groups, betas=BETAS, eps=EPS, weight_decay=0.0, no_deprecation_warning=True)]


def _this_package(variant: Variant, task: Task) -> list[Optimizer]:
    config = config_of(variant, seed=task.seed, **task.common)
    base = _adamw8bit(task.groups()) if variant.moments_in_8bit else _adamw(task.groups())
    others: list[Optimizer] = []
    if variant.sgd:
        base, others = torch.optim.SGD(task.matrices, lr=task.lr), [_dense(task)]
    optimizer = GaLoreOptimizer(base, task.model, config)
    if {id(weight) for weight in optimizer.targets} != {id(weight) for weight in task.matrices}:
        raise ValueError(
            f"settings={dict(variant.settings)} and rank={task.rank} project {len(optimizer.targets)} weights, not the "
            f"{len(task.matrices)} that are compared; choose settings that project just these."
        )
    return [optimizer, *others]


_BUILDERS: dict[Kind, Callable[[Variant, Task], list[Optimizer]]] = {
    "adamw": _full_rank,
    "muon": _muon,
    "soap": _soap,
    "galore-torch": _galore_torch,
    "galore": _this_package,
}


def held_bytes(optimizers: Iterable[Optimizer], weights: Iterable[nn.Parameter]) -> int:
    """Bytes of memory that optimizer state holds for some weights; what a view keeps alive counts whole.

    Args:
        optimizers: All of them.
        weights: The weights whose state is counted.
    """
    held: dict[int, int] = {}
    weights = list(weights)
    for optimizer in optimizers:
        for weight in weights:
            if weight in optimizer.state:
                _count(optimizer.state[weight], held)
    return sum(held.values())


def _count(value: object, held: dict[int, int]) -> None:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, Mapping):
        for inner in value.values():
            _count(inner, held)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _count(inner, held)
    elif hasattr(value, "ortho_matrix"):  # galore_torch keeps its basis in an object
        _count(value.ortho_matrix, held)


def refreshes(optimizers: Iterable[Optimizer], weights: Iterable[nn.Parameter]) -> float | None:
    """How often a weight's basis was refreshed, on average over ``weights``; None if nobody counted."""
    counts = [
        float(optimizer.state[weight]["galore_refreshes"])
        for optimizer in optimizers
        for weight in weights
        if weight in optimizer.state and "galore_refreshes" in optimizer.state[weight]
    ]
    return sum(counts) / len(counts) if counts else None
