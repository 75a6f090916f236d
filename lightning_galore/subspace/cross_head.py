# SPDX-License-Identifier: Apache-2.0
"""A basis for all heads of an attention weight, found from a few of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_galore.config import GaLoreConfig
from lightning_galore.subspace.base import Found, Known, Projection, Subspace
from lightning_galore.subspace.randomized import Randomized
from lightning_galore.subspace.svd import Gram


class CrossHead(Subspace):
    """The right singular vectors of one head's rows of the gradient, or of as many heads as the rank takes.

    GaLore+ (arXiv 2412.19820): the heads of a query, key or value weight share what acts on their common input, so the
    basis of a head drawn at random at each refresh serves all of them. Its rows are few, so the basis comes from the
    exact decomposition of their small Gram matrix. Weights without heads, and those that are projected on another side
    than their input, get ``randomized``, as in the paper. The paper's sparsely coded residual is no part of it.
    """

    relative_cost: ClassVar[float] = 3.0

    def __init__(self, head_size: int = 64) -> None:
        self.head_size = head_size

    @classmethod
    @override
    def build(cls, config: GaLoreConfig) -> Self:
        return cls(config.head_size)

    @override
    def _find(
        self, grad: Tensor, projection: Projection, *, generator: torch.Generator, known: Known | None
    ) -> Found | None:
        rows, size = grad.shape[0], self.head_size
        taken = math.ceil(projection.rank / size)
        if not projection.has_heads or projection.side != "right" or rows % size or taken * size >= rows:
            return Randomized()._find(grad, projection, generator=generator, known=None)
        chosen = torch.randperm(rows // size, generator=generator, device=grad.device)[:taken]
        part = grad.unflatten(0, (-1, size))[chosen].flatten(0, 1)
        shared = replace(projection, shape=(part.shape[0], part.shape[1]))
        # Heads whose gradient is zero say nothing; the others may.
        found = Gram()._find(part, shared, generator=generator, known=None) if bool(part.any()) else None
        if found is None:
            return Randomized()._find(grad, projection, generator=generator, known=None)
        return Found(bases=found.bases)  # its spectrum is not that of the whole gradient
