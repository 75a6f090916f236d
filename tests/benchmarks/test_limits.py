# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import limits, optimizers, peers, steps, training
from benchmarks.limits import Least, Rates
from benchmarks.optimizers import FULL_RANK, OURS
from benchmarks.options import Options
from benchmarks.timing import SideBySide
from benchmarks.weights import WeightSet

CPU = torch.device("cpu")


def test_the_least_that_a_step_does() -> None:
    # One weight projected from the right and one from the left: bases (8, 2) and (6, 2), low rank (10, 2) and (2, 12).
    least = Least.of(WeightSet(name="two", shapes=((10, 8), (6, 12)), rank=2))
    assert least.flops == 2 * 2 * (10 * 8 + 6 * 12) * 2
    assert least.bytes == 4 * (3 * (10 * 8 + 6 * 12) + 4 * (10 * 2 + 2 * 12) + 2 * (8 * 2 + 6 * 2))


def test_shares_of_the_limits() -> None:
    weights = WeightSet(name="one", shapes=((10, 8),), rank=2)
    least = Least.of(weights)
    # Two seconds of arithmetic and three of traffic, in a step of ten.
    held = limits.compared(weights, Rates(flops=least.flops / 2, bytes=least.bytes / 3), 10.0)
    assert held["share_of_serial_limit"] == pytest.approx(0.5)
    assert held["share_of_overlapped_limit"] == pytest.approx(0.3)
    assert held["gflop_per_s"] == pytest.approx(held["gemm_gflop_per_s"] / 5)
    assert held["gbyte_per_s"] == pytest.approx(held["copy_gbyte_per_s"] * 0.3)


def test_rates_are_of_the_faster_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"mm": [2.0, 2.0], "product": [0.5, 0.5], "copy": [4.0, 4.0]}
    monkeypatch.setattr(limits, "side_by_side", lambda works, **_: SideBySide(seconds=seconds, outcomes={}))
    rates = Rates.measure(Options().clock, CPU)
    assert rates.flops == 2 * 1024**3 / 0.5
    assert rates.bytes == 2 * 4 * 2**24 / 4.0


def test_peak_of_a_work() -> None:
    def work() -> None:
        # As an optimizer's step is: what is freed inside of it is not all freed at its end.
        with torch.profiler.record_function("a step"):
            one = torch.ones(1000)
            for _ in range(5):
                one = one + 1

    assert 8000 <= limits.peak_bytes(work, CPU) <= 8400


def test_state_counts_whole_storages_once() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    whole = torch.zeros(100)
    projector = type("Projector", (), {})()
    projector.basis, projector.pair = whole[:3], [torch.zeros(2), whole[50:]]
    optimizer.state[weight] = {"step": 1, "view": whole[:1], "projector": projector}
    assert limits.state_bytes(optimizer) == 4 * (100 + 2)


def test_what_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(groups: object) -> torch.optim.Optimizer:
        raise KeyError("percentile_clipping")

    monkeypatch.setitem(optimizers.MAKERS, peers.Q_GALORE_TORCH, broken)
    monkeypatch.setattr(peers, "peer", lambda name, module: None)
    names, notes = optimizers.runnable(CPU)
    assert names == [OURS, FULL_RANK]
    assert sorted(note.split(",")[0] for note in notes) == [
        "apollo-torch is not installed",
        "galore-torch is not installed",
        "q-galore-torch does not run here",
    ]
    assert any("KeyError: 'percentile_clipping'" in note for note in notes)


def test_every_optimizer_projects_the_targets_and_steps_the_others() -> None:
    names, _ = optimizers.runnable(CPU)
    for name in names:
        target, other = nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(5))
        target.grad, other.grad = torch.randn(32, 16), torch.randn(5)
        before = target.detach().clone(), other.detach().clone()
        optimizer = optimizers.make(name, [target], rank=4, gap=10, others=[other])
        optimizer.step()
        assert not torch.equal(target, before[0])
        assert not torch.equal(other, before[1])
        assert (optimizer.state[target]["exp_avg"].numel() == 32 * 16) is (name == FULL_RANK)


@pytest.mark.parametrize(("ratio", "kept"), [(3.1, True), (2.9, False)])
def test_a_step_is_held_to_its_ratio(ratio: float, kept: bool) -> None:
    kinds = {"ordinary": {"median": ratio}, "amortised": {"median": 10.0}}
    row = {OURS: {"times_faster_than": {peers.GALORE_TORCH: kinds}}, peers.GALORE_TORCH: {}}
    held = {"name": steps.CASES[0].weights.name, "optimizers": row}
    assert [target.passed for target in steps._targets([held], Options())] == [kept, True]
    assert steps._targets([held], Options(threads=2)) == []
    assert steps._targets([{**held, "name": "another"}], Options()) == []


@pytest.mark.parametrize(("ratio", "kept"), [(1.01, True), (1.03, False)])
def test_a_fine_tuning_step_is_held_to_that_of_adamw(ratio: float, kept: bool) -> None:
    held = {"name": training.FINE_TUNING, "optimizers": {OURS: {"steps_of_full_rank": {"median": ratio}}}}
    (target,) = training._targets([held], Options())
    assert target.passed is kept


@pytest.mark.parametrize(("case", "count"), [(training.CASES[0], 72), (training.CASES[1], 56)])
def test_the_matrices_of_the_layers_are_projected(case: training.Case, count: int) -> None:
    with torch.device("meta"):
        model = case.make()
    chosen = [name for name, param in model.named_parameters() if training.is_projected(name, param)]
    assert len(chosen) == count
    assert not any("embed" in name or "head" in name for name in chosen)
