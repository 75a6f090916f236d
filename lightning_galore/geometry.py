# SPDX-License-Identifier: Apache-2.0
"""How a weight is projected, by shape and settings: a matrix on its side, a tensor folded or along its modes."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_galore.config import GaLoreConfig, Rank
from lightning_galore.subspace import FoldedProjection, Projection, TuckerProjection, resolve_side
from lightning_galore.subspace.tensors import columns_as_they_lie, tucker_ranks


def projection_of(
    weight: Tensor, config: GaLoreConfig, *, module: str, named: Rank | None = None
) -> tuple[Projection | None, str]:
    """The projection of a weight of order 2 or more, or None and the reason why it would save nothing.

    Args:
        weight: The weight.
        config: The settings of its param group.
        module: Name of its module, for ``rank_pattern``.
        named: The ``rank`` of its param group, which wins.

    Raises:
        ValueError: If the rank has an entry for each mode, and the weight is a matrix or has other modes.
    """
    sizes, rank = tuple(weight.shape), config.rank_named(module, named=named)
    if config.by_modes and weight.ndim > 2:
        ranks = tucker_ranks(sizes, rank)
        if all(r == d for r, d in zip(ranks, sizes, strict=True)):
            return None, f"rank = {rank} reaches every mode: nothing would be saved"
        return TuckerProjection.of(sizes, ranks), ""
    shape = (sizes[0], math.prod(sizes[1:]))
    width = config.rank_of(module, shape, named=named)
    # A rank in the group names these very weights, so r = min(m, n) is honoured there although it saves nothing.
    if width > min(shape) - (named is None):
        return None, f"min(m, n) = {min(shape)} <= rank = {width}: nothing would be saved"
    side = resolve_side(config.proj_type, shape)
    if weight.ndim == 2:
        return Projection(shape=shape, side=side, rank=width, has_heads=config.has_heads(module)), ""
    order = columns_as_they_lie(weight)
    return FoldedProjection(shape=shape, side=side, rank=width, sizes=sizes, order=order), ""
