# SPDX-License-Identifier: Apache-2.0
"""LR schedulers on either object, and the learning rate of the weights that are not projected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR

from tests.helpers import TinyTransformer, train
from tests.test_optimizer_behaviour import start


@pytest.mark.parametrize("on", ["base", "wrapper"])
@pytest.mark.parametrize("kind", ["step", "lambda", "onecycle"])
def test_schedulers_on_either_object_do_the_same_and_warn_of_nothing(on: str, kind: str) -> None:
    model, optimizer, base = start()
    target = base if on == "base" else optimizer
    scheduler: Any = {
        "step": lambda: StepLR(target, 2, gamma=0.5),
        "lambda": lambda: LambdaLR(target, lambda step: 1 / (1 + step)),
        "onecycle": lambda: OneCycleLR(target, 0.1, total_steps=10),
    }[kind]()
    rates = []
    for step in range(5):
        train(model, optimizer, [step])
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [base.param_groups[0]["lr"] if i == 4 else rate for i, rate in enumerate(rates)]
    assert len(set(rates)) >= 3

    bare = TinyTransformer()
    plain = torch.optim.AdamW(bare.parameters(), lr=0.01)
    other: Any = {
        "step": lambda: StepLR(plain, 2, gamma=0.5),
        "lambda": lambda: LambdaLR(plain, lambda step: 1 / (1 + step)),
        "onecycle": lambda: OneCycleLR(plain, 0.1, total_steps=10),
    }[kind]()
    expected = []
    for step in range(5):
        train(bare, plain, [step])
        other.step()
        expected.append(plain.param_groups[0]["lr"])
    assert rates == expected


@pytest.mark.parametrize("factor", [0.25, 3.0])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_dense_lr_factor_reaches_dense_weights_only(name: str, factor: float) -> None:
    model, optimizer, base = start(name, dense_lr_factor=factor)
    plain, plain_optimizer, _ = start(name)
    bare = TinyTransformer()
    train(model, optimizer, [0])
    train(plain, plain_optimizer, [0])
    train(bare, getattr(torch.optim, name)(bare.parameters(), lr=0.01 * factor), [0])
    projected = {id(weight) for weight in model.matrices()}
    for ours, same_lr, other_lr in zip(model.parameters(), plain.parameters(), bare.parameters(), strict=True):
        assert torch.equal(ours, same_lr if id(ours) in projected else other_lr)
    assert len(base.param_groups) == 1
    assert base.param_groups[0]["lr"] == 0.01
    assert len(base.param_groups[0]["params"]) == len(list(model.parameters()))
