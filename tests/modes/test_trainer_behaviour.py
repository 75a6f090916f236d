# SPDX-License-Identifier: Apache-2.0
"""What the Trainer counts, logs, saves and stops is the same in every mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, callbacks, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import get_ema_avg_fn

from lightning_galore import GaLoreOptimizer
from lightning_galore.callbacks import GradNormMonitor
from tests.helpers import max_difference
from tests.strategies.modules import (
    PROJECTED,
    SETTINGS,
    DictLogger,
    Make,
    Tiny,
    adamw,
    assert_clean,
    assert_same_weights,
    batches,
    expect_warning,
    galore,
    loader,
    make_trainer,
    snapshot,
)

from .common import BACKWARD_MODES, MODES, SILENT, assert_equal_runs, hooks_on, run
from .test_several_optimizers import DeclaredGan

FP32 = 2e-6


class Diary(Tiny):
    """Counts what the Trainer tells it, and sums the squares of all gradients by itself."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.zero_grads: list[int] = []
        self.progress: list[tuple[int, int, int]] = []

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        self.zero_grads.append(self.trainer.global_step)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        step = self.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        self.progress.append((step.ready, step.completed, self.trainer.fit_loop.epoch_loop.batch_idx))


def plateau(model: Tiny) -> Any:
    optimizer = adamw(model)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_counts_names_and_logs(mode: str, accumulate: int, tmp_path: Path) -> None:
    found = {}
    for each in ("step", mode):
        logger = DictLogger()
        saver = ModelCheckpoint(tmp_path / each, every_n_train_steps=4, save_top_k=-1)
        stopper = EarlyStopping("loss", patience=0, min_delta=10.0, check_on_train_epoch_end=True)
        model, trainer = run(
            each,
            plateau,
            model=Diary,
            callbacks=lambda: [LearningRateMonitor("step"), saver, stopper],  # noqa: B023
            max_epochs=8,
            accumulate_grad_batches=accumulate,
            enable_checkpointing=True,
            logger=logger,
            log_every_n_steps=1,
        )
        assert isinstance(model, Diary)
        rates = [(step, values) for step, values in logger.metrics if any(key.startswith("lr-") for key in values)]
        names = sorted(path.name for path in (tmp_path / each).iterdir())
        stopped = stopper.stopped_epoch, trainer.current_epoch
        found[each] = (trainer.global_step, model.zero_grads, model.progress, model.steps, rates, names, stopped)
    assert found[mode] == found["step"]
    steps, zero_grads, progress, _, rates, names, stopped = found[mode]
    assert len(zero_grads) == len(progress) if accumulate == 1 else 2 * stopped[1]
    assert rates
    assert any("lr-AdamW/decay" in values for _, values in rates)
    assert stopped[1] < 8
    in_epoch = steps // stopped[1]
    assert names == sorted(f"epoch={(step - 1) // in_epoch}-step={step}.ckpt" for step in range(4, steps + 1, 4))


def averaging() -> list[Callback]:
    return [StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=1)]


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_stochastic_weight_averaging(mode: str) -> None:
    runs = [run(each, callbacks=averaging, max_epochs=5) for each in (mode, "step")]
    assert_equal_runs(*runs)
    assert not torch.equal(runs[0][0].body[0].weight, run(mode, max_epochs=5)[0].body[0].weight)


class BatchNormed(Tiny):
    """Averaging its weights takes one more epoch, without backward, for the statistics."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.body.append(nn.BatchNorm1d(12))


def test_stochastic_weight_averaging_with_batch_norm_takes_no_stale_step() -> None:
    """Lightning calls ``step`` once more after that epoch, on the gradients that are left, which spoils the average.

    In mode "step" all are left, as without us; in mode "project" those of the weights that are not projected.
    """
    runs = {mode: run(mode, callbacks=averaging, max_epochs=5, model=BatchNormed) for mode in MODES}
    for name in PROJECTED:
        assert torch.equal(runs["project"][0].get_parameter(name), runs["layerwise"][0].get_parameter(name))
    steps = {mode: run[1].optimizers[0].state[run[0].body[0].weight]["galore_step"] for mode, run in runs.items()}
    assert steps == {"step": 31, "project": 30, "layerwise": 30}


@pytest.mark.skipif(not hasattr(callbacks, "WeightAveraging"), reason="this Lightning has no WeightAveraging")
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_exponential_moving_average(mode: str) -> None:
    def moving() -> list[Callback]:
        return [callbacks.WeightAveraging(avg_fn=get_ema_avg_fn(0.5))]

    runs = [run(each, callbacks=moving) for each in (mode, "step")]
    assert_equal_runs(*runs)
    assert not torch.equal(runs[0][0].body[0].weight, run(mode)[0].body[0].weight)


class WithLr(Tiny):
    """Its learning rate is an attribute, which the finder sets."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(lambda model: torch.optim.AdamW(model.parameters(), lr=model.lr))  # type: ignore[arg-type, attr-defined]
        self.lr = 1e-2


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_learning_rate_finder(mode: str, tmp_path: Path) -> None:
    found = []
    for each in (mode, "step"):
        seed_everything(1, verbose=False)
        model = WithLr()
        before = snapshot(model)
        trainer = make_trainer(galore(mode=each), default_root_dir=tmp_path)
        finder = Tuner(trainer).lr_find(model, loader(), loader(1), num_training=8, min_lr=1e-4, max_lr=1e-1)
        assert finder is not None
        assert_same_weights(model, before)
        assert_clean(model, trainer.optimizers)
        trainer.fit(model, loader(), loader(1))
        assert hooks_on(model) == 0
        found.append((finder.results, model.lr, snapshot(model)))
    assert found[0][:2] == found[1][:2]
    assert_same_weights(model, found[0][2])


