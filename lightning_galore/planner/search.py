# SPDX-License-Identifier: Apache-2.0
"""What fits into a budget of bytes, and what it trades for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lightning_galore.config import GaLoreConfig
from lightning_galore.planner.candidates import Candidate
from lightning_galore.planner.fakes import Job
from lightning_galore.planner.planning import UNAVAILABLE, Column, Peak, peak_of
from lightning_galore.planner.rehearsal import footprint_of
from lightning_galore.planner.sharing import Devices, largest_layer_bytes, on_each

LEAST_RANK = 8
MOST_DOUBLINGS = 6


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A way to train that fits.

    Args:
        name: The candidate.
        label: Its heading.
        rank: Of the low-rank ones, None for the others.
        batch_size: Sequences a batch, None where the batch was given.
        checkpointing: Whether activations are recomputed.
        total: Bytes at the peak.
        trades: What it gives up for that, in words.
    """

    name: str
    label: str
    rank: int | float | None
    batch_size: int | None
    checkpointing: bool
    total: int
    trades: str


def what_fits(
    job_of: Callable[[int], Job],
    columns: Sequence[Column],
    candidates: Sequence[Candidate],
    config: GaLoreConfig,
    budget: int,
    devices: Devices,
    *,
    rank_free: bool,
    recompute: Sequence[bool],
    batch_size: int,
    batch_free: bool,
    base: str | None = None,
) -> tuple[Fit, ...]:
    """For each candidate the least that must be given up: first nothing, then recomputing, then half the rank, ...

    What the user has named stays. A rank that was left open begins at a quarter of the short side. Then, if the batch
    size was left open, it is doubled as long as it fits.

    Args:
        job_of: Makes what is trained, for a batch size.
        columns: What was planned already, one for each candidate.
        candidates: In the order of the columns.
        config: The settings.
        budget: Bytes on each device.
        devices: How many.
        rank_free: Whether the rank may be lowered.
        recompute: Whether activations may be: the ways to try, in this order.
        batch_size: The one that was planned.
        batch_free: Whether it may be raised.
        base: Another optimizer than the candidates'.
    """
    job = job_of(batch_size)
    found = []
    for candidate, column in zip(candidates, columns, strict=True):
        if job.batch is None:
            continue
        search = _Search(candidate, budget, devices, base, largest_layer_bytes(job.module), recompute)
        ranks = free_ranks(job) if rank_free and candidate.kind != "full" else [config.rank]
        first = search.first(job, column, [config.with_settings(rank=rank) for rank in ranks], config.rank)
        if first is None:
            continue
        settings, peak = first
        size = batch_size
        for doubled in [batch_size * 2**k for k in range(1, MOST_DOUBLINGS + 1)] if batch_free else []:
            larger = search.peak(job_of(doubled), settings, peak.checkpointing)
            if larger.total > budget:
                break
            size, peak = doubled, larger
        rank = None if candidate.kind == "full" else settings.rank
        found.append(
            Fit(
                name=candidate.name,
                label=candidate.label,
                rank=rank,
                batch_size=size if batch_free or batch_size > 1 else None,
                checkpointing=peak.checkpointing,
                total=peak.total,
                trades=_trades(candidate, peak.checkpointing, rank, ranks[0]),
            )
        )
    return tuple(found)


class _Search:
    def __init__(
        self,
        candidate: Candidate,
        budget: int,
        devices: Devices,
        base: str | None,
        largest_layer: int,
        recompute: Sequence[bool],
    ) -> None:
        self._candidate, self._budget, self._devices = candidate, budget, devices
        self._base, self._largest, self._recompute = base, largest_layer, recompute

    def first(
        self, job: Job, column: Column, choices: Sequence[GaLoreConfig], planned: int | float
    ) -> tuple[GaLoreConfig, Peak] | None:
        """The first choice that fits, without recomputing if possible.

        Args:
            job: What is trained.
            column: What was planned at rank ``planned``.
            choices: The widest first.
            planned: A rank whose peaks are known.
        """
        for settings in choices:
            peaks: Iterable[Peak] = column.peaks
            try:
                if settings.rank != planned:
                    if self._held(job, settings) > self._budget:  # no need to take a step
                        continue
                    peaks = [self.peak(job, settings, recomputed) for recomputed in self._recompute]
            except UNAVAILABLE:  # as the column says; a lower rank may do
                continue
            for peak in peaks:
                if peak.total <= self._budget:
                    return settings, peak
        return None

    def peak(self, job: Job, config: GaLoreConfig, checkpointing: bool) -> Peak:
        recipe = self._candidate.recipe(config, self._base)
        return peak_of(job, recipe, self._candidate.mode, checkpointing, self._devices, self._largest)

    def _held(self, job: Job, config: GaLoreConfig) -> int:
        held = footprint_of(job, self._candidate.recipe(config, self._base))
        alive = {"weights": held.weights, "moments": held.moments, "bases": held.bases}
        each = on_each(alive, self._devices, mode=self._candidate.mode, gradients=0, largest_layer=self._largest)  # type: ignore[arg-type]
        return sum(each.values())


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


def _trades(candidate: Candidate, checkpointing: bool, rank: int | float | None, asked: int | float) -> str:
    said = [candidate.trades.format(rank=rank)] if candidate.trades else []
    if rank is not None and rank != asked:
        said.append(f"rank {rank} instead of {asked}")
    if checkpointing:
        said.append("activations are recomputed, about a third more time")
    return "; ".join(said) or "nothing"
