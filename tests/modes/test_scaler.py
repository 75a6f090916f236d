# SPDX-License-Identifier: Apache-2.0
"""A GradScaler over mode "project": an overflow skips the step and loses nothing, neither bases nor counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from tests.strategies.modules import SETTINGS, Make, Tiny, adamw, assert_same_state, assert_same_weights, batches

from .common import assert_equal_runs, counters, run

FP32 = 2e-6  # where low-rank gradients are added up in another order
FP16 = 1e-4  # the same where the forward rounds to fp16, and now and then to the next number
OVERFLOWS = (0, 4, 9, 10)  # the very first batch, and one in which a refresh is due


def plain_loop(mode: str, *, clip: float | None = None, **settings: Any) -> tuple[Tiny, GaLoreOptimizer, list[float]]:
    """What torch's AMP examples show; in mode "project" the scaler must be shown the low-rank gradients."""
    model = Tiny()
    optimizer = GaLoreOptimizer(adamw(model), model, **{**SETTINGS, "mode": mode, **settings})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6)
    scales = []
    for i, batch in enumerate(batches(4)):
        loss = model.loss(batch) * (float("inf") if i in OVERFLOWS else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        with optimizer.exposed():  # nothing to show in mode "step"
            scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_([param for group in optimizer.param_groups for param in group["params"]], clip)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return model, optimizer, scales


def test_overflow_in_a_plain_loop() -> None:
    ours, reference = plain_loop("project"), plain_loop("step")
    assert_same_weights(ours[0], reference[0])
    assert_same_state(ours[1], reference[1])
    assert ours[2] == reference[2]
    assert min(ours[2]) == 2.0**6 < max(ours[2])
    for numbers in counters(ours[0], [ours[1]]).values():
        assert numbers["galore_step"] == 24 - len(OVERFLOWS)
        assert numbers["galore_failures"] == 0
        assert numbers["galore_refreshes"] == 5


def test_overflow_and_clipping_in_a_plain_loop() -> None:
    ours, reference = plain_loop("project", clip=0.05), plain_loop("step", clip=0.05)
    for one, other in zip(ours[0].parameters(), reference[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FP32)
    assert counters(ours[0], [ours[1]]) == counters(reference[0], [reference[1]])
    free = plain_loop("step")[0]
    assert not torch.equal(free.body[0].weight, reference[0].body[0].weight)


class Overflowing(Tiny):
    """Some batches overflow, whatever the scale."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        self.losses[-1] = 0.0 if self.global_batch in OVERFLOWS else self.losses[-1]
        return loss * (float("inf") if self.global_batch in OVERFLOWS else 1.0)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        shown = [
            param
            for optimizer in self.trainer.optimizers
            for group in optimizer.param_groups
            for param in group["params"]
        ]
        assert set(shown) == set(self.parameters())  # also after a step that was skipped

    @property
    def global_batch(self) -> int:
        return len(self.losses) - 1


def fused(model: Tiny) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)


def mixed() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6))


@pytest.mark.parametrize("make", [adamw, fused], ids=lambda make: make.__name__)
@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.05}, {"accumulate_grad_batches": 2}], ids=str)
def test_overflow_under_the_trainer(make: Make, settings: dict[str, Any]) -> None:
    runs, scales = [], []
    for mode in ("project", "step"):
        plugin = mixed()
        runs.append(run(mode, make, model=Overflowing, plugins=[plugin], **settings))
        assert plugin.scaler is not None
        scales.append(plugin.scaler.get_scale())
    assert_equal_runs(*runs, tolerance=FP16 if settings else 0.0, steps=12)
    assert scales[0] == scales[1]
    for numbers in counters(runs[0][0], runs[0][1].optimizers).values():
        assert numbers["galore_step"] == (12 - 4 if "accumulate_grad_batches" in settings else 24 - len(OVERFLOWS))
        assert numbers["galore_failures"] == 0


@pytest.mark.filterwarnings("ignore:mode=.project.. in on_before_optimizer_step:UserWarning")
def test_gradients_that_a_hook_throws_away_leave_nothing() -> None:
    """The groups show proxies in this hook: none of them may be taken for a parameter."""

    class Skips(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            optimizer.zero_grad()
            assert len(optimizer._places) == len(list(self.parameters()))

    model, _ = run("project", model=Skips)
    assert_same_weights(model, Tiny())
