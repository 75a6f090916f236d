# SPDX-License-Identifier: Apache-2.0
"""Learning rate schedules of the tasks: by name, as Transformers has them, or any scheduler by its class."""

from __future__ import annotations

import difflib
import math
from typing import Any

from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, ReduceLROnPlateau
from torch.optim import Optimizer

from lightning_galore.tasks.extras import require

#: Names of ``transformers.get_scheduler`` that need nothing beyond warm-up and length.
NAMES = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt")


def check_schedule(schedule: object) -> None:
    """Refuse a name that is none of :data:`NAMES`.

    Raises:
        ValueError: If it is not known; the message has the closest ones.
    """
    if isinstance(schedule, str) and schedule not in NAMES:
        close = difflib.get_close_matches(schedule, NAMES, n=2)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(
            f"lr_scheduler={schedule!r} is not known. {hint}Known: {', '.join(NAMES)}; others by class and settings, "
            "as --model.lr_scheduler CosineAnnealingLR --model.lr_scheduler.T_max 1000."
        )


def with_schedule(
    module: LightningModule,
    optimizer: Optimizer,
    schedule: str | LRSchedulerCallable,
    *,
    warmup_ratio: float,
    monitor: str,
    min_lr_ratio: float = 0.0,
) -> Any:
    """What ``configure_optimizers`` returns: the optimizer and its schedule, stepped with it.

    Args:
        module: Attached to a Trainer, which knows the length of the run.
        optimizer: Whose learning rate is scheduled.
        schedule: A name, or a callable on the optimizer, which brings settings of its own and no warm-up.
        warmup_ratio: Share of the steps in which the learning rate rises from 0.
        monitor: The metric that ReduceLROnPlateau watches, after each epoch, if it names none.
        min_lr_ratio: What a cosine falls to, of the peak.

    Raises:
        ValueError: If the schedule needs the length of the run and that is not known.
    """
    if not isinstance(schedule, str):
        made = schedule(optimizer)
        if isinstance(made, ReduceLROnPlateau):
            watched = {"monitor": made.monitor or monitor, "interval": "epoch"}
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, **watched}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}
    steps = module.trainer.estimated_stepping_batches
    if not math.isfinite(steps) and (schedule not in _WITHOUT_END or warmup_ratio):
        raise ValueError(
            f"{type(module).__name__} with lr_scheduler={schedule!r} and warmup_ratio={warmup_ratio} needs the length "
            f"of the run: set max_epochs or max_steps of the Trainer (now max_epochs={module.trainer.max_epochs}, "
            f"max_steps={module.trainer.max_steps}), or lr_scheduler='constant' without warm-up."
        )
    length = int(steps) if math.isfinite(steps) else None
    warmup = math.ceil(warmup_ratio * steps) if warmup_ratio else 0
    options: dict[str, Any] = {}
    if schedule == "cosine" and min_lr_ratio:
        schedule, options = "cosine_with_min_lr", {"scheduler_specific_kwargs": {"min_lr_rate": min_lr_ratio}}
    made = require("transformers").get_scheduler(
        schedule, optimizer, num_warmup_steps=warmup, num_training_steps=length, **options
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}
