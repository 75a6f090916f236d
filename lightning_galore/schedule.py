# SPDX-License-Identifier: Apache-2.0
"""When a weight's subspace is refreshed: one question, asked with python numbers only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from typing_extensions import override

from lightning_galore.config import GaLoreConfig

#: Q-GaLore's rule (arXiv 2407.08296, section 3.3, and its reference code): how many cosines, and how alike.
COS_HISTORY, COS_THRESHOLD = 5, 0.4


@dataclass(frozen=True, kw_only=True)
class RefreshRecord:
    """What a schedule knows of one weight; it is kept in the optimizer's state, so that a run resumes where it was.

    Args:
        gap: The weight's ``update_proj_gap``.
        refreshed_at: Step of the last refresh, -1 when none has succeeded yet.
        num_refreshes: Refreshes that succeeded so far.
        overlap: Overlap of the last two bases in [0, 1], -1.0 before the second refresh.
        start: Step of the first refresh.
        phase: Steps in [0, gap) by which the weight's refreshes are shifted against those of other weights.
        kept_by: The schedule that has noted what follows (its ``code``); another one begins anew.
        current_gap: The gap as adapted so far, 0 for ``gap`` itself.
        worth: What a fresh basis is worth one step after it was found, in the schedule's own measure: an overlap, or a
            share of the gradient's energy; -1.0 while unknown.
        due_at: Step of the next refresh where the schedule has decided it, -1 before that.
        cosines: Of the first vectors of the last bases, oldest first.
    """

    gap: int
    refreshed_at: int = -1
    num_refreshes: int = 0
    overlap: float = -1.0
    start: int = 0
    phase: int = 0
    kept_by: int = 0
    current_gap: int = 0
    worth: float = -1.0
    due_at: int = -1
    cosines: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a step has shown of one weight's subspace.

    Args:
        refreshed: Whether a new basis was found.
        overlap: Of the old and the new basis, -1.0 when there is nothing to compare.
        cosine: Of the first vectors of the old and the new basis, without its sign; -1.0 likewise.
        energy: Share of the gradient's energy that the basis holds, -1.0 when it was not measured.
    """

    refreshed: bool
    overlap: float = -1.0
    cosine: float = -1.0
    energy: float = -1.0


