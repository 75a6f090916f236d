# SPDX-License-Identifier: Apache-2.0
"""Bytes of low-rank state, from the same layout that the optimizer allocates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_galore import base_rules, state_keys, storage
from lightning_galore.config import GaLoreConfig
from lightning_galore.targets import Target


def held_bytes(base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig) -> dict[Target, int]:
    """Bytes of each projected weight's state: the wrapped optimizer's own, and the basis.

    Before the first step those that will be taken, found by letting ``base`` step a proxy of the same shape.

    Args:
        base: The wrapped optimizer.
        targets: Its projected weights.
        config: Says how a basis is kept.
    """
    groups = {param: i for i, group in enumerate(base.param_groups) for param in group["params"]}
    probed: dict[tuple[Any, ...], int] = {}
    held: dict[Target, int] = {}
    for param, target in targets.items():
        low_shape = target.projection.low_shape
        state = state_keys.WeightState(base.state.get(param) or {}, target.projection)
        key = (groups[param], low_shape, param.dtype, param.device)
        if not state.own and key not in probed:
            probed[key] = base_rules.probe_state(base, base.param_groups[groups[param]], low_shape, param)
        itemsize = storage.storage_dtype(config.basis_storage, param.dtype).itemsize
        basis = sum(d * r for d, r in state.projection.basis_shapes) * itemsize
        held[target] = (storage.nbytes(state.own) if state.own else probed[key]) + basis
    return held


def bytes_per_rank(base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig) -> dict[Target, float]:
    """Bytes of each projected weight's state for one unit of rank, moments and basis.

    Args:
        base: The wrapped optimizer.
        targets: Its projected weights.
        config: Says how a basis is kept.
    """
    states = {
        target: state_keys.WeightState(base.state.get(param) or {}, target.projection).projection.rank
        for param, target in targets.items()
    }
    return {target: held / states[target] for target, held in held_bytes(base, targets, config).items()}
