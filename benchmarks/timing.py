# SPDX-License-Identifier: Apache-2.0
"""The side-by-side timer: candidates take turns in one run, so that what disturbs one disturbs all.

All times are in seconds. A ratio is paired: of two times of the same round, so a slow minute of the machine cancels.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A way to time one piece of work.

    Args:
        name: What is measured, in words for the report.
        seconds: Runs the work once and returns how long it took.
    """

    name: str
    seconds: Callable[[Work], float]


def clock_for(device: torch.device, *, threads: int) -> Clock:
    """The clock that other processes disturb least: CPU time at one thread, CUDA events on a GPU.

    With several threads CPU time adds up what they spend at once, and waiting as well, so there it is wall time.
    """
    if device.type == "cuda":
        return Clock(name="GPU time between CUDA events", seconds=_cuda_seconds)
    if threads == 1:
        return Clock(name="process CPU time at 1 thread", seconds=_timed_by(time.process_time))
    return Clock(name=f"wall time at {threads} threads", seconds=_timed_by(time.perf_counter))


def _timed_by(now: Callable[[], float]) -> Callable[[Work], float]:
    def seconds(work: Work) -> float:
        start = now()
        work()
        return now() - start

    return seconds


def _cuda_seconds(work: Work) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, 10th and 90th percentile of some values."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The percentiles of ``values``, between neighbours by linear interpolation."""
        return cls(median=percentile(values, 50), p10=percentile(values, 10), p90=percentile(values, 90))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which ``percent`` of 100 lie.

    Raises:
        ValueError: If there are no values.

    Example:
        >>> percentile([1.0, 2.0, 4.0], 75)
        3.0
    """
    if not values:
        raise ValueError(f"values={values!r} is empty; a percentile needs at least one measurement.")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def times_faster(seconds: Sequence[float], *, than: Sequence[float]) -> Spread:
    """How many times faster ``seconds`` are than those of the same rounds in ``than``: above 1 is faster."""
    return Spread.of([other / own for own, other in zip(seconds, than, strict=True)])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long one comparison goes on.

    Args:
        seconds: Wall time after which no further round begins.
        least: Rounds that are run however long they take.
        most: Rounds after which it ends however short they are.
    """

    seconds: float
    least: int = 3
    most: int = 25


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """What a comparison gave.

    Args:
        seconds: For each candidate one time a round, in the order of the rounds.
        outcomes: What each candidate returned in the warm-up.
    """

    seconds: dict[str, list[float]]
    outcomes: dict[str, Any]


def side_by_side(candidates: Mapping[str, Work], *, clock: Clock, plan: Plan) -> SideBySide:
    """Time the candidates in turns, after each has run once untimed.

    Args:
        candidates: Name to work. A work must leave the machine as it found it: it is run again and again.
        clock: Times one run.
        plan: When to stop. Every candidate is run equally often.
    """
    outcomes = {name: work() for name, work in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + plan.seconds
    with quiet():
        for turn in range(plan.most):
            if turn >= plan.least and time.perf_counter() >= end:
                break
            for name in in_turn(list(candidates), turn):
                seconds[name].append(clock.seconds(candidates[name]))
    return SideBySide(seconds=seconds, outcomes=outcomes)


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The order of one round: each begins with another candidate, for the first finds the caches as the last left them.

    Example:
        >>> in_turn(["a", "b", "c"], 1)
        ['b', 'c', 'a']
    """
    start = turn % len(names) if names else 0
    return [*names[start:], *names[:start]]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Python's garbage collector out of the times."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
