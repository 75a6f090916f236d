# SPDX-License-Identifier: Apache-2.0
"""How a low-rank update becomes a weight update: one file a kind. Owns ``scale``; the basis is handed in."""

from lightning_galore.lift.base import Lift, Update
from lightning_galore.lift.project_back import ProjectBack
from lightning_galore.lift.rounding import Rounding, warn_of_idle_rounding

LIFTS: dict[str, type[Lift]] = {"project_back": ProjectBack}


__all__ = ["LIFTS", "Lift", "ProjectBack", "Rounding", "Update", "warn_of_idle_rounding"]
