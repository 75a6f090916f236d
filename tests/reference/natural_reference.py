# SPDX-License-Identifier: Apache-2.0
"""Natural GaLore (arXiv 2410.16029) in plain formulas, the whole Fisher matrix inverted, without Woodbury's identity.

Slow, without any of the package's code.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.galore_reference import Adam, project, project_back, side_of, svd_bases


@dataclass
class NaturalGaLore:
    """One projected weight under Adam; moments stay as they are when the basis changes."""

    lr: float
    rank: int
    gap: int
    scale: float
    length: int = 4
    damping: float = 1.0
    step: int = 0
    bases: tuple[Tensor, ...] = ()
    state: dict[str, Tensor] = field(default_factory=dict)
    history: list[Tensor] = field(default_factory=list)

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step, in place."""
        side = side_of("std", (weight.shape[0], weight.shape[1]))
        if self.step % self.gap == 0:
            new = svd_bases(grad, self.rank, side)
            # What is remembered are directions in the weight's space: lifted from the old basis, seen from the new one.
            self.history = [project(project_back(low, self.bases, side), new, side) for low in self.history]
            self.bases = new
        low = project(grad, self.bases, side)
        self.history = [low, *self.history][: self.length]
        columns = torch.stack([one.reshape(-1) for one in self.history], dim=1)
        damping = self.damping * float(columns.square().sum(0).mean())
        fisher = damping * torch.eye(low.numel(), dtype=low.dtype) + columns @ columns.T
        natural = damping * torch.linalg.solve(fisher, low.reshape(-1)).reshape(low.shape)
        self.step += 1
        update = Adam(lr=self.lr).update(natural, self.state, self.step)
        weight.add_(self.scale * project_back(update, self.bases, side))
