# SPDX-License-Identifier: Apache-2.0
"""Tensor-GaLore in plain fp64 formulas (arXiv 2501.02379), slow and without any of the package's code.

Shapes: weight and gradient ``(d_1, ..., d_N)``, a basis ``U_k (d_k, r_k)`` for each mode with ``r_k < d_k``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.reference.galore_reference import Adam, Momentum


def unfolding(tensor: Tensor, mode: int) -> Tensor:
    """Mode-k matricisation ``(d_k, prod of the others)``."""
    others = [k for k in range(tensor.ndim) if k != mode]
    return tensor.permute(mode, *others).reshape(tensor.shape[mode], -1)


def mode_product(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """``tensor x_k matrix``: each mode-k fibre is multiplied by ``matrix (s, d_k)``."""
    letters = "abcdefgh"[: tensor.ndim]
    return torch.einsum(f"{letters},z{letters[mode]}->{letters.replace(letters[mode], 'z')}", tensor, matrix)


def leading(matrix: Tensor, rank: int) -> Tensor:
    """First left singular vectors."""
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :rank]


def signed(basis: Tensor, old: Tensor | None) -> Tensor:
    """The largest entry of each vector positive, or, after the first basis, none pointing away from its namesake."""
    for j in range(basis.shape[1]):
        column = basis[:, j]
        reference = column[column.abs().argmax()] if old is None else column @ old[:, j]
        if old is not None and reference == 0:
            reference = column[column.abs().argmax()]
        if reference < 0:
            basis[:, j] = -column
    return basis


def tucker_bases(grad: Tensor, ranks: tuple[int, ...], old: dict[int, Tensor], *, warm: bool) -> dict[int, Tensor]:
    """Higher-order orthogonal iteration: three sweeps from the last bases (warm restart), or one from the HOSVD."""
    modes = [k for k, rank in enumerate(ranks) if rank < grad.shape[k]]
    bases = (dict(old) if warm else {}) or {k: leading(unfolding(grad, k), ranks[k]) for k in modes}
    for _ in range(3 if warm else 1):
        for k in modes:
            part = grad
            for j in modes:
                if j != k:
                    part = mode_product(part, bases[j].T, j)
            bases[k] = leading(unfolding(part, k), ranks[k])
    return {k: signed(bases[k].clone(), old.get(k)) for k in modes}


def core_of(tensor: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """``tensor x_1 U_1^T ... x_N U_N^T``."""
    for k, basis in bases.items():
        tensor = mode_product(tensor, basis.T, k)
    return tensor


def back(core: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """``core x_1 U_1 ... x_N U_N``."""
    for k, basis in bases.items():
        core = mode_product(core, basis, k)
    return core


@dataclass
class TensorGaLore:
    """One weight of order > 2, with everything that is remembered between its steps.

    Args:
        rule: The optimizer inside.
        ranks: Of each mode; one that is the mode's size leaves it as it is.
        rotates: Whether the first moment is carried into the new coordinates at a refresh.
        warm: Whether a refresh begins with the last bases.
        decoupled: Decay of the full weight before its update, factor ``1 - lr * decay``.
        coupled: L2 penalty, added to the gradient after the bases were found.
    """

    rule: Adam | Momentum
    ranks: tuple[int, ...]
    gap: int
    scale: float
    decoupled: float = 0.0
    coupled: float = 0.0
    rotates: bool = False
    warm: bool = True
    state: dict[str, Tensor] = field(default_factory=dict)
    bases: dict[int, Tensor] = field(default_factory=dict)
    step: int = 0

    def apply_(self, weight: Tensor, grad: Tensor) -> None:
        """One step of the weight, in place."""
        if self.step % self.gap == 0:
            old, self.bases = self.bases, tucker_bases(grad, self.ranks, self.bases, warm=self.warm)
            if self.rotates and old:
                for name in self.state:
                    for k in old:
                        self.state[name] = mode_product(self.state[name], self.bases[k].T @ old[k], k)
        low = core_of(grad + self.coupled * weight, self.bases)
        self.step += 1
        update = self.rule.update(low, self.state, self.step)
        weight.mul_(1 - self.rule.lr * self.decoupled)
        weight.add_(self.scale * back(update, self.bases))
