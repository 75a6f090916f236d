# SPDX-License-Identifier: Apache-2.0
"""Stable-SPAM's clipping and normalising by what was usual."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from lightning_galore.transforms.base import Transform

# The paper's names and values: of the norm's mean, of its mean square, of the largest entry.
GAMMA1, GAMMA2, GAMMA3 = 0.7, 0.9, 0.999
EPS = 1e-8


class StableSpam(Transform):
    """AdaClip, then AdaGN (arXiv 2502.17055, algorithm 1); all averages are corrected for the bias of their start.

    AdaClip averages the largest entry, ``T = gamma3 T + (1 - gamma3) max|g|``; entries above ``T`` are scaled by
    ``T / max|g|``. AdaGN averages norm and squared norm of what comes out, and gives the gradient the norm
    ``mean / (sqrt(mean square) + eps)``: about 1, less right after a spike. Derived from the paper alone.
    """

    @override
    def apply_(self, grad: Tensor, entries: Mapping[str, Tensor], *, second: Tensor | None) -> dict[str, Tensor]:
        wide = torch.promote_types(grad.dtype, torch.float32)
        low, high = torch.aminmax(grad)  # not grad.abs(), which would copy it
        largest = torch.maximum(high, -low).to(wide)
        zero = torch.zeros_like(largest)
        new = {"count": entries.get("count", zero) + 1}

        def usual(name: str, value: Tensor, gamma: float) -> Tensor:
            new[name] = gamma * entries.get(name, zero) + (1 - gamma) * value
            return new[name] / (1 - gamma ** new["count"])

        top = usual("largest", largest, GAMMA3)
        spiked = (grad > top) | (grad < -top)
        grad.mul_(torch.where(spiked, top / largest, 1.0).to(grad.dtype))
        norm = torch.linalg.vector_norm(grad, dtype=wide)
        mean, mean_square = usual("norm", norm, GAMMA1), usual("norm_sq", norm.square(), GAMMA2)
        factor = mean / (mean_square.sqrt() + EPS) / norm
        grad.mul_(torch.where(norm > 0, factor, 1.0).to(grad.dtype))
        return new

    @override
    def kept_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("count", "largest", "norm", "norm_sq"), ())
