# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules by name and by class, and optimizers by class."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau

from lightning_galore.named_optimizers import named_optimizer
from lightning_galore.tasks.schedules import NAMES, check_schedule, with_schedule


def module(steps: float = 10) -> Any:
    """What a schedule asks of a module: how long the run is."""
    return SimpleNamespace(trainer=SimpleNamespace(estimated_stepping_batches=steps, max_epochs=-1, max_steps=-1))


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def rates(schedule: Any, warmup_ratio: float = 0.2, steps: int = 10) -> list[float]:
    base = optimizer()
    made = with_schedule(module(steps), base, schedule, warmup_ratio=warmup_ratio, monitor="val/accuracy")
    assert made["optimizer"] is base
    assert made["lr_scheduler"]["interval"] == "step"
    seen = []
    for _ in range(steps + 1):
        seen.append(base.param_groups[0]["lr"])
        base.step()
        made["lr_scheduler"]["scheduler"].step()
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_every_name(name: str) -> None:
    pytest.importorskip("transformers")
    check_schedule(name)
    seen = rates(name)
    assert seen[2] == pytest.approx(1.0)  # the end of the warm-up, or constant from the start
    assert seen[0] == (1.0 if name == "constant" else 0.0)
    if name in ("linear", "cosine", "polynomial"):
        assert seen[-1] == pytest.approx(0.0, abs=1e-6)
        assert seen[6] == pytest.approx(0.5, abs=1e-6)


def test_any_class() -> None:
    seen = rates(partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=10))
    assert seen[5] == pytest.approx(0.5)


def test_plateau_watches_the_metric_of_the_task_after_each_epoch() -> None:
    made = with_schedule(
        module(), optimizer(), partial(ReduceLROnPlateau, monitor=""), warmup_ratio=0, monitor="val/f1"
    )
    assert (made["lr_scheduler"]["monitor"], made["lr_scheduler"]["interval"]) == ("val/f1", "epoch")


def test_a_run_without_an_end() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"lr_scheduler='linear'.*set max_epochs or max_steps"):
        with_schedule(module(math.inf), optimizer(), "linear", warmup_ratio=0.0, monitor="x")
    with_schedule(module(math.inf), optimizer(), "constant", warmup_ratio=0.0, monitor="x")


def test_a_wrong_name() -> None:
    with pytest.raises(ValueError, match="lr_scheduler='cosin' is not known. Did you mean 'cosine'"):
        check_schedule("cosin")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NAdam", {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}),
        ("radam", {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}),
        ("torch.optim.ASGD", {"lr": 0.5}),
        ("torch.optim.Adafactor", {"lr": 0.5}),  # its eps are two others
        ("torch.optim.AdamW", {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-3}),
        ("lightning_galore.named_optimizers.torch.optim.SGD", {"lr": 0.5}),
    ],
)
def test_optimizers_by_class_take_the_settings_that_they_share(name: str, expected: dict[str, Any]) -> None:
    made = named_optimizer(name, lr=0.5, betas=(0.8, 0.9), eps=1e-3)([torch.nn.Parameter(torch.zeros(2, 2))])
    assert {key: made.defaults[key] for key in expected} == expected
    if name.endswith("Adafactor"):
        assert made.defaults["eps"] != 1e-3


@pytest.mark.parametrize("name", ["torch.nn.Linear", "torch.optim.Nothing"])
def test_a_path_that_leads_to_no_optimizer(name: str) -> None:
    with pytest.raises(ValueError, match="is not the path of an optimizer's class"):
        named_optimizer(name)
