# SPDX-License-Identifier: Apache-2.0
"""How the subspaces stand, for callbacks and loggers, and what those may set."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_galore import memory, storage
from lightning_galore.config import SCHEDULE_SETTINGS, GaLoreConfig
from lightning_galore.projector import Projector
from lightning_galore.refresh import RefreshEvent
from lightning_galore.subspace import Side
from lightning_galore.target_table import Target, TargetTable


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
        state_bytes: Bytes of its low-rank state: basis, moments, and what a lift and a transform keep.
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
        target, state, record = targets[param], projector.state_of(param), projector.turns.record_of(param, group)
        low = storage.nbytes([state.own, state.lift_entries, state.transform_entries])
        low += state.bases.nbytes if state.has_bases else 0
        full = memory.full_rank_bytes(state.own, state.projection)
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
                gap=projector.turns.schedule.gap_of(record),
                overlap=record.overlap if record.overlap >= 0 else None,
                energy_at_refresh=state.energy if state.energy >= 0 else None,
                energy=projector.energies.get(target),
                state_bytes=low,
                bytes_saved=full - low if full else 0,
            )
        )
    return found


class SubspaceControls:
    """What a :class:`~lightning_galore.GaLoreOptimizer` lets callbacks see and set."""

    base: Optimizer
    config: GaLoreConfig
    targets: dict[Tensor, Target]
    param_groups: list[dict[str, Any]]
    _projector: Projector
    _table: TargetTable

    def set_schedule(self, **settings: Any) -> None:
        """Decide otherwise from now on when a subspace is refreshed; what each weight's past has shown is kept.

        Args:
            **settings: Settings of the schedule (``schedule``, ``update_proj_gap``, ``stagger``, ...).

        Raises:
            TypeError: If one of them is no setting of the schedule.
            ValueError: If one is out of range.
        """
        others = sorted(set(settings) - set(SCHEDULE_SETTINGS))
        if others:
            raise TypeError(
                f"{', '.join(others)}: no setting of a schedule; choose among {', '.join(SCHEDULE_SETTINGS)}."
            )
        config = self.config.with_settings(**settings)
        for group in self.param_groups:
            config.for_group(group)  # a gap of its own must lie within the bounds too
        for optimizer in (self, getattr(self, "_optimizer", self)):  # a LightningOptimizer keeps attributes of its own
            vars(optimizer)["config"] = config
        self._projector.turns.reschedule(config)
        self._projector.arrange(self.param_groups)

    def watch(self, watching: bool = True) -> None:
        """Measure at every step how much of each gradient its basis holds: one pass over the gradient more."""
        self._projector.watching = watching

    def force_due(self, params: Collection[Tensor] | None) -> None:
        """Refresh just these weights from now on, whatever the schedule says, for who rehearses a step.

        Args:
            params: The weights that are due at every step; None asks the schedule again.
        """
        self._projector.turns.forced = None if params is None else frozenset(params)

    def refreshing_together(self) -> list[Tensor]:
        """The weights that refresh in the fullest step of the schedule, once each has its first basis."""
        return self._projector.turns.together()

    def on_refresh(self, listener: Callable[[RefreshEvent], None]) -> Callable[[], None]:
        """Tell ``listener`` of every refresh from now on, when its step has been taken.

        Returns:
            What to call when it shall not be told any more.
        """
        listeners = self._projector.listeners
        listeners.append(listener)
        return lambda: listeners.remove(listener)

    @property
    def refresh_seconds(self) -> float:
        """Seconds that this object has spent on finding bases."""
        return self._projector.refresher.seconds

    def subspaces(self) -> list[SubspaceStatus]:
        """How the subspace of each projected weight stands now."""
        groups = {param: group for group in self.param_groups for param in group["params"] if param in self.targets}
        return statuses(self._projector, self.targets, groups)

    def targets_table(self) -> TargetTable:
        """Every parameter: its shape, side, rank, bytes of low-rank state, or why it is not projected.

        Bytes are those held, and before the first step those that ``base`` and the basis will take.
        """
        return self._table.with_bytes(memory.held_bytes(self.base, self.targets, self.config))

    def footprint(self) -> memory.Footprint:
        """Bytes of weights, bases, moments and gradients: those held, and before the first step those to be held."""
        return memory.footprint(self.base, self.targets, self.config)
