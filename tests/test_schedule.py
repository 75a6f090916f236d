# SPDX-License-Identifier: Apache-2.0
"""Schedules are asked with python numbers only, so whole runs of them are simulated here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest

from lightning_galore.config import GaLoreConfig, ScheduleName
from lightning_galore.schedule import SCHEDULES, FixedGap, Observation, RefreshRecord, Schedule, staggered


def config(**settings: Any) -> GaLoreConfig:
    return GaLoreConfig(**{"stagger": False, **settings})


def schedule(**settings: Any) -> Schedule:
    made = config(**settings)
    return SCHEDULES[made.schedule](made)


def simulate(
    decide: Schedule,
    steps: int,
    *,
    fails: Callable[[int], bool] = lambda step: False,
    overlap: Callable[[int], float] = lambda since: 1.0,
    energy: Callable[[int, int], float] = lambda step, since: 1.0,
    start: int = 0,
    phase: int = 0,
) -> tuple[list[int], list[int], RefreshRecord, list[int]]:
    """Steps at which a refresh was tried, at which it succeeded, the last record, and where energy was measured.

    ``overlap`` gets the number of steps between two bases, ``energy`` the step and the age of the basis.
    """
    record = RefreshRecord(gap=decide.config.gap, start=start, phase=phase)
    tried, done, measured = [], [], []
    for step in range(steps):
        since = step - record.refreshed_at
        if decide.due(step, record):
            tried.append(step)
            if fails(step):
                seen = Observation(refreshed=False)
            else:
                done.append(step)
                alike = overlap(since) if record.refreshed_at >= 0 else -1.0
                seen = Observation(refreshed=True, overlap=alike, cosine=alike)
        elif decide.measures(step, record):
            measured.append(step)
            seen = Observation(refreshed=False, energy=energy(step, since))
        else:
            seen = Observation(refreshed=False)
        record = decide.note(step, record, seen)
    return tried, done, record, measured


def adapted(record: RefreshRecord) -> int:
    return record.current_gap or record.gap


def test_every_schedule_can_be_named() -> None:
    assert {"auto", *SCHEDULES} == set(get_args(ScheduleName))
    assert SCHEDULES[GaLoreConfig().schedule] is FixedGap


@pytest.mark.parametrize("gap", [1, 2, 5, 10])
def test_fixed_refreshes_exactly_at_multiples_of_the_gap(gap: int) -> None:
    tried, done, _, measured = simulate(schedule(update_proj_gap=gap), 31)
    assert tried == done == list(range(0, 31, gap))
    assert measured == []


def test_failed_refresh_is_tried_again_and_the_grid_does_not_move() -> None:
    tried, done, *_ = simulate(schedule(update_proj_gap=10), 31, fails=lambda step: step in (10, 11, 12))
    assert tried == [0, 10, 11, 12, 13, 20, 30]
    assert done == [0, 13, 20, 30]


@pytest.mark.parametrize("name", SCHEDULES)
def test_failed_first_refresh_is_tried_at_every_step(name: str) -> None:
    tried, done, *_ = simulate(schedule(update_proj_gap=10, schedule=name), 5, fails=lambda step: step < 3)
    assert tried == [0, 1, 2, 3]
    assert done == [3]


def test_failure_that_outlasts_a_gap_gives_one_refresh() -> None:
    _, done, *_ = simulate(schedule(update_proj_gap=5), 21, fails=lambda step: 5 <= step < 13)
    assert done == [0, 13, 15, 20]


def test_gap_may_change_on_the_way() -> None:
    late = RefreshRecord(refreshed_at=20, num_refreshes=3, gap=100)
    assert [step for step in range(21, 301) if schedule().due(step, late)] == list(range(100, 301))
    early = RefreshRecord(refreshed_at=20, num_refreshes=3, gap=7)
    assert schedule().due(21, early)


# -- warm-up -----------------------------------------------------------------------------------------------------------


def test_warm_up_refreshes_densely_and_ever_less() -> None:
    _, done, *_ = simulate(schedule(update_proj_gap=100, min_gap=10, refresh_warmup=200), 601)
    early = [step for step in done if step < 200]
    gaps = [after - before for before, after in zip(early, early[1:], strict=False)]
    assert gaps == sorted(gaps)
    assert 10 <= gaps[0] < 25
    assert max(gaps) < 100
    assert len(early) == 4  # without a warm-up there would be two
    assert [step for step in done if step >= 300] == [300, 400, 500, 600]


# -- staggering --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "gap"), [(56, 200), (56, 50), (7, 200), (200, 50), (1, 10), (3, 1)])
def test_staggered_refreshes_are_spread_and_as_many_as_before(weights: int, gap: int) -> None:
    places = staggered([1.0] * weights, [gap] * weights, cost=6.0, share=0.5)
    decide = schedule(update_proj_gap=gap, stagger=True)
    runs = [simulate(decide, 10 * gap, start=start, phase=phase)[1] for start, phase in places]
    at = [sum(step in set(run) for run in runs) for step in range(10 * gap)]
    # In the long run as many as without staggering, and no step has many more than its part of them.
    late = at[2 * gap :]
    assert sum(late) == 8 * weights
    assert max(late) <= -(-weights // gap) + 1
    # First refreshes take a share of the step, until all are done; of one weight at the least.
    first = [run[0] for run in runs]
    most = max(1, weights * 0.5 / 6.0)
    if weights / most <= gap:
        assert max(first.count(step) for step in set(first)) <= most
        assert max(first) <= weights / int(most) + 1
    for run in runs:
        gaps = [after - before for before, after in zip(run, run[1:], strict=False)]
        assert gap / 2 <= gaps[0] <= 1.5 * gap + 1
        assert set(gaps[1:]) <= {gap}


def test_staggering_weighs_weights_by_their_work() -> None:
    places = staggered([8.0, 1.0, 1.0, 1.0, 1.0], [12] * 5, cost=4.0, share=1.0)
    assert places == [(0, 0), (1, 8), (1, 9), (1, 10), (2, 11)]


def test_staggering_within_a_gap_that_is_too_short_uses_all_of_it() -> None:
    places = staggered([1.0] * 100, [4] * 100, cost=6.0, share=0.1)
    assert {start for start, _ in places} == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["adaptive", "cos", "energy"])
def test_staggered_weights_of_other_schedules_do_not_refresh_together(name: str) -> None:
    gap, weights = 40, 10
    places = staggered([1.0] * weights, [gap] * weights, cost=6.0, share=0.5)
    decide = schedule(schedule=name, update_proj_gap=gap, stagger=True)
    runs = [simulate(decide, 300, start=start, phase=phase, overlap=lambda since: 0.1)[1] for start, phase in places]
    at = [sum(step in set(run) for run in runs) for step in range(300)]
    assert max(at) <= 3


# -- adaptive ----------------------------------------------------------------------------------------------------------


def test_adaptive_gap_grows_where_an_old_basis_is_worth_a_fresh_one() -> None:
    # Bases of any two steps overlap by 0.35: what fell was batch noise, and that within one step.
    _, done, record, _ = simulate(schedule(schedule="adaptive", update_proj_gap=50), 2000, overlap=lambda since: 0.35)
    assert done[:4] == [0, 50, 51, 151]  # 51 calibrates
    assert adapted(record) == 400  # eight times the gap is the upper bound
    assert len(done) < 2000 / 50 / 2
    assert record.overlap == 0.35


def test_adaptive_gap_shrinks_where_the_subspace_turns() -> None:
    turning = {1: 0.6}
    _, done, record, _ = simulate(
        schedule(schedule="adaptive", update_proj_gap=80, min_gap=10),
        1000,
        overlap=lambda since: turning.get(since, 0.1),
    )
    assert adapted(record) == 10
    assert len(done) > 1000 / 80


def test_adaptive_gap_stays_in_between() -> None:
    _, _, record, _ = simulate(
        schedule(schedule="adaptive", update_proj_gap=20), 500, overlap=lambda since: 0.6 if since == 1 else 0.33
    )
    assert adapted(record) == 20


def test_adaptive_gap_judges_against_a_worth_that_is_measured_anew() -> None:
    # Early on the subspace turns slowly, later a fresh basis is worth less too: no reason to shrink.
    alike = {"one": 0.8, "across": 0.75}
    decide = schedule(schedule="adaptive", update_proj_gap=10, max_gap=10)
    overlap = lambda since: alike["one"] if since == 1 else alike["across"]  # noqa: E731
    _, done, record, _ = simulate(decide, 200, overlap=overlap)
    assert record.worth == 0.8
    calibrated = [after for before, after in zip(done, done[1:], strict=False) if after == before + 1]
    assert len(calibrated) == 4  # after the 2nd, 4th, 8th and 16th refresh
    assert adapted(record) == 10


def test_failed_calibration_is_not_taken_for_one() -> None:
    # The overlap of 0.1 across the gap of 10 would double it if it were judged by that of the next gap.
    _, done, record, _ = simulate(
        schedule(schedule="adaptive", update_proj_gap=10, min_gap=1),
        22,
        fails=lambda step: step == 11,
        overlap=lambda since: 0.1,
    )
    assert done == [0, 10, 20, 21]  # it is made up for after the next refresh
    assert record.worth == 0.1
    assert adapted(record) == 20


def test_adaptive_gap_begins_to_adapt_whenever_it_takes_over() -> None:
    """After a warm-up, or another schedule, the number of refreshes may be far from a power of two."""
    decide = schedule(schedule="adaptive", update_proj_gap=40, refresh_warmup=200)
    _, done, record, _ = simulate(decide, 600, overlap=lambda since: 0.35)
    late = [step for step in done if step >= 200]
    assert late[1] == late[0] + 1
    assert adapted(record) > 40
    fixed = RefreshRecord(gap=10, refreshed_at=200, num_refreshes=21, overlap=0.3)
    assert schedule(schedule="adaptive", update_proj_gap=10).due(201, fixed)


@pytest.mark.parametrize("before", SCHEDULES)
@pytest.mark.parametrize("after", SCHEDULES)
def test_a_schedule_forgets_what_another_has_noted(before: str, after: str) -> None:
    overlap = lambda since: 0.5  # noqa: E731
    *_, record, _ = simulate(schedule(schedule=before, update_proj_gap=10), 300, overlap=overlap)
    decide = schedule(schedule=after, update_proj_gap=10)
    if before == after:
        assert decide._own(record) == record
        return
    assert decide.gap_of(record) == 10
    noted = decide.note(301, record, Observation(refreshed=True, overlap=0.5, cosine=0.5, energy=0.5))
    assert noted.worth == -1.0
    assert len(noted.cosines) <= 1
    assert (noted.refreshed_at, noted.num_refreshes) == (301, record.num_refreshes + 1)


def test_new_bounds_hold_at_once() -> None:
    *_, record, _ = simulate(schedule(schedule="adaptive", update_proj_gap=10), 600, overlap=lambda since: 0.5)
    assert adapted(record) == 80
    assert schedule(schedule="adaptive", update_proj_gap=10, max_gap=12).gap_of(record) == 12


# -- Q-GaLore's rule ---------------------------------------------------------------------------------------------------


def test_cos_doubles_after_five_alike_and_never_shrinks() -> None:
    _, done, record, _ = simulate(schedule(schedule="cos", update_proj_gap=10), 400, overlap=lambda since: 0.5)
    assert done[:6] == [0, 10, 20, 30, 40, 50]  # five cosines are in at the sixth refresh
    assert done[6] == 70
    assert adapted(record) == 80  # the bound, which Q-GaLore has not
    _, done, record, _ = simulate(schedule(schedule="cos", update_proj_gap=10), 400, overlap=lambda since: 0.3)
    assert adapted(record) == 10
    assert len(record.cosines) == 5


# -- captured energy ---------------------------------------------------------------------------------------------------


def test_energy_refreshes_when_a_basis_is_used_up() -> None:
    decide = schedule(schedule="energy", update_proj_gap=40, min_gap=10)
    # A fresh basis holds 0.5 of the next gradient; after 60 steps it is down to less than 0.7 of that.
    _, done, _, measured = simulate(decide, 200, energy=lambda step, since: 0.5 - 0.0026 * since)
    assert measured[:7] == [1, 10, 20, 30, 40, 50, 60]
    assert done[:3] == [0, 61, 122]


def test_energy_refreshes_at_the_latest_after_the_largest_gap_and_not_before_the_least() -> None:
    still = simulate(schedule(schedule="energy", update_proj_gap=10), 400, energy=lambda step, since: 0.5)[1]
    assert still == list(range(0, 400, 80))
    falling = simulate(
        schedule(schedule="energy", update_proj_gap=40), 100, energy=lambda step, since: 0.5 if since == 1 else 0.1
    )[1]
    assert falling == list(range(0, 100, 11))


def test_energy_that_could_not_be_measured_changes_nothing() -> None:
    decide = schedule(schedule="energy", update_proj_gap=10)
    record = RefreshRecord(gap=10, refreshed_at=0, num_refreshes=1, kept_by=decide.code)
    assert decide.note(1, record, Observation(refreshed=False, energy=-1.0)) == record
