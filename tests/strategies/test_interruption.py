# SPDX-License-Identifier: Apache-2.0
"""An exception anywhere in a step leaves real parameters in the groups, whole state, and a model that trains on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from lightning_galore import GaLoreOptimizer
from lightning_galore.lift import ProjectBack

from .modules import (
    BATCHES,
    SETTINGS,
    Tiny,
    assert_clean,
    assert_same_state,
    assert_same_weights,
    batches,
    fit,
    galore,
    loader,
    make_trainer,
    plain_loop,
    the_optimizer,
)

FAILS_AT = 2  # the third batch


class BoomError(Exception):
    """What a test raises."""


class Breaks(torch.autograd.Function):
    """Raises in backward."""

    error: type[BaseException] = BoomError

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise Breaks.error("in backward")


class FailingAdamW(torch.optim.AdamW):
    """Raises in its third step, while it sees the proxies."""

    error: type[BaseException] | None = None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        output = super().step(closure)
        if self.error and any(int(state.get("step", 0)) > FAILS_AT for state in self.state.values()):
            raise self.error("in optimizer.step")
        return output


class Failing(Tiny):
    """Fails once, at a place of its choice."""

    def __init__(self, place: str, error: type[BaseException]) -> None:
        super().__init__(self._make)
        self.place, self.error = place, error
        self.armed = True

    def _make(self, model: Tiny) -> torch.optim.Optimizer:
        optimizer = FailingAdamW(model.parameters(), lr=1e-2)
        if self.armed and self.place == "base.step":
            optimizer.error = self.error
        return optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        if self.armed and batch_idx == FAILS_AT:
            if self.place == "training_step":
                raise self.error("in training_step")
            if self.place == "backward":
                Breaks.error = self.error
                assert loss is not None
                return Breaks.apply(loss)  # type: ignore[no-untyped-call, no-any-return]
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.armed and self.place == "hook" and self.trainer.global_step == FAILS_AT:
            raise self.error("in a hook")


@pytest.fixture(autouse=True)
def _interrupts_work_again() -> Iterator[None]:
    """Lightning ignores further interrupts while it shuts down, and leaves it so."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def optimizer_states_are_whole(optimizer: GaLoreOptimizer, model: Tiny) -> None:
    for param, target in optimizer.targets.items():
        state = optimizer.state[param]
        assert state["exp_avg"].shape == target.projection.low_shape
        assert state["galore_basis"].shape == target.projection.basis_shapes[0]
        assert state["galore_step"] >= FAILS_AT
    assert set(optimizer.state) == set(model.parameters())
    assert [param for group in optimizer.param_groups for param in group["params"]] == list(model.parameters())


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["training_step", "backward", "hook", "base.step"])
def test_interrupted_run_leaves_everything_usable(place: str, error: type[BaseException], tmp_path: Path) -> None:
    model = Failing(place, error)
    trainer = make_trainer(galore(), default_root_dir=tmp_path)
    # Lightning turns a keyboard interrupt into an exit.
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(model, loader(), loader(2))
    stopped = the_optimizer(trainer)
    optimizer_states_are_whole(stopped, model)
    assert_clean(model, [stopped, stopped.base])
    stopped.load_state_dict(stopped.state_dict())

    reference = Tiny(model.make)
    model.armed = False
    if place != "base.step":  # there the step is half done: the weights without a projection have moved
        plain_loop(reference, data=batches()[:FAILS_AT])
        assert_same_weights(model, reference)
    reference.load_state_dict(model.state_dict())
    model.zero_grad()
    trainer = fit(model)
    assert_same_state(the_optimizer(trainer), plain_loop(reference, data=batches()))
    assert_same_weights(model, reference)


def test_the_same_trainer_goes_on_after_an_exception() -> None:
    model = Failing("training_step", BoomError)
    trainer = make_trainer(galore(), max_epochs=3)
    with pytest.raises(BoomError):
        trainer.fit(model, loader(), loader(2))
    model.armed = False
    trainer.fit(model, loader(), loader(2))
    assert_clean(model, trainer.optimizers)


def test_an_exception_in_the_lift_leaves_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise BoomError

    model = Tiny()
    trainer = make_trainer(galore())
    monkeypatch.setattr(ProjectBack, "apply_", fail)
    with pytest.raises(BoomError):
        trainer.fit(model, loader(), loader(2))
    monkeypatch.undo()
    assert_clean(model, trainer.optimizers)
    assert fit(model).global_step == BATCHES


def test_a_checkpoint_saved_on_an_exception_can_be_resumed(tmp_path: Path) -> None:
    """Lightning's ``OnExceptionCheckpoint`` saves in the middle of an epoch; the state in it is whole."""

    class SaveOnException(Callback):
        def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "exception.ckpt")

    model = Failing("base.step", BoomError)
    with pytest.raises(BoomError):
        make_trainer(galore(), callbacks=[SaveOnException()]).fit(model, loader(), loader(2))
    again = Tiny(Failing("none", BoomError).make)
    optimizer = GaLoreOptimizer(again.make(again), again, **SETTINGS)
    saved = torch.load(tmp_path / "exception.ckpt", weights_only=True)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    optimizer_states_are_whole(optimizer, again)

    steps = torch.optim.AdamW.step, torch.optim.Optimizer.step
    model = Tiny()
    attributes = set(vars(model)) | {"_trainer"}
    saver = ModelCheckpoint(tmp_path)
    trainer = fit(model, callbacks=[saver], enable_checkpointing=True)
    optimizer = the_optimizer(trainer)
    assert_clean(model, [optimizer, optimizer.base])
    assert (torch.optim.AdamW.step, torch.optim.Optimizer.step) == steps
    assert type(optimizer.base) is torch.optim.AdamW
    assert not optimizer.base._optimizer_step_pre_hooks
    assert not optimizer.base._optimizer_step_post_hooks
    left = {name for name in set(vars(model)) - attributes if "galore" in name.lower()}
    assert not left
