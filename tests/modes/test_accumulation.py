# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation: a weight adds up projections of gradients, where mode "step" projects the sum of gradients.

Rounding differs, and nothing else does. A basis from the first micro-batch alone would be off by more than 1e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_galore import GaLoreOptimizer
from tests.strategies.modules import RANK, SETTINGS, Make, Tiny, adamw, batches

from .common import BACKWARD_MODES, assert_equal_runs, run
from .test_equal_weights import Branches, Checkpointed, FrozenAtFirst, Tied, adafactor, both, scheduled, sgd

# Of sums in another order, after 20 steps; measured up to 3.0e-7 and 3.9e-3, on weights of about 0.5.
FP32, BF16 = 2e-6, 1e-2


@pytest.fixture(params=BACKWARD_MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def changing() -> Sequence[Callback]:
    return [GradientAccumulationScheduler({0: 1, 2: 2, 4: 3})]


# Windows of 3, 3 and of 4, 2: the last one of an epoch is not full.
@pytest.mark.parametrize(
    ("accumulate", "callbacks", "epochs"),
    [(3, tuple, 10), (4, tuple, 10), (1, changing, 8)],
    ids=["3", "4", "changing"],
)
@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", FP32), ("bf16-mixed", FP32), ("bf16-true", BF16)])
def test_accumulation(
    mode: str,
    accumulate: int,
    callbacks: Callable[[], Sequence[Callback]],
    epochs: int,
    precision: Any,
    tolerance: float,
) -> None:
    settings: dict[str, Any] = {"max_epochs": epochs, "precision": precision, "callbacks": callbacks}
    ours, reference = both(mode, scheduled, accumulate_grad_batches=accumulate, **settings)
    assert_equal_runs(ours, reference, tolerance=tolerance)


@pytest.mark.parametrize("make", [sgd, adafactor], ids=lambda make: make.__name__)
@pytest.mark.parametrize("model", [Tied, Checkpointed, Branches, FrozenAtFirst])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_accumulation_of_models(mode: str, model: type[Tiny], make: Make) -> None:
    ours, reference = both(mode, make, model=model, accumulate_grad_batches=3, max_epochs=10)
    assert_equal_runs(ours, reference, tolerance=FP32)


def test_refresh_in_every_window_is_exact(mode: str) -> None:
    """A weight that is due keeps the sum of full gradients, which is the one that mode "step" projects."""
    ours, reference = both(mode, settings={"update_proj_gap": 1}, accumulate_grad_batches=3, max_epochs=10)
    assert_equal_runs(ours, reference)


def test_both_modes_agree_under_accumulation() -> None:
    """They add up the same projections in the same order."""
    settings: dict[str, Any] = {"accumulate_grad_batches": 4, "max_epochs": 10}
    assert_equal_runs(run("project", **settings), run("layerwise", **settings))


def test_tolerance_is_far_below_a_basis_from_the_wrong_gradient() -> None:
    """What these tests must tell apart: a gap that is off by one step moves the weights this much."""
    one, other = (run("step", settings={"update_proj_gap": gap}, max_epochs=4)[0] for gap in (4, 5))
    difference = (one.body[0].weight - other.body[0].weight).abs().max()
    assert difference > 100 * FP32
    assert SETTINGS["update_proj_gap"] == 4


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_norm_after_several_gradients_is_that_of_what_is_kept(mode: str) -> None:
    """Not that of the last gradient alone, whose full norm is known too."""
    model = Tiny()
    optimizer = GaLoreOptimizer(adamw(model), model, **{**SETTINGS, "update_proj_gap": 1000, "mode": mode})
    for first, second in zip(batches()[:3], batches()[3:], strict=True):
        optimizer.zero_grad()
        expected = dict.fromkeys(model.parameters(), 0.0)
        grads = torch.autograd.grad(model.loss(first) + model.loss(second), list(model.parameters()))
        for param, grad in zip(model.parameters(), grads, strict=True):
            if param in optimizer.targets and not optimizer.is_due(param):
                unit = torch.eye(min(grad.shape), RANK)  # until its first refresh
                basis = optimizer.state.get(param, {}).get("galore_basis", unit)
                grad = grad @ basis if grad.shape[0] >= grad.shape[1] else basis.mT @ grad
            expected[param] = float(grad.square().sum())
        with optimizer.accumulate():
            model.loss(first).backward()
        model.loss(second).backward()
        assert float(optimizer.grad_norm()) == pytest.approx(sum(expected.values()) ** 0.5, rel=1e-5)
        optimizer.step()
