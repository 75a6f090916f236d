# SPDX-License-Identifier: Apache-2.0
"""The battery over every subspace x optimizer x shape x dtype, and what single optimizers need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import GaLoreOptimizer, base_rules
from lightning_galore.state_keys import BASIS, is_ours
from lightning_galore.subspace import SUBSPACES
from tests.helpers import Matrices, assert_orthonormal, assert_state_whole, max_difference, quadratic_loss, same_bits
from tests.reference import galore_reference as reference
from tests.test_optimizer_bases import BASES, LR, build

SHAPES = {"tall": (20, 12), "wide": (12, 20), "square": (12, 12)}
RANKS = [1, 4, 12]


def descend(name: str, subspace: str, shape: Any, rank: int, dtype: torch.dtype) -> tuple[Matrices, Any, list[float]]:
    model = Matrices(shape, dtype=dtype)
    # Steps in one random direction of twelve are no more than the rounding errors of bf16, unless they are longer.
    lr = 4 * LR if dtype == torch.bfloat16 and subspace == "random_orthonormal" and rank == 1 else LR
    if name == "adadelta":
        lr = 16.0  # its steps start at the root of its eps, 1e-3, times the learning rate: too small for bf16 else
    base = build(name, "plain", [{"params": list(model.parameters()), "rank": rank}], lr=lr)
    options: dict[str, Any] = {"scale": 0.5, "update_proj_gap": 2, "subspace": subspace}
    optimizer = GaLoreOptimizer(base, model, **options)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = quadratic_loss(model.parameters())
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return model, optimizer, [*losses, float(quadratic_loss(model.parameters()).detach())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("name", BASES)
def test_every_combination_descends(name: str, subspace: str, dtype: torch.dtype) -> None:
    for shape in SHAPES.values():
        for rank in RANKS:
            model, optimizer, losses = descend(name, subspace, shape, rank, dtype)
            (weight,) = model.parameters()
            target = optimizer.targets[weight]
            state = optimizer.state[weight]
            assert weight.dtype == dtype
            assert bool(torch.isfinite(weight).all())
            assert losses[-1] < losses[0], (shape, rank)
            assert target.projection.rank == rank
            assert_state_whole(state)
            own = [
                value for key, value in state.items() if not is_ours(key) and isinstance(value, Tensor) and value.ndim
            ]
            low = target.projection.low_shape
            assert all(value.shape in (low, (low[0], 1), (1, low[1])) for value in own), (shape, rank)
            assert state[BASIS].dtype == dtype
            if SUBSPACES[subspace].orthonormal:
                assert_orthonormal(state[BASIS])
    again, _, repeated = descend(name, subspace, shape, rank, dtype)
    assert repeated == losses
    assert same_bits(again.parameters(), model.parameters())


@pytest.mark.parametrize("proj_type", ["reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "adagrad"])
def test_every_side_descends(name: str, proj_type: str) -> None:
    for shape in SHAPES.values():
        for rank in RANKS:
            model = Matrices(shape)
            base = build(name, "plain", [{"params": list(model.parameters()), "rank": rank, "proj_type": proj_type}])
            optimizer = GaLoreOptimizer(base, scale=0.5, update_proj_gap=2)
            before = float(quadratic_loss(model.parameters()).detach())
            for _ in range(4):
                optimizer.zero_grad()
                quadratic_loss(model.parameters()).backward()
                optimizer.step()
            assert float(quadratic_loss(model.parameters()).detach()) < before


# -- weight decay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, (_, _, takes) in BASES.items() if "weight_decay" in takes])
def test_kind_of_decay_is_what_a_probe_sees(name: str) -> None:
    """A weight of one with a zero gradient: decoupled decay gives ``1 - lr * decay``, a penalty something else."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    base = build(name, "decay", [weight])
    weight.grad = torch.zeros_like(weight)
    base.step()
    base.zero_grad()
    weight.grad = torch.zeros_like(weight)
    base.step()
    shrunk = bool(((weight - (1 - 2.0**-11) ** 2).abs() < 1e-7).all())
    if type(base) is torch.optim.SGD and not base.defaults["momentum"]:
        assert shrunk  # plain SGD: a penalty and decoupled decay are the same
        return
    assert base_rules.decay_kind(base, base.param_groups[0]) == ("decoupled" if shrunk else "coupled")


