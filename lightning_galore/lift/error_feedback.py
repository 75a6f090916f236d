# SPDX-License-Identifier: Apache-2.0
"""LDAdam's way back: what the projection leaves out of a gradient is added to the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore.lift.base import Update
from lightning_galore.lift.project_back import ProjectBack
from lightning_galore.subspace import Projection

ERROR = "error"


class ErrorFeedback(ProjectBack):
    """GaLore's way back, with the generalized error feedback of LDAdam (arXiv 2410.16103, algorithm 1).

    ``e' = A - P P^T A + beta1 / (1 - beta1) (P_old m - P m')`` with ``A = G + e``, the gradient and what earlier ones
    left: what the basis leaves out of that, and what its change has taken from the first moment ``m``, which became
    ``m'``, in units of a gradient. (The other sides likewise.) A buffer of the weight's size and data type for each.
    """

    needs_grad: ClassVar[bool] = True
    leaves_over: ClassVar[bool] = True
    follows_moment: ClassVar[bool] = True

    @override
    def apply_(self, weight: Tensor, update: Update) -> None:
        super().apply_(weight, update)
        grad, kept = update.grad, update.entries.get(ERROR)
        assert grad is not None
        # Half precision would round each of the four terms; the sum is rounded once.
        dtype = torch.promote_types(grad.dtype, torch.float32)
        error = grad.to(dtype, copy=True) if kept is None else kept.to(dtype).add_(grad)
        update.add_back_(error, update.low_grad, alpha=-1.0)
        if update.turned is not None:
            turned, old = update.turned, update.turned.old.read(grad.dtype)
            before = update.projection.with_rank(turned.old.rank)
            before.add_back_(error, turned.before, old, alpha=turned.share)
            update.add_back_(error, turned.after, alpha=-turned.share)
        update.entries[ERROR] = error.to(grad.dtype) if kept is None else kept.copy_(error)

    @override
    def left_over(self, entries: Mapping[str, Tensor]) -> Tensor | None:
        return entries.get(ERROR)

    @override
    def kept_shapes(self, projection: Projection) -> dict[str, tuple[int, ...]]:
        return {ERROR: projection.shape}
