# SPDX-License-Identifier: Apache-2.0
"""How the subspaces stand, for callbacks and loggers: numbers to read, nothing to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_galore import storage
from lightning_galore.low_grad import Projector
from lightning_galore.subspace import Side
from lightning_galore.targets import Target


@dataclass(frozen=True, kw_only=True)
class SubspaceStatus:
    """One projected weight.

    Args:
        name: The parameter's name in the model.
        shape: ``(m, n)`` of the weight.
        side: Which side is projected.
        rank: Width of its basis now; before the first step the most that it may have.
        step: Updates of the weight so far.
        refreshed_at: Step of the last refresh, -1 when none has succeeded.
        num_refreshes: Refreshes that succeeded.
        num_failures: Refreshes that were due and found no basis.
        gap: Steps from one refresh to the next, as adapted so far.
        overlap: Of the last two bases in [0, 1], None before the second refresh; ``drift`` is 1 minus it.
        energy_at_refresh: Share of the gradient's energy that the basis held of the gradient it was found from.
        energy: The same of the last gradient that was measured, 0-D on the weight's device.
        state_bytes: Bytes of its low-rank state, basis and moments.
        bytes_saved: What its moments would take at full rank, less ``state_bytes``; 0 before the first step.
    """

    name: str
    shape: tuple[int, int]
    side: Side
    rank: int
    step: int
    refreshed_at: int
    num_refreshes: int
    num_failures: int
    gap: int
    overlap: float | None
    energy_at_refresh: float | None
    energy: Tensor | None
    state_bytes: int
    bytes_saved: int

    @property
    def drift(self) -> float | None:
        """How much of the last basis the one before it did not hold."""
        return None if self.overlap is None else 1.0 - self.overlap


def statuses(
    projector: Projector, targets: Mapping[Tensor, Target], groups: Mapping[Tensor, Mapping[str, Any]]
) -> list[SubspaceStatus]:
    """The status of every projected weight.

    Args:
        projector: What refreshes them.
        targets: The projected weights.
        groups: The param group of each.
    """
    found = []
    for param, group in groups.items():
        target, state, record = targets[param], projector.state_of(param), projector.record_of(param, group)
        low = storage.nbytes(state.own) + storage.nbytes(state.bases if state.has_bases else ())
        # Moments have the shape of the low-rank gradient, so at full rank they would grow with it.
        full = storage.nbytes(state.own) * math.prod(param.shape) // math.prod(state.projection.low_shape)
        found.append(
            SubspaceStatus(
                name=target.name,
                shape=target.projection.shape,
                side=target.projection.side,
                rank=state.projection.rank,
                step=state.step,
                refreshed_at=record.refreshed_at,
                num_refreshes=record.num_refreshes,
                num_failures=state.num_failures,
                gap=record.gap_now,
                overlap=record.overlap if record.overlap >= 0 else None,
                energy_at_refresh=state.energy if state.energy >= 0 else None,
                energy=projector.energies.get(target),
                state_bytes=low,
                bytes_saved=full - low if full else 0,
            )
        )
    return found
