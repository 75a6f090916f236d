# SPDX-License-Identifier: Apache-2.0
"""The geometry of one projected weight, and what every way to find a basis must do.

Shapes: weight and gradient ``(m, n)``, basis ``(d, r)`` with ``d = m`` on the left and ``d = n`` on the right.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_galore import gemm, linalg
from lightning_galore.config import GaLoreConfig, ProjType

#: ``modes``: not a matrix but a tensor, along several of its dimensions.
Side = Literal["left", "right", "full", "modes"]
# In a state dict a side is a number: torch walks into strings there as into any iterable.
SIDE_CODES: dict[Side, int] = {"left": 0, "right": 1, "full": 2, "modes": 3}


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

    This is a matrix's; ``subspace/tensors.py`` has its siblings for weights of a higher order.

    Args:
        shape: ``(m, n)`` of the weight.
        side: ``left`` (low-rank gradient ``P^T G``), ``right`` (``G Q``) or ``full`` (``P^T G Q``).
        rank: Width ``r`` of the basis.
        has_heads: Whether its rows are those of attention heads with one input, which may share a basis.
    """

    shape: tuple[int, int]
    side: Side
    rank: int
    has_heads: bool = False

    def with_rank(self, rank: int) -> Projection:
        """The same side at another rank: the width of a basis may change where ``rank`` is only its ceiling."""
        return self if rank == self.rank else replace(self, rank=rank)

    @property
    def label(self) -> str:
        """The rank, for people."""
        return str(self.rank)

    @property
    def layout(self) -> tuple[int, ...]:
        """What the state must hold to be read again, besides bases and rank; empty for a matrix."""
        return ()

    def in_layout(self, layout: tuple[int, ...]) -> Projection:
        """The same weight as a state of another layout means it."""
        return self

    def unfold(self, tensor: Tensor) -> Tensor:
        """The weight or its gradient as :meth:`project` takes it: dense, and folded into a matrix if that is wanted.

        What is dense is not copied. Row-sparse gradients (``nn.Embedding(sparse=True)``) are: one weight at a time.
        """
        return tensor.to_dense() if tensor.is_sparse else tensor

    def fold_back(self, weight: Tensor, unfolded: Tensor) -> None:
        """Write into the weight what was written onto ``unfold(weight)``, wherever that is no view of it."""

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
        return {"left": (left,), "right": (right,)}.get(self.side, (left, right))

    def oriented(
        self,
        matrix: Tensor,  # (m, n)
    ) -> tuple[Tensor, ...]:
        """``matrix`` as each basis sees it ``(d, l)``, a view with its projected dimension first: see basis_shapes."""
        return {"left": (matrix,), "right": (matrix.mT,)}.get(self.side, (matrix, matrix.mT))

    def project(
        self,
        matrix: Tensor,  # (m, n)
        bases: tuple[Tensor, ...],  # basis_shapes
    ) -> Tensor:
        """Coordinates of ``matrix`` of ``low_shape``, in its dtype; computed in the wider dtype of the two."""
        work, first, last = _in_one_dtype(matrix, bases[0], bases[-1])
        if self.side == "left":
            low = gemm.product(work.mT, first).mT
        elif self.side == "right":
            low = gemm.product(work, last)
        else:
            low = gemm.product(work.mT, first).mT @ last
        return (low if low.dtype == matrix.dtype else low.to(matrix.dtype)).contiguous()

    def add_back_(
        self,
        weight: Tensor,  # (m, n)
        low_update: Tensor,  # low_shape
        bases: tuple[Tensor, ...],  # basis_shapes
        *,
        alpha: float,
        beta: float = 1.0,
    ) -> None:
        """``weight`` becomes ``beta`` times itself and ``alpha`` times the projected-back update, rounded once.

        Without a full-size temporary, but where the basis is kept in a wider dtype than the weight.
        """
        first, last = _in_one_dtype(bases[0], bases[-1], dtype=weight.dtype)
        low = low_update if low_update.dtype == first.dtype else low_update.to(first.dtype)
        if self.side == "full":
            low = first @ low
        left, right = (first, low.mT) if self.side == "left" else (low, last)
        if left.dtype == weight.dtype:
            gemm.add_product_(weight, left, right, alpha=alpha, beta=beta)
        else:
            weight.copy_((left @ right.mT).mul_(alpha).add_(weight, alpha=beta))


