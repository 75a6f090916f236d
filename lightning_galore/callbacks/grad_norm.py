# SPDX-License-Identifier: Apache-2.0
"""The norm of gradients that are gone by the time anybody could look."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_galore.optimizer import GaLoreOptimizer


class GradNormMonitor(Callback):
    """Logs the norm of the full gradients before clipping, in every mode, as ``galore/grad_norm``.

    In ``mode="project"`` and ``"layerwise"`` the gradients are freed in backward, so anything that reads ``param.grad``
    sees nothing; this asks the optimizer. Several optimizers get a number behind the name.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[GradNormMonitor()], accelerator="cpu", logger=False)
    """

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, GaLoreOptimizer):
            return
        index = [id(other) for other in trainer.strategy.optimizers].index(id(optimizer))
        name = "galore/grad_norm" if len(trainer.strategy.optimizers) == 1 else f"galore/grad_norm_{index}"
        pl_module.log(name, optimizer.grad_norm(), on_step=True, on_epoch=False)
