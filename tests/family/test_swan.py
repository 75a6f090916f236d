# SPDX-License-Identifier: Apache-2.0
"""After SWAN: normalised and whitened updates in the subspace, without moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_galore import linalg
from lightning_galore.state_keys import BASIS, is_ours
from tests.family.common import LR, RANKS, SHAPES, STEPS, advance, furthest, gradient, made
from tests.reference import swan_reference as reference

GAP = 7
MODES: list[Any] = ["step", "project", "layerwise"]


def sgd(params: Any, **how: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, **{"lr": LR, **how})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", RANKS)
def test_it_is_the_papers_formulas_in_the_subspace(rank: int, mode: Any) -> None:
    settings = {"method": "swan", "subspace": "svd", "update_proj_gap": GAP, "mode": mode, "rank": rank, "scale": 0.5}
    model, optimizer = made(sgd, *SHAPES, **settings)
    expected = [weight.detach().clone() for weight in model.parameters()]
    for step in range(STEPS):
        advance(model, optimizer, [step])
        for weight, ours in zip(expected, model.parameters(), strict=True):
            basis = None if step % GAP == 0 else optimizer.state[ours][BASIS]
            reference.step_(weight, gradient(step, weight), rank, LR, 0.5, basis)
        assert furthest(model.parameters(), expected) < 1e-6, step


def test_no_state_but_the_basis() -> None:
    model, optimizer = made(sgd, *SHAPES, method="swan", rank=4)
    advance(model, optimizer, range(3))
    for weight in model.parameters():
        tensors = [key for key, value in optimizer.state[weight].items() if isinstance(value, torch.Tensor)]
        assert tensors == [BASIS]
        assert all(is_ours(key) or optimizer.state[weight][key] is None for key in optimizer.state[weight])
    assert optimizer.footprint().moments == optimizer.footprint().lifts == 0


@pytest.mark.parametrize("factor", [1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_size_of_a_gradient_does_not_matter(factor: float, dtype: torch.dtype) -> None:
    changes = []
    for by in (1.0, factor):
        model, optimizer = made(sgd, (12, 20), dtype=dtype, method="swan", subspace="svd", rank=4)
        (weight,) = model.parameters()
        before = weight.detach().clone()
        weight.grad = by * gradient(0, weight)
        optimizer.step()
        changes.append(weight.detach() - before)
    torch.testing.assert_close(changes[1], changes[0], rtol=1e-4, atol=1e-6)
    # Each entry of the low-rank update has a mean square of one.
    assert float(changes[0].norm()) == pytest.approx(LR * (4 * 20) ** 0.5, rel=1e-4)


def test_decay_maximize_and_learning_rate_are_those_of_the_group() -> None:
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(12, 20, dtype=torch.float64, generator=generator)
    for how, sign, rate in (({}, 1, LR), ({"maximize": True}, -1, LR), ({"lr": 0.0}, 0, 0.0), ({"lr": 0.5}, 1, 0.5)):
        model, optimizer = made(lambda p, how=how: sgd(p, **how), (12, 20), method="swan", subspace="svd", rank=4)
        (weight,) = model.parameters()
        expected = weight.detach().clone()
        weight.grad = grad.clone()
        optimizer.step()
        if sign:
            reference.step_(expected, sign * grad, 4, rate, 1.0)
        assert furthest(model.parameters(), [expected]) < 1e-10
    model, optimizer = made(lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.5), (12, 20), method="swan", rank=4)
    (weight,) = model.parameters()
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), (1 - LR * 0.5) * before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_makes_all_singular_values_one_but_those_of_noise(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in ((8, 5), (5, 40)))
    white = linalg.whitened((left @ right).to(dtype)).double()
    values = torch.linalg.svdvals(white)
    torch.testing.assert_close(values, torch.tensor([1.0] * 5 + [0.0] * 3, dtype=torch.float64), rtol=0, atol=1e-4)
    assert not bool(linalg.whitened(torch.zeros(3, 5, dtype=dtype)).any())


def test_rows_without_spread_are_zero() -> None:
    rows = torch.tensor([[0.1] * 7, [0.0] * 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]])
    standard = linalg.standardized(rows)
    assert not bool(standard[:2].any())
    torch.testing.assert_close(standard[2].double(), reference.standardized(rows[2:].double())[0], rtol=0, atol=1e-6)
    tiny = linalg.standardized(rows[2:] * 1e-30)
    torch.testing.assert_close(tiny[0], standard[2])
