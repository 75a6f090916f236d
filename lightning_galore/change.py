# SPDX-License-Identifier: Apache-2.0
"""How coordinates change at a refresh: those of a matrix, and of a tensor with a basis for each of several modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore.subspace import Projection, Side, TuckerProjection


@dataclass(frozen=True, kw_only=True)
class Change:
    """How coordinates change at a refresh: ``low' = left @ low @ right^T``.

    Args:
        left: ``P_new^T P_old`` ``(r', r)``, in fp32 at least; None where the left side is not projected.
        right: ``Q_new^T Q_old`` ``(r', r)``; None where the right side is not projected.
    """

    left: Tensor | None
    right: Tensor | None

    @classmethod
    def between(cls, old: tuple[Tensor, ...], new: tuple[Tensor, ...], side: Side) -> Change:
        """The change from orthonormal bases to others, whose rank may be another one.

        Args:
            old: Bases before, of ``Projection.basis_shapes``.
            new: Bases after.
            side: Which sides they project.
        """
        dtype = torch.promote_types(torch.promote_types(new[0].dtype, old[0].dtype), torch.float32)
        changes = [after.to(dtype).mT @ before.to(dtype) for after, before in zip(new, old, strict=True)]
        return cls(left=None if side == "right" else changes[0], right=None if side == "left" else changes[-1])

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Change:
        """The same change with each of its matrices as ``function`` gives it."""
        left, right = (None if one is None else function(one) for one in (self.left, self.right))
        return Change(left=left, right=right)

    @property
    def _sides(self) -> list[tuple[int, Tensor]]:
        return [(axis, matrix) for axis, matrix in ((-2, self.left), (-1, self.right)) if matrix is not None]

    @property
    def matrices(self) -> list[Tensor]:
        """One for each basis, in their order."""
        return [matrix for _, matrix in self._sides]

    @property
    def changes_rank(self) -> bool:
        """Whether there are more or fewer coordinates than before."""
        return any(matrix.shape[0] != matrix.shape[1] for _, matrix in self._sides)

    def fits(self, value: Tensor) -> bool:
        """Whether ``value`` has the shape of something in the old coordinates."""
        if value.ndim < 2:
            return value.numel() > 1 and any(value.numel() == matrix.shape[1] for _, matrix in self._sides)
        return all(value.shape[axis] == matrix.shape[1] for axis, matrix in self._sides)

    def rotate(self, low: Tensor) -> Tensor:
        """New coordinates of what is linear in the gradient, in the widest dtype of all."""
        for axis, matrix in self._sides:
            low = _along(axis, matrix, low)
        return low

    def rotate_squares(self, low: Tensor) -> Tensor:
        """Expected squares in the new coordinates, given those in the old ones and no correlation between them."""
        for axis, matrix in self._sides:
            low = _along(axis, matrix.square(), low)
        return low

    def average(self, low: Tensor) -> Tensor:
        """Averages of the old coordinates, each by its share in the new one; the mean of all stands for the rest."""
        for axis, matrix in self._sides:
            shares = matrix.square()
            shares = torch.cat([shares, (1 - shares.sum(1, keepdim=True)).clamp(min=0)], dim=1)
            shares /= shares.sum(1, keepdim=True)  # a stored basis is not quite orthonormal
            low = _along(axis, shares, torch.cat([low, low.mean(axis, keepdim=True)], dim=axis))
        return low

    def resize(self, low: Tensor, *, fill: float | Literal["mean"]) -> Tensor:
        """The leading coordinates, as many as the new rank has; ``low`` itself if it has as many as before.

        Args:
            low: In the old coordinates.
            fill: What further coordinates begin with; ``mean`` is that over the old ones, by row or column.
        """
        for axis, matrix in self._sides:
            if matrix.shape[0] != matrix.shape[1]:
                head = low.narrow(axis, 0, min(matrix.shape))
                one = head.mean(axis, keepdim=True)
                one = one if fill == "mean" else torch.full_like(one, fill)
                low = torch.cat([head, *[one] * (matrix.shape[0] - head.shape[axis])], dim=axis)
        return low


def _along(axis: int, matrix: Tensor, low: Tensor) -> Tensor:
    dtype = torch.promote_types(low.dtype, matrix.dtype)
    low, matrix = low.to(dtype), matrix.to(dtype)
    if axis == -1:
        return low @ matrix.mT
    return matrix @ low if axis == -2 else (low.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)


@dataclass(frozen=True, kw_only=True)
class ModeChange(Change):
    """Each mode of the core turns by itself: ``R' = R x_k C_k`` with ``C_k = U_k,new^T U_k,old``.

    What the wrapped optimizer keeps has the core as a matrix ``(r_1, r_2 ... r_N)`` in its last two dimensions.

    Args:
        turns: The mode and ``C_k (r_k, r_k)`` of each basis.
        ranks: ``(r_1, ..., r_N)``.
    """

    turns: tuple[tuple[int, Tensor], ...]
    ranks: tuple[int, ...]

    @property
    @override
    def _sides(self) -> list[tuple[int, Tensor]]:
        return [(mode - len(self.ranks), matrix) for mode, matrix in self.turns]

    @override
    def fits(self, value: Tensor) -> bool:
        rows, columns = self.ranks[0], torch.Size(self.ranks[1:]).numel()
        if value.ndim < 2:
            return value.numel() > 1 and value.numel() in (rows, columns)
        return tuple(value.shape[-2:]) == (rows, columns)

    @override
    def rotate(self, low: Tensor) -> Tensor:
        return self._as_core(super().rotate, low)

    @override
    def rotate_squares(self, low: Tensor) -> Tensor:
        return self._as_core(super().rotate_squares, low)

    @override
    def average(self, low: Tensor) -> Tensor:
        return self._as_core(super().average, low)

    def _as_core(self, turned: Callable[[Tensor], Tensor], low: Tensor) -> Tensor:
        return turned(low.reshape(*low.shape[:-2], *self.ranks)).reshape(low.shape)


def change_between(old: tuple[Tensor, ...], new: tuple[Tensor, ...], projection: Projection) -> Change:
    """The change from orthonormal bases to others, whose rank may be another one (of a matrix).

    Args:
        old: Bases before, of ``projection.basis_shapes``.
        new: Bases after.
        projection: What they project.
    """
    if not isinstance(projection, TuckerProjection):
        return Change.between(old, new, projection.side)
    dtype = torch.promote_types(torch.promote_types(new[0].dtype, old[0].dtype), torch.float32)
    matrices = [after.to(dtype).mT @ before.to(dtype) for after, before in zip(new, old, strict=True)]
    turns = tuple(zip(projection.modes, matrices, strict=True))
    return ModeChange(left=None, right=None, turns=turns, ranks=projection.ranks)
