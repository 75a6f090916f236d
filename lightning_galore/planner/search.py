# SPDX-License-Identifier: Apache-2.0
"""What fits into a budget of bytes, and what it trades for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_galore.config import GaLoreConfig, Rank
from lightning_galore.planner.candidates import Candidate
from lightning_galore.planner.columns import UNAVAILABLE, peak_of, ways_to_recompute
from lightning_galore.planner.fakes import Job
from lightning_galore.planner.rehearsal import footprint_of
from lightning_galore.planner.results import Column, Fit, Peak
from lightning_galore.planner.sharing import Devices, largest_layer_bytes, on_each

LEAST_RANK = 8
MOST_DOUBLINGS = 6


@dataclass(frozen=True, kw_only=True)
class Question:
    """What must fit, and what may be changed for that.

    Args:
        job_of: Makes what is trained, for a batch size.
        config: The settings.
        devices: How many.
        budget: Bytes on each of them; None for no limit.
        base: Another optimizer than the candidates'.
        rank_free: Whether the rank may be chosen.
        checkpointing: Whether activations are recomputed; None for both.
        batch_size: The one that was planned.
        batch_free: Whether it may be raised.
    """

    job_of: Callable[[int], Job]
    config: GaLoreConfig
    devices: Devices
    budget: int | None
    base: str | None
    rank_free: bool
    checkpointing: bool | None
    batch_size: int
    batch_free: bool


def what_fits(
    question: Question, budget: int, candidates: Sequence[Candidate], columns: Sequence[Column]
) -> tuple[Fit, ...]:
    """For each candidate the least that must be given up: first nothing, then recomputing, then half the rank, ...

    What the user has named stays. A rank that was left open begins at a quarter of the short side. Then, if the batch
    size was left open, it is doubled as long as it fits.

    Args:
        question: What must fit.
        budget: Into how many bytes, on each device.
        candidates: Ways to train.
        columns: What was planned of them already, in the same order.
    """
    job = question.job_of(question.batch_size)
    if job.batch is None:
        return ()
    largest = largest_layer_bytes(job.module)
    found = (
        _Search(question, budget, candidate, largest).fit(job, column)
        for candidate, column in zip(candidates, columns, strict=True)
    )
    return tuple(fit for fit in found if fit is not None)


class _Search:
    def __init__(self, question: Question, budget: int, candidate: Candidate, largest_layer: int) -> None:
        self._question, self._budget = question, budget
        self._candidate, self._largest = candidate, largest_layer

    def fit(self, job: Job, column: Column) -> Fit | None:
        """The candidate as it fits, or None."""
        question, candidate = self._question, self._candidate
        config, low_rank = question.config, candidate.kind != "full"
        free = question.rank_free and low_rank and candidate.rank is None
        ranks = free_ranks(job) if free else [config.width]
        first = self._first(job, column, [config.with_settings(rank=rank) for rank in ranks])
        if first is None:
            return None
        settings, peak = first
        size = question.batch_size
        for doubled in [size * 2**k for k in range(1, MOST_DOUBLINGS + 1)] if question.batch_free else []:
            larger = self._peak(question.job_of(doubled), settings, peak.checkpointing)
            if larger.total > self._budget:
                break
            size, peak = doubled, larger
        rank = (candidate.rank or settings.width) if low_rank else None
        return Fit(
            name=candidate.name,
            label=candidate.label,
            rank=rank,
            batch_size=size if question.batch_free or size > 1 else None,
            checkpointing=peak.checkpointing,
            total=peak.total,
            trades=_trades(candidate, peak.checkpointing, rank, ranks[0] if free else rank),
        )

    def _first(self, job: Job, column: Column, choices: Sequence[GaLoreConfig]) -> tuple[GaLoreConfig, Peak] | None:
        """The first choice that fits, without recomputing if possible; the widest come first."""
        for settings in choices:
            try:
                if settings.width == self._question.config.width:
                    peaks: Iterable[Peak] = column.peaks
                elif self._held(job, settings) > self._budget:  # no need to take a step
                    continue
                else:
                    peaks = [self._peak(job, settings, recomputed) for recomputed in self._ways(job)]
            except UNAVAILABLE:  # as the column says; a lower rank may do
                continue
            for peak in peaks:
                if peak.total <= self._budget:
                    return settings, peak
        return None

    def _ways(self, job: Job) -> tuple[bool, ...]:
        return ways_to_recompute(job, self._question.checkpointing)

    def _peak(self, job: Job, config: GaLoreConfig, checkpointing: bool) -> Peak:
        recipe = self._candidate.recipe(config, self._question.base)
        return peak_of(job, recipe, self._candidate.mode, checkpointing, self._question.devices, self._largest)

    def _held(self, job: Job, config: GaLoreConfig) -> int:
        held = footprint_of(job, self._candidate.recipe(config, self._question.base))
        alive = {"weights": held.weights, "moments": held.states, "bases": held.bases}
        devices, mode = self._question.devices, self._candidate.mode
        return sum(on_each(alive, devices, mode=mode, gradients=0, largest_layer=self._largest).values())


def free_ranks(job: Job) -> list[int]:
    """Ranks to choose among: a quarter of the most common short side of a matrix (as in the paper), its half, ...

    Args:
        job: What is trained.
    """
    sides = Counter(min(param.shape) for param in job.module.parameters() if param.ndim == 2)
    rank = sides.most_common(1)[0][0] // 4 if sides else 0
    ranks = [max(rank, LEAST_RANK)]
    while ranks[-1] // 2 >= LEAST_RANK:
        ranks.append(ranks[-1] // 2)
    return ranks


def _trades(candidate: Candidate, checkpointing: bool, rank: Rank | None, asked: Rank | None) -> str:
    said = [candidate.trades.format(rank=rank)] if candidate.trades else []
    if rank is not None and rank != asked:
        said.append(f"rank {rank} instead of {asked}")
    if checkpointing:
        said.append("activations are recomputed, about a third more time")
    return "; ".join(said) or "nothing"
