# SPDX-License-Identifier: Apache-2.0
"""Bases that do not look at the gradient: cheap baselines, and the projection of the APOLLO family."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.subspace.base import Subspace


class Gaussian(Subspace):
    """Entries from ``N(0, 1/r)``: ``P P^T`` is the identity in expectation, but the columns are not orthonormal."""

    orthonormal: ClassVar[bool] = False

    @override
    def _pair(self, grad: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        left, right = (linalg.gaussian(rows, rank, like=grad, generator=generator) for rows in grad.shape)
        return left / rank**0.5, right / rank**0.5


class RandomOrthonormal(Subspace):
    """A uniformly distributed orthonormal basis: the QR factor of a Gaussian matrix. Never runs an SVD."""

    @override
    def _pair(self, grad: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        left, right = (linalg.gaussian(rows, rank, like=grad, generator=generator) for rows in grad.shape)
        return linalg.orthonormalize(left), linalg.orthonormalize(right)
