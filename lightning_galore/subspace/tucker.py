# SPDX-License-Identifier: Apache-2.0
"""Bases of each mode of a tensor: Tensor-GaLore's Tucker decomposition (arXiv 2501.02379), derived from the paper."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.subspace.base import Found, Known, Projection, Subspace
from lightning_galore.subspace.svd import SVD
from lightning_galore.subspace.tensors import TuckerProjection

SWEEPS = 2


class Tucker(Subspace):
    """Leading left singular vectors of each mode's unfolding, improved by higher-order orthogonal iteration (HOOI).

    The first refresh starts from the HOSVD (each unfolding by itself), a later one from the last bases (warm restart).
    A sweep then takes each mode in turn: its basis are the leading left singular vectors of the gradient as the other
    bases leave it. A matrix gets its exact singular vectors, which is what all this comes to there.
    """

    continuous: ClassVar[bool] = True
    relative_cost: ClassVar[float] = 100.0

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        if not isinstance(projection, TuckerProjection):
            return SVD()._find(grad, projection, generator=generator, known=known)
        bases = None
        if known is not None and len(projection.modes) > 1:
            bases = _iterated(grad, projection, [basis.to(grad.dtype) for basis in known.bases])
        if bases is None:  # the first ones, or a gradient that the last ones do not touch
            pairs = zip(projection.oriented(grad), projection.basis_shapes, strict=True)
            start = [_leading(matrix, rank) for matrix, (_, rank) in pairs]
            bases = _iterated(grad, projection, start)
        return None if bases is None else Found(bases=tuple(bases))


def _iterated(grad: Tensor, projection: TuckerProjection, start: list[Tensor | None]) -> list[Tensor] | None:
    bases = [basis for basis in start if basis is not None]
    if len(bases) < len(start):
        return None
    for _ in range(SWEEPS if len(bases) > 1 else 0):  # one mode alone has its best basis already
        for place, mode in enumerate(projection.modes):
            part = projection.core(grad, bases, but=mode)
            found = _leading(part.movedim(mode, 0).flatten(1), projection.ranks[mode])
            if found is None:
                return None
            bases[place] = found
    return bases


def _leading(
    matrix: Tensor,  # (d, l)
    rank: int,
) -> Tensor | None:
    """First ``rank`` left singular vectors ``(d, r)``; None for a matrix that is zero, or when they cannot be found."""
    found = linalg.gram_factors(matrix, rank) if matrix.shape[0] <= matrix.shape[1] else None
    if found is not None:
        return found[0].contiguous()
    factors = linalg.svd_factors(matrix, rank)
    if factors is None or not float(factors.values[0]) > 0:
        return None
    return factors.left.contiguous()
