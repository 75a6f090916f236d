# SPDX-License-Identifier: Apache-2.0
"""Refreshes through the optimizer: rank and moments change together, a failure leaves all as it was."""

from __future__ import annotations

from copy import deepcopy
from io import BytesIO
from typing import Any, NoReturn

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer, storage
from lightning_galore.refresh import RefreshEvent
from lightning_galore.subspace import SUBSPACES
from tests.helpers import TinyTransformer, assert_state_whole, language_loss, max_difference, train

MODES = ["step", "project", "layerwise"]


def make(mode: str = "step", base: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> tuple[
    TinyTransformer, GaLoreOptimizer
]:  # fmt: skip
    model = TinyTransformer(layers=2)
    wrapped = base(model.parameters(), lr=1e-2)  # type: ignore[call-arg]
    settings = {"rank": 6, "update_proj_gap": 4, "scale": 1.0, "mode": mode, **settings}
    return model, GaLoreOptimizer(wrapped, model, **settings)


def ranks(optimizer: GaLoreOptimizer) -> list[int]:
    return [status.rank for status in optimizer.subspaces()]


# -- one schedule a setting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["fixed", "adaptive", "cos", "energy"])
@pytest.mark.parametrize("stagger", [False, True])
def test_modes_agree_under_every_schedule(schedule: str, stagger: bool) -> None:
    settings: dict[str, Any] = {"schedule": schedule, "stagger": stagger, "refresh_warmup": 6, "min_gap": 1}
    runs = {}
    for mode in MODES:
        model, optimizer = make(mode, **settings)
        train(model, optimizer, range(30))
        counts = [
            (s.num_refreshes, s.refreshed_at, s.gap, s.overlap, s.energy_at_refresh) for s in optimizer.subspaces()
        ]
        runs[mode] = ([*model.parameters()], counts)
    for mode in MODES[1:]:
        assert runs[mode][1] == runs["step"][1]
        assert max_difference(runs[mode][0], runs["step"][0]) == 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "adaptive"},
        {"schedule": "cos"},
        {"schedule": "energy", "min_gap": 2},
        {"refresh_warmup": 9, "min_gap": 1},
        {"method": "galore-track"},
        {"subspace": "power", "stagger": True},
        {"rank_rule": "energy", "rank_energy": 0.6},
        {"rank_rule": "noise_edge", "moments": "rotate"},
        {"rank_rule": "energy", "state_budget": 20_000, "moments": "keep"},
        {"moments": "reset"},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact(mode: str, settings: dict[str, Any]) -> None:
    whole, trained = make(mode, **settings)
    train(whole, trained, range(24))
    first, before = make(mode, **settings)
    train(first, before, range(11))
    saved = {"model": first.state_dict(), "optimizer": before.state_dict()}
    torch.save(saved, buffer := BytesIO())
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    again, resumed = make(mode, **settings)
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    train(again, resumed, range(11, 24))
    assert max_difference(again.parameters(), whole.parameters()) == 0.0
    assert [s.num_refreshes for s in resumed.subspaces()] == [s.num_refreshes for s in trained.subspaces()]
    assert ranks(resumed) == ranks(trained)


# -- stand-ins ---------------------------------------------------------------------------------------------------------


def test_a_weight_trains_on_unit_vectors_until_its_first_refresh() -> None:
    model, optimizer = make(update_proj_gap=100)
    train(model, optimizer, range(1))
    waiting = [weight for weight in optimizer.targets if optimizer.state[weight]["galore_refreshed_at"] < 0]
    assert 0 < len(waiting) < len(optimizer.targets)
    for weight in waiting:
        basis = optimizer.state[weight]["galore_basis"]
        assert torch.equal(basis, torch.eye(*basis.shape))
        assert optimizer.state[weight]["galore_failures"] == 0
        assert optimizer.state[weight]["galore_step"] == 1
    train(model, optimizer, range(1, 40))
    assert all(status.num_refreshes == 1 for status in optimizer.subspaces())


