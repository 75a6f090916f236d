# SPDX-License-Identifier: Apache-2.0
"""Manual optimization with several optimizers, whose backwards reach each other's weights: a GAN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from tests.strategies.modules import Make, Tiny, adamw, assert_same_weights

from .common import BACKWARD_MODES, assert_equal_runs, run
from .test_manual import Manual


class Gan(Manual):
    """The generator's loss reaches the discriminator, and the discriminator's, not detached, the generator."""

    way = "plain"

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.judge = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1))
        self.norms: list[float] = []

    def generator_loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.softplus(-self.judge(self(batch[0]))).mean()

    def judge_loss(self, batch: list[Tensor]) -> Tensor:
        fake, real = self.judge(self(batch[0])), self.judge(batch[1])
        return (nn.functional.softplus(fake) + nn.functional.softplus(-real)).mean()

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        pairs = zip(self.optimizers(), (self.generator_loss, self.judge_loss), strict=True)  # type: ignore[arg-type]
        for optimizer, loss in pairs:
            self.update(optimizer, lambda loss=loss: loss(batch))

    def update(self, optimizer: Any, loss: Any) -> None:
        optimizer.zero_grad()
        if self.way == "plain":
            self.manual_backward(loss())
            optimizer.step()
        elif self.way == "declared":
            with self.galore.layerwise_updates(optimizer):
                self.manual_backward(loss())
            optimizer.step()
        elif self.way == "toggled":
            self.toggle_optimizer(optimizer)
            self.manual_backward(loss())
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        else:

            def closure() -> None:
                optimizer.zero_grad()
                self.manual_backward(loss())

            optimizer.step(closure=closure)

    def configure_optimizers(self) -> Any:
        own = [*self.body.parameters(), *self.head.parameters()]
        return torch.optim.AdamW(own, lr=1e-2), torch.optim.AdamW(self.judge.parameters(), lr=5e-3)


class DeclaredGan(Gan):
    way = "declared"


class ToggledGan(Gan):
    way = "toggled"


class ClosureGan(Gan):
    way = "closure"


@pytest.mark.parametrize("model", [DeclaredGan, ToggledGan, ClosureGan])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_gan(mode: str, model: type[Gan]) -> None:
    ours = run(mode, model=model)
    assert_equal_runs(ours, run("step", model=model), steps=48)
    assert_same_weights(ours[0], run("step", model=Gan)[0])


def test_plain_gan_in_project_mode() -> None:
    assert_equal_runs(run("project", model=Gan), run("step", model=Gan), steps=48)


def test_plain_gan_in_layerwise_mode_names_the_remedies() -> None:
    with pytest.raises(MisconfigurationException) as refused:
        run("layerwise", model=Gan)
    for remedy in ("2 optimizers", "layerwise_updates(optimizer)", "toggle_optimizer", "closure", 'mode="project"'):
        assert remedy in str(refused.value)


class SmallJudge(Gan):
    """The second optimizer has nothing to project and stays as it is, but a backward for it is not for the first."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.judge = nn.Sequential(nn.Linear(4, 1))  # type: ignore[assignment]


class DeclaredSmallJudge(SmallJudge):
    way = "declared"


class ToggledSmallJudge(SmallJudge):
    way = "toggled"


class ClosureSmallJudge(SmallJudge):
    way = "closure"


@pytest.mark.filterwarnings("ignore:One of the optimizers has no weight to project:UserWarning")
@pytest.mark.filterwarnings("ignore:rank=3. 1 selected weights are no larger:UserWarning")
@pytest.mark.parametrize("model", [DeclaredSmallJudge, ToggledSmallJudge, ClosureSmallJudge])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_an_optimizer_that_is_not_wrapped_counts_too(mode: str, model: type[Gan]) -> None:
    ours: tuple[Tiny, Trainer] = run(mode, model=model)
    assert_equal_runs(ours, run("step", model=model), steps=48)


@pytest.mark.filterwarnings("ignore:One of the optimizers has no weight to project:UserWarning")
def test_a_backward_for_an_optimizer_that_is_not_wrapped_must_be_declared() -> None:
    with pytest.raises(MisconfigurationException, match="2 optimizers"):
        run("layerwise", model=SmallJudge)
