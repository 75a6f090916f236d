# SPDX-License-Identifier: Apache-2.0
"""The wrapper stands in for the user's optimizer: closures, hooks, groups, schedulers, copies, scalers."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.state_keys import BASIS
from tests.helpers import PLAIN, Matrices, TinyTransformer, language_loss, max_difference, same_bits, train

SETTINGS: dict[str, Any] = {"rank": 4, "update_proj_gap": 3}


def start(
    base: str = "AdamW", model: nn.Module | None = None, **settings: Any
) -> tuple[Any, GaLoreOptimizer, torch.optim.Optimizer]:
    model = model or TinyTransformer()
    wrapped = getattr(torch.optim, base)(model.parameters(), lr=0.01)
    return model, GaLoreOptimizer(wrapped, model, **{**SETTINGS, **settings}), wrapped


# -- step --------------------------------------------------------------------------------------------------------------


def test_closure_runs_once_with_gradients_and_its_value_is_returned() -> None:
    model, optimizer, _ = start()
    other, plain, _ = start()
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = language_loss(model, 0)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(loss, language_loss(TinyTransformer(), 0))
    train(other, plain, [0])
    assert same_bits(model.parameters(), other.parameters())


def test_without_a_closure_the_bases_value_is_returned_and_arguments_are_handed_on() -> None:
    seen = []

    class Talkative(torch.optim.SGD):
        def step(self, closure: Any = None, *, note: str = "") -> str:  # type: ignore[override]
            seen.append((closure, note))
            super().step()
            return "done"

    model = Matrices((8, 8))
    optimizer = GaLoreOptimizer(Talkative(model.parameters(), lr=0.1), model, rank=2)
    seen.clear()  # the self-check has stepped a copy
    model.give_gradients(0)
    assert optimizer.step(note="hello") == "done"
    assert optimizer.step(lambda: 3.0, note="again") == 3.0
    assert seen == [(None, "hello"), (None, "again")]


def test_gradients_are_left_as_they_are() -> None:
    model = Matrices((12, 8), (8, 12))
    base = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    optimizer = GaLoreOptimizer(base, model, rank=2)
    model.give_gradients(0)
    before = [weight.grad for weight in model.parameters()]
    values = [grad.clone() for grad in before if grad is not None]
    optimizer.step()
    for weight, grad, value in zip(model.parameters(), before, values, strict=True):
        assert weight.grad is grad
        assert weight.grad.shape == weight.shape
        assert torch.equal(weight.grad, value)
    optimizer.zero_grad(set_to_none=False)
    assert all(bool((weight.grad == 0).all()) for weight in model.parameters())
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in model.parameters())


def test_weight_without_a_gradient_is_skipped() -> None:
    model = Matrices((12, 8), (8, 12))
    first, second = model.parameters()
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters(), weight_decay=0.1), model, rank=2)
    model.give_gradients(0)
    second.grad = None
    before = second.detach().clone()
    optimizer.step()
    assert torch.equal(second, before)
    assert second not in optimizer.state
    assert optimizer.state[first]["galore_step"] == 1


@pytest.mark.parametrize("subspace", ["svd", "random_orthonormal"])
@pytest.mark.parametrize("gap", [1, 3, 5])
def test_basis_changes_exactly_at_multiples_of_the_gap(gap: int, subspace: str) -> None:
    model, optimizer, _ = start(update_proj_gap=gap, subspace=subspace, **PLAIN)
    changed = changes_of_bases(model, optimizer)
    assert changed == [list(range(0, 12, gap))] * 6
    check_counters(model, optimizer, changed)


def changes_of_bases(model: TinyTransformer, optimizer: GaLoreOptimizer) -> list[list[int]]:
    """Twelve steps of training: those in which the basis of each weight changed."""
    weights = model.matrices()
    changed: list[list[int]] = [[] for _ in weights]
    old = [torch.zeros(1) for _ in weights]
    for step in range(12):
        train(model, optimizer, [step])
        new = [optimizer.state[weight][BASIS].clone() for weight in weights]
        for steps, before, after in zip(changed, old, new, strict=True):
            if before.shape != after.shape or not torch.equal(before, after):
                steps.append(step)
        old = new
    return changed


def check_counters(model: TinyTransformer, optimizer: GaLoreOptimizer, refreshed: list[list[int]]) -> None:
    """What each weight's state says of its refreshes."""
    for weight, steps in zip(model.matrices(), refreshed, strict=True):
        state = optimizer.state[weight]
        assert (state["galore_step"], state["galore_refreshes"], state["galore_failures"]) == (12, len(steps), 0)
        assert state["galore_refreshed_at"] == steps[-1]
        assert 0.0 <= state["galore_overlap"] <= 1.0 + 1e-6


