# SPDX-License-Identifier: Apache-2.0
"""What the modules' optimizers share: two parameter groups."""

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