# -- adaptive rank -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moments", ["keep", "rotate", "rotate_first", "reset"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("rule", [{"rank_rule": "energy", "rank_energy": 0.8}, {"rank_rule": "noise_edge"}], ids=str)
def test_rank_and_moments_change_together(moments: str, proj_type: str, rule: dict[str, Any]) -> None:
    model, optimizer = make(rank=12, moments=moments, proj_type=proj_type, update_proj_gap=3, **rule)
    seen = set()
    for step in range(20):
        train(model, optimizer, [step])
        for weight, target in optimizer.targets.items():
            state = optimizer.state[weight]
            rank = state["galore_basis"].shape[1]
            assert 1 <= rank <= 12
            seen.add(rank)
            projection = target.projection.with_rank(rank)
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == projection.low_shape
            assert bool((state["exp_avg_sq"] >= 0).all())
            assert_state_whole(state)
    assert len(seen) > 2
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


def test_adaptive_rank_holds_the_energy_it_promises() -> None:
    model, optimizer = make(rank=15, rank_rule="energy", rank_energy=0.9, subspace="svd", stagger=False)
    train(model, optimizer, range(9))
    for status in optimizer.subspaces():
        assert status.energy_at_refresh is not None
        assert status.energy_at_refresh >= 0.9 - 1e-5 or status.rank == 15


def test_least_rank_is_kept() -> None:
    model, optimizer = make(rank=8, rank_rule="energy", rank_energy=0.01, min_rank=3)
    train(model, optimizer, range(9))
    assert set(ranks(optimizer)) == {3}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stagger", [False, True])
def test_budget_holds_at_every_step(mode: str, stagger: bool) -> None:
    budget = 24_000
    model, optimizer = make(
        mode, rank=15, rank_rule="energy", rank_energy=0.99, state_budget=budget, update_proj_gap=3, stagger=stagger
    )
    held = []
    for step in range(24):
        train(model, optimizer, [step])
        states = [optimizer.state[weight] for weight in optimizer.targets]
        tensors = [v for state in states for key, v in state.items() if isinstance(v, Tensor) and key != "step"]
        held.append(storage.nbytes(tensors))
    assert max(held) <= budget
    assert held[-1] > 0.7 * budget


def test_ranks_by_name_and_by_fraction() -> None:
    _, optimizer = make(rank=0.25, rank_pattern={"query": 3, r".*\.up": 0.5})
    by_name = {target.name: target.projection.rank for target in optimizer.targets.values()}
    assert by_name["blocks.0.query.weight"] == 3
    assert by_name["blocks.1.up.weight"] == 8
    assert by_name["blocks.1.down.weight"] == 4


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 8])
def test_a_run_goes_on_after_a_gradient_that_is_not_finite_at_a_refresh(mode: str, value: float, at: int) -> None:
    model, optimizer = make(mode, stagger=False)
    broken = model.blocks[0].up.weight
    poison = broken.register_hook(lambda grad: torch.full_like(grad, value) if step == at else None)
    for step in range(at):
        train(model, optimizer, [step])
    step = at
    before, state = broken.detach().clone(), dict(optimizer.state[broken])
    moments = {key: state[key].clone() for key in ("exp_avg", "exp_avg_sq") if key in state}
    train(model, optimizer, [at])
    assert torch.equal(broken, before)  # it has sat the step out
    assert all(torch.equal(optimizer.state[broken][key], moment) for key, moment in moments.items())
    assert optimizer.state[broken]["galore_failures"] == 1
    poison.remove()
    train(model, optimizer, range(at + 1, at + 12))
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())
    status = next(s for s in optimizer.subspaces() if s.name == "blocks.0.up.weight")
    assert status.step == at + 11
    others = [s for s in optimizer.subspaces() if s.name != status.name]
    assert {s.step for s in others} == {at + 12}
    assert status.num_refreshes == others[0].num_refreshes
    assert not torch.equal(broken, before)


