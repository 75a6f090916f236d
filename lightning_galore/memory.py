# SPDX-License-Identifier: Apache-2.0
"""Bytes by category, held or to be held, from the same layout that the optimizer allocates.

Where weights are sharded over processes, these are the bytes of one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_galore import base_probe, dtensors, state_keys, storage
from lightning_galore.bases import DRAWN_BYTES
from lightning_galore.config import GaLoreConfig
from lightning_galore.lift import LIFTS
from lightning_galore.sharding import Sharding
from lightning_galore.subspace import Projection
from lightning_galore.target_table import Target
from lightning_galore.transforms import Transform, transform_of


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes that the parameters of an optimizer hold, all of them together.

    Args:
        weights: The parameters themselves.
        bases: Bases of the projected ones.
        moments: State of the wrapped optimizer.
        lifts: What the lift keeps of projected weights.
        gradients: What is alive after the last backward of a step, by ``mode``. (A weight whose refresh waits for the
            end of an accumulation has its full gradient until then, whatever the mode.)
        transforms: What the transform of gradients remembers.
    """

    weights: int
    bases: int
    moments: int
    gradients: int
    lifts: int = 0
    transforms: int = 0

    @property
    def states(self) -> int:
        """Moments, and what else is kept of each weight from step to step, but its basis."""
        return self.moments + self.lifts + self.transforms

    @property
    def total(self) -> int:
        """All categories."""
        return self.weights + self.bases + self.moments + self.gradients + self.lifts + self.transforms


def footprint(base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig) -> Footprint:
    """Bytes that are held, or will be once every parameter has taken a step.

    Args:
        base: The wrapped optimizer.
        targets: Its projected weights.
        config: Says how bases and low-rank gradients are kept.
    """
    tally, transform = _Tally(base), transform_of(config)
    weights = bases = gradients = lifts = transforms = 0
    for group in base.param_groups:
        for param in group["params"]:
            weights += storage.nbytes(param)
            target = targets.get(param)
            shape = tuple(dtensors.local(param).shape)
            if target is not None:
                state = state_keys.WeightState(base.state.get(param) or {}, target.projection)
                shape = _low_part_shape(state.projection, param)
                lifts += _lift_bytes(state.projection, param, config)
                bases += state.bases.nbytes if state.has_bases else _basis_bytes(target.projection, param, config)
            own = {k: v for k, v in (base.state.get(param) or {}).items() if not state_keys.is_ours(k)}
            tally.add(own or None, group, shape, param)
            gradients += _gradient_bytes(param, None if target is None else shape, config)
            transforms += _transform_bytes(transform, shape, param, projected=target is not None)
    held = {"weights": weights, "bases": bases, "moments": tally.total, "gradients": gradients}
    return Footprint(**held, lifts=lifts, transforms=transforms)


class _Tally:
    """Adds up states; what bitsandbytes shares among all parameters (its maps of codes) counts once."""

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self._sum = 0
        self._shared: dict[int, Tensor] = {}
        self._probed: dict[tuple[Any, ...], Mapping[str, Any]] = {}

    @property
    def total(self) -> int:
        return self._sum + storage.nbytes(self._shared)

    def add(
        self, own: Mapping[str, Any] | None, group: Mapping[str, Any], shape: tuple[int, ...], like: Tensor
    ) -> None:
        """One parameter's state, or without one what a parameter of ``shape`` would have."""
        if own is None:
            key = (id(group), shape, like.dtype, like.device)
            if key not in self._probed:
                start = torch.zeros(shape, dtype=like.dtype, device=like.device)
                self._probed[key] = base_probe.stepped(self._base, group, start)[1]
            own = self._probed[key]
        shared = {id(value): value for name, value in own.items() if name.startswith("qmap")}
        self._shared |= shared
        self._sum += storage.nbytes(own) - storage.nbytes(shared)


