# SPDX-License-Identifier: Apache-2.0
"""A run that can be killed at any moment: ``python -m tests.modes.kill_script MODE FOLDER`` goes on where it was."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.strategies.modules import Tiny, adamw

from .common import run

EPOCHS = 12


class Slow(Tiny):
    """Says that it has begun, and leaves time to be killed in every part of a step."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor | None:
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def on_train_start(self) -> None:
        sys.stdout.write("begun\n")
        sys.stdout.flush()


def train(mode: str, folder: Path, *, model: type[Tiny] = Slow) -> None:
    """Fit with two micro-batches a step, a checkpoint every epoch and the weights at the end, resuming if possible."""
    saver = ModelCheckpoint(folder, save_last=True, every_n_epochs=1, filename="{epoch}")
    last = folder / "last.ckpt"
    resume: dict[str, Any] = {"ckpt_path": last} if last.exists() else {}
    module, _ = run(
        mode,
        adamw,
        model=model,
        callbacks=lambda: [saver],
        enable_checkpointing=True,
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        **resume,
    )
    torch.save(module.state_dict(), folder / "weights.pt")


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
