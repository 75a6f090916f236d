# SPDX-License-Identifier: Apache-2.0
"""APOLLO, APOLLO-Mini and Fira against their papers' formulas, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import GaLoreConfig, GaLoreOptimizer
from lightning_galore.state_keys import BASIS
from tests.reference.galore_reference import Adam, Momentum
from tests.reference.scaling_reference import Scaling, gaussian, singular_vectors

from .one_weight import SHAPES, Base, gradient, one_weight

GAP, STEPS, LR = 7, 30, 0.02
KINDS = {"apollo": "channel", "apollo-svd": "channel", "apollo-mini": "tensor", "fira": "residual"}
SINGULAR = ("apollo-svd", "fira")  # bases of the gradient's singular vectors
BASES: dict[str, tuple[Base, Any, dict[str, float]]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.1), Adam(lr=LR), {"decoupled": 0.1}),
    "Adam": (lambda p: torch.optim.Adam(p, lr=LR, weight_decay=0.1), Adam(lr=LR), {"coupled": 0.1}),
    "SGD": (lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9), Momentum(lr=LR), {}),
}


def referred(method: str, optimizer: GaLoreOptimizer, weight: Tensor, base: str, *, rank: int, scale: float) -> Scaling:
    """The plain formulas with the same settings; of random bases it gets the number that the state holds."""

    def basis(grad: Tensor) -> Tensor:
        if method in SINGULAR:
            return singular_vectors(grad, rank)
        return gaussian(optimizer.state[weight][BASIS], grad.shape[0], rank)

    _, rule, decay = BASES[base]
    return Scaling(rule=rule, kind=KINDS[method], rank=rank, scale=scale, basis=basis, gap=GAP, **decay)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", KINDS)
def test_weights_are_those_of_the_formulas(method: str, shape: tuple[int, int], rank: int, base: str) -> None:
    scale = GaLoreConfig(method=method).factor  # type: ignore[arg-type]
    weight, optimizer = one_weight(shape, BASES[base][0], method=method, rank=rank, update_proj_gap=GAP)
    expected = weight.detach().clone()
    plain = referred(method, optimizer, weight, base, rank=rank, scale=scale)
    start, numbers = expected.clone(), []
    for step in range(STEPS):
        grad = gradient(shape, step)
        weight.grad = grad.clone()
        optimizer.step()
        numbers.append(optimizer.state[weight][BASIS])
        plain.apply_(expected, grad)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)
        assert optimizer.state[weight]["galore_lift_norm"].item() == pytest.approx(plain.limiter.norms[-1], rel=1e-5)
    assert float((expected - start).abs().max()) > 0.05
    # It had something to limit, and not always, but where momentum adds up.
    assert 3 <= len(plain.limiter.limited) < STEPS - (base != "SGD")
    refreshes = [step for step in range(STEPS) if step == 0 or numbers[step] is not numbers[step - 1]]
    assert refreshes == list(range(0, STEPS, GAP))


@pytest.mark.parametrize("method", KINDS)
def test_presets_have_the_papers_scale_and_rank(method: Any) -> None:
    config = GaLoreConfig(method=method)
    expected = {"apollo": (128, 1.0), "apollo-svd": (128, 1.0), "apollo-mini": (1, 128**0.5), "fira": (128, 0.25)}
    assert (config.rank, config.scale) == expected[method]
    assert (config.schedule, config.stagger, config.moments, config.gap) == ("fixed", False, "keep", 200)


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_settings_of_a_param_group_win(method: str, shape: tuple[int, int]) -> None:
    """Rank, scale, gap and side by the keys of galore-torch; ``rank = min(m, n)`` leaves no residual (PO-3)."""

    def grouped(params: Any) -> torch.optim.Optimizer:
        keys = {"rank": min(shape), "scale": 0.5, "update_proj_gap": 3}
        return torch.optim.AdamW([{"params": list(params), **keys}], lr=LR, weight_decay=0.1)

    weight, optimizer = one_weight(shape, grouped, method=method, rank=2, update_proj_gap=50)
    expected = weight.detach().clone()
    plain = referred(method, optimizer, weight, "AdamW", rank=min(shape), scale=0.5)
    plain.gap = 3
    for step in range(10):
        weight.grad = gradient(shape, step)
        optimizer.step()
        plain.apply_(expected, gradient(shape, step))
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)
    if method == "fira":
        assert max(plain.limiter.norms) < 1e-12
