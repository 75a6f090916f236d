# SPDX-License-Identifier: Apache-2.0
"""APOLLO (arXiv 2412.05270) and Fira (arXiv 2410.01623) in plain formulas, without any of the package's code.

Both papers take a weight ``(m, n)`` with ``m <= n`` and a basis ``P (m, r)`` on its left; a tall weight is the same
thing transposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.galore_reference import Adam, Momentum

GAMMA = 1.01


def gaussian(number: int, d: int, r: int) -> Tensor:
    """APOLLO's projection, entries from ``N(0, 1/r)``, drawn in fp64 from a number."""
    return torch.randn(d, r, dtype=torch.float64, generator=torch.Generator().manual_seed(number)) / r**0.5


def singular_vectors(grad: Tensor, r: int) -> Tensor:
    """Fira's projection, that of GaLore; of each vector the largest entry is positive."""
    vectors = torch.linalg.svd(grad, full_matrices=False)[0][:, :r]
    return vectors * torch.stack([column[column.abs().argmax()].sign() for column in vectors.T])


@dataclass
class Limiter:
    """Fira, section 4.3: ``S`` becomes ``gamma |S_before| S / |S|`` where its norm has grown by more than gamma.

    Args:
        norms: Of every step, after limiting.
        limited: Steps at which it has limited.
    """

    norms: list[float] = field(default_factory=list)
    limited: list[int] = field(default_factory=list)

    def __call__(self, step: Tensor) -> Tensor:
        norm = float(step.norm())
        if self.norms and norm > GAMMA * self.norms[-1]:
            self.limited.append(len(self.norms))
            step = step / norm * GAMMA * self.norms[-1]
        self.norms.append(float(step.norm()))
        return step


@dataclass
class Scaling:
    """One weight's run by one of the two papers.

    Args:
        rule: The optimizer in the subspace.
        kind: ``channel`` (APOLLO, algorithm 1), ``tensor`` (APOLLO-Mini) or ``residual`` (Fira, equation 10).
        rank: ``r``.
        scale: ``alpha``.
        basis: Gives ``P`` of a gradient ``(m, n)``.
        gap: Steps between two bases. The moments stay.
        decoupled: Decay of the weight by ``1 - lr * decay`` before its update.
        coupled: L2 penalty: it is a part of the gradient, but not of what the basis is found from.
    """

    rule: Adam | Momentum
    kind: str
    rank: int
    scale: float
    basis: Callable[[Tensor], Tensor]
    gap: int
    decoupled: float = 0.0
    coupled: float = 0.0
    limiter: Limiter = field(default_factory=Limiter)
    state: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step of the weight, in place."""
        if weight.shape[0] >= weight.shape[1]:  # as published for m <= n
            weight, grad = weight.T, grad.T
        if self.steps % self.gap == 0:
            self.projection = self.basis(grad)
        grad = grad + self.coupled * weight
        low = self.projection.T @ grad
        self.steps += 1
        lr = self.rule.lr
        direction = self.rule.update(low, self.state, self.steps) / -lr
        weight.mul_(1 - lr * self.decoupled)
        if self.kind == "tensor":
            weight.sub_(lr * self.scale * self.limiter(direction.norm() / low.norm() * grad))
            return
        ratios = torch.stack([direction[:, j].norm() / low[:, j].norm() for j in range(low.shape[1])])
        if self.kind == "channel":
            weight.sub_(lr * self.scale * self.limiter(grad @ torch.diag(ratios)))
            return
        residual = self.limiter((grad - self.projection @ low) @ torch.diag(ratios))
        weight.sub_(lr * (self.scale * self.projection @ direction + residual))