@pytest.mark.parametrize("subspace", ["svd", "random_orthonormal"])
def test_staggered_weights_take_turns(subspace: str) -> None:
    """One weight at a time; before its first turn each has unit vectors, afterwards it refreshes once a gap."""
    model, optimizer, _ = start(update_proj_gap=6, subspace=subspace)
    train(model, optimizer, [0])
    for weight in model.matrices()[1:]:
        rows = optimizer.state[weight][BASIS].shape[0]
        assert torch.equal(optimizer.state[weight][BASIS], torch.eye(rows, 4))
        assert optimizer.state[weight]["galore_refreshed_at"] == -1

    model, optimizer, _ = start(update_proj_gap=6, subspace=subspace)
    first, *others = changes_of_bases(model, optimizer)
    assert others[0][0] == others[-1][0] == 0  # the unit vectors
    refreshed = [first, *(steps[1:] for steps in others)]
    assert [steps[0] for steps in refreshed] == [0, 1, 2, 3, 4, 5]
    assert all(0 < later - before <= 9 for steps in refreshed for before, later in itertools.pairwise(steps))
    assert max(sum(step in steps for steps in refreshed) for step in range(12)) <= 2
    check_counters(model, optimizer, refreshed)


# -- hooks and failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["base", "wrapper"])
@pytest.mark.parametrize("name", ["AdamW", "Adafactor"])
def test_step_hooks_run_once_and_see_real_parameters(on: str, name: str) -> None:
    model, optimizer, base = start(name)
    shapes = [param.shape for param in model.parameters()]
    seen: list[Any] = []

    def look(kind: str) -> Any:
        def hook(opt: Any, args: Any, kwargs: Any) -> None:
            params = [param for group in opt.param_groups for param in group["params"]]
            real = all(p is q for p, q in zip(params, model.parameters(), strict=True))
            seen.append((kind, [param.shape for param in params] == shapes, real))

        return hook

    target = base if on == "base" else optimizer
    pre, post = target.register_step_pre_hook(look("pre")), target.register_step_post_hook(look("post"))
    train(model, optimizer, range(2))
    assert seen == [("pre", True, True), ("post", True, True)] * 2
    pre.remove()
    post.remove()
    train(model, optimizer, range(1))
    assert len(seen) == 4


def test_failing_step_leaves_everything_whole() -> None:
    class Failing(torch.optim.AdamW):
        fail = False

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            super().step()
            if self.fail:
                raise RuntimeError("out of memory")

    model = TinyTransformer()
    base = Failing(model.parameters(), lr=0.01, weight_decay=0.1)
    optimizer = GaLoreOptimizer(base, model, **SETTINGS)
    calls: list[str] = []
    base.register_step_post_hook(lambda *args: calls.append("post"))
    train(model, optimizer, range(2))
    weights = [weight.detach().clone() for weight in model.matrices()]
    groups, keys = base.param_groups, {param: set(state) for param, state in base.state.items()}
    params = list(groups[0]["params"])
    base.fail = True
    with pytest.raises(RuntimeError, match="out of memory"):
        train(model, optimizer, [2])
    assert base.param_groups is groups
    assert all(a is b for a, b in zip(groups[0]["params"], params, strict=True))
    assert {param: set(state) for param, state in base.state.items()} == keys
    assert same_bits(weights, model.matrices())
    base.fail = False
    train(model, optimizer, [3])
    assert calls == ["post"] * 3
    assert all(optimizer.state[weight]["galore_step"] == 3 for weight in model.matrices())


