# SPDX-License-Identifier: Apache-2.0
"""Low-rank training on several devices that all hold the model."""

from __future__ import annotations

import inspect
from typing import Any

import torch.distributed as dist
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_galore.distributed import Team
from lightning_galore.strategies.base import GaLoreStrategy
from lightning_galore.strategies.replicas import ReplicaCheck
from lightning_galore.weights import coded_weights

# Arguments of DistributedDataParallel that mean something without it.
_KEPT = ("broadcast_buffers", "find_unused_parameters")


class GaLoreDDPStrategy(ReplicaCheck, GaLoreStrategy, DDPStrategy):
    """Low-rank training on several devices or nodes, each of which holds the whole model (``strategy="galore_ddp"``).

    In mode ``step`` torch's DDP averages full gradients as ever. In modes ``project`` and ``layerwise`` the model is
    not wrapped in DDP: hooks project each gradient and only low-rank ones travel (and full ones of weights that are not
    projected, or whose basis is refreshed in this step). In every mode one process finds a basis and the others take
    it, so that all hold the same one to the bit. Takes the arguments of both parents.
    """

    # They are in no signature of Lightning's, which hands them on.
    handed_on = frozenset(inspect.signature(DistributedDataParallel.__init__).parameters) - {"self", "module"}

    @override
    def configure_ddp(self) -> None:
        """Wrap the model in DDP, or in the backward modes only make all processes start from the same weights."""
        if self.config.mode == "step":
            self._check_step_mode()
            super().configure_ddp()
            return
        self._check_backward_modes()
        assert self.lightning_module is not None
        _sync_module_states(self.lightning_module)
        for weight in coded_weights(self.lightning_module).values():  # that shares what codes stand for
            for part in (weight.codes, weight.absmax):
                dist.broadcast(part, 0)

    def _check_step_mode(self) -> None:
        if self.config.weight_storage == "int8":
            raise MisconfigurationException(
                "weight_storage='int8' with mode='step' on several devices: DDP holds on to the weights as they were. "
                "Use mode='project' or 'layerwise', where the model is not wrapped in DDP."
            )

    def _check_backward_modes(self) -> None:
        mode = self.config.mode
        odd = sorted(set(self._ddp_kwargs) - set(_KEPT))
        if self._ddp_comm_hook is not None or self._model_averaging_period is not None:
            odd.append("ddp_comm_hook" if self._ddp_comm_hook is not None else "model_averaging_period")
        if odd:
            raise MisconfigurationException(
                f"{', '.join(odd)}: mode={mode!r} averages low-rank gradients without DDP, which this would set. "
                "Leave it out, or use mode='step'."
            )

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.config.mode == "layerwise" and trainer.gradient_clip_val:
            raise MisconfigurationException(
                f"gradient_clip_val={trainer.gradient_clip_val}, mode='layerwise' on several devices: entries would be "
                "clipped before they are averaged. Use mode='project' and clip by norm, or mode='step'."
            )
        for optimizer in self._galore_optimizers():
            optimizer.join(Team())
        others = [opt for opt in self.optimizers if opt not in self._galore_optimizers()]
        if others and self.config.mode != "step":
            raise MisconfigurationException(
                f"{type(others[0]).__name__} has no weight to project, and mode={self.config.mode!r} on several "
                "devices averages the gradients of wrapped optimizers only. Use mode='step', or let it project some."
            )
        if self.config.mode == "project" and trainer.gradient_clip_val:
            rank_zero_warn(
                "mode='project' on several devices clips by the norm of what is kept of the gradients, which is "
                "smaller than the full norm. mode='step' clips by the full norm."
            )

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Give every process the buffers of the first (batch statistics), as DDP does before a forward pass."""
        self._share_buffers()
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._share_buffers()
        return super().validation_step(*args, **kwargs)

    def _share_buffers(self) -> None:
        module = self.lightning_module
        assert module is not None
        if self.config.mode == "step" or not self._ddp_kwargs.get("broadcast_buffers", True):
            return
        if module.trainer.state.fn == TrainerFn.FITTING:  # where Lightning would wrap the model in DDP
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)