class Schedule(ABC):
    """Decides when to refresh. Holds settings only: what it learns of a weight stands in the weight's record.

    Args:
        config: Warm-up, bounds and thresholds.
    """

    #: Stands for the schedule in a saved record.
    code: ClassVar[int]
    #: Whether :meth:`measures` can say yes.
    needs_energy: ClassVar[bool] = False

    def __init__(self, config: GaLoreConfig) -> None:
        self.config = config

    def due(self, step: int, record: RefreshRecord) -> bool:
        """Whether the weight refreshes at ``step``.

        A refresh that failed (a non-finite gradient) stays due and is tried again at the next step.

        Args:
            step: Updates of this weight done so far, so 0 at the first.
            record: The weight's history.
        """
        record = self._own(record)
        if record.refreshed_at < 0:
            return step >= record.start
        warmup = self.config.refresh_warmup
        if step < warmup:
            low = min(self.config.gap_bounds(record.gap)[0], record.gap)
            return step - record.refreshed_at >= low + (record.gap - low) * step // warmup
        return self._due(step, record)

    @abstractmethod
    def _due(self, step: int, record: RefreshRecord) -> bool:
        """The same for a weight that has a basis, after the warm-up."""

    def measures(self, step: int, record: RefreshRecord) -> bool:
        """Whether :meth:`note` wants to know the captured energy at ``step``, which costs a pass over the gradient."""
        return False

    def gap_of(self, record: RefreshRecord) -> int:
        """Steps from one refresh to the next, as adapted so far."""
        record = self._own(record)
        return self._bounded(record.current_gap, record) if record.current_gap else record.gap

    def note(self, step: int, record: RefreshRecord, seen: Observation) -> RefreshRecord:
        """The record after ``step``."""
        record = self._own(record)
        if not seen.refreshed:
            return record
        overlap = seen.overlap if seen.overlap >= 0 else record.overlap
        return replace(record, refreshed_at=step, num_refreshes=record.num_refreshes + 1, overlap=overlap)

    def _own(self, record: RefreshRecord) -> RefreshRecord:
        """The record without what another schedule has noted in it, whose gaps and measures mean something else."""
        if record.kept_by == self.code:
            return record
        return replace(record, kept_by=self.code, current_gap=0, worth=-1.0, due_at=-1, cosines=())

    def _bounded(self, gap: int, record: RefreshRecord) -> int:
        low, high = self.config.gap_bounds(record.gap)
        return max(low, min(gap, high))

    def _interval(self, record: RefreshRecord) -> int:
        """Steps to the next refresh; the first interval is of a length of its own where weights are staggered."""
        if self.config.stagger and record.num_refreshes == 1:
            return max(1, self.gap_of(record) // 2 + record.phase)
        return self.gap_of(record)


class FixedGap(Schedule):
    """Refresh every ``gap`` steps: at 0, gap, 2 gap, ... (arXiv 2403.03507, algorithm 2), or staggered.

    The grid does not move when a refresh comes late. Staggered, that of a weight begins at its phase, and a point of it
    that would follow the very first refresh by less than half a gap is left out.

    Example:
        >>> schedule = FixedGap(GaLoreConfig(method="galore"))
        >>> record = RefreshRecord(refreshed_at=0, num_refreshes=1, gap=200)
        >>> [step for step in (1, 199, 200, 201) if schedule.due(step, record)]
        [200, 201]
    """

    code: ClassVar[int] = 0

    @override
    def _due(self, step: int, record: RefreshRecord) -> bool:
        gap, phase, last = record.gap, record.phase, record.refreshed_at
        if self.config.stagger and record.num_refreshes == 1:
            last += gap // 2
        return (step - phase) // gap > (last - phase) // gap


class AdaptiveGap(Schedule):
    """A gap that follows the overlap: it doubles while an old basis is worth a fresh one, and halves when it is not.

    Bases of two consecutive batches already differ, by an amount that depends on the weight and the rank. So the
    overlap across a gap is judged against that of two bases found one step apart, never against 1. That is measured by
    refreshing twice in a row: after the 2nd, 4th, 8th, ... refresh, and as long as it is not known (Q-GaLore, arXiv
    2407.08296, has the idea of a gap that grows; this measure is blind to signs and uses the whole basis, and the gap
    has two bounds).
    """

    code: ClassVar[int] = 1

    @override
    def _due(self, step: int, record: RefreshRecord) -> bool:
        since = step - record.refreshed_at
        return since >= self._interval(record) or (since == 1 and self._calibrates(record))

    @staticmethod
    def _calibrates(record: RefreshRecord) -> bool:
        count = record.num_refreshes
        return count >= 2 and (record.worth < 0 or count & (count - 1) == 0)

    @override
    def note(self, step: int, record: RefreshRecord, seen: Observation) -> RefreshRecord:
        record = self._own(record)
        after = super().note(step, record, seen)
        if not seen.refreshed or seen.overlap < 0:
            return after
        across = seen.overlap
        if step == record.refreshed_at + 1 and self._calibrates(record):
            # The overlap across the gap that went before is judged now, by what has just been measured.
            across = record.overlap
            after = replace(after, worth=seen.overlap, overlap=across)
        elif step < self.config.refresh_warmup or self._calibrates(after):
            return after
        if after.worth <= 0:
            return after
        share = across / after.worth
        gap = self.gap_of(after)
        if share >= self.config.grow_above:
            gap *= 2
        elif share < self.config.shrink_below:
            gap //= 2
        return replace(after, current_gap=self._bounded(gap, record))


class CosineGap(Schedule):
    """Q-GaLore's rule, sign-proof: double the gap when five cosines of first vectors are 0.4 in the mean.

    As in its reference code (arXiv 2407.08296) the last five are not forgotten when the gap grows, and it never
    shrinks; unlike there ``max_gap`` bounds it, and a vector and its negative are alike.
    """

    code: ClassVar[int] = 2

    @override
    def _due(self, step: int, record: RefreshRecord) -> bool:
        return step - record.refreshed_at >= self._interval(record)

    @override
    def note(self, step: int, record: RefreshRecord, seen: Observation) -> RefreshRecord:
        after = super().note(step, record, seen)
        if not seen.refreshed or seen.cosine < 0:
            return after
        cosines = (*after.cosines, seen.cosine)[-COS_HISTORY:]
        grows = len(cosines) == COS_HISTORY and sum(cosines) / COS_HISTORY >= COS_THRESHOLD
        gap = self._bounded(self.gap_of(after) * 2, record) if grows else after.current_gap
        return replace(after, cosines=cosines, current_gap=gap)


class EnergyGap(Schedule):
    """Refresh when the basis no longer holds enough of the gradient: by captured energy, ``|R|^2 / |G|^2``.

    What a fresh basis is worth is measured one step after it was found, on a gradient that it was not made from. From
    then on every ``min_gap`` steps, and below ``refresh_below`` of that worth the next step refreshes; so does one that
    comes ``max_gap`` after the last.
    """

    code: ClassVar[int] = 3
    needs_energy: ClassVar[bool] = True

    @override
    def _due(self, step: int, record: RefreshRecord) -> bool:
        latest = record.refreshed_at + self.config.gap_bounds(record.gap)[1]
        return step >= latest or 0 <= record.due_at <= step

    @override
    def measures(self, step: int, record: RefreshRecord) -> bool:
        record = self._own(record)
        if record.refreshed_at < 0 or record.due_at >= 0:
            return False
        since = step - record.refreshed_at
        low = self.config.gap_bounds(record.gap)[0]
        return since >= 1 and (record.worth < 0 or since % low == 0)

    @override
    def note(self, step: int, record: RefreshRecord, seen: Observation) -> RefreshRecord:
        after = super().note(step, record, seen)
        if seen.refreshed:
            return replace(after, worth=-1.0, due_at=-1)
        if seen.energy < 0:
            return after
        if after.worth < 0:
            return replace(after, worth=seen.energy)
        return replace(after, due_at=step + 1) if seen.energy < self.config.refresh_below * after.worth else after


SCHEDULES: dict[str, type[Schedule]] = {
    "fixed": FixedGap,
    "adaptive": AdaptiveGap,
    "cos": CosineGap,
    "energy": EnergyGap,
}


def staggered(works: Sequence[float], gaps: Sequence[int], *, cost: float, share: float) -> list[tuple[int, int]]:
    """First steps and phases of weights, so that no step refreshes many of them.

    First refreshes come as early as ``share`` allows, but within the gap; later ones are spread evenly over it.

    Args:
        works: Arithmetic of each weight's ordinary optimizer step, in any unit.
        gaps: ``update_proj_gap`` of each weight.
        cost: Time of a refresh, as a multiple of the same weight's ordinary step.
        share: Most time that first refreshes may add to a step, as a share of the ordinary step of all weights.

    Returns:
        ``(start, phase)`` of each weight.

    Example:
        >>> staggered([1.0] * 4, [8] * 4, cost=2.0, share=1.0)
        [(0, 0), (0, 2), (1, 4), (1, 6)]
    """
    total = sum(works)
    most = total * share / cost
    starts, phases = [], []
    done, start, spent = 0.0, 0, 0.0
    for work, gap in zip(works, gaps, strict=True):
        if spent and spent + work > most:
            start, spent = start + 1, 0.0
        starts.append(start)
        phases.append(int(gap * done / total))
        spent, done = spent + work, done + work
    # Where the gap is too short for that share, the first refreshes take all of it.
    return [(s * gap // max(gap, start + 1), phase) for s, phase, gap in zip(starts, phases, gaps, strict=True)]
