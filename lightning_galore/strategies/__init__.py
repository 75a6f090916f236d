# SPDX-License-Identifier: Apache-2.0
"""Lightning strategies. Importing this registers ``Trainer(strategy="galore")``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_galore.strategies.base import GaLoreStrategy
from lightning_galore.strategies.single_device import GaLoreSingleDeviceStrategy

StrategyRegistry.register("galore", GaLoreStrategy, description="Low-rank gradient training (GaLore)", override=True)

__all__ = ["GaLoreSingleDeviceStrategy", "GaLoreStrategy"]
