# SPDX-License-Identifier: Apache-2.0
"""A run that is resumed, in its mode or another one, or after a failure, equals the run that was not stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_galore import GaLoreOptimizer
from tests.helpers import max_difference
from tests.strategies.modules import (
    PROJECTED,
    Make,
    Tiny,
    adamw,
    assert_clean,
    assert_same_state,
    assert_same_weights,
    galore,
    loader,
    make_trainer,
)
from tests.strategies.test_interruption import BoomError, Breaks
from tests.strategies.test_resume import FIRST, NAME, Wide

from .common import BACKWARD_MODES, MODES, SILENT, hooks_on, run
from .kill_script import EPOCHS, train
from .test_equal_weights import adamw_8bit, scheduled, sgd

FP32 = 2e-6  # where low-rank gradients are added up in another order
ROOT = Path(__file__).parents[2]


def saved_run(mode: str, make: Make, folder: Path, resume: Path | None = None, **settings: Any) -> tuple[Tiny, Trainer]:
    saver = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename=NAME)
    return run(
        mode, make, callbacks=lambda: [saver], enable_checkpointing=True, max_epochs=3, ckpt_path=resume, **settings
    )


def assert_resumes(mode: str, make: Make, folder: Path, **settings: Any) -> None:
    whole, trainer = saved_run(mode, make, folder, **settings)
    resumed, again = saved_run(mode, make, folder, folder / FIRST, **settings)
    assert resumed.losses == whole.losses[6:]
    assert len(resumed.losses) == 12
    assert_same_weights(resumed, whole)
    assert_same_state(again.optimizers[0], trainer.optimizers[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("make", [scheduled, sgd], ids=lambda make: make.__name__)
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_resume_is_exact(mode: str, make: Make, precision: Any, tmp_path: Path) -> None:
    assert_resumes(mode, make, tmp_path, precision=precision)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_resume_is_exact_with_8bit_states(mode: str, precision: Any, tmp_path: Path) -> None:
    assert_resumes(mode, adamw_8bit, tmp_path, precision=precision, model=Wide)


# An epoch is 6 batches: windows of 4 and 2, so that the first checkpoint follows one that was not full.
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_resume_is_exact_with_accumulation(mode: str, precision: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"settings": {"update_proj_gap": 3}, "precision": precision}
    assert_resumes(mode, scheduled, tmp_path, accumulate_grad_batches=4, **settings)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tiny, Trainer]]:
    """One whole run in each mode, with its first checkpoint."""
    runs = {}
    for mode in MODES:
        folder = tmp_path_factory.mktemp(mode)
        runs[mode] = (folder / FIRST, *saved_run(mode, scheduled, folder))
    return runs


@pytest.mark.parametrize("reader", MODES)
@pytest.mark.parametrize("writer", MODES)
def test_any_mode_resumes_from_any_other(
    writer: str, reader: str, written: dict[str, tuple[Path, Tiny, Trainer]]
) -> None:
    checkpoint, whole, trainer = written[writer]
    resumed, again = saved_run(reader, scheduled, checkpoint.parent, checkpoint)
    assert_same_weights(resumed, whole)
    assert_same_state(again.optimizers[0], trainer.optimizers[0])


# -- failures in backward ----------------------------------------------------------------------------------------------


class Failing(Tiny):
    """Fails once in the middle of the backward of its fourth batch: the head has had its gradient, the rest not."""

    def __init__(self, make: Make = adamw, *, error: type[BaseException] | None = BoomError) -> None:
        super().__init__(make)
        self.error = error
        self.bad_loss = False

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.body(inputs)
        if self.error is not None and self.trainer.training and len(self.losses) == 3:
            Breaks.error = self.error
            hidden = Breaks.apply(hidden)  # type: ignore[no-untyped-call]
        return self.head(hidden)  # type: ignore[no-any-return]


@pytest.fixture
def _interrupts_work_again() -> Iterator[None]:
    """Lightning ignores further interrupts while it shuts down, and leaves it so."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_interrupts_work_again")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_failure_in_backward_leaves_everything_usable(mode: str, error: type[BaseException], accumulate: int) -> None:
    model = Failing(error=error)
    trainer = make_trainer(galore(mode=mode), accumulate_grad_batches=accumulate, max_epochs=3, **SILENT)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(model, loader(), loader(1))
    (stopped,) = trainer.optimizers
    assert isinstance(stopped, GaLoreOptimizer)
    assert_clean(model, [stopped, stopped.base])
    assert hooks_on(model) == 0
    assert not stopped.hooks.waiting
    assert all(bool(param.isfinite().all()) for param in model.parameters())
    stopped.load_state_dict(stopped.state_dict())
    for param in model.body.parameters():
        assert stopped.state[param]["step"] == 3 // accumulate

    # Again, with the same model: as a run that starts from these weights.
    model.error, reference = None, Tiny()
    reference.load_state_dict(model.state_dict())
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate, "max_epochs": 2, **SILENT}
    make_trainer(galore(mode=mode), **settings).fit(model, loader(), loader(1))
    make_trainer(galore(mode=mode), **settings).fit(reference, loader(), loader(1))
    assert_same_weights(model, reference)


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_the_same_trainer_goes_on_after_an_exception(mode: str) -> None:
    model = Failing()
    trainer = make_trainer(galore(mode=mode), max_epochs=3, **SILENT)
    with pytest.raises(BoomError):
        trainer.fit(model, loader(), loader(1))
    model.error = None
    trainer.fit(model, loader(), loader(1))
    assert_clean(model, trainer.optimizers)
    assert trainer.current_epoch == 3


