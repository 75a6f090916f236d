# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import doctest
import gc
import time

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Clock, Plan, Spread, Work, clock_for, percentile, side_by_side, times_faster


class Recorder:
    """A clock that gives the times that it was told, and two works that write down when they ran."""

    def __init__(self, *seconds: float) -> None:
        self.calls: list[str] = []
        self.timed: list[str] = []
        self._seconds = iter(seconds)
        self.works = {name: self._work(name) for name in ("a", "b")}
        self.clock = Clock(name="told", seconds=self._time)

    def _work(self, name: str) -> Work:
        def work() -> str:
            self.calls.append(name)
            return f"outcome of {name}"

        return work

    def _time(self, work: Work) -> float:
        work()
        self.timed.append(self.calls[-1])
        assert not gc.isenabled()
        return next(self._seconds)


def test_examples() -> None:
    done = doctest.testmod(timing)
    assert done.attempted >= 2
    assert done.failed == 0


def test_candidates_take_turns_after_an_untimed_run() -> None:
    recorder = Recorder(1, 10, 20, 2, 3, 30)
    done = side_by_side(recorder.works, clock=recorder.clock, plan=Plan(seconds=60, least=1, most=3))
    assert recorder.calls[:2] == ["a", "b"]
    assert recorder.timed == ["a", "b", "b", "a", "a", "b"]
    assert done.seconds == {"a": [1, 2, 3], "b": [10, 20, 30]}
    assert done.outcomes == {"a": "outcome of a", "b": "outcome of b"}
    assert gc.isenabled()


@pytest.mark.parametrize(("plan", "rounds"), [(Plan(seconds=0, least=3), 3), (Plan(seconds=60, least=1, most=4), 4)])
def test_the_plan_is_kept(plan: Plan, rounds: int) -> None:
    recorder = Recorder(*range(100))
    done = side_by_side(recorder.works, clock=recorder.clock, plan=plan)
    assert [len(times) for times in done.seconds.values()] == [rounds, rounds]


def test_a_ratio_is_paired() -> None:
    # A machine that is ten times slower in two of the rounds moves no ratio, and so not its percentiles.
    ours, theirs = [1.0, 10.0, 10.0, 1.0, 1.0], [2.0, 20.0, 20.0, 2.0, 2.0]
    assert times_faster(ours, than=theirs) == Spread(median=2.0, p10=2.0, p90=2.0)
    assert times_faster(theirs, than=ours).median == 0.5
    # The median of the ratios 9, 1, 4/9; not the ratio of the medians, 4/2.
    assert times_faster([1.0, 2.0, 9.0], than=[9.0, 2.0, 4.0]).median == 1.0


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([1.0, 3.0], 90) == pytest.approx(2.8)
    assert percentile([5.0], 10) == 5.0
    spread = Spread.of([float(value) for value in range(11)])
    assert (spread.p10, spread.median, spread.p90) == (1.0, 5.0, 9.0)
    with pytest.raises(ValueError, match=r"values=\[\] is empty"):
        percentile([], 50)


def test_cpu_time_does_not_count_waiting_and_wall_time_does() -> None:
    one, two = (clock_for(torch.device("cpu"), threads=threads) for threads in (1, 2))
    assert "1 thread" in one.name
    assert one.seconds(lambda: time.sleep(0.05)) < 0.04
    assert "2 threads" in two.name
    assert two.seconds(lambda: time.sleep(0.05)) >= 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_time_waits_for_the_kernels() -> None:
    clock = clock_for(torch.device("cuda"), threads=1)
    matrix = torch.randn(4096, 4096, device="cuda")
    clock.seconds(lambda: matrix @ matrix)
    assert clock.seconds(lambda: [matrix @ matrix for _ in range(20)]) > 5 * clock.seconds(lambda: matrix @ matrix)
