# SPDX-License-Identifier: Apache-2.0
"""Runs of one and the same module in the three modes, and what must be equal between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from tests.helpers import max_difference
from tests.strategies.modules import Make, Tiny, adamw, assert_clean, galore, loader, make_trainer, snapshot

BACKWARD_MODES = ("project", "layerwise")
MODES = ("step", *BACKWARD_MODES)
SILENT: dict[str, Any] = {"limit_val_batches": 0, "num_sanity_val_steps": 0}


def run(
    mode: str,
    make: Make = adamw,
    *,
    model: Callable[[Make], Tiny] = Tiny,
    settings: dict[str, Any] | None = None,
    callbacks: Callable[[], Sequence[Callback]] = tuple,
    **trainer_settings: Any,
) -> tuple[Tiny, Trainer]:
    """Fit a new model for four epochs of six batches, or as ``trainer_settings`` say."""
    seed_everything(1, verbose=False)
    module = model(make)
    ckpt_path = trainer_settings.pop("ckpt_path", None)
    strategy = galore(mode=mode, **(settings or {}))
    trainer = make_trainer(strategy, **{**SILENT, "max_epochs": 4, "callbacks": list(callbacks()), **trainer_settings})
    trainer.fit(module, loader(), loader(1), ckpt_path=ckpt_path)
    assert_clean(module, trainer.optimizers)
    return module, trainer


def counters(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, dict[str, Any]]:
    """Every number that is kept of each projected weight: steps, refreshes, failures."""
    names = {param: name for name, param in model.named_parameters()}
    return {
        names[param]: {
            key: value for key, value in state.items() if key.startswith("galore") and isinstance(value, int)
        }
        for optimizer in optimizers
        for param, state in optimizer.state.items()
        if "galore_step" in state
    }


def assert_equal_runs(
    one: tuple[Tiny, Trainer], other: tuple[Tiny, Trainer], *, tolerance: float = 0.0, steps: int = 20
) -> float:
    """Weights, counters, learning rates and ``global_step`` of two runs are equal; returns the largest difference.

    Bit for bit where no tolerance is given.
    """
    (model, trainer), (expected, reference) = one, other
    start = snapshot(type(expected)(expected.make))
    assert trainer.global_step == reference.global_step >= steps
    assert (model.steps, model.lrs) == (expected.steps, expected.lrs)
    seen = counters(expected, reference.optimizers)
    assert counters(model, trainer.optimizers) == seen
    assert seen
    weights, wanted = snapshot(model), snapshot(expected)
    assert all(not torch.equal(wanted[name], start[name].to(wanted[name].dtype)) for name in seen), "nothing moved"
    difference = max_difference(weights.values(), wanted.values())
    if tolerance:
        assert difference <= tolerance
    else:
        unequal = [name for name, value in weights.items() if not torch.equal(value, wanted[name])]
        assert unequal == [], f"largest difference {difference:.1e}"
        assert model.losses == expected.losses
    return difference


def hooks_on(model: nn.Module) -> int:
    """Hooks that wait for gradients on a model's parameters."""
    return sum(len(param._post_accumulate_grad_hooks or ()) for param in model.parameters())


def full_gradients(model: nn.Module) -> list[str]:
    """Names of the parameters that hold a gradient now."""
    return [name for name, param in model.named_parameters() if param.grad is not None]


def projected(optimizer: GaLoreOptimizer, model: nn.Module) -> set[str]:
    """Names of the weights that an optimizer projects."""
    return {name for name, param in model.named_parameters() if param in optimizer.targets}


def rows(batch_size: int = 8, *, seed: int = 0) -> list[Tensor]:
    """One batch for :class:`Tiny` that depends on nothing but ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(batch_size, 8, generator=generator)
    return [inputs, torch.sin(inputs[:, :4] * 2)]