class NotANumber(Tiny):
    """Its third loss is not a number."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        if self.trainer.global_step != 2 or self.trainer.max_steps < 0:
            return loss
        (optimizer,) = self.trainer.optimizers
        self.due: set[str] = {name for name in PROJECTED if optimizer.is_due(self.get_parameter(name))}  # type: ignore[attr-defined]
        return loss * float("nan")


@pytest.mark.parametrize("gap", [1, 2, 1000])
@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_a_number_spoils_weights_alike_and_no_basis(mode: str, gap: int) -> None:
    """It spoils what the wrapped optimizer steps on; a weight whose basis was to come from it sits the step out."""
    model, trainer = run(mode, model=NotANumber, max_steps=3, settings={"update_proj_gap": gap})
    assert isinstance(model, NotANumber)
    assert model.due >= {1: set(PROJECTED), 2: {PROJECTED[0]}, 1000: set()}[gap]
    assert gap < 1000 or not model.due
    (optimizer,) = trainer.optimizers
    for name, param in model.named_parameters():
        state, skips = optimizer.state[param], name in model.due
        assert bool(param.isfinite().all()) == bool(state["exp_avg"].isfinite().all()) == skips
        assert float(state["step"]) == (2 if skips else 3)
        if name in PROJECTED:
            assert bool(state["galore_basis"].isfinite().all())
            assert (state["galore_step"], state["galore_failures"]) == ((2, 1) if skips else (3, 0))
    # Good weights, and the next run is as if nothing had been.
    model.load_state_dict(Tiny().state_dict())
    make_trainer(galore(mode=mode), **SILENT).fit(model, loader(), loader(1))
    assert_same_weights(model, run(mode, max_epochs=1)[0])


# -- killed ------------------------------------------------------------------------------------------------------------


def start(mode: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.modes.kill_script", mode, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("mode", MODES)
def test_killed_at_random_moments_and_resumed(mode: str, tmp_path: Path) -> None:
    moments = random.Random(f"moments of {mode}")
    kills, resumed_from = 0, []
    while kills < 4:
        process = start(mode, tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(moments.uniform(0.05, 0.7))  # an epoch takes about 0.2 s
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        kills += 1
        last = tmp_path / "last.ckpt"
        resumed_from.append(torch.load(last, weights_only=True)["global_step"] if last.exists() else 0)
    process = start(mode, tmp_path)
    assert process.communicate()[0] == "begun\n"
    assert process.returncode == 0
    assert 0 < resumed_from[-1] < EPOCHS * 3

    whole = tmp_path / "whole"
    whole.mkdir()
    train(mode, whole, model=Tiny)
    weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in (tmp_path, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert max_difference(weights[0].values(), weights[1].values()) == 0.0
