# SPDX-License-Identifier: Apache-2.0
"""How a low-rank update becomes a weight update: one file a kind. Owns ``scale``; the basis is handed in."""

from collections.abc import Iterable

from lightning_galore.config import GaLoreConfig
from lightning_galore.lift.base import Lift, Update
from lightning_galore.lift.project_back import ProjectBack
from lightning_galore.lift.residual import ScaledResidual
from lightning_galore.lift.rounding import Rounding, warn_of_idle_rounding
from lightning_galore.lift.scaling import ChannelScale, TensorScale
from lightning_galore.subspace import SUBSPACES, Projection

LIFTS: dict[str, type[Lift]] = {
    "project_back": ProjectBack,
    "channel_scale": ChannelScale,
    "tensor_scale": TensorScale,
    "scaled_residual": ScaledResidual,
}


def check_lift(config: GaLoreConfig, projections: Iterable[Projection] = ()) -> None:
    """Refuse a lift where it has not what it needs.

    Args:
        config: Names the lift, the mode and the subspace.
        projections: Of the weights that are projected.

    Raises:
        ValueError: With what to use instead.
    """
    lift = LIFTS[config.lift]
    if lift.needs_orthonormal and not SUBSPACES[config.subspace].orthonormal:
        raise ValueError(
            f"lift={config.lift!r} with subspace={config.subspace!r}: what a basis leaves out of a gradient is known "
            "for orthonormal bases only. Use subspace='random_orthonormal' or another one."
        )
    if lift.per_channel and any(projection.side == "full" for projection in projections):
        raise ValueError(
            f"lift={config.lift!r} with proj_type='full': it compares channels, and a gradient that is projected on "
            "both sides has none left. Use proj_type='std', or lift='tensor_scale'."
        )
    if lift.needs_grad and config.mode == "project":
        raise ValueError(
            f"lift={config.lift!r} with mode='project': it needs the full gradient, which that mode frees in backward. "
            "Use mode='layerwise', which frees each as soon as its weight has moved, or mode='step'."
        )


__all__ = [
    "LIFTS",
    "ChannelScale",
    "Lift",
    "ProjectBack",
    "Rounding",
    "ScaledResidual",
    "TensorScale",
    "Update",
    "check_lift",
    "warn_of_idle_rounding",
]
