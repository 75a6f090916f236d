# SPDX-License-Identifier: Apache-2.0
"""From a gradient to a low-rank gradient: refresh the basis when it is due, project, commit nothing before the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_galore import linalg, storage
from lightning_galore.config import GaLoreConfig
from lightning_galore.schedule import SCHEDULES
from lightning_galore.state_keys import WeightState
from lightning_galore.subspace import SUBSPACES, seeded_generator
from lightning_galore.targets import Target


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """What a refresh that was due came to.

    Args:
        bases: The new bases, or None when the old ones stay.
        found: Whether ``bases`` come from the gradient; False also for the unit vectors that stand in at the start.
        overlap: Of the old and the new bases, -1.0 when there is nothing to compare.
    """

    bases: tuple[Tensor, ...] | None
    found: bool
    overlap: float = -1.0


@dataclass(frozen=True, kw_only=True)
class LowGrad:
    """A weight's projected gradient, waiting for a step. Dropping it drops its refresh: a skipped step loses nothing.

    Args:
        target: The weight's name and geometry.
        proxy: Zeros of the low-rank shape; ``proxy.grad`` is the low-rank gradient.
        bases: What the gradient was projected with.
        refresh: What happened if a refresh was due.
    """

    target: Target
    proxy: nn.Parameter
    bases: tuple[Tensor, ...]
    refresh: Refresh | None

    @property
    def grad(self) -> Tensor:
        """The low-rank gradient, of ``target.projection.low_shape``."""
        assert self.proxy.grad is not None
        return self.proxy.grad

    def add_(self, grad: Tensor) -> None:
        """Accumulate one more full gradient ``(m, n)``: exact, because projecting is linear and the bases stay."""
        self.grad.add_(self.target.projection.project(grad, self.bases))


class Projector:
    """Prepares low-rank gradients and commits what their step decided.

    Args:
        config: Names the subspace, the schedule and the storage.
    """

    def __init__(self, config: GaLoreConfig) -> None:
        self.config = config
        self.subspace = SUBSPACES[config.subspace]()
        self.schedule = SCHEDULES[config.schedule]()

    def due(self, state: WeightState, group: Mapping[str, Any]) -> bool:
        """Whether the weight's next step refreshes its basis.

        Args:
            state: The weight's state.
            group: Its param group, whose ``update_proj_gap`` wins over the configuration's.
        """
        return self.schedule.due(state.step, state.record(group.get("update_proj_gap") or self.config.update_proj_gap))

    def prepare(
        self,
        grad: Tensor,  # (m, n)
        target: Target,
        state: WeightState,
        *,
        due: bool,
    ) -> LowGrad:
        """Project ``grad``, with a new basis if one is due. Changes nothing but what it returns."""
        if grad.is_sparse:
            raise ValueError(
                f"{target.name} has a sparse gradient, which cannot be projected; add it to ignore_modules."
            )
        refresh = self._refresh(grad, target, state) if due else None
        bases = refresh.bases if refresh and refresh.bases else state.bases
        low_grad = target.projection.project(grad, bases)
        proxy = nn.Parameter(torch.zeros_like(low_grad))
        proxy.grad = low_grad
        return LowGrad(target=target, proxy=proxy, bases=bases, refresh=refresh)

    def commit(self, low_grad: LowGrad, state: WeightState) -> None:
        """Write the outcome of the refresh into the state: the step is taken now."""
        if low_grad.refresh is not None:
            state.record_refresh(low_grad.refresh.bases, found=low_grad.refresh.found, overlap=low_grad.refresh.overlap)

    def _refresh(self, grad: Tensor, target: Target, state: WeightState) -> Refresh:
        """Find new bases; where the gradient gives none, keep the old ones, or begin with unit vectors."""
        seed, refresh = self.config.seed, state.num_refreshes
        generator = seeded_generator(grad.device, seed=seed, name=target.name, refresh=refresh)
        found = self.subspace.find(grad, target.projection, generator=generator, fix_signs=self.config.fix_signs)
        if found is None:
            if state.has_bases:
                return Refresh(bases=None, found=False)
            unit = [linalg.identity_basis(d, r, like=grad) for d, r in target.projection.basis_shapes]
            return Refresh(bases=self._store(unit, grad), found=False)
        bases = self._store(found, grad)
        overlap = -1.0
        if state.refreshed_at >= 0 and self.subspace.orthonormal:
            pairs = zip(state.bases, bases, strict=True)
            # A basis that is stored in half precision is not quite orthonormal, so this could pass 1.
            overlap = min(1.0, float(sum(linalg.overlap(old, new) for old, new in pairs)) / len(bases))
        return Refresh(bases=bases, found=True, overlap=overlap)

    def _store(self, bases: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        kept = self.config.basis_storage
        return tuple(storage.write(basis, storage=kept, param_dtype=grad.dtype) for basis in bases)


def clip_(grad: Tensor | None, max_norm: float | None, *, norm_sq: Tensor | None = None) -> None:
    """Scale one parameter's gradient down to ``max_norm``, in place; nothing to do without either.

    Args:
        grad: A gradient, full or low-rank.
        max_norm: ``clip_weight_norm``.
        norm_sq: Squared norm of the full gradient, where ``grad`` is only its projection.
    """
    if grad is None or max_norm is None:
        return
    norm = torch.linalg.vector_norm(grad) if norm_sq is None else norm_sq.sqrt()
    grad.mul_((max_norm / norm.clamp(min=max_norm)).to(grad.dtype))
