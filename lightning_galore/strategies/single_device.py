# SPDX-License-Identifier: Apache-2.0
"""Low-rank training on one device, and the choice of a strategy once the Trainer knows its devices."""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_galore.strategies.base import GaLoreStrategy
from lightning_galore.strategies.checks import refuse_many_devices
from lightning_galore.strategies.ddp import GaLoreDDPStrategy


class GaLoreSingleDeviceStrategy(GaLoreStrategy, SingleDeviceStrategy):
    """Low-rank training on one device. Takes the arguments of both parents."""


class GaLoreAutoStrategy(GaLoreStrategy, SingleDeviceStrategy):
    """What ``GaLoreStrategy(...)`` is until the Trainer has found its devices; it becomes the strategy for them."""

    # The Trainer's accelerator connector fills the attributes that it finds on a strategy.
    parallel_devices: list[torch.device] | None = None
    cluster_environment: ClusterEnvironment | None = None
    num_nodes: int = 1
    _layer_sync: Any = None

    @override
    def _configure_launcher(self) -> None:
        """Resolve: the last call of the connector's set-up, when all slots are filled."""
        devices = self.parallel_devices or [self.root_device]
        environment = self.cluster_environment
        external = environment is not None and environment.creates_processes_externally
        processes = environment.world_size() if environment and external else 1
        if len(devices) > 1 or self.num_nodes > 1 or processes > 1:
            if self._only_one:
                refuse_many_devices(devices, self.num_nodes, processes)
            self._become_ddp(list(devices))
            return
        for slot in ("parallel_devices", "cluster_environment", "num_nodes"):
            self.__dict__.pop(slot, None)
        if not self.device_named:
            self._root_device = devices[0]
        self.__class__ = GaLoreSingleDeviceStrategy  # type: ignore[assignment]
        self._configure_launcher()

    def _become_ddp(self, devices: list[torch.device]) -> None:
        """Begin anew as the strategy for several devices, with what the connector has filled in."""
        if self.device_named:
            raise MisconfigurationException(
                f"device={self._root_device} names one device, and the Trainer has {len(devices)} devices on "
                f"{self.num_nodes} nodes. Leave device out, or set devices=1."
            )
        filled: dict[str, Any] = {
            "accelerator": self._accelerator,
            "checkpoint_io": self._checkpoint_io,
            "precision_plugin": self._precision_plugin,
            "cluster_environment": self.cluster_environment,
        }
        nodes, layer_sync = self.num_nodes, self._layer_sync
        for slot in ("parallel_devices", "cluster_environment", "num_nodes", "_layer_sync", "_root_device"):
            self.__dict__.pop(slot, None)
        self.__class__ = GaLoreDDPStrategy  # type: ignore[assignment]
        ddp: Any = self
        filled["start_method"] = "fork" if _IS_INTERACTIVE else "popen"
        DDPStrategy.__init__(ddp, parallel_devices=devices, **filled)
        ddp.num_nodes, ddp._layer_sync = nodes, layer_sync
        ddp.set_world_ranks()
        ddp._configure_launcher()
