# SPDX-License-Identifier: Apache-2.0
"""How a low-rank update becomes a weight update: one file a kind. Owns ``scale``; the basis is handed in."""

from lightning_galore.lift.base import Lift, Turned, Update
from lightning_galore.lift.error_feedback import ErrorFeedback
from lightning_galore.lift.project_back import ProjectBack
from lightning_galore.lift.residual import ScaledResidual
from lightning_galore.lift.rounding import Rounding, warn_of_idle_rounding
from lightning_galore.lift.scaling import ChannelScale, TensorScale
from lightning_galore.lift.sign_residual import SignResidual
from lightning_galore.lift.whiten import Whiten

LIFTS: dict[str, type[Lift]] = {
    "project_back": ProjectBack,
    "error_feedback": ErrorFeedback,
    "sign_residual": SignResidual,
    "whiten": Whiten,
    "channel_scale": ChannelScale,
    "tensor_scale": TensorScale,
    "scaled_residual": ScaledResidual,
}


__all__ = ["LIFTS", "Lift", "ProjectBack", "Rounding", "Turned", "Update", "warn_of_idle_rounding"]
