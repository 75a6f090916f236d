# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import optimizers, stagger, steps
from benchmarks.stagger import AT_ONCE, STAGGERED
from benchmarks.timing import Clock
from benchmarks.weights import WeightSet

SMALL = WeightSet(name="small", shapes=((12, 20), (20, 12)), rank=2)


@pytest.fixture
def grads() -> list[Tensor]:
    return optimizers.random_gradients(SMALL, device=torch.device("cpu"))


def test_times_are_sorted_by_what_the_step_did() -> None:
    kinds = steps.by_kind([1.0, 2.0, 3.0, 50.0, 3.0, 4.0, 5.0, 80.0], gap=4)
    assert kinds["ordinary"] == [1.0, 2.0, 3.0, 3.0, 4.0, 5.0]
    assert kinds["refresh"] == [50.0, 80.0]
    assert kinds["amortised"] == [(199 * 2.0 + 50.0) / 200, (199 * 4.0 + 80.0) / 200]


def test_ours_refreshes_when_the_times_are_taken_for_refreshes(grads: list[Tensor]) -> None:
    optimizer = optimizers.ours(grads, rank=2, gap=3, stagger=False)
    counts = []
    for _ in range(7):
        optimizer.step()
        counts.append([optimizer.state[p]["galore_refreshes"] for p in optimizer.param_groups[0]["params"]])
    # The untimed step 0, and then those that by_kind takes for refreshes: the last of each gap.
    assert counts == [[1, 1]] * 3 + [[2, 2]] * 3 + [[3, 3]]


def test_galore_torch_refreshes_when_the_times_are_taken_for_refreshes(
    grads: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    projectors = pytest.importorskip("galore_torch.galore_projector")
    find, counts = projectors.GaLoreProjector.get_orthogonal_matrix, [0]

    def counted(*args: object, **kwargs: object) -> object:
        counts[-1] += 1
        return find(*args, **kwargs)

    monkeypatch.setattr(projectors.GaLoreProjector, "get_orthogonal_matrix", counted)
    optimizer = optimizers.galore_torch(grads, rank=2, gap=3)
    assert optimizer is not None
    for _ in range(7):
        optimizer.step()
        counts.append(0)
    assert counts == [2, 0, 0, 2, 0, 0, 2, 0]


def test_no_optimizer_writes_into_the_shared_gradients(grads: list[Tensor]) -> None:
    before = [grad.clone() for grad in grads]
    made = [optimizers.ours(grads, rank=2, gap=3, stagger=True), optimizers.full_rank(grads)]
    peer = optimizers.galore_torch(grads, rank=2, gap=3)
    for optimizer in made + ([peer] if peer else []):
        (params,) = (group["params"] for group in optimizer.param_groups)
        start = [param.detach().clone() for param in params]
        optimizer.step()
        assert all(not torch.equal(old, new) for old, new in zip(start, params, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(before, grads, strict=True))


def test_costs_are_in_ordinary_steps_of_the_same_optimizer() -> None:
    run = {"ordinary step": [2.0, 2.0, 9.0], AT_ONCE: [40.0, 2.0, 2.0], "galore-torch": [900.0, 3.0, 3.0]}
    assert stagger._relative(AT_ONCE, run) == [20.0, 1.0, 1.0]
    assert stagger._relative("galore-torch", run) == [300.0, 1.0, 1.0]


@pytest.mark.parametrize(("dearest", "kept"), [(1.9, True), (2.1, False)])
def test_the_bound_is_on_the_dearest_step(dearest: float, kept: bool) -> None:
    held = {"name": "small", "gap": 8, "steps": 16, "optimizers": {STAGGERED: {"max": dearest}, AT_ONCE: {"max": 50.0}}}
    (target,) = stagger._targets([held])
    assert target.passed is kept


def test_a_run_times_every_step_from_the_first_on(monkeypatch: pytest.MonkeyPatch, grads: list[Tensor]) -> None:
    case = stagger.Case(weights=SMALL, gap=4, steps=8)
    made: list[Counted] = []

    def ours(grads: list[Tensor], **settings: object) -> Counted:
        made.append(Counted(settings))
        return made[-1]

    monkeypatch.setattr(optimizers, "ours", ours)
    run = stagger._one_run(case, grads, Clock(name="", seconds=lambda step: step()), 0)
    assert [(own.settings["stagger"], own.settings["gap"]) for own in made] == [(False, 10**9), (True, 4), (False, 4)]
    assert run[STAGGERED] == run[AT_ONCE] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert run["ordinary step"] == [3, 4]  # after three untimed ones


class Counted:
    """An optimizer whose steps return their number."""

    def __init__(self, settings: dict[str, object]) -> None:
        self.settings, self.steps = settings, -1

    def step(self) -> int:
        self.steps += 1
        return self.steps
