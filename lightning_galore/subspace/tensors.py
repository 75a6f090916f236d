# SPDX-License-Identifier: Apache-2.0
"""The geometry of weights of order > 2 (convolutions): folded into a matrix, or projected along each mode.

Shapes: weight and gradient ``(d_1, ..., d_N)``, for a convolution ``(o, i, kh, kw)``. As a matrix ``(m, n)`` with
``m = d_1`` and ``n = d_2 ... d_N``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore.subspace.base import Projection


@dataclass(frozen=True)
class FoldedProjection(Projection):
    """A tensor as the matrix of its rows: whoever finds, projects or lifts sees an ordinary ``(m, n)``.

    The columns stand in the order in which the weight lies in memory, so that the matrix is a view of it both for
    contiguous and for ``channels_last`` weights; a tensor that lies otherwise is copied. Bases and moments refer to
    that order, which is kept with them: a run that is resumed with weights in another memory format goes on alike.

    Args:
        sizes: Shape of the weight.
        order: Its dimensions but the first, in the order of the columns.
    """

    sizes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()

    @property
    @override
    def layout(self) -> tuple[int, ...]:
        return self.order

    @override
    def in_layout(self, layout: tuple[int, ...]) -> Projection:
        return replace(self, order=tuple(layout))

    @override
    def unfold(self, tensor: Tensor) -> Tensor:
        tensor = super().unfold(tensor)
        if tensor.shape == self.shape:
            return tensor
        return tensor.permute(0, *self.order).reshape(self.shape)  # a view wherever there is one

    def unfold_rows(
        self,
        tensor: Tensor,  # (k, d_2, ..., d_N)
    ) -> Tensor:
        """Any number of rows ``(k, n)``, with their columns in the order of the matrix."""
        return tensor.permute(0, *self.order).reshape(tensor.shape[0], self.shape[1])

    def fold(
        self,
        rows: Tensor,  # (k, n)
    ) -> Tensor:
        """The opposite of :meth:`unfold_rows`, ``(k, d_2, ..., d_N)``."""
        folded = rows.reshape(rows.shape[0], *(self.sizes[k] for k in self.order))
        return folded.permute(0, *(self.order.index(k) + 1 for k in range(1, len(self.sizes))))

    @override
    def fold_back(self, weight: Tensor, unfolded: Tensor) -> None:
        # Not by data_ptr: the planner's tensors have no data.
        if unfolded.untyped_storage()._cdata != weight.untyped_storage()._cdata:
            weight.permute(0, *self.order).copy_(unfolded.view(self.shape[0], *(self.sizes[k] for k in self.order)))


def columns_as_they_lie(weight: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor but the first from the slowest to the fastest; those of size 1 may stand anywhere."""
    real = sorted((k for k in range(1, weight.ndim) if weight.shape[k] > 1), key=weight.stride, reverse=True)
    rest = iter(real)
    return tuple(next(rest) if weight.shape[k] > 1 else k for k in range(1, weight.ndim))


