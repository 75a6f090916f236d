# SPDX-License-Identifier: Apache-2.0
"""GaLore's way back: through the basis."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from lightning_galore.lift.base import Lift, Update


class ProjectBack(Lift):
    """``W += scale * P R`` (left), ``R Q^T`` (right), ``P R Q^T`` (full): arXiv 2403.03507, equation 11."""

    @override
    def apply_(self, weight: Tensor, update: Update) -> None:
        low, bases = update.low_update, update.bases
        update.projection.add_back_(weight, low, bases, alpha=update.scale, beta=update.shrink)
