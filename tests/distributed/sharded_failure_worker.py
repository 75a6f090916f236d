# SPDX-License-Identifier: Apache-2.0
"""One process of a run with FSDP2 in which the second raises, or is killed as it saves, as the folder is called."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import model_parallel
from torch import Tensor
from typing_extensions import override

from lightning_galore import GaLoreModelParallelStrategy
from tests.strategies.modules import SETTINGS, Tiny

from .trainer_cases import fit

#: Each second step is saved under its number, and then as the last one: this call is for step 6.
KILLED_IN_SAVE = 6


class Fails(Tiny):
    """Raises on the second process, in the middle of an epoch."""

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == 7 and dist.get_rank():
            raise ArithmeticError("this process has had enough")
        return super().training_step(batch, batch_idx)


def killed_as_it_saves() -> None:
    """Let the second process leave a part of its file, and go without a word."""
    save, calls = model_parallel._distributed_checkpoint_save, []

    def dying(state: dict[str, Any], path: Path) -> None:
        calls.append(path)
        if len(calls) == KILLED_IN_SAVE and dist.get_rank():
            (path / "__1_0.distcp").write_bytes(b"a part")
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, path)

    model_parallel._distributed_checkpoint_save = dying


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    if folder.name == "killed":
        killed_as_it_saves()
    strategy = GaLoreModelParallelStrategy(**SETTINGS, mode="layerwise", timeout=timedelta(seconds=20))
    saved = ModelCheckpoint(
        dirpath=folder / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True
    )
    settings: dict[str, Any] = {"callbacks": [saved], "enable_checkpointing": True}
    fit(Fails() if folder.name == "raised" else Tiny(), strategy, **settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
