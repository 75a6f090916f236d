# SPDX-License-Identifier: Apache-2.0
"""FRUGAL in plain formulas (arXiv 2411.07837, algorithm 1), for one weight: Adam in a subspace, signSGD outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def singular_basis(grad: Tensor, rank: int) -> Tensor:
    """First left singular vectors."""
    return torch.linalg.svd(grad, full_matrices=False)[0][:, :rank]


def unit_basis(chosen: list[int], rows: int) -> Tensor:
    """The unit vectors of some rows."""
    return torch.eye(rows, dtype=torch.float64)[:, chosen]


@dataclass
class Frugal:
    """What is remembered of one weight between its steps; a tall or square one is transposed.

    Args:
        factor: On the learning rate of signSGD.
        ascends: Whether the weight goes along the gradient.
    """

    lr: float
    betas: tuple[float, float]
    factor: float = 1.0
    eps: float = 1e-8
    scale: float = 1.0
    decoupled: float = 0.0
    coupled: float = 0.0
    ascends: bool = False

    def switch(self, basis: Tensor) -> None:
        """Take another subspace: the statistics begin anew."""
        self.basis, self.step = basis, 0

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step of the weight, in place."""
        if weight.shape[0] >= weight.shape[1]:
            weight, grad = weight.T, grad.T
        grad = (-grad if self.ascends else grad) + self.coupled * weight
        low = self.basis.T @ grad
        residual = grad - self.basis @ low
        if self.step == 0:
            self.m, self.v = torch.zeros_like(low), torch.zeros_like(low)
        self.step += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * low
        self.v = b2 * self.v + (1 - b2) * low**2
        mean, variance = self.m / (1 - b1**self.step), self.v / (1 - b2**self.step)
        weight.mul_(1 - self.lr * self.decoupled)
        weight.sub_(self.lr * self.scale * self.basis @ (mean / (variance.sqrt() + self.eps)))
        weight.sub_(self.lr * self.factor * residual.sign())