@dataclass(frozen=True)
class TuckerProjection(Projection):
    """A tensor in Tucker's coordinates: each mode ``k`` has a basis ``U_k (d_k, r_k)``, arXiv 2501.02379.

    The low-rank gradient is the core ``G x_1 U_1^T ... x_N U_N^T``, and an update of it goes back as ``R x_1 U_1 ...``.
    A mode of full rank has no basis: turning it would save nothing. The wrapped optimizer sees the core ``(r_1, ...,
    r_N)`` as a matrix ``(r_1, r_2 ... r_N)``, so that all that is known of its state for matrices holds.

    Args:
        sizes: Shape of the weight.
        ranks: Of each mode.
    """

    sizes: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    @classmethod
    def of(cls, sizes: Sequence[int], ranks: Sequence[int]) -> TuckerProjection:
        """The projection of a weight of shape ``sizes`` along each mode whose rank is less than its size."""
        shape = (sizes[0], math.prod(sizes[1:]))
        widest = max((r for d, r in zip(sizes, ranks, strict=True) if r < d), default=max(ranks))
        return cls(shape=shape, side="modes", rank=widest, sizes=tuple(sizes), ranks=tuple(ranks))

    @property
    def modes(self) -> tuple[int, ...]:
        """The modes that have a basis, in the order of the bases."""
        return tuple(k for k, (d, r) in enumerate(zip(self.sizes, self.ranks, strict=True)) if r < d)

    @override
    def with_rank(self, rank: int) -> Projection:
        return self  # adaptive ranks are refused

    @property
    @override
    def label(self) -> str:
        return "x".join(map(str, self.ranks))

    @property
    @override
    def layout(self) -> tuple[int, ...]:
        return self.ranks

    @property
    @override
    def low_shape(self) -> tuple[int, int]:
        return self.ranks[0], math.prod(self.ranks[1:])

    @property
    @override
    def basis_shapes(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.sizes[k], self.ranks[k]) for k in self.modes)

    @override
    def oriented(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """The unfoldings ``(d_k, l)`` of the modes that have a basis: copies, but for the first mode."""
        return tuple(matrix.movedim(k, 0).flatten(1) for k in self.modes)

    @override
    def project(self, matrix: Tensor, bases: tuple[Tensor, ...]) -> Tensor:
        work = matrix.to(torch.promote_types(matrix.dtype, bases[0].dtype))
        return self.core(work, bases).reshape(self.low_shape).to(matrix.dtype)

    def core(
        self,
        tensor: Tensor,  # sizes
        bases: Sequence[Tensor],  # basis_shapes
        *,
        but: int | None = None,
    ) -> Tensor:
        """``tensor`` in the coordinates of all bases ``(r_1, ..., r_N)``, or of all but the one of mode ``but``."""
        factors = dict(zip(self.modes, bases, strict=True))
        for mode in self._by_reduction:
            if mode != but:
                tensor = _mode_product(tensor, factors[mode].to(tensor.dtype).mT, mode)
        return tensor

    @property
    def _by_reduction(self) -> list[int]:
        """The modes with a basis, the one first that makes the tensor smallest."""
        return sorted(self.modes, key=lambda k: self.ranks[k] / self.sizes[k])

    @override
    def add_back_(
        self,
        weight: Tensor,  # sizes
        low_update: Tensor,
        bases: tuple[Tensor, ...],
        *,
        alpha: float,
        beta: float = 1.0,
    ) -> None:
        dtype = torch.promote_types(weight.dtype, bases[0].dtype)
        factors = {mode: basis.to(dtype) for mode, basis in zip(self.modes, bases, strict=True)}
        last, *others = self._by_reduction
        part = low_update.to(dtype).reshape(self.ranks)
        for mode in reversed(others):
            part = _mode_product(part, factors[mode], mode)
        order, blocks = _blocks(weight, last)
        if dtype != weight.dtype or blocks is None:
            weight.copy_(_mode_product(part, factors[last], last).mul_(alpha).add_(weight, alpha=beta))
            return
        a, _, b = blocks.shape
        part = part.permute(order).reshape(a, -1, b)
        scales: Any = {"alpha": alpha, "beta": beta}
        if a == 1:
            blocks[0].addmm_(factors[last], part[0], **scales)
        elif b == 1:
            blocks[..., 0].addmm_(part[..., 0], factors[last].mT, **scales)
        else:
            blocks.baddbmm_(factors[last].expand(a, -1, -1), part, **scales)


def _blocks(tensor: Tensor, mode: int) -> tuple[list[int], Tensor | None]:
    """A view ``(a, d, b)`` of a tensor with mode ``d`` in the middle, in the order of its memory; None if it has gaps.

    With the order of the dimensions, from the slowest to the fastest.
    """
    order = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    lying = tensor.permute(order)
    if not lying.is_contiguous():
        return order, None
    place = order.index(mode)
    return order, lying.view(math.prod(lying.shape[:place]), lying.shape[place], -1)


def _mode_product(
    tensor: Tensor,  # (..., d, ...)
    matrix: Tensor,  # (s, d)
    mode: int,
) -> Tensor:
    """``tensor x_mode matrix``: the mode of size ``d`` becomes one of size ``s``. Dense tensors are not copied."""
    order, blocks = _blocks(tensor, mode)
    if blocks is None:
        tensor = tensor.contiguous()
        order, blocks = _blocks(tensor, mode)
        assert blocks is not None
    if blocks.shape[0] == 1:
        product = matrix @ blocks[0]
    elif blocks.shape[2] == 1:
        product = blocks[..., 0] @ matrix.mT
    else:
        product = matrix @ blocks
    sizes = [matrix.shape[0] if k == mode else tensor.shape[k] for k in order]
    return product.reshape(sizes).permute([order.index(k) for k in range(tensor.ndim)])


def tucker_ranks(sizes: Sequence[int], rank: int | float | tuple[int, ...]) -> tuple[int, ...]:
    """The rank of each mode that a setting means.

    Args:
        sizes: Shape of the weight.
        rank: One rank for all modes, a rank for each, or, as a fraction, the share that core and bases together have of
            the weight's entries; modes then shrink in proportion.

    Raises:
        ValueError: If there is not a rank for each mode.

    Example:
        >>> tucker_ranks((64, 32, 3, 3), 8)
        (8, 8, 3, 3)
        >>> tucker_ranks((512, 512, 3, 3), 0.25)
        (276, 276, 2, 2)
    """
    if isinstance(rank, tuple):
        if len(rank) != len(sizes):
            raise ValueError(
                f"rank={rank} has {len(rank)} entries for a weight of shape {tuple(sizes)}, which has {len(sizes)} "
                "modes; give a rank for each, one for all, or different ones by rank_pattern."
            )
        return _capped([min(d, r) for d, r in zip(sizes, rank, strict=True)])
    if isinstance(rank, float):
        return _ranks_of_share(sizes, rank)
    return _capped([min(d, rank) for d in sizes])


def _ranks_of_share(sizes: Sequence[int], share: float) -> tuple[int, ...]:
    """Ranks in proportion to the sizes, the largest ones whose core and bases are no more than ``share`` of them."""
    least = (1,) * len(sizes)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        ranks = _capped([max(1, round(middle * d)) for d in sizes])
        held = math.prod(ranks) + sum(d * r for d, r in zip(sizes, ranks, strict=True) if r < d)
        if held <= share * math.prod(sizes):
            low, least = middle, ranks
        else:
            high = middle
    return least


def _capped(ranks: list[int]) -> tuple[int, ...]:
    """No mode wider than all others together: further vectors would have nothing to stand for."""
    while True:
        total = math.prod(ranks)
        capped = [min(r, total // r) for r in ranks]
        if capped == ranks:
            return tuple(ranks)
        # One at a time, the widest first: the others' bound depends on it.
        widest = max(range(len(ranks)), key=lambda k: ranks[k])
        ranks = [capped[k] if k == widest else r for k, r in enumerate(ranks)]