@pytest.mark.parametrize("moments", ["keep", "rotate", "rotate_first", "reset"])
def test_where_base_raises_basis_and_moments_stay(moments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make(moments=moments, stagger=False)
    train(model, optimizer, range(4))  # the next one refreshes
    before = {weight: dict(optimizer.state[weight]) for weight in optimizer.targets}

    def raises(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(optimizer.base, "step", raises)
        with pytest.raises(RuntimeError, match="no more"):
            train(model, optimizer, [4])
    for weight, state in before.items():
        assert optimizer.state[weight].keys() == state.keys()
        for key, value in state.items():
            now = optimizer.state[weight][key]
            assert now is value if isinstance(value, Tensor) else now == value, key
    train(model, optimizer, range(4, 9))
    assert all(status.num_refreshes == 3 for status in optimizer.subspaces())


def test_rotated_first_moment_is_the_old_one_seen_in_the_new_basis() -> None:
    model, optimizer = make(moments="rotate_first", stagger=False, base=torch.optim.AdamW, proj_type="left")
    train(model, optimizer, range(4))
    optimizer.base.param_groups[0]["betas"] = (1.0 - 1e-12, 0.999)  # nothing of the new gradient gets in
    weight = model.blocks[0].up.weight
    old, moment = optimizer.state[weight]["galore_basis"].clone(), optimizer.state[weight]["exp_avg"].clone()
    train(model, optimizer, [4])
    new = optimizer.state[weight]["galore_basis"]
    assert not torch.allclose(old, new)
    expected = new.double().mT @ (old.double() @ moment.double())
    scale = float(expected.abs().max())
    assert float((optimizer.state[weight]["exp_avg"].double() - expected).abs().max()) <= 1e-5 * scale


def test_refresh_of_a_dropped_step_leaves_no_trace_in_the_budget() -> None:
    model, optimizer = make(rank=12, rank_rule="energy", state_budget=30_000, stagger=False, update_proj_gap=2)
    twin_model, twin = make(rank=12, rank_rule="energy", state_budget=30_000, stagger=False, update_proj_gap=2)
    for step in range(8):
        if step % 2 == 0:
            language_loss(model, 100 + step).backward()
            for weight in optimizer.targets:
                optimizer.prepare(weight, due=True)  # and then the step is not taken
        train(model, optimizer, [step])
        train(twin_model, twin, [step])
    assert ranks(optimizer) == ranks(twin)
    assert max_difference(model.parameters(), twin_model.parameters()) == 0.0


def test_budget_recovers_from_a_checkpoint_that_has_none() -> None:
    model, optimizer = make(rank=12, rank_rule="energy", rank_energy=0.99, stagger=False, update_proj_gap=2)
    train(model, optimizer, range(4))
    saved = optimizer.state_dict()
    model, capped = make(
        rank=12, rank_rule="energy", rank_energy=0.99, stagger=False, update_proj_gap=2, state_budget=12_000
    )
    capped.load_state_dict(saved)
    train(model, capped, range(4, 10))
    assert all(1 <= rank <= 12 for rank in ranks(capped))
    assert sum(status.state_bytes for status in capped.subspaces()) <= 12_000 + 4 * len(capped.targets)


@pytest.mark.parametrize("moments", ["keep", "rotate", "rotate_first", "reset"])
@pytest.mark.parametrize("base", [torch.optim.Adagrad, torch.optim.Adafactor, torch.optim.SGD])
def test_adaptive_rank_with_other_optimizers(moments: str, base: type[torch.optim.Optimizer]) -> None:
    model, optimizer = make(base=base, rank=15, rank_rule="energy", rank_energy=0.7, moments=moments)
    train(model, optimizer, range(12))
    assert len(set(ranks(optimizer))) > 1
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


def test_overlap_of_a_basis_that_has_grown_counts_what_it_holds_of_the_old_one() -> None:
    model, optimizer = make(rank=15, rank_rule="energy", rank_energy=0.5, subspace="svd", stagger=False)
    weight = model.blocks[0].up.weight
    gradient = torch.zeros_like(weight)
    gradient[range(8), range(8)] = torch.tensor([4.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    for step in range(5):
        for other in model.parameters():
            other.grad = torch.ones_like(other)
        weight.grad = gradient.clone()
        if step == 4:
            weight.grad[2:8] *= 2.0  # more directions are needed, and the first two stay
        optimizer.step()
    status = next(s for s in optimizer.subspaces() if s.name == "blocks.0.up.weight")
    assert status.num_refreshes == 2
    assert status.rank > 1
    assert status.overlap == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("mode", ["project", "layerwise"])
def test_energy_is_that_of_the_whole_window(mode: str) -> None:
    """Under accumulation a look at the gradient's energy waits for the last backward, as a refresh does."""
    records = {}
    for one in ("step", mode):
        model, optimizer = make(one, schedule="energy", min_gap=2, update_proj_gap=8, refresh_below=0.9, stagger=False)
        for step in range(24):
            optimizer.zero_grad()
            with optimizer.accumulate():
                for part in range(3):
                    language_loss(model, 10 * step + part).backward()
            language_loss(model, 10 * step + 3).backward()
            optimizer.step()
        records[one] = [(s.refreshed_at, s.num_refreshes) for s in optimizer.subspaces()]
    assert records[mode] == records["step"]
    assert max(count for _, count in records["step"]) > 2


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_tracked_basis_knows_nothing_of_clipping_and_loss_scale(clip: float | None, scale: float) -> None:
    """Mode "project" finds it before either, mode "step" after."""
    weights = {}
    for mode in ("step", "project"):
        model, optimizer = make(mode, method="galore-track", update_proj_gap=1)
        for step in range(12):
            optimizer.zero_grad()
            (language_loss(model, step) * scale).backward()
            with optimizer.exposed():
                params = [param for group in optimizer.param_groups for param in group["params"]]
                for param in params:
                    if param.grad is not None:
                        param.grad.div_(scale)
                if clip:
                    nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()
        weights[mode] = [weight.detach().clone() for weight in model.parameters()]
    assert max_difference(weights["step"], weights["project"]) <= 2e-4


def test_reading_changes_nothing() -> None:
    _, optimizer = make()
    optimizer.subspaces()
    for weight in optimizer.targets:
        optimizer.is_due(weight)
    assert dict(optimizer.state) == {}


def test_set_schedule_staggers_what_was_not() -> None:
    model, optimizer = make(stagger=False, update_proj_gap=16)
    train(model, optimizer, range(4))
    optimizer.set_schedule(stagger=True)
    told: list[RefreshEvent] = []
    optimizer.on_refresh(told.append)
    train(model, optimizer, range(4, 60))
    assert len({event.step for event in told}) > 8


def test_set_schedule_checks_the_gaps_of_groups_too() -> None:
    model = TinyTransformer()
    groups = [{"params": model.matrices(), "rank": 4, "update_proj_gap": 400}]
    optimizer = GaLoreOptimizer(torch.optim.AdamW(groups), model)
    with pytest.raises(ValueError, match="update_proj_gap=400 must lie between min_gap=100 and max_gap=300"):
        optimizer.set_schedule(max_gap=300)
    assert optimizer.config.max_gap is None


def test_rank_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rank_pattern\['nowhere'\]=3 names no module of the model; mend or remove"):
        make(rank_pattern={"nowhere": 3})


# -- what can be seen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_every_refresh_is_told_once(subspace: str) -> None:
    model, optimizer = make(subspace=subspace, update_proj_gap=5)
    told: list[RefreshEvent] = []
    silence = optimizer.on_refresh(told.append)
    train(model, optimizer, range(17))
    for status in optimizer.subspaces():
        events = [event for event in told if event.name == status.name]
        assert [event.step for event in events] == sorted({event.step for event in events})
        assert len(events) == status.num_refreshes >= 3
        assert events[-1].step == status.refreshed_at
        assert all(event.found and event.rank == status.rank and event.gap == 5 for event in events)
        assert all(event.energy is not None and event.energy > 0 for event in events)
        if SUBSPACES[subspace].orthonormal:
            assert all(event.energy is not None and event.energy <= 1.0 + 1e-5 for event in events)
            assert [event.overlap is None for event in events] == [True] + [False] * (len(events) - 1)
    silence()
    count = len(told)
    train(model, optimizer, range(17, 24))
    assert len(told) == count
    assert optimizer.refresh_seconds > 0


def test_captured_energy_is_measured_while_somebody_watches() -> None:
    model, optimizer = make(stagger=False, update_proj_gap=10)
    train(model, optimizer, range(2))
    stale = [status.energy for status in optimizer.subspaces()]
    train(model, optimizer, [2])
    assert [status.energy for status in optimizer.subspaces()] == stale
    optimizer.watch()
    language_loss(model, 3).backward()
    expected = {}
    for weight, target in optimizer.targets.items():
        low = target.projection.project(weight.grad, (optimizer.state[weight]["galore_basis"],))
        expected[target.name] = float(low.square().sum() / weight.grad.square().sum())
    optimizer.step()
    for status in optimizer.subspaces():
        assert float(status.energy) == pytest.approx(expected[status.name], rel=1e-5)  # type: ignore[arg-type]


def test_bytes_saved_are_those_of_full_rank_moments_less_what_is_held() -> None:
    model, optimizer = make(rank=4)
    train(model, optimizer, range(1))
    for (weight, target), status in zip(optimizer.targets.items(), optimizer.subspaces(), strict=True):
        m, n = target.projection.shape
        assert status.state_bytes == storage.nbytes(optimizer.state[weight])
        full = 2 * 4 * m * n
        assert status.bytes_saved == pytest.approx(full - status.state_bytes, abs=4 * m * n // 4 + 16)
        assert weight.shape == (m, n)


def test_schedule_may_be_set_later() -> None:
    model, optimizer = make(update_proj_gap=100, stagger=False)
    train(model, optimizer, range(3))
    optimizer.set_schedule(schedule="fixed", update_proj_gap=2)
    train(model, optimizer, range(3, 9))
    assert all(status.num_refreshes == 5 for status in optimizer.subspaces())  # at 0, 3 (late), 4, 6, 8
    assert optimizer.config.gap == 2
    with pytest.raises(TypeError, match="rank: no setting of a schedule; choose among schedule, update_proj_gap"):
        optimizer.set_schedule(rank=3)
    with pytest.raises(ValueError, match="update_proj_gap=0 must be at least 1"):
        optimizer.set_schedule(update_proj_gap=0)
    assert optimizer.config.gap == 2


def test_schedule_may_be_set_through_lightnings_wrapper() -> None:
    _, optimizer = make(stagger=False)
    LightningOptimizer(optimizer).set_schedule(update_proj_gap=7)  # type: ignore[attr-defined]
    assert optimizer.config.gap == 7
    assert {status.gap for status in optimizer.subspaces()} == {7}


def test_layers_that_come_later_get_places_of_their_own() -> None:
    model = TinyTransformer(layers=2)
    model.blocks[1].requires_grad_(False)
    first = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = GaLoreOptimizer(torch.optim.AdamW(first, lr=1e-2), model, rank=4, update_proj_gap=20)
    train(model, optimizer, range(10))
    places = {s.name: s.num_refreshes for s in optimizer.subspaces()}
    model.blocks[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(model.blocks[1].parameters())})
    train(model, optimizer, range(10, 50))
    later = [s for s in optimizer.subspaces() if s.name not in places]
    assert len(later) == 6
    assert all(s.num_refreshes >= 2 for s in later)
    assert len({s.refreshed_at for s in later}) > 1


def test_copy_keeps_its_own_course() -> None:
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, rank=4, update_proj_gap=3)
    twin_model, twin = deepcopy((model, optimizer))
    for net, opt in ((model, optimizer), (twin_model, twin)):
        for step in range(8):
            opt.zero_grad()
            net(torch.ones(2, 16) * (step + 1)).square().sum().backward()
            opt.step()
    assert max_difference(model.parameters(), twin_model.parameters()) == 0.0
    assert [s.num_refreshes for s in twin.subspaces()] == [s.num_refreshes for s in optimizer.subspaces()]
