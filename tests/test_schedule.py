# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pytest

from lightning_galore.schedule import SCHEDULES, FixedGap, RefreshRecord


def refreshes(gap: int, steps: int, fails: Callable[[int], bool] = lambda step: False) -> tuple[list[int], list[int]]:
    """Steps at which a refresh was tried, and those at which it succeeded."""
    tried, done = [], []
    refreshed_at = -1
    for step in range(steps):
        record = RefreshRecord(refreshed_at=refreshed_at, num_refreshes=len(done), gap=gap)
        if FixedGap().due(step, record):
            tried.append(step)
            if not fails(step):
                refreshed_at = step
                done.append(step)
    return tried, done


def test_fixed_is_the_default_schedule() -> None:
    assert SCHEDULES["fixed"] is FixedGap


@pytest.mark.parametrize("gap", [1, 2, 5, 10])
def test_refreshes_exactly_at_multiples_of_the_gap(gap: int) -> None:
    expected = list(range(0, 31, gap))
    assert refreshes(gap, 31) == (expected, expected)


def test_failed_refresh_is_tried_again_and_the_grid_does_not_move() -> None:
    tried, done = refreshes(10, 31, fails=lambda step: step in (10, 11, 12))
    assert tried == [0, 10, 11, 12, 13, 20, 30]
    assert done == [0, 13, 20, 30]


def test_failed_first_refresh_is_tried_at_every_step() -> None:
    tried, done = refreshes(10, 21, fails=lambda step: step < 3)
    assert tried == [0, 1, 2, 3, 10, 20]
    assert done == [3, 10, 20]


def test_failure_that_outlasts_a_gap_gives_one_refresh() -> None:
    _, done = refreshes(5, 21, fails=lambda step: 5 <= step < 13)
    assert done == [0, 13, 15, 20]


def test_gap_may_change_on_the_way() -> None:
    late = RefreshRecord(refreshed_at=20, num_refreshes=3, gap=100)
    assert [step for step in range(21, 301) if FixedGap().due(step, late)] == list(range(100, 301))
    early = RefreshRecord(refreshed_at=20, num_refreshes=3, gap=7)
    assert FixedGap().due(21, early)
