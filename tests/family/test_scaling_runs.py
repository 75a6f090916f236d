# SPDX-License-Identifier: Apache-2.0
"""APOLLO and Fira in training: modes, resuming, bytes, few bits, several param groups and schedulers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.storage import Int8Tensor
from tests.helpers import TinyTransformer, language_loss, max_difference, same_bits, train
from tests.modes.common import counters, run

from .one_weight import one_weight, steps

METHODS: list[Any] = ["apollo", "apollo-mini", "q-apollo", "fira"]
BASES: dict[str, Any] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}


def start(
    method: Any, base: str = "AdamW", *, dtype: torch.dtype = torch.float32, **settings: Any
) -> tuple[TinyTransformer, GaLoreOptimizer]:
    model = TinyTransformer(dtype=dtype)
    rank = {} if method == "apollo-mini" else {"rank": 4}
    settings = {"update_proj_gap": 4, "scale": 1.0, **rank, **settings}
    return model, GaLoreOptimizer(BASES[base](model.parameters()), model, method=method, **settings)


def weights(model: nn.Module) -> list[Tensor]:
    values = [one.detach() for one in model.parameters()]
    return [one.dequantize() if isinstance(one, Int8Tensor) else one.clone() for one in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_modes_give_the_same_bits(method: str, base: str, dtype: torch.dtype) -> None:
    runs = {}
    for mode in ("step", "layerwise"):
        model, optimizer = start(method, base, dtype=dtype, mode=mode)
        losses = train(model, optimizer, range(10))
        runs[mode] = weights(model)
        fresh = weights(start(method, base, dtype=dtype)[0])
        assert all(not torch.equal(one, old) for one, old in zip(runs[mode], fresh, strict=True)), "nothing moved"
        assert all(loss == loss for loss in losses)
    assert same_bits(runs["step"], runs["layerwise"])


@pytest.mark.parametrize("method", METHODS)
def test_accumulation_is_one_large_batch(method: str) -> None:
    """The full gradient of a whole window is scaled, in mode "layerwise" too."""
    runs = []
    for mode in ("step", "layerwise"):
        model, optimizer = start(method, mode=mode)
        for step in range(8):
            optimizer.zero_grad()
            with optimizer.accumulate():
                (language_loss(model, 2 * step) / 2).backward()
            (language_loss(model, 2 * step + 1) / 2).backward()
            optimizer.step()
        runs.append(weights(model))
    assert max_difference(*runs) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["step", "layerwise"])
@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_equals_the_unbroken_one(method: str, mode: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole, optimizer = start(method, mode=mode, dtype=dtype)
    train(whole, optimizer, range(10))
    first, optimizer = start(method, mode=mode, dtype=dtype)
    train(first, optimizer, range(6))  # between two refreshes
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second, resumed = start(method, mode=mode, dtype=dtype)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for one, other in zip(first.matrices(), second.matrices(), strict=True):
        assert resumed.state[other]["galore_lift_norm"].dtype == torch.float32
        assert torch.equal(resumed.state[other]["galore_lift_norm"], optimizer.state[one]["galore_lift_norm"])
    train(second, resumed, range(6, 10))
    assert same_bits(weights(second), weights(whole))


@pytest.mark.parametrize("mode", ["step", "layerwise"])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_predicted_and_those_of_plain_arithmetic(method: str, mode: str) -> None:
    model, optimizer = start(method, mode=mode)
    predicted, table = optimizer.footprint(), optimizer.targets_table()
    train(model, optimizer, range(6))
    assert optimizer.footprint() == predicted
    assert optimizer.targets_table().taken == table.taken
    bases = moments = 0
    for weight, target in optimizer.targets.items():
        (m, n), r = target.projection.shape, target.projection.rank
        assert r == (1 if method == "apollo-mini" else 4)
        bases += 4 * min(m, n) * r if method == "fira" else 8
        # Adam's two in fp32 and its step count, and the limiter's norm.
        moments += 2 * 4 * max(m, n) * r + 4 + 4
        largest = max(value.numel() for value in optimizer.state[weight].values() if isinstance(value, Tensor))
        assert largest == max(m, n) * r  # PO-4: nothing of full size is kept
    dense = [param for param in model.parameters() if param not in optimizer.targets]
    moments += sum(2 * 4 * param.numel() + 4 for param in dense)
    assert (predicted.bases, predicted.moments + predicted.lifts) == (bases, moments)
    assert sum(status.state_bytes for status in optimizer.subspaces()) == sum(
        row.state_bytes or 0 for row in table.taken
    )


@pytest.mark.parametrize("method", METHODS)
def test_loss_falls(method: str) -> None:
    model, optimizer = start(method, update_proj_gap=10)
    losses = train(model, optimizer, [0] * 30)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_moments_at_a_refresh_are_what_the_setting_says(moments: Any) -> None:
    """AP-1: new random coordinates know nothing of the old ones, and what becomes of the moments is a choice."""
    weight, optimizer = one_weight((14, 9), method="apollo", rank=3, update_proj_gap=4, moments=moments)
    steps(weight, optimizer, range(4))
    before = {key: optimizer.state[weight][key].clone() for key in ("exp_avg", "exp_avg_sq", "step")}
    number = optimizer.state[weight]["galore_basis"]
    steps(weight, optimizer, [4])
    after = optimizer.state[weight]
    assert after["galore_basis"] != number
    drawn = torch.Generator().manual_seed(after["galore_basis"])
    basis = torch.randn(9, 3, dtype=torch.float64, generator=drawn) / 3**0.5
    low = weight.grad @ basis
    kept = 0.9 if moments == "keep" else 0.0
    torch.testing.assert_close(after["exp_avg"], kept * before["exp_avg"] + 0.1 * low)
    assert float(after["step"]) == (5 if moments == "keep" else 1)


@pytest.mark.parametrize("mode", ["step", "layerwise"])
@pytest.mark.parametrize("method", METHODS)
def test_a_scheduler_is_stepped_once_and_may_begin_at_zero(method: str, mode: str) -> None:
    """AP-5 steps twice. A warm-up that begins at zero leaves the limiter without a norm, not at a norm of zero."""
    model, optimizer = start(method, mode=mode)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    first = weights(model)
    lrs = []
    for step in range(8):
        lrs.append(optimizer.param_groups[0]["lr"])
        train(model, optimizer, [step])
        if step == 0:
            assert max_difference(first, weights(model)) <= (2e-2 if method == "q-apollo" else 0.0)
        scheduler.step()
    assert lrs == [0.0, 0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01]
    assert {optimizer.state[weight]["galore_step"] for weight in model.matrices()} == {8}
    moved = [float((one - old).abs().max()) for one, old in zip(weights(model), first, strict=True)]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_of_zero_now_and_then_stops_nothing(method: str) -> None:
    weight, optimizer = one_weight((14, 9), method=method.removeprefix("q-"), rank=3, update_proj_gap=50)
    steps(weight, optimizer, range(3))
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    before = weight.detach().clone()
    steps(weight, optimizer, [3])
    assert float((weight.detach() - before).abs().mean()) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_raises_changes_nothing(method: str) -> None:
    model, optimizer = start(method)
    train(model, optimizer, range(3))
    before, state = weights(model), copy.deepcopy([dict(optimizer.state[weight]) for weight in model.matrices()])
    optimizer.base.param_groups[0]["lr"] = "high"
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        train(model, optimizer, [3])
    assert same_bits(before, weights(model))
    for weight, old in zip(model.matrices(), state, strict=True):
        new = optimizer.state[weight]
        assert new["galore_step"] == old["galore_step"] == 3
        assert torch.equal(new["galore_lift_norm"], old["galore_lift_norm"])


@pytest.mark.parametrize("method", METHODS)
def test_under_the_trainer_modes_give_the_same_bits(method: str) -> None:
    settings = {"method": method, "rank": 1 if method == "apollo-mini" else 3}
    runs = [run(mode, settings=settings, max_epochs=2) for mode in ("step", "layerwise")]
    assert [trainer.global_step for _, trainer in runs] == [12, 12]
    assert runs[0][0].losses == runs[1][0].losses
    assert same_bits(*(weights(model) for model, _ in runs))
    states = [counters(model, trainer.optimizers) for model, trainer in runs]
    assert states[0] == states[1]
    assert {state["galore_refreshes"] for state in states[0].values()} == {3}
