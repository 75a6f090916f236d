# SPDX-License-Identifier: Apache-2.0
"""Lightning's documented behaviours on its usual tiny model, ``Linear(32, 2)``: the default strategy and ours alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, ModelCheckpoint, Timer
from lightning.pytorch.demos.boring_classes import BoringModel, ManualOptimBoringModel
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import lr_scheduler

from lightning_galore import GaLoreStrategy

from .common import MODES, hooks_on

STRATEGIES = ("auto", *MODES)
HOOKS = [
    name
    for name in dir(LightningModule)
    if name.startswith("on_") or name in ("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step", "backward")
]


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> Strategy | str:
    seed_everything(1, verbose=False)
    mode = str(request.param)
    if mode == "auto":
        return mode
    # The only weight is the output layer, which "all-linear" takes all the same here: no model calls it its head.
    return GaLoreStrategy(rank=1, mode=mode, update_proj_gap=3, target_modules=".*", scale=1.0)  # type: ignore[arg-type]


pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:mode=.(project|layerwise).. in on_(after_backward|before_optimizer_step):UserWarning"
    ),
    pytest.mark.filterwarnings("ignore:mode=.project.. in configure_gradient_clipping:UserWarning"),
]


def trainer_of(strategy: Strategy | str, folder: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "max_epochs": 1,
        "limit_train_batches": 4,
        "limit_val_batches": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(strategy=strategy, accelerator="cpu", devices=1, default_root_dir=folder, **{**quiet, **settings})


def fit(model: LightningModule, strategy: Strategy | str, folder: Path, **settings: Any) -> Trainer:
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = trainer_of(strategy, folder, **settings)
    trainer.fit(model, ckpt_path=ckpt_path)
    assert hooks_on(model) == 0
    return trainer


def recording(base: type[LightningModule]) -> Any:
    """An instance of ``base`` that keeps the names of its hooks in the order in which they are called."""

    def record(name: str) -> Any:
        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.called.append(name)
            return getattr(super(cls, self), name)(*args, **kwargs)

        return hook

    names = [name for name in HOOKS if callable(getattr(base, name)) and name not in ("on_gpu",)]
    cls = type("Recording", (base,), {name: record(name) for name in names})
    model = cls()
    model.called = []
    return model


STEP = [
    "on_before_batch_transfer",
    "on_after_batch_transfer",
    "on_train_batch_start",
    "optimizer_step",
    "on_before_zero_grad",
    "optimizer_zero_grad",
    "on_before_backward",
    "backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
]


def test_order_of_hooks_in_a_step(strategy: Strategy | str, tmp_path: Path) -> None:
    model = recording(BoringModel)
    assert is_overridden("on_before_backward", model)
    fit(model, strategy, tmp_path, limit_train_batches=2, limit_val_batches=0)
    order = [name for name in model.called if name in STEP]
    assert order == 2 * STEP
    outer = [name for name in model.called if name not in STEP]
    assert outer[:3] == ["on_fit_start", "on_train_start", "on_train_epoch_start"]
    assert outer[-3:] == ["on_train_epoch_end", "on_train_end", "on_fit_end"]
    assert "lr_scheduler_step" in outer


def test_order_of_hooks_under_accumulation(strategy: Strategy | str, tmp_path: Path) -> None:
    model = recording(BoringModel)
    fit(model, strategy, tmp_path, limit_val_batches=0, accumulate_grad_batches=2)
    batch = [name for name in STEP if "transfer" not in name]
    first = [name for name in batch if name not in ("optimizer_step", "on_before_optimizer_step")]
    second = [name for name in batch if "zero_grad" not in name]
    assert [name for name in model.called if name in batch] == 2 * (first + second)


def test_order_of_hooks_of_callbacks(strategy: Strategy | str, tmp_path: Path) -> None:
    called: list[str] = []
    names = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
    callback = LambdaCallback(**{name: lambda *args, name=name: called.append(name) for name in names})  # type: ignore[arg-type]
    fit(BoringModel(), strategy, tmp_path, callbacks=[callback])
    assert called == 4 * list(names)


def test_every_step_moves_every_parameter(strategy: Strategy | str, tmp_path: Path) -> None:
    class Watches(BoringModel):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.before = [param.detach().clone() for param in self.parameters()]

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert not any(map(torch.equal, self.before, self.parameters()))

    trainer = fit(Watches(), strategy, tmp_path, max_epochs=2, limit_train_batches=32)
    assert trainer.global_step == 64


def test_max_steps(strategy: Strategy | str, tmp_path: Path) -> None:
    assert fit(BoringModel(), strategy, tmp_path, max_steps=3, max_epochs=-1).global_step == 3


def test_fast_dev_run(strategy: Strategy | str, tmp_path: Path) -> None:
    assert fit(BoringModel(), strategy, tmp_path, fast_dev_run=2).global_step == 2


def test_scheduler_by_step_and_by_epoch(strategy: Strategy | str, tmp_path: Path) -> None:
    class Scheduled(BoringModel):
        interval = "step"

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "interval": self.interval, "frequency": 2},
            }

    trainer = fit(Scheduled(), strategy, tmp_path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.25
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_training_step_that_returns_none(strategy: Strategy | str, tmp_path: Path) -> None:
    class Skips(BoringModel):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    assert fit(Skips(), strategy, tmp_path).global_step == 4


def test_overridden_optimizer_step_may_skip(strategy: Strategy | str, tmp_path: Path) -> None:
    class EverySecond(BoringModel):
        weights: list[Tensor]

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            before = self.layer.weight.detach().clone()
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()
            assert torch.equal(before, self.layer.weight) == (batch_idx % 2 == 0)

    assert fit(EverySecond(), strategy, tmp_path).global_step == 2 * 2


def test_gradient_clipping_hook(strategy: Strategy | str, tmp_path: Path) -> None:
    class Clips(BoringModel):
        seen = 0

        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            self.seen += 1
            self.clip_gradients(optimizer, gradient_clip_val=1e-9, gradient_clip_algorithm="norm")

    model = Clips()
    before = model.layer.weight.detach().clone()
    if getattr(getattr(strategy, "config", None), "mode", "") == "layerwise":
        with pytest.raises(MisconfigurationException, match='Use mode="project"'):
            fit(model, strategy, tmp_path)
        return
    fit(model, strategy, tmp_path)
    assert model.seen == 4
    assert torch.allclose(before, model.layer.weight, rtol=0, atol=1e-8)


def test_checkpoint_and_resume(strategy: Strategy | str, tmp_path: Path) -> None:
    savers = [ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}-{step}") for _ in range(2)]
    model = BoringModel()
    trainer = fit(model, strategy, tmp_path, callbacks=savers[:1], enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    assert path.name == "epoch=0-step=4.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == trainer.global_step == 4
    assert len(saved["optimizer_states"]) == len(saved["lr_schedulers"]) == 1
    assert torch.equal(saved["state_dict"]["layer.weight"], model.layer.weight)
    other = BoringModel.load_from_checkpoint(path)
    assert torch.equal(other.layer.weight, model.layer.weight)
    settings: dict[str, Any] = {"callbacks": savers[1:], "enable_checkpointing": True, "max_epochs": 2}
    again = fit(BoringModel(), fresh(strategy), tmp_path, ckpt_path=path, **settings)
    assert (again.global_step, again.current_epoch) == (8, 2)


def fresh(strategy: Strategy | str) -> Strategy | str:
    """A strategy belongs to one Trainer."""
    if isinstance(strategy, GaLoreStrategy):
        config = strategy.config
        return GaLoreStrategy(rank=1, mode=config.mode, update_proj_gap=3, target_modules=".*", scale=1.0)
    return strategy


def test_callbacks_may_stop_a_run(strategy: Strategy | str, tmp_path: Path) -> None:
    class Logs(BoringModel):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("x", 1.0)
            return super().validation_step(batch, batch_idx)

    stopper = EarlyStopping("x", patience=1)
    trainer = fit(Logs(), strategy, tmp_path, max_epochs=10, callbacks=[stopper, Timer(duration={"minutes": 5})])
    assert (trainer.current_epoch, trainer.global_step) == (2, 8)

    class Stops(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    assert fit(BoringModel(), fresh(strategy), tmp_path, callbacks=[Stops()]).global_step == 2


def test_manual_optimization(strategy: Strategy | str, tmp_path: Path) -> None:
    model = ManualOptimBoringModel()
    before = model.layer.weight.detach().clone()
    assert fit(model, strategy, tmp_path).global_step == 4
    assert not torch.equal(before, model.layer.weight)


@pytest.mark.parametrize("settings", [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}], ids=str)
def test_manual_optimization_refuses_what_lightning_refuses(
    strategy: Strategy | str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(ManualOptimBoringModel(), strategy, tmp_path, **settings)


def test_validate_test_and_predict_need_no_optimizer(strategy: Strategy | str, tmp_path: Path) -> None:
    trainer = trainer_of(strategy, tmp_path, limit_test_batches=1, limit_predict_batches=1)
    model = BoringModel()
    before = model.layer.weight.detach().clone()
    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    assert len(trainer.predict(model) or []) == 1
    assert trainer.optimizers == []
    assert torch.equal(before, model.layer.weight)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precision(strategy: Strategy | str, precision: Any, tmp_path: Path) -> None:
    model = BoringModel()
    assert fit(model, strategy, tmp_path, precision=precision).global_step == 4
    assert model.layer.weight.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(
        precision, torch.float32
    )


def test_overfit_batches_and_detect_anomaly(strategy: Strategy | str, tmp_path: Path) -> None:
    trainer = fit(BoringModel(), strategy, tmp_path, overfit_batches=2, detect_anomaly=True, max_epochs=3)
    assert trainer.global_step == 6
