# SPDX-License-Identifier: Apache-2.0
"""Plain fp64 formulas of the finders: every matrix is formed, nothing is fast."""

from __future__ import annotations

import torch
from torch import Tensor


def lifted(momentum: Tensor, side: str, bases: tuple[Tensor, ...]) -> Tensor:
    """The full-size matrix ``(m, n)`` whose coordinates are ``momentum``: ``P m``, ``m Q^T`` or ``P m Q^T``."""
    if side == "left":
        return bases[0] @ momentum
    if side == "right":
        return momentum @ bases[0].T
    return bases[0] @ momentum @ bases[1].T


def tracked(grad: Tensor, side: str, bases: tuple[Tensor, ...], momentum: Tensor | None, rho: float) -> list[Tensor]:
    """``qr(B B^T P)`` or ``qr(B^T B Q)``, each vector turned towards its last self.

    ``B = rho M/|M| + (1 - rho) G/|G|``.
    """
    moment = None if momentum is None else lifted(momentum, side, bases)
    blend = grad if moment is None else rho * moment / moment.norm() + (1 - rho) * grad / grad.norm()
    sides = {"left": (blend,), "right": (blend.T,), "full": (blend, blend.T)}[side]
    new = []
    for matrix, old in zip(sides, bases, strict=True):
        basis = torch.linalg.qr(matrix @ (matrix.T @ old))[0]
        for i in range(basis.shape[1]):
            if torch.dot(old[:, i], basis[:, i]) < 0:
                basis[:, i] *= -1
        new.append(basis)
    return new


def best_energy(grad: Tensor, rank: int) -> float:
    """Squared Frobenius norm of the best approximation of ``rank``."""
    return float(torch.linalg.svdvals(grad.double())[:rank].square().sum())


def energy(
    grad: Tensor,  # (d, l)
    basis: Tensor,  # (d, r)
) -> float:
    """Squared Frobenius norm of what an orthonormal basis keeps of ``grad``."""
    return float((basis.double().T @ grad.double()).square().sum())
