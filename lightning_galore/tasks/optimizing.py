# SPDX-License-Identifier: Apache-2.0
"""What the modules' optimizers share: two parameter groups, and the length of the run for a schedule."""

import math
from typing import Any

from lightning import LightningModule


def decay_groups(module: LightningModule, weight_decay: float) -> list[dict[str, Any]]:
    """The trained parameters in two groups, of which biases and normalisation weights get no decay.

    Args:
        module: Whose parameters.
        weight_decay: Of the others.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def length_of_run(module: LightningModule) -> int:
    """Optimizer steps of the whole run.

    Raises:
        ValueError: If the Trainer has no end, as a learning rate that falls over the run needs one.
    """
    trainer = module.trainer
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise ValueError(
            f"{type(module).__name__} lets the learning rate fall over the run and so needs its length: "
            f"set max_epochs or max_steps of the Trainer (now max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps})."
        )
    return int(steps)
