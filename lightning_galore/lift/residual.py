# SPDX-License-Identifier: Apache-2.0
"""Fira's lift: through the basis, and what lies outside of it along the gradient."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.lift.base import Lift, Update
from lightning_galore.lift.limiter import NORM, limit
from lightning_galore.lift.scaling import channel_dims, norm_ratios
from lightning_galore.subspace import Projection


class ScaledResidual(Lift):
    """``W -= lr * (scale * P N + phi * (G - P P^T G))``: arXiv 2410.01623, equation 10 with GaLore's ``scale``.

    ``N`` is the wrapped optimizer's direction and ``phi = |N| / |R|`` for each column (left) or row (right) of the
    low-rank gradient ``R``: what the optimizer does to a channel inside the subspace is done to it outside too. The
    norm of the residual's part grows by no more than 1 % a step. ``scale`` acts on the subspace alone, and the residual
    has no part in the subspace whatever it is. Takes memory of one full-size matrix while a weight moves.
    """

    needs_grad: ClassVar[bool] = True
    needs_orthonormal: ClassVar[bool] = True
    per_channel: ClassVar[bool] = True

    @override
    def apply_(self, weight: Tensor, update: Update) -> None:
        assert update.grad is not None
        residual = update.grad.to(linalg.decomposition_dtype(update.grad.dtype), copy=True)
        update.add_back_(residual, update.low_grad, alpha=-1.0)
        residual *= norm_ratios(update, channel_dims(update.projection.side)) * update.shape_factor
        factor = limit(linalg.norm(residual) / update.lr, update.entries).to(residual.dtype)
        residual *= factor if update.ascends else -factor
        update.add_back_(residual, update.low_update, alpha=update.scale)
        if weight.dtype == residual.dtype:
            weight.mul_(update.shrink).add_(residual)
        else:
            weight.copy_(residual.add_(weight, alpha=update.shrink))

    @override
    def kept_shapes(self, projection: Projection) -> dict[str, tuple[int, ...]]:
        return {NORM: ()}
