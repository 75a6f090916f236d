# SPDX-License-Identifier: Apache-2.0
"""LDAdam's basis: a power iteration on gradient and first moment as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore.subspace.base import Found, Known, Projection
from lightning_galore.subspace.svd import SVD
from lightning_galore.subspace.track import Track


class Blend(Track):
    """``qr(B B^T P)`` with ``B = rho P m + (1 - rho) G``: arXiv 2410.16103, algorithm 1; ``m`` is bias-corrected.

    As ``track``, but the two are not divided by their norms: while gradients shrink or turn, the moment outweighs them.
    The gradient must have the units of what the optimizer saw before: one that is still scaled for the loss outweighs
    the moment. Begins with an exact SVD of ``G``, and goes back to it where ``B`` does not touch the last basis.
    """

    normalizes: ClassVar[bool] = False

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        tracked = None if known is None else self._follow(grad, projection, generator=generator, known=known)
        return tracked or SVD()._find(grad, projection, generator=generator, known=None)
