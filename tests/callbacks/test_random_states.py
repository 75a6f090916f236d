# SPDX-License-Identifier: Apache-2.0
"""A resumed run draws the random numbers that an unbroken one draws."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_galore import RandomStates


class Draws(LightningModule):
    """Notes what each batch draws from the generators of torch, Python and numpy, and what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.drawn: list[tuple[float, ...]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        numbers = float(torch.rand(())), random.random(), float(np.random.rand()), float(np.random.randn())
        self.drawn.append((float(batch.sum()), *numbers, random.gauss(0, 1)))
        return self.weight.sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        torch.rand(())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.arange(8.0), batch_size=2, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.arange(4.0), batch_size=2)  # type: ignore[arg-type]


def drawn(folder: Path, *, resume: Path | None = None, seed: int = 1, callbacks: Any = None, **options: Any) -> Any:
    seed_everything(seed, verbose=False)
    each = ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, auto_insert_metric_name=False, enable_version_counter=False
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=3,
        callbacks=[each, *([RandomStates()] if callbacks is None else callbacks)], **options,
    )  # fmt: skip
    module = Draws()
    trainer.fit(module, ckpt_path=resume)
    return module.drawn


@pytest.mark.parametrize("sanity", [0, 2])
def test_an_epoch_begins_with_the_same_numbers_and_the_same_order(tmp_path: Path, sanity: int) -> None:
    whole = drawn(tmp_path, num_sanity_val_steps=sanity)
    torch.load(tmp_path / "0.ckpt", weights_only=True)  # nothing has to be unpickled
    for epoch in (0, 1):
        resumed = drawn(tmp_path, resume=tmp_path / f"{epoch}.ckpt", seed=7, num_sanity_val_steps=sanity)
        assert resumed == whole[4 * (epoch + 1) :]
    without = drawn(tmp_path, resume=tmp_path / "0.ckpt", seed=7, callbacks=[])
    assert without != whole[4:]


def test_it_changes_no_run(tmp_path: Path) -> None:
    assert drawn(tmp_path) == drawn(tmp_path, callbacks=[])


def test_another_number_of_processes_is_said(tmp_path: Path) -> None:
    drawn(tmp_path)
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)
    (key,) = (key for key in saved if "random_states" in key)
    saved[key]["states"] *= 2
    torch.save(saved, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="random states of 2 processes, now there are 1"):
        drawn(tmp_path, resume=tmp_path / "two.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_an_older_checkpoint_and_validation_leave_the_generators_alone(tmp_path: Path) -> None:
    drawn(tmp_path, callbacks=[])
    assert len(drawn(tmp_path, resume=tmp_path / "0.ckpt")) == 8
    drawn(tmp_path)
    seed_everything(5, verbose=False)
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    }  # fmt: skip
    trainer = Trainer(**quiet, callbacks=[RandomStates()])
    trainer.validate(Draws(), ckpt_path=tmp_path / "0.ckpt", verbose=False)
    validated = torch.get_rng_state()
    seed_everything(5, verbose=False)
    trainer = Trainer(**quiet)
    trainer.validate(Draws(), ckpt_path=tmp_path / "0.ckpt", verbose=False)
    assert torch.equal(validated, torch.get_rng_state())


def test_the_command_line_always_has_it() -> None:
    from lightning_galore.cli import GaLoreCLI

    recipe = str(Path(__file__).parents[2] / "recipes" / "gan.yaml")
    cli = GaLoreCLI(args=["-c", recipe, "--trainer.callbacks+=GradNormMonitor"], run=False)
    names = [type(callback).__name__ for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
    assert names.count("RandomStates") == names.count("GradNormMonitor") == 1
