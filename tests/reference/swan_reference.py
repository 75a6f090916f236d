# SPDX-License-Identifier: Apache-2.0
"""SWAN's normalisation and whitening in plain formulas (arXiv 2412.13148, section 4), on a low-rank gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def standardized(matrix: Tensor) -> Tensor:
    """Each row minus its mean, over the root of its mean square: one row after the other."""
    rows = []
    for row in matrix:
        centred = row - row.sum() / len(row)
        rows.append(centred / (centred.square().sum() / len(row)).sqrt())
    return torch.stack(rows)


def whitened(matrix: Tensor) -> Tensor:
    """``(A A^T)^(-1/2) A``, which is ``U V^T``."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def step_(weight: Tensor, grad: Tensor, rank: int, lr: float, scale: float, basis: Tensor | None = None) -> None:
    """One step of the weight, in place, in the subspace of the gradient's singular vectors, or another one.

    A tall or square weight is transposed.
    """
    if weight.shape[0] >= weight.shape[1]:
        weight, grad = weight.T, grad.T
    basis = torch.linalg.svd(grad, full_matrices=False)[0][:, :rank] if basis is None else basis
    rows = standardized(basis.T @ grad)
    white = whitened(rows)
    weight.sub_(lr * scale * basis @ (white * rows.norm() / white.norm()))
