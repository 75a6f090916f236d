# SPDX-License-Identifier: Apache-2.0
"""FRUGAL: the formulas of the paper on every choice of a subspace, and the faults of its own code (FR-1, FR-2)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.state_keys import BASIS
from tests.family.common import LR, RANKS, SHAPES, STEPS, advance, backward, furthest, gradient, made
from tests.helpers import same_bits
from tests.reference.frugal_reference import Frugal, singular_basis, unit_basis

BETAS = (0.9, 0.999)
GAP = 7
MODES: list[Any] = ["step", "layerwise"]
CHOICES: list[Any] = ["svd", "random_orthonormal", "coordinates", "block"]


def adam(params: Any, *, decoupled: bool = True, decay: float = 0.0, ascends: bool = False) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(params, lr=LR, betas=BETAS, weight_decay=decay, maximize=ascends)


def basis_of(optimizer: GaLoreOptimizer, weight: Tensor, choice: str) -> Tensor:
    """What the reference takes: its own singular vectors, or what was drawn, checked for what it should be."""
    basis: Tensor = optimizer.state[weight][BASIS]
    if choice in ("coordinates", "block"):
        chosen = basis.argmax(0).tolist()
        assert torch.equal(basis, unit_basis(chosen, len(basis)))
        assert len(set(chosen)) == len(chosen)
        if choice == "block":
            assert chosen == list(range(chosen[0], chosen[0] + len(chosen)))
    return basis.clone()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(
    "how",
    [{}, {"decoupled": 0.1}, {"coupled": 0.1}, {"factor": 0.1, "scale": 0.5}, {"ascends": True, "coupled": 0.1}],
    ids=str,
)
def test_it_is_the_papers_algorithm(how: dict[str, Any], choice: Any, rank: int, mode: Any) -> None:
    decay = how.get("decoupled", how.get("coupled", 0.0))
    model, optimizer = made(
        lambda params: adam(params, decoupled="coupled" not in how, decay=decay, ascends=how.get("ascends", False)),
        *SHAPES,
        method="frugal",
        subspace=choice,
        rank=rank,
        mode=mode,
        update_proj_gap=GAP,
        residual_scale=how.get("factor", 1.0),
        scale=how.get("scale"),
    )
    expected = [weight.detach().clone() for weight in model.parameters()]
    plain = [Frugal(lr=LR, betas=BETAS, **how) for _ in SHAPES]
    for step in range(STEPS):
        grads = [gradient(step, weight) for weight in expected]
        advance(model, optimizer, [step])
        for rule, weight, grad, ours in zip(plain, expected, grads, model.parameters(), strict=True):
            if step % GAP == 0:
                wide = grad.T if weight.shape[0] >= weight.shape[1] else grad
                rule.switch(singular_basis(wide, rank) if choice == "svd" else basis_of(optimizer, ours, choice))
            rule.apply_(weight, grad)
        assert furthest(model.parameters(), expected) < 1e-6, step


@pytest.mark.parametrize("choice", ["coordinates", "block"])
def test_choices_change_at_each_switch_and_reach_every_row(choice: Any) -> None:
    model, optimizer = made(adam, (12, 20), method="frugal", subspace=choice, rank=5, update_proj_gap=1)
    (weight,) = model.parameters()
    seen = set()
    for step in range(40):
        advance(model, optimizer, [step])
        seen.add(tuple(optimizer.state[weight][BASIS].argmax(0).tolist()))
    assert {row for chosen in seen for row in chosen} == set(range(12))
    assert seen <= {(0, 1, 2, 3, 4), (5, 6, 7, 8, 9), (7, 8, 9, 10, 11)} if choice == "block" else len(seen) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("choice", ["coordinates", "block"])
@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_chosen_rows_get_no_sign(choice: Any, dtype: torch.dtype, decay: float, clip: float | None) -> None:
    """With a learning rate factor of 1000 any sign of a rounding error in them would show."""

    def coupled(params: Any) -> torch.optim.Optimizer:
        return adam(params, decoupled=False, decay=decay)

    model, optimizer = made(
        coupled,
        (64, 96),
        dtype=dtype,
        method="frugal",
        subspace=choice,
        rank=16,
        residual_scale=1000.0,
        clip_weight_norm=clip,
    )
    (weight,) = model.parameters()
    before = weight.detach().clone()
    advance(model, optimizer, [0])
    chosen = optimizer.state[weight][BASIS].argmax(0)
    moved = (weight.detach() - before).abs().amax(1)
    others = torch.ones(64, dtype=torch.bool)
    others[chosen] = False
    assert float(moved[chosen].max()) < 2 * LR + 0.02
    assert float(moved[others].min()) > 500 * LR


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
def test_a_gradient_inside_the_subspace_moves_nothing_outside(dtype: torch.dtype, proj_type: Any) -> None:
    """Signs of rounding errors are no directions: here all of the residual is made of them."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(48, 80, dtype=dtype))
    left, right = (torch.randn(size, generator=generator).to(dtype) for size in ((48, 4), (4, 80)))
    optimizer = GaLoreOptimizer(
        adam([{"params": [weight], "rank": 8}]), method="frugal", subspace="svd", residual_scale=1000.0,
        proj_type=proj_type, rank=8,
    )  # fmt: skip
    weight.grad = left @ right
    optimizer.step()
    assert 0 < float(weight.detach().abs().max()) < 10 * LR


