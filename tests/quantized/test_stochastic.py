# SPDX-License-Identifier: Apache-2.0
"""``stochastic_round``: bf16 and int8 weights are right in the mean, and no update is too small to arrive."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.config import GaLoreConfig
from tests.modes.common import assert_equal_runs
from tests.modes.common import run as run_mode
from tests.modes.test_equal_weights import adafactor, coupled, sgd
from tests.strategies.modules import Make, Tiny, adamw, assert_same_weights, batches, fit, galore


class Weights(nn.Module):
    """A projected weight and one of each kind that is not: an embedding, a norm, a head."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(16, 16)
        self.body = nn.Linear(16, 32, bias=False)
        self.norm = nn.LayerNorm(32)
        self.lm_head = nn.Linear(32, 16)
        with torch.no_grad():
            for param in self.parameters():
                # Of one size, so that a bf16 step of them is known; bf16 numbers, so that both dtypes start alike.
                value = 1 + 0.9 * torch.rand(param.shape, generator=generator)
                param.copy_(value.bfloat16())
        self.to(dtype)

    def give_gradients(self, step: int, size: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for param in self.parameters():
            grad = size * (0.5 + torch.rand(param.shape, generator=generator))
            param.grad = grad.bfloat16().to(param.dtype)


def bnb(name: str, **settings: Any) -> Callable[[Any], Any]:
    def make(params: Any) -> Any:
        return getattr(pytest.importorskip("bitsandbytes").optim, name)(params, **settings)

    return make


def of(cls: type, **settings: Any) -> Callable[[Any], Any]:
    return lambda params: cls(params, **settings)


LR = 1e-3  # of weights between 1 and 2, whose bf16 neighbours are 2^-7 away: no single update survives
MAKES: dict[str, Callable[[Any], Any]] = {
    "AdamW, decoupled decay": of(torch.optim.AdamW, lr=LR, weight_decay=0.5),
    "AdamW, foreach": of(torch.optim.AdamW, lr=LR, foreach=True),
    "AdamW, maximize": of(torch.optim.AdamW, lr=LR, weight_decay=0.1, maximize=True),
    "Adam, coupled decay": of(torch.optim.Adam, lr=LR, weight_decay=0.5),
    "SGD, momentum, coupled decay": of(torch.optim.SGD, lr=LR, momentum=0.9, weight_decay=0.5),
    "SGD, coupled decay, maximize": of(torch.optim.SGD, lr=LR, weight_decay=0.1, maximize=True),
    "Adafactor": of(torch.optim.Adafactor, lr=LR, weight_decay=0.5),
    "bitsandbytes Lion": bnb("Lion", lr=LR, weight_decay=0.5),
    "bitsandbytes AdamW8bit": bnb("AdamW8bit", lr=LR, weight_decay=0.5, min_8bit_size=16),
}
SETTINGS: dict[str, Any] = {"rank": 4, "stagger": False, "scale": 1.0}


def after(dtype: torch.dtype, make: Callable[[Any], Any], steps: int = 1, **settings: Any) -> dict[str, Tensor]:
    model = Weights(dtype)
    optimizer = GaLoreOptimizer(make(model.parameters()), model, **{**SETTINGS, **settings})
    for step in range(steps):
        model.give_gradients(step)
        optimizer.step()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@pytest.mark.parametrize("dense_lr_factor", [1.0, 0.25])
@pytest.mark.parametrize("name", MAKES)
def test_one_step_is_right_in_the_mean(name: str, dense_lr_factor: float) -> None:
    """The mean over many seeds is the step in fp32, of the dense weights and of the projected one."""
    make, seeds = MAKES[name], 60
    exact = after(torch.float32, make, dense_lr_factor=dense_lr_factor)
    start = {key: param.detach() for key, param in Weights(torch.float32).named_parameters()}
    runs = [
        after(torch.bfloat16, make, dense_lr_factor=dense_lr_factor, stochastic_round=True, seed=seed)
        for seed in range(seeds)
    ]
    nearest = after(torch.bfloat16, make, dense_lr_factor=dense_lr_factor)
    for key, value in exact.items():
        change = (value - start[key]).double().mean()
        found = torch.stack([run[key].double() - start[key] for run in runs])
        # Each entry is one of two neighbours, 2^-7 apart: the variance is known, and so is how sure the mean is.
        spread = 2.0**-7 * float(change.abs() / 2.0**-7) ** 0.5
        sure = spread / (seeds * value.numel()) ** 0.5
        # A subspace of the projected weight is random, hence not quite the same one in another dtype or seed.
        slack = 0.02 * abs(float(change)) if key != "body.weight" else 0.3 * abs(float(change))
        assert abs(float(found.mean() - change)) <= 4 * sure + slack, key
        assert abs(float(change)) > 4 * sure + slack or value.numel() < 96, f"{key}: the test sees nothing"
        # Rounded to the nearest, less than half of it arrives: most entries do not move at all.
        if key not in ("body.weight", "words.weight"):
            assert abs(float((nearest[key].double() - start[key]).mean())) < 0.5 * abs(float(change)), key


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
def test_small_updates_arrive_over_many_steps(mode: str) -> None:
    """Relative updates of 1e-4, which nearest rounding loses every one of."""
    steps, lr = 300, 1e-4
    moved = {}
    for stochastic in (False, True):
        model = Weights(torch.bfloat16)
        before = {name: param.detach().double().clone() for name, param in model.named_parameters()}
        base = torch.optim.SGD(model.parameters(), lr=lr)
        settings = {**SETTINGS, "mode": mode, "stochastic_round": stochastic}
        optimizer = GaLoreOptimizer(base, model, target_modules="body", **settings)
        for _ in range(steps):
            # The gradient of each entry is one: of rank one, so projecting leaves nothing out.
            torch.stack([param.float().sum() for param in model.parameters()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[stochastic] = {
            name: float((param.detach().double() - before[name]).mean()) for name, param in model.named_parameters()
        }
    for name, change in moved[False].items():
        assert change == 0, name
        assert moved[True][name] == pytest.approx(-steps * lr, rel=0.35 if before[name].numel() < 100 else 0.15), name


@pytest.mark.parametrize("make", [adamw, coupled, sgd, adafactor], ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", ["project", "layerwise"])
def test_modes_round_alike(mode: str, make: Make) -> None:
    settings = {"stochastic_round": True}
    ours, reference = (run_mode(one, make, settings=settings, precision="bf16-true") for one in (mode, "step"))
    assert_equal_runs(ours, reference)
    assert not torch.equal(ours[0].head.weight, run_mode(mode, make, precision="bf16-true")[0].head.weight)


def test_off_by_default_for_bf16_and_on_for_int8() -> None:
    assert GaLoreConfig().stochastic_round is False
    assert GaLoreConfig(weight_storage="int8").stochastic_round is True
    assert GaLoreConfig(weight_storage="int8", stochastic_round=False).stochastic_round is False
    assert GaLoreConfig(method="q-galore").stochastic_round is True
    assert GaLoreConfig(method="q-galore", weight_storage="param").stochastic_round is True
    assert GaLoreConfig(method="galore-8bit").stochastic_round is False
    models = [Tiny() for _ in range(4)]
    for model, stochastic, seed in zip(models, (None, False, True, True), (0, 0, 0, 1), strict=True):
        fit(model, galore(stochastic_round=stochastic, seed=seed, subspace="svd"), precision="bf16-true")
    assert_same_weights(models[0], models[1])
    assert not torch.equal(models[1].head.weight, models[2].head.weight)
    assert not torch.equal(models[2].head.weight, models[3].head.weight)
    again = Tiny()
    fit(again, galore(stochastic_round=True, subspace="svd"), precision="bf16-true")
    assert_same_weights(again, models[2])


def test_small_decoupled_decay_reaches_the_weights() -> None:
    """``lr * weight_decay < 2^-9``: to the nearest, ``W * (1 - lr * wd)`` is ``W`` for ever."""
    lr, decay, steps = 1e-3, 0.5, 200
    left = {}
    for stochastic in (False, True):
        model = Weights(torch.bfloat16)
        start = {name: param.detach().double().clone() for name, param in model.named_parameters()}
        base = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)
        optimizer = GaLoreOptimizer(base, model, **SETTINGS, stochastic_round=stochastic)
        for _ in range(steps):
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
        left[stochastic] = {n: float(p.detach().double().sum() / start[n].sum()) for n, p in model.named_parameters()}
    for name, share in left[True].items():
        assert left[False][name] == 1.0, name
        assert share == pytest.approx((1 - lr * decay) ** steps, abs=0.04), name


def test_int8_weights_get_updates_smaller_than_a_code() -> None:
    moved = {}
    for stochastic in (False, True):
        model = Weights(torch.float32)
        settings: dict[str, Any] = {"weight_storage": "int8", "stochastic_round": stochastic}
        base = torch.optim.SGD(model.parameters(), lr=1e-4)
        optimizer = GaLoreOptimizer(base, model, target_modules="body", **{**SETTINGS, **settings})
        weight = model.body.weight
        before = weight.dequantize().double().mean()
        for _ in range(200):
            for param in model.parameters():
                param.grad = torch.ones(param.shape)
            optimizer.step()
        moved[stochastic] = float(weight.dequantize().double().mean() - before)
    assert moved[True] == pytest.approx(-200 * 1e-4, rel=0.15)
    assert abs(moved[False]) < 0.25 * 200 * 1e-4


# -- where there is nothing to round -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_model_without_bf16_or_int8_weights_is_warned_of(dtype: torch.dtype) -> None:
    model = Weights(dtype)
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="stochastic_round=True.*no weight is bf16 or int8"):
        GaLoreOptimizer(base, model, **SETTINGS, stochastic_round=True)


def test_a_model_with_some_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, settings in (
            (torch.bfloat16, {}),
            (torch.float32, {"weight_storage": "int8"}),
            (torch.float16, {"weight_storage": "int8"}),
        ):
            model = Weights(dtype)
            base = torch.optim.AdamW(model.parameters(), lr=1e-3)
            GaLoreOptimizer(base, model, **SETTINGS, stochastic_round=True, **settings)
        model = Weights(torch.float32)
        GaLoreOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, **SETTINGS)


def test_a_window_of_several_backwards_rounds_once() -> None:
    """Random numbers belong to a step of a weight, so a skipped batch draws none."""
    weights = []
    for skip in (False, True):
        model = Tiny().bfloat16()
        optimizer = GaLoreOptimizer(adamw(model), model, rank=3, stochastic_round=True)
        for i, batch in enumerate(batches(dtype=torch.bfloat16)):
            if skip and i == 2:
                optimizer.step()  # no gradient: nothing moves, nothing is counted
            model.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model)
    assert_same_weights(*weights)
