# SPDX-License-Identifier: Apache-2.0
"""A base for LightningModules that step by hand, with one optimizer or several, in every mode and strategy."""

from contextlib import nullcontext
from typing import Any

from lightning import LightningModule
from torch import Tensor


class ManualModule(LightningModule):
    """Manual optimization with :meth:`minimize` as the whole of a step.

    Derive from it, or copy the method: nothing else is needed, and without GaLore it does the ordinary thing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def minimize(self, optimizer: Any, loss: Tensor) -> None:
        """One step of one optimizer. Only ``mode="layerwise"`` must be told whom a backward is for.

        Args:
            optimizer: What ``self.optimizers()`` gave.
            loss: Made after the last step, as that has moved the weights.
        """
        optimizer.zero_grad()
        with getattr(self.trainer.strategy, "layerwise_updates", nullcontext)(optimizer):
            self.manual_backward(loss)
        optimizer.step()
