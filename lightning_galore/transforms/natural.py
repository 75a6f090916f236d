# SPDX-License-Identifier: Apache-2.0
"""Natural GaLore: the low-rank gradient scaled by the inverse of an empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_galore.change import Change
from lightning_galore.config import GaLoreConfig
from lightning_galore.transforms.base import Transform

_HISTORY = "history"


class Natural(Transform):
    """``g' = lambda (lambda I + H^T H)^-1 g``, the rows of ``H (s, d)`` the last gradients, this one included.

    arXiv 2410.16029: the empirical Fisher matrix of a weight's low-rank gradients, inverted by Woodbury's identity, so
    that only an ``s x s`` system is solved: ``g' = g - H^T (lambda I + H H^T)^-1 H g``. The paper's ``1 / lambda`` is
    left out: Adam does not see it, and other optimizers keep their learning rates. Its ``lambda`` is a constant, ours
    ``damping`` times the mean squared norm in ``H``, which does not depend on how the loss is scaled. When the basis
    changes the history gets its new coordinates, which is exact where the span stays.

    Args:
        length: ``s``, gradients remembered.
        damping: As above.
    """

    projected_only: ClassVar[bool] = True

    def __init__(self, length: int = 4, damping: float = 1.0) -> None:
        self.length, self.damping = length, damping

    @classmethod
    @override
    def build(cls, config: GaLoreConfig) -> Self:
        return cls(config.natural_history, config.natural_damping)

    @override
    def apply_(self, grad: Tensor, entries: Mapping[str, Tensor], *, second: Tensor | None) -> dict[str, Tensor]:
        history = grad.new_zeros(self.length, *grad.shape)
        history[0].copy_(grad)
        old = entries.get(_HISTORY)
        if old is not None:
            kept = min(self.length - 1, old.shape[0])
            history[1 : 1 + kept].copy_(old[:kept])
        rows = history.flatten(1).to(torch.promote_types(grad.dtype, torch.float32))
        gram = rows @ rows.mT
        squares = gram.diagonal()
        tiny = torch.finfo(gram.dtype).tiny
        # Zeros stand for gradients that are still to come. Where all are zero there is nothing to scale.
        damping = (self.damping * squares.sum() / (squares > 0).sum().clamp(min=1)).clamp(min=tiny)
        system = gram + damping * torch.eye(self.length, dtype=gram.dtype, device=gram.device)
        # Not cholesky or solve, which look at the device for whether they succeeded: damped as it is, it does.
        factor, _ = torch.linalg.cholesky_ex(system)
        weights = torch.cholesky_solve(gram[:, :1], factor)
        grad.sub_((weights.mT @ rows).view(grad.shape).to(grad.dtype))
        return {_HISTORY: history}

    @override
    def carried(self, entries: Mapping[str, Tensor], change: Change | None) -> Mapping[str, Tensor]:
        history = entries.get(_HISTORY)
        if history is None or change is None:
            return {}
        return {_HISTORY: torch.stack([change.rotate(one).to(one.dtype) for one in history])}

    @override
    def kept_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {_HISTORY: (self.length, *shape)}
