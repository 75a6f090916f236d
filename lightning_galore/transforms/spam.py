# SPDX-License-Identifier: Apache-2.0
"""SPAM's spike-aware clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_galore.config import GaLoreConfig
from lightning_galore.transforms.base import Transform


class Spam(Transform):
    """Where ``g^2 > theta v``, ``g`` becomes ``sign(g) sqrt(theta v)`` (arXiv 2501.06842, algorithm 1).

    ``v`` is the wrapped optimizer's second moment before this step, with the bias of its start. Derived from the paper
    alone. Where ``v`` is zero there is nothing to compare with and the entry stays: clipped to zero, as the formula
    says, an embedding's row whose token comes late would never move. The paper's sparse momentum, another way to save
    memory, is no part of it.

    Args:
        theta: Threshold.
    """

    needs_second: ClassVar[bool] = True

    def __init__(self, theta: float = 5000.0) -> None:
        self.theta = theta

    @classmethod
    @override
    def build(cls, config: GaLoreConfig) -> Self:
        return cls(config.spam_theta)

    @override
    def apply_(self, grad: Tensor, entries: Mapping[str, Tensor], *, second: Tensor | None) -> dict[str, Tensor]:
        if second is not None:
            limit = second.sqrt().mul_(math.sqrt(self.theta))
            limit = limit.masked_fill_(limit == 0, math.inf).to(grad.dtype)
            torch.minimum(grad, limit, out=grad)
            torch.maximum(grad, limit.neg_(), out=grad)
        return {}