@pytest.mark.parametrize("name", [name for name, (_, _, takes) in BASES.items() if "weight_decay" in takes])
def test_decoupled_decay_reaches_the_whole_weight(name: str) -> None:
    """Outside the subspace a weight only decays: decoupled decay reaches there, a penalty is projected."""
    model = Matrices((6, 4))
    (weight,) = model.parameters()
    start = weight.detach().clone()
    base = build(name, "decay", [{"params": [weight], "rank": 1}])
    optimizer = GaLoreOptimizer(base, subspace="svd")
    weight.grad = torch.zeros_like(weight)
    weight.grad[2, 1] = 1.0  # the subspace is the second column
    optimizer.step()
    decoupled = base_rules.decay_kind(base, base.param_groups[0]) == "decoupled"
    expected = start[:, [0, 2, 3]] * (1 - 2.0**-11 if decoupled else 1.0)
    torch.testing.assert_close(weight[:, [0, 2, 3]], expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(weight[:, 1], start[:, 1])


# -- single optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_adagrads_eager_state_is_low_rank_after_wrapping(start: float) -> None:
    model = Matrices((20, 12), (12, 20))
    base = torch.optim.Adagrad(model.parameters(), lr=0.1, initial_accumulator_value=start)
    optimizer = GaLoreOptimizer(base, model, rank=3)
    sums = [optimizer.state[weight]["sum"] for weight in model.parameters()]
    assert [tuple(one.shape) for one in sums] == [(20, 3), (3, 20)]
    assert_state_whole(dict(enumerate(sums)))  # type: ignore[arg-type]
    assert all(bool((one == start).all()) for one in sums)
    model.give_gradients(0)
    optimizer.step()
    assert [tuple(optimizer.state[weight]["sum"].shape) for weight in model.parameters()] == [(20, 3), (3, 20)]


@pytest.mark.parametrize("rule", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (16, 16)])
def test_muons_rate_is_that_of_the_full_shape(rule: str | None, shape: tuple[int, int]) -> None:
    group = {"adjust_lr_fn": rule}
    for low_shape in ((shape[0], 4), (4, shape[1]), (4, 4), shape):
        expected = reference.muon_factor(shape, rule) / reference.muon_factor(low_shape, rule)
        assert base_rules.lift_factor(group, shape, low_shape) == pytest.approx(expected)
    assert base_rules.lift_factor(group, shape, shape) == 1.0
    assert base_rules.lift_factor({"lr": 0.1}, shape, (4, 4)) == 1.0


@pytest.mark.parametrize("rule", [None, "match_rms_adamw"])
def test_muons_update_has_the_size_of_the_full_shape(rule: Any) -> None:
    model = Matrices((64, 16))
    (weight,) = model.parameters()
    base = torch.optim.Muon([weight], lr=0.5, weight_decay=0.0, adjust_lr_fn=rule)
    start = weight.detach().clone()
    model.give_gradients(0)
    GaLoreOptimizer(base, model, rank=4, scale=1.0).step()
    values = torch.linalg.svdvals(weight.detach() - start)
    # Newton-Schulz brings singular values to 0.7 ... 1.2; four of them are not zero.
    assert bool((values[:4] / (0.5 * reference.muon_factor((64, 16), rule)) - 0.95).abs().max() < 0.3)
    assert float(values[4:].max()) < 1e-4


@pytest.mark.parametrize("foreach", [False, True])
def test_adafactors_step_is_relative_to_the_weight(foreach: bool) -> None:
    """Equal gradients, weights of which one is 100 times larger, and one of zeros: the sizes of their steps follow."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(factor * torch.randn(12, 8)) for factor in (1.0, 100.0, 0.0)]
    starts = [weight.detach().clone() for weight in weights]
    groups = [{"params": weights, "rank": 2, "weight_decay": 0.25}]
    base = torch.optim.Adafactor(groups, lr=0.5, foreach=foreach)
    optimizer = GaLoreOptimizer(base, scale=1.0, stagger=False)  # equal bases too
    grad = torch.randn(12, 8)
    for weight in weights:
        weight.grad = grad.clone()
    optimizer.step()
    updates = [weight.detach() - start * (1 - 0.5 * 0.25) for weight, start in zip(weights, starts, strict=True)]
    sizes = [reference.adafactor_step_size(start, 0.5, 1) for start in starts]
    assert sizes[2] == pytest.approx(0.5e-3)
    units = [update / size for update, size in zip(updates, sizes, strict=True)]
    for unit in units:
        torch.testing.assert_close(unit, units[2], rtol=1e-4, atol=1e-4)
    assert base.param_groups[0]["eps"] == (None, 1e-3)
    assert base.param_groups[0]["params"] == weights


def test_adafactor_steps_dense_and_projected_weights_once_each() -> None:
    model = Matrices((12, 8), (8, 12), (8, 8))
    bare = Matrices((12, 8), (8, 12), (8, 8))
    optimizer = GaLoreOptimizer(
        torch.optim.Adafactor(model.parameters(), lr=0.1), model, rank=2, target_modules=[r"layers\.0"]
    )
    other = torch.optim.Adafactor(bare.parameters(), lr=0.1)
    for step in range(3):
        model.give_gradients(step)
        bare.give_gradients(step)
        optimizer.step()
        other.step()
    first, *rest = list(model.parameters())
    assert [float(optimizer.state[weight]["step"]) for weight in (first, *rest)] == [3.0, 3.0, 3.0]
    assert max_difference(rest, list(bare.parameters())[1:]) == 0.0
