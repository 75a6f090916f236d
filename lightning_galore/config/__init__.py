# SPDX-License-Identifier: Apache-2.0
"""Every setting of low-rank training: names, defaults, ranges and their error messages. Holds primitives only."""

from lightning_galore.config.checks import names
from lightning_galore.config.presets import (
    AUTO,
    CLASS_PREFIX,
    GROUP_KEYS,
    METHODS,
    RESETS,
    SCHEDULE_SETTINGS,
    AccumulatorStorage,
    BasisPlacement,
    BasisStorage,
    LiftName,
    Method,
    Mode,
    MomentsName,
    MomentStorage,
    ProjType,
    Rank,
    RankRuleName,
    ScheduleName,
    SubspaceName,
    TransformName,
    WeightStorage,
)
from lightning_galore.config.settings import GaLoreConfig

__all__ = [
    "AUTO",
    "CLASS_PREFIX",
    "GROUP_KEYS",
    "METHODS",
    "RESETS",
    "SCHEDULE_SETTINGS",
    "AccumulatorStorage",
    "BasisPlacement",
    "BasisStorage",
    "GaLoreConfig",
    "LiftName",
    "Method",
    "Mode",
    "MomentStorage",
    "MomentsName",
    "ProjType",
    "Rank",
    "RankRuleName",
    "ScheduleName",
    "SubspaceName",
    "TransformName",
    "WeightStorage",
    "names",
]
