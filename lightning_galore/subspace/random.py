# SPDX-License-Identifier: Apache-2.0
"""Bases that do not look at the gradient: cheap baselines, and the projection of the APOLLO family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.subspace.base import Found, Known, Projection, Subspace


def draw(
    shapes: Sequence[tuple[int, int]], *, generator: torch.Generator, dtype: torch.dtype, orthonormal: bool
) -> tuple[Tensor, ...]:
    """Random bases ``(d, r)``, on the generator's device: the same ones whenever it stands where it stood.

    Args:
        shapes: Of the bases, which are drawn one after the other.
        generator: Source of the numbers.
        dtype: That of the gradients; they are drawn and orthonormalised in its decomposition dtype.
        orthonormal: Whether the columns shall be so, with any signs; else their entries are from ``N(0, 1/r)``.
    """
    like = torch.empty((), dtype=dtype, device=generator.device)
    draws = [linalg.gaussian(d, r, like=like, generator=generator) for d, r in shapes]
    return tuple(linalg.orthonormalize(one) if orthonormal else one / one.shape[1] ** 0.5 for one in draws)


class Gaussian(Subspace):
    """Entries from ``N(0, 1/r)``: ``P P^T`` is the identity in expectation, but the columns are not orthonormal."""

    orthonormal: ClassVar[bool] = False

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        return _found(grad, projection, generator, orthonormal=False)


class RandomOrthonormal(Subspace):
    """A uniformly distributed orthonormal basis: the QR factor of a Gaussian matrix. Never runs an SVD."""

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        return _found(grad, projection, generator, orthonormal=True)


def _found(grad: Tensor, projection: Projection, generator: torch.Generator, *, orthonormal: bool) -> Found:
    return Found(bases=draw(projection.basis_shapes, generator=generator, dtype=grad.dtype, orthonormal=orthonormal))
