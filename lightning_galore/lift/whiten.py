# SPDX-License-Identifier: Apache-2.0
"""After SWAN: the update is normalised and whitened, so that it needs no moments."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.lift.base import Update
from lightning_galore.lift.project_back import ProjectBack


class Whiten(ProjectBack):
    """``W += scale * lr * P (|N| / |S|) S`` (left), ``S = (N N^T)^(-1/2) N``, ``N`` the update with standardised rows.

    The formulas of SWAN (arXiv 2412.13148, section 4), which takes the full gradient of a weight; here they act on the
    low-rank update, whatever the wrapped optimizer made it of: the gradient where that is SGD, which keeps nothing. A
    row is a coordinate of the subspace. The size of the update does not matter, the learning rate alone does.
    """

    needs_whole: ClassVar[bool] = True

    @override
    def apply_(self, weight: Tensor, update: Update) -> None:
        turned = update.projection.side == "right"  # its coordinates are columns
        rows = linalg.standardized(update.low_update.mT if turned else update.low_update)
        white = linalg.whitened(rows)
        white *= linalg.norm(rows) / linalg.norm(white).clamp(min=torch.finfo(white.dtype).tiny)
        low = white.mT if turned else white
        update.add_back_(weight, low, alpha=update.scale * float(update.lr), beta=update.shrink)
