# SPDX-License-Identifier: Apache-2.0
"""How coordinates change at a refresh where a tensor has a basis for each of several modes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore.moments import Change
from lightning_galore.subspace import Projection, TuckerProjection


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