# -- standing in for the base ------------------------------------------------------------------------------------------


def test_is_an_instance_of_the_bases_class() -> None:
    _, optimizer, base = start()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(optimizer, GaLoreOptimizer)
    assert not isinstance(start("SGD")[1], torch.optim.AdamW)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert optimizer.optimizer is optimizer.base is base
    assert "6 projected weights" in repr(optimizer)
    assert "AdamW" in repr(optimizer)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = optimizer.no_such_thing


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_bit_for_bit(name: str, copier: Any) -> None:
    model, optimizer, _ = start(name)
    train(model, optimizer, range(4))
    twin, twin_optimizer = copier((model, optimizer))
    assert isinstance(twin_optimizer, getattr(torch.optim, name))
    assert {id(weight) for weight in twin_optimizer.targets} == {id(weight) for weight in twin.matrices()}
    train(model, optimizer, range(4, 10))
    train(twin, twin_optimizer, range(4, 10))
    assert same_bits(model.parameters(), twin.parameters())
    assert max_difference(model.parameters(), TinyTransformer().parameters()) > 0


def test_base_can_be_wrapped_again_and_goes_on() -> None:
    model, optimizer, base = start()
    other, plain, _ = start()
    train(model, optimizer, range(2))
    with pytest.raises(ValueError, match=r"has rank=4, .* this run has rank=6"):
        GaLoreOptimizer(base, model, rank=6)
    again = GaLoreOptimizer(base, model, **SETTINGS)
    train(model, again, range(2, 5))
    train(other, plain, range(5))
    assert same_bits(model.parameters(), other.parameters())


def test_added_group_is_projected() -> None:
    model = TinyTransformer()
    up, down = model.blocks[0].up, model.blocks[0].down
    base = torch.optim.AdamW(up.parameters(), lr=0.01)
    optimizer = GaLoreOptimizer(base, model, **SETTINGS)
    assert set(optimizer.targets) == {up.weight}
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": list(down.parameters()), "lr": 0.1})
    assert set(optimizer.targets) == {up.weight, down.weight}
    assert any(row.name == "blocks.0.down.weight" and row.target for row in optimizer.targets_table().rows)
    train(model, optimizer, range(2, 4))
    assert optimizer.state[up.weight]["galore_step"] == 4
    assert optimizer.state[down.weight]["galore_step"] == 2
    assert optimizer.state[down.weight]["exp_avg"].shape == (4, 40)


def test_group_can_be_added_to_a_copy_and_without_targets_in_it() -> None:
    model = TinyTransformer()
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model.matrices()), model, **SETTINGS)
    twin_model, twin = copy.deepcopy((model, optimizer))
    twin.add_param_group({"params": list(twin_model.norm.parameters())})
    optimizer.add_param_group({"params": list(model.norm.parameters())})
    assert len(twin.targets) == len(optimizer.targets) == 6
    train(model, optimizer, range(3))
    train(twin_model, twin, range(3))
    assert same_bits(model.parameters(), twin_model.parameters())


def test_groups_can_be_replaced() -> None:
    model = TinyTransformer()
    optimizer = GaLoreOptimizer(torch.optim.AdamW([model.blocks[0].up.weight]), model, **SETTINGS)
    group = {**optimizer.param_groups[0], "params": list(model.blocks[0].parameters())}
    optimizer.param_groups = [group]
    assert optimizer.base.param_groups[0] is group
    assert set(optimizer.targets) == set(model.matrices())


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
@pytest.mark.parametrize("storage", ["param", "int4"])
def test_backward_and_step_inside_autocast_change_nothing(storage: Any, mode: Any) -> None:
    """As manual optimization does under precision="bf16-mixed": bases and moments keep their dtype."""
    runs = []
    for inside in (False, True):
        model = TinyTransformer()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer = GaLoreOptimizer(base, model, rank=4, update_proj_gap=2, mode=mode, basis_storage=storage)
        for step in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                loss = language_loss(model, step)
                if inside:
                    loss.backward()
                    optimizer.step()
            if not inside:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        runs.append(list(model.parameters()))
    assert same_bits(*runs)
