# SPDX-License-Identifier: Apache-2.0
"""GoLore in plain formulas (arXiv 2410.11289), for one weight: singular vectors first, random bases later on.

What a change of basis does to the moments stands in ``moments_reference``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.reference import moments_reference


@dataclass
class GoLore:
    """What is remembered of one weight between its steps; a tall or square one is transposed."""

    rank: int
    lr: float
    betas: tuple[float, float]
    scale: float
    eps: float = 1e-8
    step: int = 0

    def switch(self, basis: Tensor) -> None:
        """Take another basis: the first moment gets its coordinates in it."""
        if self.step:
            turn = basis.T @ self.basis
            new_m = turn @ self.m
            self.v = moments_reference.floored_second(self.v, self.m, turn, None, step=self.step, betas=self.betas)
            self.m = new_m
        self.basis = basis

    def switch_to_singular_vectors(self, grad: Tensor) -> None:
        """The first ``rank`` of the gradient's."""
        grad = grad.T if grad.shape[0] >= grad.shape[1] else grad
        self.switch(torch.linalg.svd(grad, full_matrices=False)[0][:, : self.rank])

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step of the weight, in place."""
        if weight.shape[0] >= weight.shape[1]:
            weight, grad = weight.T, grad.T
        low = self.basis.T @ grad
        if self.step == 0:
            self.m, self.v = torch.zeros_like(low), torch.zeros_like(low)
        self.step += 1
        b1, b2 = self.betas
        self.m = b1 * self.m + (1 - b1) * low
        self.v = b2 * self.v + (1 - b2) * low**2
        mean, variance = self.m / (1 - b1**self.step), self.v / (1 - b2**self.step)
        weight.sub_(self.lr * self.scale * self.basis @ (mean / (variance.sqrt() + self.eps)))
