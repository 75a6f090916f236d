# SPDX-License-Identifier: Apache-2.0
"""Lightning strategies. Importing this registers ``"galore"``, ``"galore_ddp"`` and ``"galore_fsdp2"`` by name."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_galore.strategies.base import GaLoreStrategy
from lightning_galore.strategies.ddp import GaLoreDDPStrategy
from lightning_galore.strategies.model_parallel import GaLoreModelParallelStrategy
from lightning_galore.strategies.single_device import GaLoreSingleDeviceStrategy

StrategyRegistry.register("galore", GaLoreStrategy, description="Low-rank gradient training (GaLore)", override=True)
StrategyRegistry.register(
    "galore_ddp", GaLoreDDPStrategy, description="GaLore on several devices that all hold the model", override=True
)
StrategyRegistry.register(
    "galore_fsdp2",
    GaLoreModelParallelStrategy,
    description="GaLore on several devices that each hold a part of the model (FSDP2)",
    override=True,
)

__all__ = ["GaLoreDDPStrategy", "GaLoreModelParallelStrategy", "GaLoreSingleDeviceStrategy", "GaLoreStrategy"]
