# SPDX-License-Identifier: Apache-2.0
"""LDAdam in plain formulas (arXiv 2410.16103, algorithm 1), for one weight; every matrix is formed.

Written for a wide weight ``(m, n)``, ``m < n``, with its basis ``(m, r)`` on the left; another one is transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LDAdam:
    """What is remembered of one weight between its steps.

    Args:
        decoupled: Decay of the full weight, factor ``1 - lr * decay``.
        coupled: L2 penalty, added to the gradient after the basis was found.
        clip: Norm to which a gradient is clipped after the basis was found; what is left over is not clipped again.
    """

    rank: int
    lr: float
    betas: tuple[float, float]
    rho: float
    eps: float = 1e-8
    scale: float = 1.0
    decoupled: float = 0.0
    coupled: float = 0.0
    clip: float = float("inf")
    step: int = 0

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step of the weight, in place."""
        if weight.shape[0] >= weight.shape[1]:
            weight, grad = weight.T, grad.T
        b1, b2 = self.betas
        if self.step == 0:
            self.e = torch.zeros_like(weight)
        seen = grad + self.e
        if self.step == 0:
            basis = torch.linalg.svd(seen, full_matrices=False)[0][:, : self.rank]
            moved, spread, lost = (torch.zeros_like(basis.T @ grad) for _ in range(3))
            error = torch.zeros_like(weight)
        else:
            bc1, bc2 = 1 - b1**self.step, 1 - b2**self.step
            blend = self.rho * self.basis @ self.m / bc1 + (1 - self.rho) * seen
            basis = torch.linalg.qr(blend @ (blend.T @ self.basis))[0]
            turn = basis.T @ self.basis
            moved = turn @ self.m
            spread = bc2 * (turn**2 @ (self.v / bc2 - (self.m / bc1) ** 2) + (moved / bc1) ** 2).abs()
            error = b1 / (1 - b1) * (self.basis @ self.m - basis @ moved)
        grad = grad * min(1.0, self.clip / float(grad.norm()))
        full = grad + self.coupled * weight + self.e
        low = basis.T @ full
        self.m = b1 * moved + (1 - b1) * low
        self.v = b2 * spread + (1 - b2) * low**2
        self.e = full - basis @ low + error
        self.basis, self.step = basis, self.step + 1
        mean, variance = self.m / (1 - b1**self.step), self.v / (1 - b2**self.step)
        weight.mul_(1 - self.lr * self.decoupled)
        weight.sub_(self.lr * self.scale * basis @ (mean / (variance.sqrt() + self.eps)))
