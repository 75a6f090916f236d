# SPDX-License-Identifier: Apache-2.0
"""Bytes of low-rank state, from the same layout that the optimizer allocates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_galore import base_probe, state_keys, storage
from lightning_galore.config import GaLoreConfig
from lightning_galore.subspace import Projection
from lightning_galore.targets import Target


def held_bytes(base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig) -> dict[Target, int]:
    """Bytes of each projected weight's state: the wrapped optimizer's own, and the basis.

    Before the first step those that will be taken, found by letting ``base`` step a proxy of the same shape.

    Args:
        base: The wrapped optimizer.
        targets: Its projected weights.
        config: Says how a basis is kept.
    """
    states = {
        param: state_keys.WeightState(base.state.get(param) or {}, target.projection)
        for param, target in targets.items()
    }
    fresh = {param: target for param, target in targets.items() if not states[param].own}
    held = _probed(base, fresh, config)
    for param, state in states.items():
        if param not in fresh:
            held[param] = storage.nbytes(state.own) + _basis_bytes(state.projection, param, config)
    return {target: held[param] for param, target in targets.items()}


def bytes_at(
    base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig, ranks: Mapping[Target, int]
) -> dict[Target, int]:
    """Bytes that each projected weight's state would take at another rank, whatever it holds now.

    Args:
        base: The wrapped optimizer.
        targets: Its projected weights.
        config: Says how a basis is kept.
        ranks: The rank of each.
    """
    shadows = {
        param: replace(target, projection=target.projection.with_rank(ranks[target]))
        for param, target in targets.items()
    }
    held = _probed(base, shadows, config)
    return {target: held[param] for param, target in targets.items()}


def full_rank_bytes(own: Mapping[str, Any], projection: Projection) -> int:
    """What the wrapped optimizer's state would take at full rank: it grows along each projected axis."""
    grown = tuple(full / low for full, low in zip(projection.shape, projection.low_shape, strict=True))
    total = 0.0
    for key, value in own.items():
        if not isinstance(value, Tensor):
            continue
        factor = 1.0
        if value.ndim == 2:
            pairs = zip(value.shape, projection.low_shape, grown, strict=True)
            factor = math.prod(growth for size, low, growth in pairs if size == low)
        elif key.startswith("absmax"):  # a scale for each block of 8-bit codes
            factor = math.prod(grown)
        total += storage.nbytes(value) * factor
    return round(total)


def _probed(base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig) -> dict[Tensor, int]:
    """Bytes of state before it is there, by letting ``base`` step one proxy of each kind."""
    groups = {param: i for i, group in enumerate(base.param_groups) for param in group["params"]}
    probed: dict[tuple[Any, ...], int] = {}
    held = {}
    for param, target in targets.items():
        low_shape = target.projection.low_shape
        key = (groups[param], low_shape, param.dtype, param.device)
        if key not in probed:
            probed[key] = base_probe.probe_state(base, base.param_groups[groups[param]], low_shape, param)
        held[param] = probed[key] + _basis_bytes(target.projection, param, config)
    return held


def _basis_bytes(projection: Projection, param: Tensor, config: GaLoreConfig) -> int:
    kept = config.basis_storage
    return sum(storage.stored_bytes(s, storage=kept, param_dtype=param.dtype) for s in projection.basis_shapes)
