# SPDX-License-Identifier: Apache-2.0
"""Lightning's callbacks, and models that are not plain, against the unwrapped run or a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, callbacks, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_galore import GaLoreOptimizer

from .modules import (
    BATCHES,
    PROJECTED,
    RANK,
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


def test_model_checkpoint_writes_the_same_files(tmp_path: Path) -> None:
    names = []
    for kind, strategy in (("plain", "auto"), ("galore", galore())):
        folder = tmp_path / kind
        saver = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, save_last=True)
        fit(Tiny(), strategy, max_epochs=2, callbacks=[saver], enable_checkpointing=True)
        names.append(sorted(path.name for path in folder.iterdir()))
    assert names[0] == names[1] == ["epoch=0-step=4.ckpt", "epoch=1-step=12.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"]


def test_early_stopping_stops_at_the_same_epoch() -> None:
    stopped = []
    for strategy in ("auto", galore()):
        # No improvement is ever large enough.
        stopper = EarlyStopping("val_loss", min_delta=100.0, patience=2)
        trainer = fit(Tiny(), strategy, max_epochs=8, callbacks=[stopper])
        stopped.append((stopper.stopped_epoch, trainer.global_step))
    assert stopped[0] == stopped[1] == (2, 18)


class NotesRates(Tiny):
    """Notes the rate that each step is made with."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lrs.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(self.trainer.global_step)


def test_stochastic_weight_averaging() -> None:
    traces = []
    model = NotesRates()
    for strategy in ("auto", galore()):
        model = NotesRates()
        averaging = StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=1)
        fit(model, strategy, max_epochs=4, callbacks=[averaging])
        traces.append((model.lrs, model.steps))
    assert traces[0] == traces[1]
    assert model.lrs[-1] == [5e-3, 5e-3]
    reference = Tiny()
    optimizer = GaLoreOptimizer(adamw(reference), reference, **SETTINGS)
    averages: dict[str, Tensor] = {}
    for step, batch in enumerate(batches(4)):
        epoch, in_epoch = divmod(step, BATCHES)
        if in_epoch == 0 and epoch >= 1:  # Lightning averages at the beginning of an epoch
            for name, value in snapshot(reference).items():
                old = averages.setdefault(name, value)
                averages[name] = old + (value - old) / epoch
        for group, lr in zip(optimizer.param_groups, model.lrs[step], strict=True):
            group["lr"] = lr
        reference.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), averages[name], rtol=0, atol=1e-6)


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging")
def test_exponential_moving_average_of_the_weights() -> None:
    model = Tiny()
    fit(model, callbacks=[callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.5))])
    reference = Tiny()
    optimizer = GaLoreOptimizer(adamw(reference), reference, **SETTINGS)
    averages: dict[str, Tensor] = {}
    for batch in batches():
        reference.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in snapshot(reference).items():
            averages[name] = averages[name] * 0.5 + value * 0.5 if name in averages else value
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.detach(), averages[name], rtol=0, atol=1e-6)


class WithLr(Tiny):
    """Its learning rate is an attribute, which the finder sets."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lambda model: torch.optim.AdamW(model.parameters(), lr=model.lr))
        self.lr = lr


def test_learning_rate_finder_leaves_no_trace_but_the_rate(tmp_path: Path) -> None:
    seed_everything(1, verbose=False)
    model = WithLr()
    before = snapshot(model)
    trainer = make_trainer(galore(), default_root_dir=tmp_path)
    finder = Tuner(trainer).lr_find(
        model, loader(), loader(2), num_training=5, update_attr=False, min_lr=1e-4, max_lr=1e-1
    )
    assert finder is not None
    assert len(finder.results["loss"]) == 5
    assert finder.results["lr"][-1] > finder.results["lr"][0]
    assert_same_weights(model, before)
    assert_clean(model, trainer.optimizers)
    trainer.fit(model, loader(), loader(2))
    reference = WithLr()
    assert_same_state(the_optimizer(trainer), plain_loop(reference, data=batches()))
    assert_same_weights(model, reference)


class Unfreeze(BaseFinetuning):
    """Trains the second half, and from the second epoch on the first layer too, in a group of its own."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.body[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body[0], optimizer, lr=5e-3)


def trainable(model: Tiny) -> torch.optim.Optimizer:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)


