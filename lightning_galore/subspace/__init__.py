# SPDX-License-Identifier: Apache-2.0
"""How a basis is found: one file a kind, one line here."""

from lightning_galore.subspace.base import (
    SIDE_CODES,
    Found,
    Known,
    Projection,
    Side,
    Subspace,
    resolve_side,
    seeded_generator,
)
from lightning_galore.subspace.blend import Blend
from lightning_galore.subspace.columns import Columns
from lightning_galore.subspace.coordinates import BlockChoice, CoordinateChoice
from lightning_galore.subspace.cross_head import CrossHead
from lightning_galore.subspace.power import Power
from lightning_galore.subspace.random import Gaussian, RandomOrthonormal, draw
from lightning_galore.subspace.randomized import Randomized
from lightning_galore.subspace.svd import SVD, Gram
from lightning_galore.subspace.tensors import FoldedProjection, TuckerProjection
from lightning_galore.subspace.track import Track
from lightning_galore.subspace.tucker import Tucker, WarmTucker

SUBSPACES: dict[str, type[Subspace]] = {
    "randomized": Randomized,
    "svd": SVD,
    "gram": Gram,
    "power": Power,
    "track": Track,
    "blend": Blend,
    "columns": Columns,
    "coordinates": CoordinateChoice,
    "block": BlockChoice,
    "cross_head": CrossHead,
    "gaussian": Gaussian,
    "random_orthonormal": RandomOrthonormal,
    "tucker": Tucker,
    "tucker_warm": WarmTucker,
}

__all__ = [
    "SIDE_CODES",
    "SUBSPACES",
    "FoldedProjection",
    "Found",
    "Known",
    "Projection",
    "RandomOrthonormal",
    "Side",
    "Subspace",
    "Tucker",
    "TuckerProjection",
    "WarmTucker",
    "draw",
    "resolve_side",
    "seeded_generator",
]
