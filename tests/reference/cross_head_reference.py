# SPDX-License-Identifier: Apache-2.0
"""GaLore+'s cross-head projection (arXiv 2412.19820) in plain formulas, without any of the package's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.galore_reference import Adam


@dataclass
class CrossHeadGaLore:
    """A query, key or value weight ``(heads * size, n)`` under Adam; each head has the basis found from ``chosen``.

    Args:
        chosen: For each refresh the heads whose gradients it looks at.
    """

    lr: float
    rank: int
    gap: int
    scale: float
    size: int
    chosen: Sequence[Sequence[int]]
    step: int = 0
    basis: Tensor = field(default_factory=lambda: torch.empty(0))
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step, in place, head by head; moments stay as they are when the basis changes."""
        heads = grad.split(self.size)
        if self.step % self.gap == 0:
            some = torch.cat([heads[index] for index in self.chosen[self.step // self.gap]])
            vectors = torch.linalg.svd(some, full_matrices=False).Vh[: self.rank].T
            places = vectors.abs().argmax(0)
            self.basis = vectors * vectors[places, torch.arange(self.rank)].sign()
        self.step += 1
        for index, (head, part) in enumerate(zip(heads, weight.split(self.size), strict=True)):
            update = Adam(lr=self.lr).update(head @ self.basis, self.states.setdefault(index, {}), self.step)
            part.add_(self.scale * update @ self.basis.T)
