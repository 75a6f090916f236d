# SPDX-License-Identifier: Apache-2.0
"""FRUGAL's way back: the wrapped optimizer in the subspace, signSGD outside it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_galore.config import GaLoreConfig
from lightning_galore.lift.base import Lift, Update
from lightning_galore.subspace import Projection


class SignResidual(Lift):
    """``W += scale * P R - lr * f * sign(G - P P^T G)`` (left): arXiv 2411.07837, algorithm 1. Keeps nothing.

    Entries of the residual that are no more than rounding errors count as zero: where the basis holds the whole
    gradient, or where it is made of unit vectors, their signs would be steps of full length along nothing.

    Args:
        factor: ``f``, on the learning rate.
    """

    needs_grad: ClassVar[bool] = True

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    @classmethod
    @override
    def build(cls, config: GaLoreConfig) -> Self:
        return cls(config.residual_scale)

    @override
    def apply_(self, weight: Tensor, update: Update) -> None:
        assert update.grad is not None
        dtype = torch.promote_types(update.grad.dtype, torch.float32)
        change = update.grad.to(dtype, copy=True)
        # Of a gradient in half precision the low-rank one is rounded once more: not taken for what is in the subspace.
        low = update.low_grad if dtype == update.grad.dtype else update.projection.project(change, update.bases)
        update.add_back_(change, low, alpha=-1.0)
        change.masked_fill_(change.abs() <= _noise(low, update.projection), 0.0)
        step = float(update.lr) * self.factor
        change.sign_()
        # The change is put together first, so that the weight is written and rounded once.
        sign = 1 if update.ascends else -1
        update.add_back_(change, update.low_update, alpha=update.scale, beta=sign * step)
        weight.copy_(change.add_(weight, alpha=update.shrink))


def _noise(low: Tensor, projection: Projection) -> Tensor:
    """What rounding may leave of an entry that lies in the subspace: ``|p_i| |low_j|`` bounds it, ``|p_i| <= 1``."""
    size = 8 * torch.finfo(low.dtype).eps
    if projection.side == "full":
        return size * torch.linalg.vector_norm(low)
    return size * torch.linalg.vector_norm(low, dim=0 if projection.side == "left" else 1, keepdim=True)
