# SPDX-License-Identifier: Apache-2.0
"""Ranks that shrink (related to AdaRankGrad, arXiv 2410.17881) in plain formulas, without any of the package's code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.galore_reference import project, project_back, side_of, svd_bases


def energy_rank(grad: Tensor, share: float) -> int:
    """The smallest rank whose best approximation holds ``share`` of the squared norm."""
    squares = torch.linalg.svdvals(grad).square()
    return 1 + int((squares.cumsum(0) < share * squares.sum()).sum())


@dataclass
class AdaRankGrad:
    """One projected weight under Adam, moments carried with ``R = P_new^T P_old``.

    ``m' = R m`` and ``v' = (1 - beta2^t) |(R o R)(v / bc2 - (m / bc1)^2) + (R m / bc1)^2|``, ``bc`` the corrections of
    the bias at the last step.
    """

    lr: float
    rank: int
    gap: int
    scale: float
    share: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    step: int = 0
    bases: tuple[Tensor, ...] = ()
    moments: tuple[Tensor, Tensor] | None = None
    ranks: list[int] = field(default_factory=list)

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step, in place."""
        side = side_of("std", (weight.shape[0], weight.shape[1]))
        if self.step % self.gap == 0:
            self.rank = min(self.rank, energy_rank(grad, self.share))
            new = svd_bases(grad, self.rank, side)
            if self.moments is not None:
                self._carry(new, side)
            self.bases = new
            self.ranks.append(self.rank)
        low = project(grad, self.bases, side)
        self.step += 1
        m, v = self.moments or (torch.zeros_like(low), torch.zeros_like(low))
        m = self.betas[0] * m + (1 - self.betas[0]) * low
        v = self.betas[1] * v + (1 - self.betas[1]) * low**2
        self.moments = (m, v)
        update = -self.lr * (m / self._bc(0)) / ((v / self._bc(1)).sqrt() + self.eps)
        weight.add_(self.scale * project_back(update, self.bases, side))

    def _bc(self, which: int) -> float:
        return 1 - math.pow(self.betas[which], self.step)

    def _carry(self, new: tuple[Tensor, ...], side: str) -> None:
        assert self.moments is not None
        m, v = (one if side == "left" else one.T for one in self.moments)
        turn = new[0].T @ self.bases[0]
        mean, square = m / self._bc(0), v / self._bc(1)
        turned = turn @ mean
        moved = ((turn * turn) @ (square - mean**2) + turned**2).abs()
        m, v = turned * self._bc(0), moved * self._bc(1)
        self.moments = (m, v) if side == "left" else (m.T, v.T)
