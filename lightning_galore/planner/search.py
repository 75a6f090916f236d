# SPDX-License-Identifier: Apache-2.0
"""What fits into a budget of bytes, and what it trades for that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lightning_galore.config import GaLoreConfig
from lightning_galore.planner.candidates import Candidate
from lightning_galore.planner.fakes import Job
from lightning_galore.planner.planning import Column, Peak, peak_of
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
    batch_size: int,
    batch_free: bool,
    base: str | None = None,
) -> tuple[Fit, ...]:
    """For each candidate the least that must be given up: first nothing, then recomputing, then half the rank, ...

    What the user has named stays. Then, if the batch size was left open, it is doubled as long as it fits.

    Args:
        job_of: Makes what is trained, for a batch size.
        columns: What was planned already, one for each candidate.
        candidates: In the order of the columns.
        config: The settings.
        budget: Bytes on each device.
        devices: How many.
        rank_free: Whether the rank may be lowered.
        batch_size: The one that was planned.
        batch_free: Whether it may be raised.
        base: Another optimizer than the candidates'.
    """
    job = job_of(batch_size)
    found = []
    for candidate, column in zip(candidates, columns, strict=True):
        if not column.peaks:
            continue
        search = _Search(candidate, budget, devices, base, largest_layer_bytes(job.module))
        first = search.first(job, column, config, rank_free=rank_free and candidate.kind != "full")
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
                trades=_trades(candidate, peak.checkpointing, rank, config.rank),
            )
        )
    return tuple(found)


class _Search:
    def __init__(
        self, candidate: Candidate, budget: int, devices: Devices, base: str | None, largest_layer: int
    ) -> None:
        self._candidate, self._budget, self._devices = candidate, budget, devices
        self._base, self._largest = base, largest_layer

    def first(
        self, job: Job, column: Column, config: GaLoreConfig, *, rank_free: bool
    ) -> tuple[GaLoreConfig, Peak] | None:
        """The first way that fits, with the least given up."""
        able = [peak.checkpointing for peak in column.peaks]
        for settings in self._lowered(config) if rank_free else iter((config,)):
            peaks = column.peaks
            if settings is not config:
                if self._held(job, settings) > self._budget:  # no need to take a step
                    continue
                peaks = tuple(self.peak(job, settings, one) for one in able)
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

    def _lowered(self, config: GaLoreConfig) -> Iterator[GaLoreConfig]:
        yield config
        rank = config.rank
        while isinstance(rank, int) and rank // 2 >= LEAST_RANK:
            rank //= 2
            yield config.with_settings(rank=rank)


def _trades(candidate: Candidate, checkpointing: bool, rank: int | float | None, asked: int | float) -> str:
    said = [candidate.trades.format(rank=rank)] if candidate.trades else []
    if rank is not None and rank != asked:
        said.append(f"rank {rank} instead of {asked}")
    if checkpointing:
        said.append("activations are recomputed, about a third more time")
    return "; ".join(said) or "nothing"
