# SPDX-License-Identifier: Apache-2.0
"""Optimizer states whole and in parts: as one process writes them, and as each of several keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_galore import dtensors, state_keys
from lightning_galore.sharding import Sharding
from lightning_galore.target_table import Target


def placed_state_dict(
    state_dict: Mapping[str, Any],
    param_groups: Sequence[Mapping[str, Any]],
    targets: Mapping[Tensor, Target],
    *,
    divide_bases: bool,
) -> dict[str, Any]:
    """A state dict in the form in which these parameters keep it: parts where they are divided, whole where not.

    So what one process has written loads into several, and the reverse. Collective only where whole ones are made of
    parts.

    Args:
        state_dict: Of any number of processes, by position.
        param_groups: Where it will be loaded into.
        targets: The projected weights.
        divide_bases: ``basis_placement="shard"``.
    """
    state = dict(state_dict["state"])
    for group, saved_group in zip(param_groups, state_dict["param_groups"], strict=False):
        for param, index in zip(group["params"], saved_group["params"], strict=False):
            if state.get(index):
                state[index] = placed(state[index], param, targets.get(param), divide_bases=divide_bases)
    return {**state_dict, "state": state}


def placed(
    saved: Mapping[str, Any], param: Tensor, target: Target | None, *, divide_bases: bool = False
) -> dict[str, Any]:
    """One parameter's state as it keeps it.

    Args:
        saved: Its entries; DTensors on the parameter's mesh stay as they are.
        param: The parameter.
        target: Its name and geometry, if it is projected.
        divide_bases: ``basis_placement="shard"``.
    """
    if not dtensors.is_sharded(param):
        return {key: dtensors.whole(value) if isinstance(value, Tensor) else value for key, value in saved.items()}
    placed = dict(saved)
    sharding = Sharding.of(param, name=target.name) if target is not None else None
    low_shape, low_placements = None, None
    if target is not None and sharding is not None and state_keys.BASIS in saved:
        state = state_keys.WeightState(placed, target.projection)
        low_shape = state.projection.low_shape
        drawn = isinstance(saved[state_keys.BASIS], int)  # a number, which is the same on all
        if not drawn and not any(dtensors.is_sharded(part.codes) for part in state.bases.parts):
            state.write_bases(sharding.at_rest(state.bases, target.projection.side, divide=divide_bases))
    elif target is not None:
        low_shape = target.projection.low_shape
    if target is not None and sharding is not None:
        low_placements = sharding.shards.placements(sharding.low_dim(target.projection.side))
    for key, value in placed.items():
        if not isinstance(value, Tensor) or not value.ndim or dtensors.is_sharded(value) or state_keys.is_ours(key):
            continue
        shape = tuple(value.shape)
        placements = {low_shape: low_placements, tuple(param.shape): param.placements}.get(shape)
        placed[key] = dtensors.divided(value.to(param.device), param.device_mesh, placements)
    return placed
