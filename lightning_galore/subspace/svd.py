# SPDX-License-Identifier: Apache-2.0
"""Exact singular vectors: of the gradient itself, and of its small Gram matrix."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.subspace.base import Found, Known, Projection, Subspace


class SVD(Subspace):
    """The first ``r`` singular vectors by a full SVD (arXiv 2403.03507, equation 12). Exact, slow on large weights."""

    relative_cost: ClassVar[float] = 100.0

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        factors = linalg.svd_factors(grad, projection.rank)
        return None if factors is None else _found(factors.left, factors.right, factors.values, projection)


class Gram(Subspace):
    """The first ``r`` singular vectors by an eigendecomposition of ``G G^T`` or ``G^T G``, the smaller one, in fp64.

    On the ill-conditioned gradients of real training (sigma_1/sigma_r up to 5e7) it is nearer to the exact vectors than
    an SVD in fp32. On one CPU thread it took a third of the SVD's time on rectangular weights (768x3072, 2048x5461) and
    as long as it on square ones; it copies the gradient to fp64.
    """

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        wide = grad.shape[0] <= grad.shape[1]
        matrix = grad if wide else grad.mT
        factors = linalg.gram_factors(matrix, projection.rank)
        if factors is None:
            return SVD()._find(grad, projection, generator=generator, known=known)
        short, values = factors
        if projection.side == ("left" if wide else "right"):
            return Found(bases=(short,), spectrum=values)
        # A^T U has the columns sigma_i v_i: orthogonal already, but for those that are too small to be more than noise.
        long = linalg.orthonormalize(matrix.mT @ short)
        return _found(*((short, long) if wide else (long, short)), values, projection)


def _found(left: Tensor, right: Tensor, values: Tensor, projection: Projection) -> Found:
    bases = {"left": (left,), "right": (right,), "full": (left, right)}[projection.side]
    return Found(bases=bases, spectrum=values)