def test_layers_that_a_finetuning_callback_unfreezes_are_projected() -> None:
    model, plain = Tiny(trainable), Tiny(trainable)
    trainer = fit(model, max_epochs=2, callbacks=[Unfreeze()])
    fit(plain, "auto", max_epochs=2, callbacks=[Unfreeze()])
    optimizer = the_optimizer(trainer)
    assert (model.lrs, model.steps) == (plain.lrs, plain.steps)
    assert model.lrs[0] == [1e-2]
    assert model.lrs[-1] == [1e-2, 5e-3]
    late = optimizer.state[model.body[0].weight]
    assert late["exp_avg"].shape == (16, RANK)
    assert late["galore_step"] == BATCHES
    assert optimizer.state[model.body[2].weight]["galore_step"] == 2 * BATCHES
    (table,) = trainer.strategy.targets_tables()
    assert {row.name for row in table.taken} == set(PROJECTED)

    reference = Tiny(trainable)
    reference.body[0].requires_grad_(False)
    expected = GaLoreOptimizer(trainable(reference), reference, **SETTINGS)
    for i, batch in enumerate(batches(2)):
        if i == BATCHES:
            reference.body[0].requires_grad_(True)
            expected.add_param_group({"params": list(reference.body[0].parameters()), "lr": 5e-3})
        reference.loss(batch).backward()
        expected.step()
        expected.zero_grad()
    assert_same_weights(model, reference)


def test_finetuning_resumes_with_the_added_group(tmp_path: Path) -> None:
    straight = Tiny(trainable)
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer = fit(straight, max_epochs=3, callbacks=[Unfreeze(), saver], enable_checkpointing=True)
    resumed = Tiny(trainable)
    # Lightning does not restore requires_grad, with or without us.
    resumed.on_train_start = lambda: resumed.requires_grad_(True)  # type: ignore[method-assign]
    saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    again = fit(
        resumed,
        max_epochs=3,
        callbacks=[Unfreeze(), saver],
        enable_checkpointing=True,
        ckpt_path=tmp_path / "epoch=1.ckpt",
    )
    assert_same_weights(resumed, straight)
    assert_same_state(the_optimizer(again), the_optimizer(trainer))


def test_frozen_weights_stay_and_take_no_state() -> None:
    model = Tiny()
    model.body[0].requires_grad_(False)
    before = snapshot(model)
    optimizer = the_optimizer(fit(model))
    assert torch.equal(model.body[0].weight, before["body.0.weight"])
    assert not optimizer.state.get(model.body[0].weight)
    assert not torch.equal(model.body[2].weight, before["body.2.weight"])
    (row,) = [row for row in optimizer.targets_table().rows if row.name == "body.0.weight"]
    assert row.reason == "(frozen for now)"


class Tied(Tiny):
    """An embedding shared with the output layer, and a weight used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.out = nn.Linear(8, 10, bias=False)
        self.out.weight = self.words.weight
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def loss(self, batch: list[Tensor]) -> Tensor:
        ids = (batch[0].abs() * 3).long().clamp(max=9)
        hidden = self.second(torch.tanh(self.first(self.words(ids))))
        return nn.functional.cross_entropy(self.out(hidden).flatten(0, 1), ids.flatten()) + super().loss(batch)


def test_tied_weights_are_one_parameter() -> None:
    model, reference = Tied(), Tied()
    optimizer = the_optimizer(fit(model, max_epochs=2))
    assert {target.name for target in optimizer.targets.values()} == {*PROJECTED, "first.weight"}
    assert optimizer.state[model.words.weight]["exp_avg"].shape == (10, 8)
    assert optimizer.state[model.first.weight]["galore_step"] == 2 * BATCHES
    assert model.out.weight is model.words.weight
    assert model.second.weight is model.first.weight
    assert_same_state(optimizer, plain_loop(reference, data=batches(2)))
    assert_same_weights(model, reference)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_submodule(backend: str) -> None:
    model, reference = Tiny(), Tiny()
    model.body = torch.compile(model.body, backend=backend)  # type: ignore[assignment]
    optimizer = the_optimizer(fit(model))
    assert {target.name for target in optimizer.targets.values()} == set(PROJECTED)
    assert_same_state(optimizer, plain_loop(reference, data=batches()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


class Late(Tiny):
    """Makes its layers in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__()
        self._late = copy.deepcopy(self.body)
        del self.body

    def configure_model(self) -> None:
        if not hasattr(self, "body"):
            self.body = self._late
            del self._late


def test_layers_made_in_configure_model() -> None:
    model, reference = Late(), Tiny()
    optimizer = the_optimizer(fit(model))
    assert {target.name for target in optimizer.targets.values()} == set(PROJECTED)
    plain_loop(reference, data=batches())
    assert_same_weights(model, reference)
