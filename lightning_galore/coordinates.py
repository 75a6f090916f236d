# SPDX-License-Identifier: Apache-2.0
"""Between a full gradient and its low-rank coordinates: the bases of one weight, decoded and gathered while in use."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_galore.bases import DrawnBases, StoredBases
from lightning_galore.sharding import Sharding
from lightning_galore.subspace import Projection


class Coordinates:
    """Projects gradients of one weight, and says what its update is projected back with, on this process.

    Args:
        projection: The weight's geometry, with the rank of the bases.
        stored: The bases as they are kept.
        sharding: How the weight is divided among processes; None where each holds it whole.
        dtype: That of the gradients; codes are decoded into it.
    """

    def __init__(
        self, projection: Projection, stored: StoredBases, sharding: Sharding | None, *, dtype: torch.dtype
    ) -> None:
        self.projection, self.stored = projection, stored
        self._sharding, self._dtype = sharding, dtype
        self._bases: tuple[Tensor, ...] | None = None

    @property
    def bases(self) -> tuple[Tensor, ...]:
        """What this process needs of the bases, read once until :meth:`let_go`; collective if they must be gathered."""
        if self._bases is None:
            bases = self.stored.read(self._dtype)
            self._bases = bases if self._sharding is None else self._sharding.own_bases(bases, self.projection.side)
        return self._bases

    @property
    def gathers(self) -> bool:
        """Whether reading the bases makes much more of them than is kept: from what others keep, or from a number."""
        if isinstance(self.stored, DrawnBases):
            return True
        return self._sharding is not None and self._sharding.gathers(self.stored, self.projection.side)

    def let_go(self) -> None:
        """Keep no more than what is stored."""
        self._bases = None

    def project(
        self,
        matrix: Tensor,  # (m, n), or of the weight's shape
    ) -> Tensor:
        """Low-rank coordinates, of ``projection.low_shape``; where the weight is divided, so are they."""
        if self._sharding is None:
            return self.projection.project(self.projection.unfold(matrix), self.bases)
        return self._sharding.project(matrix, self.projection, self.bases)

    def spread(
        self,
        low: Tensor,  # projection.low_shape
    ) -> Tensor:
        """What this process needs of a low-rank update, for its part of the weight."""
        return low if self._sharding is None else self._sharding.spread(low, self.projection)

    def like(self, part: Tensor) -> Tensor:
        """This process's part of a low-rank tensor, as such a part; a whole one as it is."""
        return part if self._sharding is None else self._sharding.divided_low(part, self.projection)
