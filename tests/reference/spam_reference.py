# SPDX-License-Identifier: Apache-2.0
"""SPAM (arXiv 2501.06842, algorithm 1) and Stable-SPAM (arXiv 2502.17055, algorithm 1) over Adam, in plain formulas.

Slow, without any of the package's code; derived from the papers' formulas alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.galore_reference import project, project_back, side_of, svd_bases


def spike_clipped(grad: Tensor, second: Tensor | None, theta: float) -> Tensor:
    """``sign(g) sqrt(theta v)`` where ``g^2 > theta v``; nothing is known of an entry whose ``v`` is zero."""
    if second is None:
        return grad
    clipped = grad.clone()
    for index in range(grad.numel()):
        g, v = float(grad.reshape(-1)[index]), float(second.reshape(-1)[index])
        if v > 0 and g * g > theta * v:
            clipped.reshape(-1)[index] = math.copysign(math.sqrt(theta * v), g)
    return clipped


@dataclass
class Stabilizer:
    """AdaClip and AdaGN for one parameter."""

    gamma1: float = 0.7
    gamma2: float = 0.9
    gamma3: float = 0.999
    eps: float = 1e-8
    step: int = 0
    largest: float = 0.0
    norm: float = 0.0
    norm_sq: float = 0.0

    def __call__(self, grad: Tensor) -> Tensor:
        self.step += 1
        top = float(grad.abs().max())
        self.largest = self.gamma3 * self.largest + (1 - self.gamma3) * top
        threshold = self.largest / (1 - self.gamma3**self.step)
        spiked = grad.abs() > threshold
        grad = torch.where(spiked, grad / top * threshold, grad)
        norm = float(grad.square().sum().sqrt())
        self.norm = self.gamma1 * self.norm + (1 - self.gamma1) * norm
        self.norm_sq = self.gamma2 * self.norm_sq + (1 - self.gamma2) * norm**2
        mean = self.norm / (1 - self.gamma1**self.step)
        mean_square = self.norm_sq / (1 - self.gamma2**self.step)
        return grad / norm * mean / (math.sqrt(mean_square) + self.eps)


def warmup(step: int, gap: int, length: int) -> float:
    """Cosine warm-up after each reset: ``step`` counts from 0, its place in the window from 1."""
    place = min(step % gap + 1, length) if gap and length else 1
    return (1 - math.cos(math.pi * place / length)) / 2 if gap and length else 1.0


@dataclass
class Spam:
    """One parameter under Adam with SPAM's or Stable-SPAM's gradients and momentum reset.

    Args:
        rank: None for a parameter that is not projected.
        stabilizer: Stable-SPAM's; None for SPAM's clipping by ``theta``.
    """

    lr: float
    rank: int | None
    gap: int
    scale: float
    theta: float = math.inf
    stabilizer: Stabilizer | None = None
    reset_gap: int = 0
    reset_warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    step: int = 0
    since_reset: int = 0
    moments: tuple[Tensor, Tensor] | None = None
    bases: tuple[Tensor, ...] = ()
    seen: list[Tensor] = field(default_factory=list)

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step, in place; moments stay as they are when the basis changes."""
        side = side_of("std", (weight.shape[0], weight.shape[-1]))
        if self.rank is not None and self.step % self.gap == 0:
            self.bases = svd_bases(grad, self.rank, side)
        low = grad if self.rank is None else project(grad, self.bases, side)
        if self.reset_gap and self.step % self.reset_gap == 0:
            self.moments, self.since_reset = None, 0
        if self.stabilizer is not None:
            low = self.stabilizer(low)
        else:
            low = spike_clipped(low, None if self.moments is None else self.moments[1], self.theta)
        self.seen.append(low)
        lr = self.lr * warmup(self.step, self.reset_gap, self.reset_warmup)
        self.step += 1
        self.since_reset += 1
        m, v = self.moments or (torch.zeros_like(low), torch.zeros_like(low))
        m = self.betas[0] * m + (1 - self.betas[0]) * low
        v = self.betas[1] * v + (1 - self.betas[1]) * low**2
        self.moments = (m, v)
        mean, variance = m / (1 - self.betas[0] ** self.since_reset), v / (1 - self.betas[1] ** self.since_reset)
        update = -lr * mean / (variance.sqrt() + self.eps)
        weight.mul_(1 - lr * self.decay)
        weight.add_(update if self.rank is None else self.scale * project_back(update, self.bases, side))
