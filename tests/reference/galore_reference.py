# SPDX-License-Identifier: Apache-2.0
"""GaLore in plain formulas (arXiv 2403.03507), one function each, slow and without any of the package's code.

Shapes: weight and gradient ``(m, n)``, bases ``(d, r)``, rank ``r``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def side_of(proj_type: str, shape: tuple[int, int]) -> str:
    """The rule of galore-torch: ``std`` compresses the shorter dimension, a square counts as tall."""
    tall = shape[0] >= shape[1]
    if proj_type == "std":
        return "right" if tall else "left"
    if proj_type == "reverse_std":
        return "left" if tall else "right"
    return proj_type


def svd_bases(grad: Tensor, rank: int, side: str) -> tuple[Tensor, ...]:
    """First singular vectors of the gradient (equation 12)."""
    u, _, vh = torch.linalg.svd(grad, full_matrices=False)
    left, right = u[:, :rank], vh[:rank].T
    return {"left": (left,), "right": (right,), "full": (left, right)}[side]


def project(grad: Tensor, bases: tuple[Tensor, ...], side: str) -> Tensor:
    """``P^T G``, ``G Q`` or ``P^T G Q``."""
    if side == "left":
        return bases[0].T @ grad
    if side == "right":
        return grad @ bases[0]
    return bases[0].T @ grad @ bases[1]


def project_back(update: Tensor, bases: tuple[Tensor, ...], side: str) -> Tensor:
    """``P R``, ``R Q^T`` or ``P R Q^T`` (equation 11)."""
    if side == "left":
        return bases[0] @ update
    if side == "right":
        return update @ bases[0].T
    return bases[0] @ update @ bases[1].T


@dataclass
class Adam:
    """The step of Adam (arXiv 1412.6980) as ``torch.optim`` writes it: eps after the correction of the bias."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def update(self, grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """What is added to the parameter; ``step`` counts from 1."""
        beta1, beta2 = self.betas
        state["m"] = beta1 * state.get("m", torch.zeros_like(grad)) + (1 - beta1) * grad
        state["v"] = beta2 * state.get("v", torch.zeros_like(grad)) + (1 - beta2) * grad**2
        mean, variance = state["m"] / (1 - beta1**step), state["v"] / (1 - beta2**step)
        return -self.lr * mean / (variance.sqrt() + self.eps)


@dataclass
class Momentum:
    """SGD with momentum as ``torch.optim.SGD`` writes it: the first gradient fills the buffer undamped."""

    lr: float
    momentum: float = 0.9
    nesterov: bool = False

    def update(self, grad: Tensor, state: dict[str, Tensor], step: int) -> Tensor:
        """What is added to the parameter."""
        state["b"] = grad.clone() if step == 1 else self.momentum * state["b"] + grad
        return -self.lr * (grad + self.momentum * state["b"] if self.nesterov else state["b"])


def adafactor_step_size(weight: Tensor, lr: float, step: int, eps2: float = 1e-3) -> float:
    """Relative step size (arXiv 1804.04235, algorithm 4): root mean square of the weight times ``min(lr, t^-1/2)``."""
    rms = math.sqrt(float(weight.double().square().mean()))
    return max(eps2, rms) * min(lr, 1 / math.sqrt(step))


def muon_factor(shape: tuple[int, int], rule: str | None) -> float:
    """Factor on Muon's learning rate for a matrix of ``shape``: Jordan's (default) or Moonshot's."""
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(shape))
    return math.sqrt(max(1.0, shape[0] / shape[1]))


@dataclass
class GaLore:
    """Algorithm 2 for one weight: everything that is remembered between its steps.

    Args:
        rule: The optimizer inside.
        rank: ``None`` trains full-rank.
        decoupled: Decay of the full weight before its update, factor ``1 - lr * decay``.
        coupled: L2 penalty, added to the gradient after the basis was found.
    """

    rule: Adam | Momentum
    rank: int | None
    gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    decoupled: float = 0.0
    coupled: float = 0.0
    state: dict[str, Tensor] = field(default_factory=dict)
    bases: tuple[Tensor, ...] = ()
    step: int = 0

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step of the weight, in place."""
        side = side_of(self.proj_type, (weight.shape[0], weight.shape[-1]))
        if self.rank is not None and self.step % self.gap == 0:
            self.bases = svd_bases(grad, self.rank, side)
        penalized = grad + self.coupled * weight
        low = penalized if self.rank is None else project(penalized, self.bases, side)
        self.step += 1
        update = self.rule.update(low, self.state, self.step)
        if self.rank is not None:
            update = self.scale * project_back(update, self.bases, side)
        weight.mul_(1 - self.rule.lr * self.decoupled)
        weight.add_(update)
