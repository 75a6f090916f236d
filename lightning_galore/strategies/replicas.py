# SPDX-License-Identifier: Apache-2.0
"""Comparing what several processes must hold alike."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy
from torch import Tensor
from typing_extensions import override

from lightning_galore import dtensors
from lightning_galore.distributed import Team
from lightning_galore.strategies.backward_modes import BackwardModes


class ReplicaCheck(BackwardModes, Strategy):
    """The part of strategies for several processes that compares them every ``check_replicas_every`` steps."""

    check_replicas_every: int
    _steps: int = 0

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(*args, **kwargs)
        self._steps += 1
        if self.check_replicas_every and self._steps % self.check_replicas_every == 0:
            self.check_replicas()
        return output

    def check_replicas(self) -> None:
        """Compare weights and bases of all processes bit by bit, where each holds them; every process must call it.

        Raises:
            RuntimeError: With the names of those that differ.
        """
        differing = Team().differing(self._replicated())
        if differing:
            raise RuntimeError(
                f"The processes do not hold the same {', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''} "
                f"after {self._steps} steps: something changed them on one process only (a callback, random numbers, "
                "a different number of threads). What was saved before is whole."
            )

    def _replicated(self) -> dict[str, Tensor]:
        assert self.lightning_module is not None
        # Not the buffers: batch statistics are each process's own until the next forward pass.
        buffers = {name for name, _ in self.lightning_module.named_buffers()}
        state = self.lightning_module.state_dict()
        tensors = {name: value.detach() for name, value in state.items() if name not in buffers}
        for optimizer in self._galore_optimizers():
            for param, target in optimizer.targets.items():
                own = optimizer.state.get(param) or {}
                held = {key: value for key, value in own.items() if isinstance(value, Tensor)}
                tensors |= {f"{key} of {target.name}": value for key, value in held.items()}
        return {name: value for name, value in tensors.items() if not dtensors.is_sharded(value)}
