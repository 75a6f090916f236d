# SPDX-License-Identifier: Apache-2.0
"""Lightning strategies. Importing this registers ``Trainer(strategy="galore")`` and ``"galore_ddp"``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_galore.strategies.base import GaLoreStrategy
from lightning_galore.strategies.ddp import GaLoreDDPStrategy
from lightning_galore.strategies.single_device import GaLoreSingleDeviceStrategy

StrategyRegistry.register("galore", GaLoreStrategy, description="Low-rank gradient training (GaLore)", override=True)
StrategyRegistry.register(
    "galore_ddp", GaLoreDDPStrategy, description="GaLore on several devices that all hold the model", override=True
)

__all__ = ["GaLoreDDPStrategy", "GaLoreSingleDeviceStrategy", "GaLoreStrategy"]
