# SPDX-License-Identifier: Apache-2.0
"""Manual optimization in all modes: the loop that users write means what it means in mode "step"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_galore import GaLoreStrategy
from tests.helpers import max_difference
from tests.strategies.modules import Make, Tiny, adamw, assert_same_weights

from .common import BACKWARD_MODES, assert_equal_runs, full_gradients, run

FP32 = 2e-6  # where low-rank gradients are added up in another order


class Manual(Tiny):
    """One optimizer; each subclass is a way to step it."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.alive: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.losses.append(float(self.loss(batch).detach()))
        self.by_hand(batch, batch_idx)

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        raise NotImplementedError

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.alive.append(len(full_gradients(self)))

    @property
    def galore(self) -> GaLoreStrategy:
        assert isinstance(self.trainer.strategy, GaLoreStrategy)
        return self.trainer.strategy


class Plain(Manual):
    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Closure(Manual):
    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Toggled(Manual):
    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        with optimizer.toggle_model():
            self.manual_backward(self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()


class Raw(Manual):
    """Without Lightning's wrapper around the optimizer, and with a backward that Lightning does not see."""

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        self.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()


class Halves(Manual):
    """Two backwards over two forwards, and one step."""

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for _ in range(2):
            self.manual_backward(self.loss(batch) * 0.5)
        optimizer.step()


class EveryThird(Manual):
    """Gradient accumulation as Lightning's documentation shows it."""

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch) / 3)
        if (batch_idx + 1) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()


class EveryThirdDeclared(Manual):
    """The same for layerwise mode, by the strategy's or the optimizer's own ``accumulate``."""

    by = "strategy"

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch) / 3
        if (batch_idx + 1) % 3:
            with self.galore.accumulate() if self.by == "strategy" else optimizer.accumulate():
                self.manual_backward(loss)
        else:
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()


class EveryThirdByTheOptimizer(EveryThirdDeclared):
    by = "optimizer"


class EveryThirdBoth(EveryThirdDeclared):
    """Says whom a backward is for and that it is not the last: neither must undo the other."""

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        with self.galore.layerwise_updates(optimizer):
            super().by_hand(batch, batch_idx) if (batch_idx + 1) % 3 == 0 else None
        if (batch_idx + 1) % 3:
            with self.galore.accumulate(), self.galore.layerwise_updates(optimizer):
                self.manual_backward(self.loss(batch) / 3)


class Clipped(Manual):
    algorithm = "norm"

    def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm=self.algorithm)
        optimizer.step()


class ClippedByValue(Clipped):
    algorithm = "value"


def both(mode: str, model: type[Tiny]) -> Any:
    return run(mode, sgd, model=model), run("step", sgd, model=model)


def sgd(model: Tiny) -> Any:
    return torch.optim.SGD(model.parameters(), lr=3e-2, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize("model", [Plain, Closure, Toggled, Raw])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_one_optimizer(mode: str, model: type[Manual]) -> None:
    ours, reference = both(mode, model)
    assert_equal_runs(ours, reference, steps=0)
    assert ours[1].global_step == (0 if model is Raw else 24)  # Lightning counts the steps of its own wrapper
    assert_same_weights(reference[0], run("step", sgd, model=Plain)[0])


@pytest.mark.parametrize("model", [Halves, EveryThird])
def test_several_backwards_a_step_in_project_mode(model: type[Manual]) -> None:
    """Nothing has to be declared: a weight that is due keeps its gradient until ``step``."""
    assert_equal_runs(*both("project", model), tolerance=FP32, steps=8)


@pytest.mark.parametrize("model", [Halves, EveryThird])
def test_several_backwards_a_step_in_layerwise_mode_name_the_remedy(model: type[Manual]) -> None:
    with pytest.raises(RuntimeError, match=r'got a second gradient.*with accumulate\(\), or use mode="project"'):
        run("layerwise", model=model)


@pytest.mark.parametrize("model", [EveryThirdDeclared, EveryThirdByTheOptimizer, EveryThirdBoth])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_accumulation_that_is_declared(mode: str, model: type[Manual]) -> None:
    ours = run(mode, sgd, model=model)
    assert_equal_runs(ours, run("step", sgd, model=model), tolerance=FP32, steps=8)
    assert_equal_runs((ours[0], ours[1]), run("project", sgd, model=model), steps=8)


def test_clip_gradients() -> None:
    ours, reference = both("project", Clipped)
    assert_equal_runs(ours, reference, tolerance=FP32)
    assert max_difference(ours[0].parameters(), run("project", sgd, model=Plain)[0].parameters()) > 1e-3
    run("step", sgd, model=ClippedByValue)
    with pytest.raises(MisconfigurationException, match=r'"project" has only low-rank.*clip by norm, or use mode="st'):
        run("project", sgd, model=ClippedByValue)
    for model in (Clipped, ClippedByValue):
        with pytest.raises(MisconfigurationException, match=r'"layerwise" has applied and freed.*Use mode="project"'):
            run("layerwise", sgd, model=model)


def test_nothing_is_left_of_a_layerwise_step() -> None:
    model, _ = run("layerwise", model=Plain)
    assert model.alive == [0] * 24  # type: ignore[attr-defined]


def test_a_backward_that_failed_arms_nobody_afterwards() -> None:
    """A user may catch an exception (out of memory, say) and go on: in ``accumulate`` nothing moves."""

    class Recovers(Manual):
        def by_hand(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            handle = self.body[0].weight.register_hook(fail) if batch_idx == 1 else None
            try:
                self.manual_backward(self.loss(batch))
            except ArithmeticError:
                assert handle is not None
                handle.remove()
                optimizer.zero_grad()
                before = self.head.weight.detach().clone()  # its backward came first: it has moved already
                with self.galore.accumulate():
                    self.manual_backward(self.loss(batch))
                assert torch.equal(before, self.head.weight)
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()

    def fail(*args: Any) -> None:
        raise ArithmeticError

    run("layerwise", model=Recovers)
