# SPDX-License-Identifier: Apache-2.0
"""Random numbers that go on where a checkpoint left them: Lightning keeps no generator's state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

_KEY = "lightning_galore_random_states"


class RandomStates(Callback):
    """Keeps the states of the random number generators of every process in each checkpoint.

    With it a run with dropout, or with anything else that draws from the global generators of torch (that of the CPU
    and that of the run's GPU), Python or numpy, goes on from a checkpoint as if it had not been stopped. In the middle
    of an epoch that needs a loader that keeps its place, too. It draws nothing, so it changes no run.

    A checkpoint of another number of processes leaves the generators as they are, with a warning.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RandomStates()], accelerator="cpu", logger=False)
    """

    def __init__(self) -> None:
        self._first_batch: dict[str, Any] | None = None

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states; all processes call it together."""
        own = _states(trainer.strategy.root_device)
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        ended = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        checkpoint[_KEY] = {"states": states, "epoch_ended": ended}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the states of this process."""
        self._first_batch = None
        saved = checkpoint.get(_KEY)
        if saved is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if len(saved["states"]) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint has the random states of {len(saved['states'])} processes, now there are "
                f"{trainer.world_size}: dropout and the like draw other numbers than an unbroken run would."
            )
            return
        own = saved["states"][trainer.global_rank]
        _restore(own, trainer.strategy.root_device)
        if not saved["epoch_ended"]:
            # The loader's iterator, which an unbroken run has at this point, draws a number when it is made.
            self._first_batch = own

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Take them over once more before the first batch, of a run that goes on in the middle of an epoch."""
        if self._first_batch is not None:
            _restore(self._first_batch, trainer.strategy.root_device)
            self._first_batch = None


def _states(device: torch.device) -> dict[str, Any]:
    """Tensors, numbers and strings only: a checkpoint stays one that is loaded without unpickling objects.

    Lightning's private ``_collect_rng_states`` gives numpy's arrays, and wakes every GPU in each process.
    """
    kind, keys, *rest = np.random.get_state(legacy=True)
    version, own, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(own), gauss],
        "numpy": [kind, [int(key) for key in keys], *rest],
    }


def _restore(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    version, own, gauss = states["python"]
    random.setstate((version, tuple(own), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
