# SPDX-License-Identifier: Apache-2.0
"""How the tests of this folder call a finder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_galore.subspace import SUBSPACES, Found, Projection, Subspace, seeded_generator

SHAPES = [(40, 24), (24, 40), (24, 24)]
SIDES: list[Any] = ["left", "right", "full"]
NAMES = list(SUBSPACES)


def find(
    finder: str | Subspace,
    grad: Tensor,
    *,
    side: Any = "right",
    rank: int = 4,
    seed: int = 0,
    refresh: int = 0,
    **options: Any,
) -> Found | None:
    """What a finder, or the one of that name, makes of ``grad``."""
    generator = seeded_generator(grad.device, seed=seed, name="weight", draw=refresh)
    projection = Projection(shape=(grad.shape[0], grad.shape[1]), side=side, rank=rank)
    subspace = SUBSPACES[finder]() if isinstance(finder, str) else finder
    return subspace.find(grad, projection, generator=generator, **options)


def found(finder: str | Subspace, grad: Tensor, **options: Any) -> Found:
    """The same, where it must not fail."""
    result = find(finder, grad, **options)
    assert result is not None
    return result
