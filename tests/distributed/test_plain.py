# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one that sees the data of both, and hold the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from .cases import CASES, MODES, Run, build, left, reference

pytestmark = pytest.mark.multiprocess
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


def run_of(plain: list[dict[str, Any]], name: str, rank: int = 0) -> Run:
    run = plain[rank][name]
    assert isinstance(run, Run), run
    return run


def difference(one: Run, other: Run) -> float:
    assert one.weights.keys() == other.weights.keys()
    return max(float((value - other.weights[name]).abs().max()) for name, value in one.weights.items())


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(plain: list[dict[str, Any]], name: str) -> None:
    case, ours, wanted = CASES[name], run_of(plain, name), reference(name)
    moved = difference(ours, left(*build(case)))
    assert moved > 0.05
    tolerance = case.tolerance or TOLERANCES[case.dtype]
    assert difference(ours, wanted) <= tolerance


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.threads == 1])
def test_replicas_hold_the_same_bits(plain: list[dict[str, Any]], name: str) -> None:
    one, other = (run_of(plain, name, rank) for rank in (0, 1))
    assert one.weights.keys() == other.weights.keys()
    assert [key for key, value in one.weights.items() if not torch.equal(value, other.weights[key])] == []
    for name_of_weight, state in one.state.items():
        assert_same_state(state, other.state[name_of_weight], name_of_weight)


def assert_same_state(one: dict[str, Any], other: dict[str, Any], name: str) -> None:
    assert one.keys() == other.keys(), name
    for key, value in one.items():
        same = torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        assert same, f"{key} of {name}"


def test_adaptive_schedules_and_ranks_have_decided_something(plain: list[dict[str, Any]]) -> None:
    refreshes = {name: [s.get("galore_refreshes") for s in run_of(plain, name).state.values()] for name in CASES}
    for mode in MODES:
        fixed = refreshes[f"{mode}-1-float64"]
        assert refreshes[f"{mode}-adaptive"] != fixed
        assert refreshes[f"{mode}-energy"] != fixed
        ranks = run_of(plain, f"{mode}-rank-energy").ranks
        assert any(len(set(of_one)) > 1 for of_one in ranks.values())
        assert ranks != run_of(plain, f"{mode}-rank-budget").ranks


@pytest.mark.parametrize("name", ["branches", "branches-2"])
@pytest.mark.parametrize("mode", MODES)
def test_what_nobody_uses_neither_moves_nor_decays(plain: list[dict[str, Any]], mode: str, name: str) -> None:
    start = left(*build(CASES[f"{mode}-{name}"])).weights
    for rank in (0, 1):
        run = run_of(plain, f"{mode}-{name}", rank)
        moved = {key for key, value in run.weights.items() if not torch.equal(value, start[key])}
        assert moved == {key for key in start if not key.startswith("idle")}
        assert run.state["idle.weight"] == {}
        assert run.state["only_first.weight"]["galore_step"] == 20


@pytest.mark.parametrize("mode", MODES)
def test_other_threads_find_no_other_basis(plain: list[dict[str, Any]], mode: str) -> None:
    one, other = (run_of(plain, f"{mode}-threads", rank) for rank in (0, 1))
    for name, state in one.state.items():
        assert_same_state(state, other.state[name], name)
    # What each process computes by itself, the product that lifts an update, may round otherwise.
    assert difference(one, other) <= 1e-6


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.norms])
def test_the_norm_is_that_of_one_process(plain: list[dict[str, Any]], name: str) -> None:
    # In the backward modes that of one process which takes the batches in turn: of what is kept of their sum.
    wanted = reference(name).norms
    assert len(wanted) == 20
    for rank in (0, 1):
        assert run_of(plain, name, rank).norms == pytest.approx(wanted, rel=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_each_basis_is_found_by_one_process(plain: list[dict[str, Any]], mode: str) -> None:
    for name in (f"{mode}-1-float32", f"{mode}-grid", f"{mode}-rank-budget"):
        runs = [run_of(plain, name, rank) for rank in (0, 1)]
        assert sum(run.refreshes for run in runs) == sum(s["galore_refreshes"] for s in runs[0].state.values())
        assert min(run.refreshes for run in runs) >= 3
