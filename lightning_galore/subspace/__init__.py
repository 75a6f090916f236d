# SPDX-License-Identifier: Apache-2.0
"""How a basis is found: one file a kind, one line here."""

from lightning_galore.subspace.base import SIDE_CODES, Projection, Side, Subspace, resolve_side, seeded_generator
from lightning_galore.subspace.random import Gaussian, RandomOrthonormal
from lightning_galore.subspace.randomized import Randomized
from lightning_galore.subspace.svd import SVD

SUBSPACES: dict[str, type[Subspace]] = {
    "randomized": Randomized,
    "svd": SVD,
    "gaussian": Gaussian,
    "random_orthonormal": RandomOrthonormal,
}

__all__ = ["SIDE_CODES", "SUBSPACES", "Projection", "Side", "Subspace", "resolve_side", "seeded_generator"]
