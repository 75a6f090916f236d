# SPDX-License-Identifier: Apache-2.0
"""Moments at a change of basis in plain fp64 formulas, one function each, without any of the package's code.

Shapes: ``low`` is ``(r, n)`` (left), ``(m, r)`` (right) or ``(r, r)`` (full); bases are ``(d, r)``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def matrices(old: tuple[Tensor, ...], new: tuple[Tensor, ...], side: str) -> tuple[Tensor | None, Tensor | None]:
    """``P_new^T P_old`` and ``Q_new^T Q_old``, None where a side is not projected."""
    pairs = [(n.double().T @ o.double()) for o, n in zip(old, new, strict=True)]
    return {"left": (pairs[0], None), "right": (None, pairs[-1]), "full": (pairs[0], pairs[-1])}[side]


def apply(low: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """``left @ low @ right^T`` with the identity in place of None."""
    low = low.double()
    left = torch.eye(low.shape[0], dtype=torch.float64) if left is None else left
    right = torch.eye(low.shape[1], dtype=torch.float64) if right is None else right
    return torch.einsum("ai,ij,bj->ab", left, low, right)


def squared(left: Tensor | None, right: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if left is None else left**2, None if right is None else right**2


def adam_second(
    v: Tensor, m: Tensor, left: Tensor | None, right: Tensor | None, *, step: int, betas: tuple[float, float]
) -> Tensor:
    """LDAdam's statistical rule (arXiv 2410.16103), with the corrections of the bias."""
    bc1, bc2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    v, m = v.double(), m.double()
    spread = apply(v / bc2 - m**2 / bc1**2, *squared(left, right))
    return bc2 * (spread + apply(m, left, right) ** 2 / bc1**2).abs()


def floored_second(
    v: Tensor, m: Tensor, left: Tensor | None, right: Tensor | None, *, step: int, betas: tuple[float, float]
) -> Tensor:
    """``v`` as it is, but ``(m' / bc1)^2 / (v' / bc2)`` nowhere above its largest value before, or 1."""
    bc1, bc2 = 1 - betas[0] ** step, 1 - betas[1] ** step
    v, m = v.double(), m.double()
    farthest = max(1.0, float(((m / bc1) ** 2 / (v / bc2)).max()))
    return v.maximum((apply(m, left, right) / bc1) ** 2 * bc2 / farthest * (1 - 1e-5))


def adamax_inf(u: Tensor, m: Tensor, left: Tensor | None, right: Tensor | None, *, step: int, beta1: float) -> Tensor:
    """The same rule for what stands where Adam has the root of an unbiased second moment."""
    u, m = u.double(), m.double() / (1 - beta1**step)
    return (apply(u**2 - m**2, *squared(left, right)) + apply(m, left, right) ** 2).abs().sqrt()


def factored(row: Tensor, column: Tensor, left: Tensor | None, right: Tensor | None) -> tuple[Tensor, Tensor]:
    """Adafactor (arXiv 1804.04235): averages over columns and rows of the squares in the new coordinates."""
    full = torch.outer(row.double().flatten(), column.double().flatten()) / row.double().mean()
    new = apply(full, *squared(left, right))
    return new.mean(1), new.mean(0)


def resized(low: Tensor, shape: tuple[int, int], fill: float | None) -> Tensor:
    """Leading rows and columns; further ones are ``fill``, or the mean over the old rows, then columns, if None."""
    low = low.double()
    rows = [
        low[i] if i < len(low) else (low.mean(0) if fill is None else torch.full_like(low[0], fill))
        for i in range(shape[0])
    ]
    low = torch.stack(rows)
    columns = [
        low[:, j] if j < low.shape[1] else (low.mean(1) if fill is None else torch.full_like(low[:, 0], fill))
        for j in range(shape[1])
    ]
    return torch.stack(columns, dim=1)
