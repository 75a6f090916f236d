# SPDX-License-Identifier: Apache-2.0
"""What the Trainer does around a step, held bit by bit to a plain loop over ``GaLoreOptimizer``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer

from .modules import (
    BATCHES,
    SETTINGS,
    Tiny,
    adamw,
    assert_clean,
    assert_same_state,
    assert_same_weights,
    batches,
    fit,
    galore,
    loader,
    make_trainer,
    plain_loop,
    snapshot,
    the_optimizer,
)


def assert_equals_plain_loop(model: Tiny, optimizer: GaLoreOptimizer, reference: Tiny, **settings: Any) -> None:
    expected = plain_loop(reference, **settings)
    assert_same_weights(model, reference)
    assert_same_state(optimizer, expected)
    assert optimizer.state[model.body[0].weight]["galore_refreshes"] > 1


def test_plain_run() -> None:
    model = Tiny()
    trainer = fit(model, max_epochs=2)
    assert_equals_plain_loop(model, the_optimizer(trainer), Tiny(), data=batches(2))
    assert trainer.global_step == 12


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulate_grad_batches(accumulate: int) -> None:
    model, plain = Tiny(), Tiny()
    trainer = fit(model, max_epochs=4, accumulate_grad_batches=accumulate)
    other = fit(plain, "auto", max_epochs=4, accumulate_grad_batches=accumulate)
    assert_equals_plain_loop(model, the_optimizer(trainer), Tiny(), data=batches(4), accumulate=accumulate)
    assert model.steps == plain.steps
    assert trainer.global_step == other.global_step == 4 * -(-BATCHES // accumulate)


def test_gradient_accumulation_scheduler() -> None:
    model, plain = Tiny(), Tiny()
    fit(model, max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 2, 1: 3})])
    fit(plain, "auto", max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 2, 1: 3})])
    assert model.steps == plain.steps == [0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5]


CLIPS: dict[str, tuple[Callable[..., Any], float]] = {
    "norm": (partial(nn.utils.clip_grad_norm_, max_norm=0.2), 0.2),
    "value": (partial(nn.utils.clip_grad_value_, clip_value=0.01), 0.01),
}


@pytest.mark.parametrize("algorithm", CLIPS)
def test_gradient_clipping(algorithm: str) -> None:
    clip, value = CLIPS[algorithm]
    model, unclipped = Tiny(), Tiny()
    settings: dict[str, Any] = {"gradient_clip_val": value, "gradient_clip_algorithm": algorithm}
    trainer = fit(model, max_epochs=2, **settings)
    fit(unclipped, max_epochs=2)
    assert_equals_plain_loop(model, the_optimizer(trainer), Tiny(), data=batches(2), clip=lambda p: clip(list(p)))
    assert not torch.equal(model.body[0].weight, unclipped.body[0].weight)


@pytest.mark.parametrize(
    ("precision", "dtype", "autocast"),
    [
        ("32-true", torch.float32, None),
        ("64-true", torch.float64, None),
        ("bf16-true", torch.bfloat16, None),
        ("bf16-mixed", torch.float32, torch.bfloat16),
    ],
)
def test_precision(precision: str, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    model = Tiny()
    trainer = fit(model, max_epochs=2, precision=precision, gradient_clip_val=0.5)
    assert_equals_plain_loop(
        model,
        the_optimizer(trainer),
        Tiny().to(dtype),
        data=batches(2, dtype),
        autocast=autocast,
        clip=lambda params: nn.utils.clip_grad_norm_(list(params), 0.5),
    )
    state = the_optimizer(trainer).state[model.body[0].weight]
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "galore_basis")} == {dtype}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="16-mixed needs a GradScaler, which needs a GPU")
@pytest.mark.parametrize("fused", [False, True])
def test_half_precision_with_a_grad_scaler(fused: bool) -> None:
    def make(model: Tiny) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)

    model, exact = Tiny(make), Tiny(make)
    trainer = fit(model, max_epochs=3, precision="16-mixed", accelerator="cuda", gradient_clip_val=0.5)
    fit(exact, max_epochs=3, accelerator="cuda", gradient_clip_val=0.5)
    assert trainer.global_step == 18
    assert max(abs(a - b) for a, b in zip(model.losses, exact.losses, strict=True)) < 0.05


def test_max_steps_in_the_middle_of_an_epoch() -> None:
    model = Tiny()
    trainer = fit(model, max_epochs=-1, max_steps=8)
    assert trainer.global_step == 8
    assert_equals_plain_loop(model, the_optimizer(trainer), Tiny(), data=batches(2)[:8])


def test_second_fit_starts_over_on_the_same_trainer_and_on_a_new_one() -> None:
    model = Tiny()
    trainer = fit(model)
    first = the_optimizer(trainer)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, loader(), loader(2))
    second = the_optimizer(trainer)
    assert second is not first
    assert second.state[model.body[0].weight]["galore_step"] == BATCHES
    third = fit(model)
    reference = Tiny()
    for _ in range(3):
        expected = plain_loop(reference, data=batches())
    assert_same_weights(model, reference)
    assert_same_state(the_optimizer(third), expected)
    assert_clean(model, [second, the_optimizer(third)])


def test_second_fit_goes_on_when_the_user_keeps_the_optimizer() -> None:
    kept: list[torch.optim.Optimizer] = []

    def make(model: Tiny) -> torch.optim.Optimizer:
        kept[:] = kept or [adamw(model)]
        return kept[0]

    model, reference = Tiny(make), Tiny()
    fit(model)
    trainer = fit(model)
    assert_equals_plain_loop(model, the_optimizer(trainer), reference, data=batches(2))


def test_validate_test_and_predict_without_fit() -> None:
    model = Tiny()
    before = snapshot(model)
    trainer = make_trainer(galore())
    assert trainer.validate(model, loader(), verbose=False)[0]["val_loss"] > 0
    assert trainer.test(model, loader(), verbose=False)[0]["test_loss"] > 0
    predictions = trainer.predict(model, loader())
    assert predictions is not None
    assert len(predictions) == BATCHES
    assert trainer.optimizers == []
    assert trainer.strategy.targets_tables() == []
    assert_same_weights(model, before)
    trainer.fit(model, loader(), loader(2))
    assert_equals_plain_loop(model, the_optimizer(trainer), Tiny(), data=batches())
    assert trainer.validate(model, loader(), verbose=False)[0]["val_loss"] > 0


@pytest.mark.parametrize("flag", [{"fast_dev_run": 2}, {"overfit_batches": 2}, {"limit_train_batches": 2}])
def test_short_runs(flag: dict[str, Any]) -> None:
    model = Tiny()
    optimizer = the_optimizer(fit(model, **flag))
    reference = Tiny()
    assert_same_state(optimizer, plain_loop(reference, data=batches()[:2]))
    assert_same_weights(model, reference)


class Warmup(Tiny):
    """Overrides ``optimizer_step`` as Lightning's documentation shows: a warm-up, and one step that is skipped."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        assert isinstance(optimizer, (GaLoreOptimizer, LightningOptimizer))
        if self.trainer.global_step == 3 and batch_idx == 3:
            optimizer_closure()
            return
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (self.trainer.global_step + 1) / 4)
        optimizer.step(closure=optimizer_closure)


