# SPDX-License-Identifier: Apache-2.0
"""A basis that tracks the gradient through the optimizer's first moment, a little at each refresh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_galore import gemm, linalg
from lightning_galore.config import GaLoreConfig
from lightning_galore.subspace.base import Found, Known, Projection, Subspace
from lightning_galore.subspace.power import continued
from lightning_galore.subspace.randomized import Randomized


class Track(Subspace):
    """One power iteration from the last basis on ``B = rho M/|M| + (1 - rho) G/|G|``, ``M`` the lifted first moment.

    Related to LDAdam (arXiv 2410.16103), which does not divide by the norms: here the basis depends on directions only,
    so that neither a loss scale nor clipping, of which the gradient may not know yet, changes it. ``B`` of full size is
    never formed, only its products. It is meant to be refreshed often, down to each step: two products with the
    gradient and one QR. Without a last basis, or when ``B`` does not touch it, this is ``randomized`` on ``G``. The
    spectrum estimates that of ``B``, not of ``G``.

    Args:
        rho: Weight of the first moment, in ``[0, 1)``; 0 where the wrapped optimizer keeps none.
    """

    continuous: ClassVar[bool] = True
    uses_momentum: ClassVar[bool] = True
    #: Whether gradient and moment are divided by their norms.
    normalizes: ClassVar[bool] = True

    def __init__(self, rho: float = 0.7) -> None:
        self.rho = rho

    @classmethod
    @override
    def build(cls, config: GaLoreConfig) -> Self:
        assert config.tracking_rho is not None
        return cls(config.tracking_rho)

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        tracked = None if known is None else self._follow(grad, projection, generator=generator, known=known)
        return tracked or Randomized()._find(grad, projection, generator=generator, known=None)

    def _follow(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known
    ) -> Found | None:
        blend = _Blend.of(grad, projection, known, self.rho, normalizes=self.normalizes)
        oriented = {"left": (blend,), "right": (blend.transposed,), "full": (blend, blend.transposed)}[projection.side]
        found = []
        for matrix, old in zip(oriented, known.bases, strict=True):
            start = continued(old, projection.rank, like=grad, generator=generator)
            basis = linalg.power_iteration(matrix.times, matrix.transposed.times, start, careful=False)
            if basis is None:
                return None
            found.append(basis)
        return Found(bases=tuple(basis for basis, _ in found), spectrum=found[0][1])


@dataclass(frozen=True)
class _Blend:
    """``rho left right^T + (1 - rho) grad``, in proportion to ``B``, known by its products: no buffer of full size.

    Args:
        grad: ``(m, n)``.
        left: ``(m, s)``, with ``right`` the lifted first moment.
        right: ``(n, s)``.
        rho: Weight of the first moment.
    """

    grad: Tensor
    left: Tensor
    right: Tensor
    rho: float

    @classmethod
    def of(cls, grad: Tensor, projection: Projection, known: Known, rho: float, *, normalizes: bool) -> _Blend:
        """The blend of ``grad`` with ``known.momentum``, which is of the low-rank shape that ``known.bases`` give."""
        first, last = known.bases[0].to(grad.dtype), known.bases[-1].to(grad.dtype)
        if known.momentum is None:
            return cls(grad, grad[:, :0], grad[:0].mT, 0.0)
        low = known.momentum.to(grad.dtype)
        if normalizes:
            # The gradient may come scaled for the loss, and unclipped; the moment, of what the optimizer got, never
            # does. In fp64, for the squares of fp32 can leave its range.
            size, whole = (torch.linalg.vector_norm(one, dtype=torch.float64) for one in (low, grad))
            ratio = torch.where(size > 0, whole / size, torch.zeros_like(size))
            low = (low * ratio).to(grad.dtype)
        if projection.side == "left":
            return cls(grad, first, low.mT, rho)
        return cls(grad, first @ low if projection.side == "full" else low, last, rho)

    @property
    def transposed(self) -> _Blend:
        """``B^T``."""
        return _Blend(self.grad.mT, self.right, self.left, self.rho)

    def times(
        self,
        block: Tensor,  # (n, k)
    ) -> Tensor:
        """``B block``, ``(m, k)``."""
        fresh = gemm.product(self.grad, block)
        return torch.addmm(fresh, self.left, self.right.mT @ block, beta=1 - self.rho, alpha=self.rho)
