# SPDX-License-Identifier: Apache-2.0
"""Ranks that shrink: beside the plain formulas, resumed, in bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import GaLoreOptimizer
from lightning_galore.state_keys import BASIS, RANK
from tests.helpers import Matrices, decaying_matrix
from tests.reference.adarankgrad_reference import AdaRankGrad

from .loops import RANKS, SHAPES, assert_resume_is_exact, copied, make

SETTINGS: dict[str, Any] = {"method": "adarankgrad", "subspace": "svd", "update_proj_gap": 8, "scale": 0.5}


def falling(step: int, shape: tuple[int, int], *, back: bool = False) -> Tensor:
    """A gradient whose energy gathers in fewer directions as training goes on; with ``back``, in more again."""
    left, values, right = torch.linalg.svd(decaying_matrix(*shape, seed=step, dtype=torch.float64), full_matrices=False)
    sharpness = 0.2 + (0.0 if back and step >= 16 else 0.12 * step)
    index = torch.arange(1, values.numel() + 1, dtype=torch.float64)
    return left @ torch.diag(index**-sharpness) @ right


def go(optimizer: GaLoreOptimizer, model: Matrices, steps: range, *, back: bool = False) -> list[list[int]]:
    ranks = []
    for step in steps:
        for param in optimizer.targets:
            param.grad = falling(step, (param.shape[0], param.shape[1]), back=back).to(param.dtype)
        optimizer.step()
        ranks.append([optimizer.state[param][RANK] for param in optimizer.targets])
    return ranks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [*RANKS, 6])
def test_thirty_steps_are_those_of_the_formulas(rank: int, shape: tuple[int, int]) -> None:
    model, optimizer = make({**SETTINGS, "rank": rank, "rank_energy": 0.8}, [shape], bias=False)
    (param,) = model.parameters()
    (expected,) = copied([param])
    rule = AdaRankGrad(lr=1e-2, rank=rank, gap=8, scale=0.5, share=0.8)
    ranks = []
    for step in range(30):
        ranks += go(optimizer, model, range(step, step + 1))
        rule.apply_(expected, falling(step, shape))
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-6)
    assert [ranks[step][0] for step in (0, 8, 16, 24)] == rule.ranks
    if rank == 6:
        assert len(set(rule.ranks)) > 2
    assert optimizer.state[param]["exp_avg"].shape == optimizer.targets[param].projection.with_rank(rule.rank).low_shape


def test_ranks_never_grow_and_those_of_the_other_rule_do() -> None:
    grown = {}
    for rule in ("energy", "energy_shrink"):
        settings = {**SETTINGS, "rank": 6, "rank_rule": rule, "rank_energy": 0.8}
        model, optimizer = make(settings, [(12, 7)], bias=False)
        ranks = [one[0] for one in go(optimizer, model, range(30), back=True)]
        grown[rule] = any(after > before for before, after in zip(ranks, ranks[1:], strict=False))
        held = [value.shape for value in (optimizer.state[next(model.parameters())][BASIS],)]
        assert held == [(7, ranks[-1])]
    assert grown == {"energy": True, "energy_shrink": False}


def test_unit_vectors_that_stand_in_shrink_nothing() -> None:
    """Under a budget they are narrow; a weight's first basis may be wider, where others have left of their shares."""
    settings = {**SETTINGS, "rank": 6, "rank_energy": 0.99, "stagger": True, "refresh_share": 1e-3}
    model, optimizer = make({**settings, "state_budget": 3_600}, [(24, 17)] * 4, bias=False, dtype=torch.float32)
    ranks = []
    for step in range(16):
        for place, param in enumerate(optimizer.targets):
            param.grad = torch.randn(24, 17, generator=torch.Generator().manual_seed(step))
            if place != 3:
                param.grad = torch.outer(param.grad[:, 0], param.grad[0])
        optimizer.step()
        ranks.append([optimizer.state[param][RANK] for param in optimizer.targets])
    assert ranks[-1][:3] == [1, 1, 1]
    assert ranks[0][3] < ranks[-1][3] == 6


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
def test_a_resumed_run_ends_with_the_same_bits(mode: Any) -> None:
    for stop in (7, 8, 20):
        assert_resume_is_exact({**SETTINGS, "rank": 6, "rank_energy": 0.5, "mode": mode}, stop=stop, spikes=False)


def test_the_state_shrinks_with_the_rank() -> None:
    model, optimizer = make({**SETTINGS, "rank": 6, "rank_energy": 0.8}, bias=False)
    go(optimizer, model, range(1))
    before = optimizer.footprint()
    go(optimizer, model, range(1, 30))
    after = optimizer.footprint()
    assert after.bases < 0.5 * before.bases
    assert after.moments < 0.5 * before.moments
