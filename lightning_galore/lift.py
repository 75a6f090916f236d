# SPDX-License-Identifier: Apache-2.0
"""How a low-rank update becomes a weight update. Owns ``scale``; the basis is handed in."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from typing_extensions import override

from lightning_galore.subspace import Projection


class Lift(ABC):
    """Writes what the wrapped optimizer made of the low-rank gradient onto the weight."""

    @abstractmethod
    def apply_(
        self,
        weight: Tensor,  # (m, n)
        low_update: Tensor,  # projection.low_shape
        projection: Projection,
        bases: tuple[Tensor, ...],
        *,
        scale: float,
    ) -> None:
        """Update ``weight`` in place, in its own dtype, with one rounding."""


class ProjectBack(Lift):
    """``W += scale * P R`` (left), ``R Q^T`` (right), ``P R Q^T`` (full): arXiv 2403.03507, equation 11."""

    @override
    def apply_(
        self, weight: Tensor, low_update: Tensor, projection: Projection, bases: tuple[Tensor, ...], *, scale: float
    ) -> None:
        projection.add_back_(weight, low_update, bases, alpha=scale)


LIFTS: dict[str, type[Lift]] = {"project_back": ProjectBack}