def _gradient_bytes(param: Tensor, low_shape: tuple[int, ...] | None, config: GaLoreConfig) -> int:
    """Of a projected weight, or, without ``low_shape``, of another parameter."""
    if config.mode == "layerwise" or not param.requires_grad:
        return 0
    kept, shape = "param", tuple(dtensors.local(param).shape)
    if low_shape is not None and config.mode == "project":
        kept, shape = config.accumulator_storage, low_shape
    return storage.stored_bytes(shape, storage=kept, param_dtype=param.dtype)


def held_bytes(base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig) -> dict[Target, int]:
    """Bytes of each projected weight's state: the wrapped optimizer's own, the basis, and what the lift keeps.

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
            ours = _basis_bytes(state.projection, param, config) + _kept_bytes(state.projection, param, config)
            held[param] = storage.nbytes(state.own) + ours
    return {target: held[param] for param, target in targets.items()}


def bytes_at(
    base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig, ranks: Mapping[Target, int]
) -> dict[Target, int]:
    """Bytes that each projected weight's state would take at another rank, whatever it holds now.

    Where weights are sharded, on the first process, whose parts are the largest: all must come to the same budget.

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
    held = _probed(base, shadows, config, index=0)
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


def _probed(
    base: Optimizer, targets: Mapping[Tensor, Target], config: GaLoreConfig, *, index: int | None = None
) -> dict[Tensor, int]:
    """Bytes of state before it is there, by letting ``base`` step one proxy of each kind."""
    groups = {param: i for i, group in enumerate(base.param_groups) for param in group["params"]}
    probed: dict[tuple[Any, ...], int] = {}
    held = {}
    for param, target in targets.items():
        low_shape = _low_part_shape(target.projection, param, index)
        key = (groups[param], low_shape, param.dtype, param.device)
        if key not in probed:
            probed[key] = base_probe.probe_state(base, base.param_groups[groups[param]], low_shape, param)
        ours = _basis_bytes(target.projection, param, config, index) + _kept_bytes(target.projection, param, config)
        held[param] = probed[key] + ours
    return held


def _basis_bytes(projection: Projection, param: Tensor, config: GaLoreConfig, index: int | None = None) -> int:
    kept, shapes, sharding = config.basis_storage, projection.basis_shapes, Sharding.of(param)
    if kept == "seed":
        return DRAWN_BYTES
    if sharding is not None and kept not in storage.CODECS:
        shapes = sharding.basis_part_shapes(projection, divide=config.basis_placement == "shard", index=index)
    return sum(storage.stored_bytes(shape, storage=kept, param_dtype=param.dtype) for shape in shapes)


def _lift_bytes(projection: Projection, param: Tensor, config: GaLoreConfig) -> int:
    shapes = LIFTS[config.lift].build(config).kept_shapes(projection).values()
    sizes = (math.prod(shape) * (param.dtype.itemsize if shape else 4) for shape in shapes)
    return sum(sizes)


def _kept_bytes(projection: Projection, param: Tensor, config: GaLoreConfig) -> int:
    """Of the lift and of the transform of a projected weight."""
    shape = _low_part_shape(projection, param)
    transformed = _transform_bytes(transform_of(config), shape, param, projected=True)
    return _lift_bytes(projection, param, config) + transformed


def _transform_bytes(transform: Transform | None, shape: tuple[int, ...], param: Tensor, *, projected: bool) -> int:
    """Of a parameter whose gradient the wrapped optimizer sees in ``shape``."""
    if transform is None or (transform.projected_only and not projected):
        return 0
    scalar = torch.promote_types(param.dtype, torch.float32).itemsize
    kept = transform.kept_shapes(shape).values()
    return sum(math.prod(one) * (param.dtype.itemsize if one else scalar) for one in kept)


def _low_part_shape(projection: Projection, param: Tensor, index: int | None = None) -> tuple[int, int]:
    """Shape of what a process holds of a low-rank tensor: this one, or one of those with a part of it."""
    sharding = Sharding.of(param)
    return projection.low_shape if sharding is None else sharding.low_part_shape(projection, index=index)