def test_statistics_begin_anew_at_each_switch() -> None:
    """The first step in a subspace is Adam's first: each coordinate moves by the learning rate, whatever was before."""
    model, optimizer = made(adam, (12, 20), method="frugal", rank=4, update_proj_gap=5)
    (weight,) = model.parameters()
    advance(model, optimizer, range(10))
    before = weight.detach().clone()
    advance(model, optimizer, [10])
    chosen = optimizer.state[weight][BASIS].argmax(0)
    torch.testing.assert_close(
        (weight.detach() - before)[chosen].abs(), torch.full((4, 20), LR, dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert float(optimizer.state[weight]["step"]) == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_plain_closure_gets_gradients(mode: Any) -> None:
    """FR-1: the closure runs with gradients enabled."""
    model, optimizer = made(adam, *SHAPES, method="frugal", rank=4, mode=mode)
    other, twin = made(adam, *SHAPES, method="frugal", rank=4, mode=mode)

    def closure() -> float:
        optimizer.zero_grad()
        backward(model, 0)
        return 1.0

    assert optimizer.step(closure) == 1.0
    advance(other, twin, [0])
    assert same_bits(model.parameters(), other.parameters())


def test_a_missing_gradient_at_a_switch_is_no_failure() -> None:
    """FR-2: the weight without one keeps its basis until it has one."""
    model, optimizer = made(adam, *SHAPES, method="frugal", rank=4, update_proj_gap=2)
    advance(model, optimizer, range(2))
    first, *others = model.parameters()
    bases = [optimizer.state[weight][BASIS].clone() for weight in (first, *others)]
    before = first.detach().clone()
    optimizer.zero_grad()
    backward(model, 2)
    first.grad = None
    optimizer.step()
    assert torch.equal(first, before)
    assert torch.equal(optimizer.state[first][BASIS], bases[0])
    assert all(not torch.equal(optimizer.state[w][BASIS], b) for w, b in zip(others, bases[1:], strict=True))
    advance(model, optimizer, [3])
    assert not torch.equal(optimizer.state[first][BASIS], bases[0])


def test_bf16_weights_are_rounded_once() -> None:
    model, optimizer = made(adam, (64, 96), dtype=torch.bfloat16, method="frugal", rank=16)
    (weight,) = model.parameters()
    exact = weight.detach().double()
    optimizer.zero_grad()
    backward(model, 0)
    grad = weight.grad.double()
    optimizer.step()
    rule = Frugal(lr=LR, betas=BETAS)
    rule.switch(optimizer.state[weight][BASIS].double())
    rule.apply_(exact, grad)
    assert float((weight.detach() == exact.bfloat16()).double().mean()) > 0.99


def test_density_is_a_fraction_of_the_rank() -> None:
    _, optimizer = made(adam, *SHAPES, method="frugal", rank=0.25)
    assert [target.projection.rank for target in optimizer.targets.values()] == [3, 3, 3]
