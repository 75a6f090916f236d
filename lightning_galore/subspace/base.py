# SPDX-License-Identifier: Apache-2.0
"""The geometry of one projected weight, and what every way to find a basis must do.

Shapes: weight and gradient ``(m, n)``, basis ``(d, r)`` with ``d = m`` on the left and ``d = n`` on the right.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lightning_galore import linalg
from lightning_galore.config import ProjType

Side = Literal["left", "right", "full"]
# In a state dict a side is a number: torch walks into strings there as into any iterable.
SIDE_CODES: dict[Side, int] = {"left": 0, "right": 1, "full": 2}


def resolve_side(proj_type: ProjType, shape: tuple[int, int]) -> Side:
    """The side that ``proj_type`` means for a weight of ``shape``, with galore-torch's rule for square ones."""
    m, n = shape
    if proj_type == "std":
        return "right" if m >= n else "left"
    if proj_type == "reverse_std":
        return "left" if m >= n else "right"
    return proj_type


@dataclass(frozen=True)
class Projection:
    """How one weight is projected: decided once, when the weight is chosen.

    Args:
        shape: ``(m, n)`` of the weight.
        side: ``left`` (low-rank gradient ``P^T G``), ``right`` (``G Q``) or ``full`` (``P^T G Q``).
        rank: Width ``r`` of the basis.
    """

    shape: tuple[int, int]
    side: Side
    rank: int

    @property
    def low_shape(self) -> tuple[int, int]:
        """Shape of the low-rank gradient, its update and its moments."""
        m, n = self.shape
        return (m if self.side == "right" else self.rank, n if self.side == "left" else self.rank)

    @property
    def basis_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the bases: one, or left and right for ``full``."""
        m, n = self.shape
        left, right = (m, self.rank), (n, self.rank)
        return {"left": (left,), "right": (right,), "full": (left, right)}[self.side]

    def project(
        self,
        matrix: Tensor,  # (m, n)
        bases: tuple[Tensor, ...],  # basis_shapes
    ) -> Tensor:
        """Coordinates of ``matrix`` of ``low_shape``, in its dtype; computed in the wider dtype of the two."""
        work = matrix.to(torch.promote_types(matrix.dtype, bases[0].dtype))
        first, last = bases[0].to(work.dtype), bases[-1].to(work.dtype)
        if self.side == "left":
            low = first.mT @ work
        elif self.side == "right":
            low = work @ last
        else:
            low = first.mT @ work @ last
        return low.to(matrix.dtype)

    def add_back_(
        self,
        weight: Tensor,  # (m, n)
        low_update: Tensor,  # low_shape
        bases: tuple[Tensor, ...],  # basis_shapes
        *,
        alpha: float,
    ) -> None:
        """Add ``alpha`` times the projected-back update into ``weight``, in one GEMM and without a full-size temporary.

        Only where the basis is kept in a wider dtype than the weight is the product formed apart, and rounded once.
        """
        dtype = torch.promote_types(weight.dtype, bases[0].dtype)
        first, last, low = bases[0].to(dtype), bases[-1].to(dtype), low_update.to(dtype)
        if self.side == "full":
            low = first @ low
        factors = (first, low) if self.side == "left" else (low, last.mT)
        if dtype == weight.dtype:
            weight.addmm_(*factors, alpha=alpha)
        else:
            weight.add_(factors[0] @ factors[1], alpha=alpha)


class Subspace(ABC):
    """A way to find the basis of a gradient's subspace. Holds no state; to repeat itself it needs the generator only.

    Subclasses vary one piece, :meth:`_pair`; what happens to a gradient that no basis can be found for stands here.
    """

    orthonormal: ClassVar[bool] = True

    @final
    def find(
        self,
        grad: Tensor,  # (m, n)
        projection: Projection,
        *,
        generator: torch.Generator,
        fix_signs: bool = True,
    ) -> tuple[Tensor, ...] | None:
        """Bases of ``projection.basis_shapes`` in the decomposition dtype, or None when the gradient gives none.

        A gradient that is zero or not finite never reaches a decomposition: there the caller keeps what it has.
        This is the one place where a step waits for the device, and only at a refresh.
        """
        # Not grad.abs().amax(), which would copy the gradient at the very moment when memory is shortest.
        if not 0 < float(torch.linalg.vector_norm(grad, torch.inf)) < float("inf"):
            return None
        pair = self._pair(grad, projection.rank, generator)
        if pair is None:
            return None
        bases = {"left": pair[:1], "right": pair[1:], "full": pair}[projection.side]
        if fix_signs and self.orthonormal:
            bases = tuple(linalg.fix_signs(basis) for basis in bases)
        return bases if all(bool(torch.isfinite(basis).all()) for basis in bases) else None

    @abstractmethod
    def _pair(self, grad: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        """Left ``(m, r)`` and right ``(n, r)`` basis of a finite, non-zero ``grad``; None when it fails."""


def seeded_generator(device: torch.device, *, seed: int, name: str, refresh: int) -> torch.Generator:
    """A generator that depends only on the seed, the weight's name and the number of its refresh.

    So there is no generator state to save, and a resumed run draws what the uninterrupted one would have drawn. The
    numbers are drawn on ``device``; the CPU and a GPU draw different ones.
    """
    digest = hashlib.blake2b(f"{seed}/{name}/{refresh}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
