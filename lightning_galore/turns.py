# SPDX-License-Identifier: Apache-2.0
"""Whose basis is refreshed when: the schedule, asked for each weight, and the places that spread first refreshes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_galore import schedule
from lightning_galore.config import GaLoreConfig
from lightning_galore.schedule import SCHEDULES, RefreshRecord
from lightning_galore.state_keys import WeightState
from lightning_galore.target_table import Target


class Turns:
    """When each projected weight is refreshed.

    Args:
        config: Names the schedule.
        targets: The projected weights; :meth:`arrange` looks at them again.
        state_of: The state of a weight.
        cost: Of a refresh, for each entry of a weight and rank, beside that of an ordinary step.
    """

    def __init__(
        self,
        config: GaLoreConfig,
        targets: Mapping[Tensor, Target],
        state_of: Callable[[Tensor], WeightState],
        *,
        cost: float,
    ) -> None:
        self._config, self._targets, self._state_of, self._cost = config, targets, state_of, cost
        self.schedule = SCHEDULES[config.schedule](config)
        #: Whether first refreshes are spread over the gap.
        self.staggers = bool(config.stagger)
        #: The weights that are due, whatever the schedule says; None asks it. For who rehearses a step.
        self.forced: frozenset[Tensor] | None = None
        self._places: dict[Target, tuple[int, int]] = {}

    def reschedule(self, config: GaLoreConfig) -> None:
        """Decide by another schedule from now on; what the weights' records hold stays."""
        self._config, self.staggers = config, bool(config.stagger)
        self.schedule = SCHEDULES[config.schedule](config)
        self._places.clear()

    def arrange(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Stagger the refreshes of weights that have no place yet.

        Args:
            groups: The param groups, for the gap of each weight.
        """
        new = {
            param: group.get("update_proj_gap") or self._config.gap
            for group in groups
            for param in group["params"]
            if param in self._targets and self._targets[param] not in self._places
        }
        # Frozen weights take no turn from those that train; they get their own, for when they are unfrozen.
        for trains in (True, False) if self.staggers else ():
            gaps = {self._targets[param]: gap for param, gap in new.items() if param.requires_grad is trains}
            works = [math.prod(target.projection.shape) * float(target.projection.rank) for target in gaps]
            share = self._config.refresh_share
            places = schedule.staggered(works, list(gaps.values()), cost=self._cost, share=share)
            self._places.update(zip(gaps, places, strict=True))

    def together(self) -> list[Tensor]:
        """The weights that refresh in the fullest step of the schedule, once each has its first basis."""
        if not self.staggers:
            return list(self._targets)
        sharing: dict[int, list[Tensor]] = {}
        for param, target in self._targets.items():
            sharing.setdefault(self._places.get(target, (0, 0))[1], []).append(param)
        return max(sharing.values(), key=lambda params: sum(param.numel() for param in params), default=[])

    def record_of(self, param: Tensor, group: Mapping[str, Any]) -> RefreshRecord:
        """What the schedule knows of a projected weight.

        Args:
            param: The weight.
            group: Its param group, whose ``update_proj_gap`` wins over the configuration's.
        """
        place = self._places.get(self._targets[param], (0, 0)) if self.staggers else None
        gap = group.get("update_proj_gap") or self._config.gap
        return self._state_of(param).record(gap, place=place)

    def due(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the weight's next step refreshes its basis."""
        if self.forced is not None:
            return param in self.forced
        state = self._state_of(param)
        return state.drawn_elsewhere or self.schedule.due(state.step, self.record_of(param, group))

    def measures(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the weight's next step measures how much of the gradient its basis holds."""
        if not self.schedule.needs_energy:
            return False
        return self.schedule.measures(self._state_of(param).step, self.record_of(param, group))
