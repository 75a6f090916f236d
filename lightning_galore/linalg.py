# SPDX-License-Identifier: Apache-2.0
"""Pure linear algebra on matrices: every decomposition, its precision, and what happens when it fails.

Shapes: ``m, n`` rows and columns of a matrix, ``d`` the projected dimension, ``r`` the rank, ``q = r + oversampling``.
Nothing here knows what a parameter or a training step is.
"""

from __future__ import annotations

import torch
from torch import Tensor


def decomposition_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision has no LAPACK kernels and too few digits for a basis: decompose in at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def svd_pair(
    matrix: Tensor,  # (m, n)
    rank: int,
) -> tuple[Tensor, Tensor] | None:
    """First ``rank`` left and right singular vectors ``(m, r)``, ``(n, r)``; None when the decomposition fails.

    LAPACK's and cuSOLVER's divide and conquer can fail to converge on badly conditioned input; fp64 is tried once then.
    """
    for dtype in (decomposition_dtype(matrix.dtype), torch.float64):
        try:
            u, _, vh = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:
            continue
        if bool(torch.isfinite(u).all()) and bool(torch.isfinite(vh).all()):
            return u[:, :rank], vh[:rank].mT
    return None


def randomized_pair(
    matrix: Tensor,  # (m, n)
    rank: int,
    *,
    oversampling: int,
    power_iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor] | None:
    """Approximate first ``rank`` left and right singular vectors ``(m, r)``, ``(n, r)``; None when it fails.

    Randomized range finder with power iterations and a small SVD that truncates ``q`` to ``r`` columns (Halko,
    Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1). Every block is orthonormalised by Householder QR:
    CholeskyQR2 was measured to be no faster on a CPU, and it breaks down on the ill-conditioned or rank-deficient
    gradients of real training.
    """
    work = matrix.to(decomposition_dtype(matrix.dtype))
    width = min(rank + oversampling, *work.shape)
    test = torch.randn(work.shape[1], width, dtype=work.dtype, device=work.device, generator=generator)
    left = orthonormalize(work @ test)
    for _ in range(power_iterations):
        left = orthonormalize(work @ orthonormalize(work.mT @ left))
    # Truncate through the triangular factor, not through the Gram matrix, which would square the condition number.
    right, triangle = torch.linalg.qr(work.mT @ left)
    small = svd_pair(triangle, rank)
    if small is None:
        return None
    right_vectors, left_vectors = small
    return left @ left_vectors, right @ right_vectors


def orthonormalize(
    block: Tensor,  # (d, q), d >= q
) -> Tensor:
    """Orthonormal columns that span (at least) those of ``block``; also when it is rank-deficient."""
    return torch.linalg.qr(block).Q


def gaussian(rows: int, columns: int, *, like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal ``(rows, columns)`` in the decomposition dtype of ``like``, on its device."""
    dtype = decomposition_dtype(like.dtype)
    return torch.randn(rows, columns, dtype=dtype, device=like.device, generator=generator)


def identity_basis(rows: int, rank: int, *, like: Tensor) -> Tensor:
    """The first ``rank`` unit vectors as a basis ``(rows, rank)``: the stand-in while no gradient gave a better one."""
    return torch.eye(rows, rank, dtype=like.dtype, device=like.device)


def fix_signs(
    basis: Tensor,  # (d, r)
) -> Tensor:
    """Flip vectors so that the entry of largest magnitude is positive (the signs of singular vectors are arbitrary)."""
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return torch.where(largest < 0, -basis, basis)


def overlap(
    old: Tensor,  # (d, r), orthonormal columns
    new: Tensor,  # (d, r), orthonormal columns
) -> Tensor:
    """Mean squared cosine of the principal angles, ``||old^T new||_F^2 / r`` in [0, 1], 0-D; ``drift`` is 1 minus it.

    Blind to the signs and the order of the vectors, unlike the cosine of one singular vector.
    """
    dtype = decomposition_dtype(new.dtype)
    return (old.to(dtype).mT @ new.to(dtype)).square().sum() / new.shape[1]


def captured_energy(
    matrix: Tensor,  # (d, n)
    basis: Tensor,  # (d, r), orthonormal columns
) -> Tensor:
    """Share of the squared Frobenius norm that the basis keeps, ``||basis^T matrix||_F^2 / ||matrix||_F^2``, 0-D."""
    dtype = decomposition_dtype(matrix.dtype)
    work = matrix.to(dtype)
    return (basis.to(dtype).mT @ work).square().sum() / work.square().sum()