def test_users_optimizer_step_with_warm_up_and_a_skipped_step() -> None:
    model, plain = Warmup(), Warmup()
    trainer = fit(model)
    fit(plain, "auto")
    assert (model.lrs, model.steps) == (plain.lrs, plain.steps)
    assert model.lrs[0] == [2.5e-3] * 2
    reference = Tiny()
    optimizer = GaLoreOptimizer(adamw(reference), reference, **SETTINGS)
    for i, batch in enumerate(batches()):
        reference.loss(batch).backward()
        if i != 3:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min(1.0, (i + 1) / 4)
            optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(model, reference)
    assert_same_state(the_optimizer(trainer), optimizer)


class SkipsSome(Tiny):
    """Returns no loss for every third batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return None if batch_idx % 3 == 2 else self.loss(batch)


# Lightning says so once a process, so whichever test comes first gets to see it.
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_training_step_may_return_none() -> None:
    model, reference = SkipsSome(), Tiny()
    trainer = fit(model, max_epochs=2)
    # A batch without a loss has no gradient, so no weight moves, nothing decays and no counter advances.
    data = [batch for i, batch in enumerate(batches(2)) if i % 3 != 2]
    assert_same_state(the_optimizer(trainer), plain_loop(reference, data=data))
    assert_same_weights(model, reference)
    assert trainer.global_step == 12


def test_the_closure_runs_once_with_gradients_and_its_loss_comes_back() -> None:
    returned: list[Any] = []

    class Watches(Tiny):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
            assert torch.is_grad_enabled()
            return super().training_step(batch, batch_idx)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            returned.append(float(optimizer.step(closure=optimizer_closure)))

    model = Watches()
    fit(model)
    assert len(model.losses) == BATCHES
    assert returned == model.losses


def test_gradients_are_left_as_backward_and_clipping_made_them() -> None:
    seen: dict[str, Tensor] = {}

    class Watches(Tiny):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            seen.update({name: param.grad.clone() for name, param in self.named_parameters() if param.grad is not None})

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            for name, param in self.named_parameters():
                assert param.grad is not None
                assert torch.equal(param.grad, seen[name])

    fit(Watches())
    assert len(seen) == 8
