# SPDX-License-Identifier: Apache-2.0
"""Manual optimization: the user's own loop inside ``training_step`` means what it means without the strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer

from .modules import (
    BATCHES,
    RANK,
    SETTINGS,
    Tiny,
    adamw,
    assert_clean,
    assert_same_state,
    assert_same_weights,
    batches,
    fit,
    plain_loop,
    the_optimizer,
)


class Manual(Tiny):
    """One optimizer, stepped by hand in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.way = way

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        if self.way == "closure":

            def closure() -> Tensor:
                loss = self.loss(batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)
        elif self.way == "halves":
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch) * 0.5)
            self.manual_backward(self.loss(batch) * 0.5)
            optimizer.step()
        elif self.way == "clip":
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
            optimizer.step()
        elif self.way == "accumulate":
            self.manual_backward(self.loss(batch) / 2)
            if batch_idx % 2:
                optimizer.step()
                optimizer.zero_grad()
        else:
            optimizer.zero_grad()
            with optimizer.toggle_model():
                self.manual_backward(self.loss(batch))
                optimizer.step()


@pytest.mark.parametrize("way", ["closure", "halves", "clip", "accumulate", "toggle"])
def test_one_optimizer(way: str) -> None:
    model, plain, reference = Manual(way), Manual(way), Tiny()
    trainer = fit(model, max_epochs=2)
    other = fit(plain, "auto", max_epochs=2)
    assert model.steps == plain.steps
    assert trainer.global_step == other.global_step == (BATCHES if way == "accumulate" else 2 * BATCHES)
    settings: dict[str, Any] = {"accumulate": 2} if way == "accumulate" else {}
    if way == "clip":
        settings["clip"] = lambda params: nn.utils.clip_grad_norm_(list(params), 0.2)
    expected = plain_loop(reference, data=batches(2), **settings)
    assert_same_weights(model, reference)
    assert_same_state(the_optimizer(trainer), expected)


class Gan(Tiny):
    """Generator and discriminator with an optimizer each; the generator's backward reaches the discriminator."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        del self.body, self.head

    def generator_loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.softplus(-self.discriminator(self.generator(batch[0]))).mean()

    def discriminator_loss(self, batch: list[Tensor]) -> Tensor:
        fake = self.discriminator(self.generator(batch[0]).detach())
        return (nn.functional.softplus(fake) + nn.functional.softplus(-self.discriminator(batch[0]))).mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer, loss in zip(self.optimizers(), (self.generator_loss, self.discriminator_loss), strict=True):
            if self.toggle:
                self.toggle_optimizer(optimizer)
                real = [param for group in optimizer.param_groups for param in group["params"]]
                assert {param for param in self.parameters() if param.requires_grad} == set(real)
            self.manual_backward(loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-2, betas=(0.5, 0.9)),
            torch.optim.AdamW(self.discriminator.parameters(), lr=5e-3),
        ]


@pytest.mark.parametrize("toggle", [False, True])
def test_gan(toggle: bool) -> None:
    model, plain, reference = Gan(toggle), Gan(toggle), Gan(toggle)
    trainer = fit(model, max_epochs=2)
    other = fit(plain, "auto", max_epochs=2)
    assert model.steps == plain.steps
    assert trainer.global_step == other.global_step == 4 * BATCHES
    first, second = (GaLoreOptimizer(one, reference, **SETTINGS) for one in reference.configure_optimizers())
    for batch in batches(2):
        for optimizer, loss in ((first, reference.generator_loss), (second, reference.discriminator_loss)):
            if toggle:
                reference.requires_grad_(False)
                for param in optimizer.param_groups[0]["params"]:
                    param.requires_grad_(True)
            loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    reference.requires_grad_(True)
    assert_same_weights(model, reference)
    for one, expected in zip(trainer.optimizers, (first, second), strict=True):
        assert_same_state(one, expected)
    assert len(trainer.optimizers) == 2
    assert_clean(model, trainer.optimizers)
    assert all(param.requires_grad for param in model.parameters())


def test_use_pl_optimizer_false_hands_out_the_wrapper() -> None:
    seen: list[Any] = []

    class Raw(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            seen.append(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    model, reference = Raw("raw"), Tiny()
    fit(model)
    assert all(isinstance(one, GaLoreOptimizer) for one in seen)
    plain_loop(reference, data=batches())
    assert_same_weights(model, reference)


def test_the_lightning_wrapper_passes_everything_through() -> None:
    """Methods called through ``self.optimizers()`` run with Lightning's wrapper as ``self``."""

    class Grows(Manual):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            if batch_idx == 2:
                optimizer.add_param_group({"params": list(self.body[2].parameters()), "lr": 5e-3})
                taken = {row.name for row in optimizer.targets_table().taken}
                assert taken == {"body.0.weight", "body.2.weight"}
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([*self.body[0].parameters(), *self.head.parameters()], lr=1e-2)

    model = Grows("grows")
    optimizer = the_optimizer(fit(model))
    assert len(optimizer.param_groups) == 2
    assert {row.name for row in optimizer.targets_table().taken} == {"body.0.weight", "body.2.weight"}
    assert optimizer.state[model.body[2].weight]["exp_avg"].shape == (RANK, 16)
    assert optimizer.state[model.body[2].weight]["galore_step"] == BATCHES - 2
    assert isinstance(optimizer, type(adamw(model)))
