# SPDX-License-Identifier: Apache-2.0
"""Low-rank training on one device, and the choice of a strategy once the Trainer knows its devices."""

from __future__ import annotations

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import SingleDeviceStrategy
from typing_extensions import override

from lightning_galore.strategies.base import GaLoreStrategy, refuse_many_devices


class GaLoreSingleDeviceStrategy(GaLoreStrategy, SingleDeviceStrategy):
    """Low-rank training on one device. Takes the arguments of both parents."""


class GaLoreAutoStrategy(GaLoreStrategy, SingleDeviceStrategy):
    """What ``GaLoreStrategy(...)`` is until the Trainer has found its devices; it becomes the strategy for them."""

    # The Trainer's accelerator connector fills the attributes that it finds on a strategy.
    parallel_devices: list[torch.device] | None = None
    cluster_environment: ClusterEnvironment | None = None
    num_nodes: int = 1

    @override
    def _configure_launcher(self) -> None:
        """Resolve: the last call of the connector's set-up, when all slots are filled."""
        devices = self.parallel_devices or [self.root_device]
        environment = self.cluster_environment
        external = environment is not None and environment.creates_processes_externally
        refuse_many_devices(devices, self.num_nodes, environment.world_size() if environment and external else 1)
        for slot in ("parallel_devices", "cluster_environment", "num_nodes"):
            self.__dict__.pop(slot, None)
        if not self.device_named:
            self._root_device = devices[0]
        self.__class__ = GaLoreSingleDeviceStrategy  # type: ignore[assignment]
        self._configure_launcher()
