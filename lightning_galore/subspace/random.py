# SPDX-License-Identifier: Apache-2.0
"""Bases that do not look at the gradient: cheap baselines, and the projection of the APOLLO family."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.subspace.base import Found, Known, Projection, Subspace


class Gaussian(Subspace):
    """Entries from ``N(0, 1/r)``: ``P P^T`` is the identity in expectation, but the columns are not orthonormal."""

    orthonormal: ClassVar[bool] = False

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        return Found(bases=tuple(draw / projection.rank**0.5 for draw in _draws(grad, projection, generator)))


class RandomOrthonormal(Subspace):
    """A uniformly distributed orthonormal basis: the QR factor of a Gaussian matrix. Never runs an SVD."""

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        return Found(bases=tuple(linalg.orthonormalize(draw) for draw in _draws(grad, projection, generator)))


def _draws(grad: Tensor, projection: Projection, generator: torch.Generator) -> list[Tensor]:
    return [linalg.gaussian(d, r, like=grad, generator=generator) for d, r in projection.basis_shapes]