def test_three_fits_in_a_row_leave_no_hooks() -> None:
    seed_everything(1, verbose=False)
    model, trainer = run("layerwise")
    for epochs in (5, 6):
        trainer.fit_loop.max_epochs = epochs
        trainer.fit(model, loader(), loader(1))
        assert hooks_on(model) == 0
    assert trainer.global_step == 36
    trainer.validate(model, loader(1), verbose=False)
    trainer.predict(model, loader(1))
    assert hooks_on(model) == 0


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_the_users_own_wrapper_is_hooked_again_in_a_second_run(mode: str) -> None:
    class Keeps(Tiny):
        """Makes its optimizer once."""

        optimizer: GaLoreOptimizer | None = None
        alive: list[int]

        def configure_optimizers(self) -> Any:
            self.alive = []
            self.optimizer = self.optimizer or GaLoreOptimizer(adamw(self), self, **SETTINGS, mode=mode)
            return self.optimizer

        def on_after_backward(self) -> None:
            self.alive.append(sum(self.body[i].weight.grad is not None for i in (0, 2)))

    seed_everything(1, verbose=False)
    model = Keeps()
    for _ in range(2):
        with expect_warning(f"mode='{mode}': in on_after_backward"):
            make_trainer(galore(mode=mode), **SILENT).fit(model, loader(), loader(1))
        assert model.alive == [0] * 6
        assert hooks_on(model) == 0


# -- norms -------------------------------------------------------------------------------------------------------------


def true_norms(epochs: int) -> list[float]:
    """Of the gradients of each step, as anyone would compute them."""
    model, norms = Tiny(), []
    optimizer = GaLoreOptimizer(adamw(model), model, **SETTINGS)
    for batch in batches(epochs):
        optimizer.zero_grad()
        model.loss(batch).backward()
        grads = [param.grad.double().flatten() for param in model.parameters() if param.grad is not None]
        norms.append(float(torch.cat(grads).norm()))
        optimizer.step()
    return norms


@pytest.mark.parametrize("mode", MODES)
def test_grad_norm_is_the_true_one(mode: str) -> None:
    logger = DictLogger()
    run(mode, callbacks=lambda: [GradNormMonitor()], logger=logger, log_every_n_steps=1)
    logged = [values["galore/grad_norm"] for _, values in logger.metrics if "galore/grad_norm" in values]
    assert logged == pytest.approx(true_norms(4), rel=1e-5)
    assert len(logged) == 24


@pytest.mark.parametrize(("mode", "algorithm"), [("step", "norm"), ("project", "norm"), ("layerwise", "value")])
def test_grad_norm_is_that_before_clipping(mode: str, algorithm: str) -> None:
    logger = DictLogger()
    clipping: dict[str, Any] = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    run(mode, callbacks=lambda: [GradNormMonitor()], logger=logger, log_every_n_steps=1, max_epochs=1, **clipping)
    logged = [values["galore/grad_norm"] for _, values in logger.metrics if "galore/grad_norm" in values]
    assert logged[0] == pytest.approx(true_norms(1)[0], rel=1e-5)
    assert logged[0] > 0.1


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_grad_norm_under_accumulation_is_exact_where_everything_is_refreshed(mode: str) -> None:
    """Elsewhere it is the norm of what is kept, which cannot be larger."""
    found = {}
    for each in (mode, "step"):
        logger = DictLogger()
        monitor: dict[str, Any] = {"callbacks": lambda: [GradNormMonitor()], "logger": logger, "log_every_n_steps": 1}
        run(each, accumulate_grad_batches=3, max_epochs=4, settings={"stagger": False}, **monitor)
        found[each] = [values["galore/grad_norm"] for _, values in logger.metrics if "galore/grad_norm" in values]
    assert len(found[mode]) == 8
    for window, (ours, true) in enumerate(zip(found[mode], found["step"], strict=True)):
        if window % 4 == 0:
            assert ours == pytest.approx(true, rel=1e-5)
        else:
            assert ours < true * (1 + 1e-5)


def test_grad_norm_of_two_optimizers_gets_two_names() -> None:
    logger = DictLogger()
    run("layerwise", model=DeclaredGan, callbacks=lambda: [GradNormMonitor()], logger=logger, log_every_n_steps=1)
    names = {key for _, values in logger.metrics for key in values if "grad_norm" in key}
    assert names == {"galore/grad_norm_0", "galore/grad_norm_1"}


@pytest.mark.parametrize("mode", MODES)
def test_clip_weight_norm_is_the_plain_formula(mode: str) -> None:
    limit = 0.1
    model, _ = run(mode, settings={"clip_weight_norm": limit})
    reference = Tiny()
    optimizer = GaLoreOptimizer(adamw(reference), reference, **SETTINGS)
    clipped = 0
    for batch in batches(4):
        optimizer.zero_grad()
        reference.loss(batch).backward()
        for param in reference.parameters():
            assert param.grad is not None
            norm = float(param.grad.norm())
            clipped += norm > limit
            param.grad.mul_(min(1.0, limit / norm))
        optimizer.step()
    assert 24 < clipped < 24 * 8
    assert max_difference(model.parameters(), reference.parameters()) <= 1e-5


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_compiled_submodule(mode: str) -> None:
    class Compiled(Tiny):
        def __init__(self, make: Make = adamw) -> None:
            super().__init__(make)
            self.body = torch.compile(self.body, backend="aot_eager")  # type: ignore[assignment]

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.loss(batch)

    runs: list[tuple[Tiny, Trainer]] = [run(each, model=Compiled) for each in (mode, "step")]
    assert_equal_runs(*runs)
