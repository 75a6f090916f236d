# SPDX-License-Identifier: Apache-2.0
"""When a weight's subspace is refreshed: one question, asked with python numbers only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from typing_extensions import override


@dataclass(frozen=True, kw_only=True)
class RefreshRecord:
    """What a schedule may know of one weight.

    Args:
        refreshed_at: Step of the last refresh, -1 when none has succeeded yet.
        num_refreshes: Refreshes that succeeded so far.
        gap: The weight's ``update_proj_gap``.
        overlap: Overlap of the last two bases in [0, 1], -1.0 before the second refresh.
    """

    refreshed_at: int
    num_refreshes: int
    gap: int
    overlap: float = -1.0


class Schedule(ABC):
    """Decides when to refresh. Holds no state of its own, so there is nothing to resume."""

    @abstractmethod
    def due(self, step: int, record: RefreshRecord) -> bool:
        """Whether the weight refreshes at ``step``.

        Args:
            step: Updates of this weight done so far, so 0 at the first.
            record: The weight's history.
        """


class FixedGap(Schedule):
    """Refresh at steps 0, gap, 2 gap, ... (arXiv 2403.03507, algorithm 2).

    A refresh that failed (non-finite gradient) is overdue and is tried again at the next step; the grid does not move.

    Example:
        >>> record = RefreshRecord(refreshed_at=0, num_refreshes=1, gap=200)
        >>> [step for step in (1, 199, 200, 201) if FixedGap().due(step, record)]
        [200, 201]
    """

    @override
    def due(self, step: int, record: RefreshRecord) -> bool:
        return record.refreshed_at < 0 or step // record.gap > record.refreshed_at // record.gap


SCHEDULES: dict[str, type[Schedule]] = {"fixed": FixedGap}
