# SPDX-License-Identifier: Apache-2.0
"""GoLore: bases of the gradient first, random ones later on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_galore.state_keys import BASIS
from tests.family.common import LR, RANKS, SHAPES, STEPS, advance, furthest, gradient, made
from tests.helpers import assert_orthonormal
from tests.reference.golore_reference import GoLore

BETAS = (0.9, 0.999)
GAP, RANDOM_AFTER = 6, 14
MODES: list[Any] = ["step", "project", "layerwise"]


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, betas=BETAS, weight_decay=0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", RANKS)
def test_it_is_the_papers_algorithm(rank: int, mode: Any) -> None:
    settings = {"method": "golore", "random_after": RANDOM_AFTER, "update_proj_gap": GAP, "mode": mode, "scale": 0.5}
    model, optimizer = made(adam, *SHAPES, rank=rank, **settings)
    expected = [weight.detach().clone() for weight in model.parameters()]
    plain = [GoLore(rank=rank, lr=LR, betas=BETAS, scale=0.5) for _ in SHAPES]
    for step in range(STEPS):
        grads = [gradient(step, weight) for weight in expected]
        advance(model, optimizer, [step])
        for rule, weight, grad, ours in zip(plain, expected, grads, model.parameters(), strict=True):
            basis = optimizer.state[ours][BASIS]
            if step % GAP == 0 and step < RANDOM_AFTER:
                rule.switch_to_singular_vectors(grad)
            elif step % GAP == 0:
                assert_orthonormal(basis)
                rule.switch(basis.clone())
            rule.apply_(weight, grad)
        assert furthest(model.parameters(), expected) < 1e-6, step


def test_the_switch_comes_with_the_first_refresh_at_that_step_or_later(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch.linalg.svd
    steps = [0]
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: (calls.append(steps[0]), real(*a, **k))[1])
    model, optimizer = made(adam, (12, 20), method="golore", random_after=RANDOM_AFTER, update_proj_gap=GAP, rank=4)
    (weight,) = model.parameters()
    bases = []
    for step in range(STEPS):
        steps[0] = step
        advance(model, optimizer, [step])
        bases.append(optimizer.state[weight][BASIS].clone())
    assert calls == [0, 6, 12]  # a random basis never runs an SVD
    changes = [step for step in range(1, STEPS) if not torch.equal(bases[step], bases[step - 1])]
    assert changes == [6, 12, 18, 24]


def test_late_bases_know_nothing_of_the_gradient() -> None:
    """Two runs with other gradients draw the same ones from the switch on, and others before."""
    held = []
    for shift in (0, 50):
        model, optimizer = made(adam, (12, 20), method="golore", random_after=4, update_proj_gap=4, rank=4)
        (weight,) = model.parameters()
        bases = []
        for step in range(9):
            advance(model, optimizer, [step + shift])
            bases.append(optimizer.state[weight][BASIS].clone())
        held.append(bases)
    for step in range(9):
        assert torch.equal(held[0][step], held[1][step]) == (step >= 4)
    assert not torch.equal(held[0][4], held[0][8])


@pytest.mark.parametrize("subspace", ["randomized", "track", "columns"])
def test_any_subspace_may_become_random(subspace: Any) -> None:
    model, optimizer = made(adam, *SHAPES, subspace=subspace, random_after=3, update_proj_gap=3, stagger=False, rank=4)
    advance(model, optimizer, range(8))
    for weight in model.parameters():
        assert_orthonormal(optimizer.state[weight][BASIS])
        assert int(optimizer.state[weight]["galore_refreshes"]) == 3
