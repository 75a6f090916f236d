# SPDX-License-Identifier: Apache-2.0
"""Low-rank gradient training (the GaLore family) for PyTorch Lightning."""

from lightning_galore.callbacks import GradNormMonitor, MemoryMonitor, RandomStates, SubspaceScheduler
from lightning_galore.config import GaLoreConfig
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.planner import plan
from lightning_galore.strategies import (
    GaLoreDDPStrategy,
    GaLoreModelParallelStrategy,
    GaLoreSingleDeviceStrategy,
    GaLoreStrategy,
)

__version__ = "0.1.0"

__all__ = [
    "GaLoreConfig",
    "GaLoreDDPStrategy",
    "GaLoreModelParallelStrategy",
    "GaLoreOptimizer",
    "GaLoreSingleDeviceStrategy",
    "GaLoreStrategy",
    "GradNormMonitor",
    "MemoryMonitor",
    "RandomStates",
    "SubspaceScheduler",
    "__version__",
    "plan",
]