def _in_one_dtype(*tensors: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """The tensors in the widest dtype of them, and of ``dtype``; themselves where they agree, as they mostly do."""
    widest = dtype or tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != widest:
            widest = torch.promote_types(widest, tensor.dtype)
    return tuple(tensor if tensor.dtype == widest else tensor.to(widest) for tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a finder may start from: the weight's last bases, and what the wrapped optimizer remembers in them.

    Args:
        bases: The last bases, left and right as in ``Projection.basis_shapes``; their rank may be another one.
        momentum: First moment of the wrapped optimizer, bias-corrected, in the coordinates of ``bases``; None where
            it keeps none or nobody asked.
    """

    bases: tuple[Tensor, ...]
    momentum: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a finder came to.

    Args:
        bases: Of ``projection.basis_shapes``, in the decomposition dtype.
        spectrum: Largest singular values of the gradient as far as the finder knows them ``(k,)``, ``k >= r`` or so,
            in descending order; None for a finder that does not look at the gradient.
    """

    bases: tuple[Tensor, ...]
    spectrum: Tensor | None = None


class Subspace(ABC):
    """A way to find the basis of a gradient's subspace. Holds no state; to repeat itself it needs its arguments only.

    Subclasses vary one piece, :meth:`_find`; what happens to a gradient that no basis can be found for, and the signs
    of the vectors, stand here.
    """

    orthonormal: ClassVar[bool] = True
    #: Whether the basis follows the last one: each vector then keeps the sign of its namesake there.
    continuous: ClassVar[bool] = False
    #: Whether the finder wants ``Known.momentum``, which costs a read of the wrapped optimizer's state.
    uses_momentum: ClassVar[bool] = False
    #: Time of a refresh as a multiple of the same weight's ordinary optimizer step, roughly: for staggering.
    relative_cost: ClassVar[float] = 6.0

    @classmethod
    def build(cls, config: GaLoreConfig) -> Self:
        """The finder with the settings that concern it."""
        return cls()

    @final
    def find(
        self,
        grad: Tensor,  # (m, n)
        projection: Projection,
        *,
        generator: torch.Generator,
        known: Known | None = None,
        fix_signs: bool = True,
    ) -> Found | None:
        """Bases of ``projection.basis_shapes`` in the decomposition dtype, or None when the gradient gives none.

        A gradient that is zero or not finite never reaches a decomposition: there the caller keeps what it has.
        This is the one place where a step waits for the device, and only at a refresh.

        Args:
            grad: Gradient of the weight.
            projection: Its side and rank.
            generator: Source of all randomness.
            known: What came before, None at the first refresh.
            fix_signs: Make the entry of largest magnitude of each vector positive, where signs are arbitrary. A finder
                that follows the last basis takes the signs from there instead.
        """
        # Not grad.abs(), which would copy the gradient at the very moment when memory is shortest; nor a vector_norm of
        # infinite order, which takes 18 times as long on a CPU. NaN fails both comparisons.
        low, high = (float(extreme) for extreme in torch.aminmax(grad))
        if not (float("-inf") < low <= high < float("inf")) or low == high == 0:
            return None
        work = grad.to(linalg.decomposition_dtype(grad.dtype))
        found = self._find(work, projection, generator=generator, known=known)
        if found is None or not all(bool(torch.isfinite(basis).all()) for basis in found.bases):
            return None
        return replace(found, bases=self._with_signs(found.bases, known, fix_signs=fix_signs))

    def _with_signs(self, bases: tuple[Tensor, ...], known: Known | None, *, fix_signs: bool) -> tuple[Tensor, ...]:
        if not self.orthonormal:
            return bases
        if fix_signs:
            bases = tuple(linalg.fix_signs(basis) for basis in bases)
        if self.continuous and known is not None:
            bases = tuple(linalg.align_signs(new, old) for new, old in zip(bases, known.bases, strict=True))
        return bases

    @abstractmethod
    def _find(
        self,
        grad: Tensor,  # (m, n), in the decomposition dtype
        projection: Projection,
        *,
        generator: torch.Generator,
        known: Known | None,
    ) -> Found | None:
        """Bases of a finite, non-zero ``grad``, with any signs; None when a decomposition fails."""


def seeded_generator(device: torch.device, *, seed: int, name: str, draw: int) -> torch.Generator:
    """A generator that depends only on the seed, the weight's name and how often it has drawn before.

    So there is no generator state to save, and a resumed run draws what the uninterrupted one would have drawn. The
    numbers are drawn on ``device``; the CPU and a GPU draw different ones.
    """
    digest = hashlib.blake2b(f"{seed}/{name}/{draw}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
