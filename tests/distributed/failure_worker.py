# SPDX-License-Identifier: Apache-2.0
"""One process of a run in which the second process fails."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from typing_extensions import override

from lightning_galore.strategies import GaLoreDDPStrategy
from tests.strategies.modules import SETTINGS, Tiny

from .trainer_cases import fit


class Fails(Tiny):
    """Raises on the second process, in the middle of an epoch."""

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == 5 and dist.get_rank():
            raise ArithmeticError("this process has had enough")
        return super().training_step(batch, batch_idx)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    strategy = GaLoreDDPStrategy(**SETTINGS, mode="layerwise", timeout=timedelta(seconds=20))
    saved = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    settings: dict[str, Any] = {"callbacks": [saved], "enable_checkpointing": True}
    fit(Fails(), strategy, **settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
