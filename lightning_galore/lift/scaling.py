# SPDX-License-Identifier: Apache-2.0
"""APOLLO's lifts: the low-rank step says only how long the update is, the full gradient says where to."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.lift.base import Lift, Update
from lightning_galore.lift.limiter import NORM, limit
from lightning_galore.subspace import Projection, Side


class GradientScale(Lift):
    """``W -= lr * scale * S G``, ``S`` made of ratios ``|direction| / |R|`` in the subspace (arXiv 2412.05270).

    The wrapped optimizer's direction and the low-rank gradient ``R`` are compared by their norms, and the full gradient
    ``G`` takes the same scaling. Its norm grows by no more than 1 % a step. Nothing is projected back.
    """

    needs_grad: ClassVar[bool] = True
    needs_bases: ClassVar[bool] = False

    @abstractmethod
    def _dims(self, side: Side) -> tuple[int, ...]:
        """The dimensions of a matrix over which one norm is taken."""

    @override
    def apply_(self, weight: Tensor, update: Update) -> None:
        assert update.grad is not None
        dims = self._dims(update.projection.side)
        ratios = norm_ratios(update, dims)
        length = torch.linalg.vector_norm(ratios * norms(update.grad, dims))
        factors = ratios * limit(length / update.lr, update.entries)
        factors *= update.scale if update.ascends else -update.scale
        _add_scaled_(weight, update.grad, factors, shrink=update.shrink)

    @override
    def kept_shapes(self, projection: Projection) -> dict[str, tuple[int, ...]]:
        return {NORM: ()}


class ChannelScale(GradientScale):
    """One ratio for each channel: column of the weight (left), or row (right). APOLLO, algorithm 1."""

    per_channel: ClassVar[bool] = True

    @override
    def _dims(self, side: Side) -> tuple[int, ...]:
        return channel_dims(side)


class TensorScale(GradientScale):
    """One ratio for the whole weight: APOLLO-Mini, which needs a subspace of rank 1 only."""

    @override
    def _dims(self, side: Side) -> tuple[int, ...]:
        return (0, 1)


def channel_dims(side: Side) -> tuple[int, ...]:
    """The projected dimension: what lies along it is a channel."""
    return (0,) if side == "left" else (1,)


def norms(matrix: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Norms over ``dims``, which are kept at size 1, in fp32 at least."""
    dtype = linalg.decomposition_dtype(matrix.dtype)
    return torch.linalg.vector_norm(matrix, dim=dims, keepdim=True, dtype=dtype)


def norm_ratios(update: Update, dims: tuple[int, ...]) -> Tensor:
    """``|low_update| / |low_grad|`` over ``dims``, with the learning rate in it.

    A channel without a low-rank gradient has no ratio, and gets 0: momentum alone says nothing of how its gradient is
    scaled.
    """
    seen = norms(update.low_grad, dims)
    return torch.where(seen > 0, norms(update.low_update, dims) / seen, torch.zeros_like(seen))


def _add_scaled_(weight: Tensor, grad: Tensor, factors: Tensor, *, shrink: float) -> None:
    """``weight`` becomes ``shrink`` times itself and ``factors * grad``; where it has half precision rounded once.

    Args:
        weight: Changed in place.
        grad: Of its shape.
        factors: One for all, or for each row or column, with two dimensions.
        shrink: Factor of a decoupled decay.
    """
    if weight.dtype == grad.dtype == factors.dtype:
        weight.mul_(shrink).addcmul_(grad, factors)
    else:
        weight.copy_((grad * factors).add_(weight, alpha=shrink))
