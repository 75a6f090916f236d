# SPDX-License-Identifier: Apache-2.0
"""Exact singular vectors: the choice of the GaLore paper."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.subspace.base import Subspace


class SVD(Subspace):
    """The first ``r`` singular vectors by a full SVD (arXiv 2403.03507, equation 12). Exact, slow on large weights."""

    @override
    def _pair(self, grad: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor] | None:
        return linalg.svd_pair(grad, rank)
