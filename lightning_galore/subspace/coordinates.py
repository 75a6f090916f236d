# SPDX-License-Identifier: Apache-2.0
"""Rows or columns of the weight itself as a subspace: bases of unit vectors, drawn without a look at the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore.subspace.base import Found, Known, Projection, Subspace


class CoordinateChoice(Subspace):
    """``r`` columns of the weight (right) or rows (left), drawn at random: columnwise FRUGAL (arXiv 2411.07837).

    The basis is kept, and multiplied by, as any other: exact, but not as cheap as an index would be.
    """

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        shapes = projection.basis_shapes
        return Found(bases=tuple(_unit_vectors(self._chosen(*shape, generator), shape, grad) for shape in shapes))

    def _chosen(self, rows: int, rank: int, generator: torch.Generator) -> Tensor:
        """Which ``rank`` of ``rows``, in ascending order."""
        return torch.randperm(rows, generator=generator, device=generator.device)[:rank].sort().values


class BlockChoice(CoordinateChoice):
    """One of the runs of ``r`` neighbours into which the columns (right) or rows (left) fall, drawn at random.

    (FRUGAL's own blocks are whole layers, of which some keep a state and others none.)
    """

    @override
    def _chosen(self, rows: int, rank: int, generator: torch.Generator) -> Tensor:
        block = int(torch.randint(-(-rows // rank), (), generator=generator, device=generator.device))
        return torch.arange(rank, device=generator.device) + min(block * rank, rows - rank)


def _unit_vectors(chosen: Tensor, shape: tuple[int, int], like: Tensor) -> Tensor:
    basis = like.new_zeros(shape)
    basis[chosen, torch.arange(len(chosen), device=like.device)] = 1.0
    return basis
