# SPDX-License-Identifier: Apache-2.0
"""The ways to find a basis that are compared: ours, torch's full SVD and galore-torch's.

Shapes: gradient ``(m, n)``, basis ``(d, r)`` with ``d = m`` on the left and ``d = n`` on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from benchmarks import peers, weights
from lightning_galore.config import GaLoreConfig
from lightning_galore.linalg import overlap
from lightning_galore.subspace import SUBSPACES, Known, Projection, resolve_side, seeded_generator

FULL_SVD = "torch.linalg.svd"
DEFAULT = GaLoreConfig().subspace


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A gradient whose basis is to be found.

    Args:
        grad: ``(m, n)``.
        projection: On the shorter side, as in the paper.
        known: The basis of another batch's gradient, which finders with a warm start begin from.
    """

    grad: Tensor
    projection: Projection
    known: Known


Finder = Callable[[Matrix], Tensor]


def matrices(grads: Sequence[Tensor], *, rank: int) -> list[Matrix]:
    """Gradients with what a finder must know of them."""
    return [_matrix(grad, rank) for grad in grads]


def _matrix(grad: Tensor, rank: int) -> Matrix:
    shape = (grad.shape[0], grad.shape[1])
    projection = Projection(shape=shape, side=resolve_side("std", shape), rank=rank)
    before = weights.other_batch(grad)
    bases = _found(DEFAULT, before, projection, known=None)
    known = Known(bases=bases, momentum=projection.project(before, bases))
    return Matrix(grad=grad, projection=projection, known=known)


def ours() -> dict[str, Finder]:
    """Our finders, but for those whose basis is the same for any gradient: those capture nothing on purpose."""
    return {name: _our_finder(name) for name in SUBSPACES if SUBSPACES[name].orthonormal and _looks(name)}


def theirs() -> dict[str, Finder]:
    """What ours are compared with, as far as it is installed."""
    found: dict[str, Finder] = {FULL_SVD: _full_svd}
    if peers.galore_torch() is not None:
        found[peers.GALORE_TORCH] = _galore_torch
    return found


def _found(name: str, grad: Tensor, projection: Projection, *, known: Known | None) -> tuple[Tensor, ...]:
    """The one place that calls a finder of ours; as a refresh does, with the making of its generator."""
    finder = SUBSPACES[name].build(GaLoreConfig())
    generator = seeded_generator(grad.device, seed=weights.SEED, name=name, draw=1)
    found = finder.find(grad, projection, generator=generator, known=known, fix_signs=True)
    if found is None:
        raise ValueError(f"subspace={name!r} found no basis of a gradient of shape {tuple(grad.shape)}.")
    return found.bases


def _our_finder(name: str) -> Finder:
    return lambda matrix: _found(name, matrix.grad, matrix.projection, known=matrix.known)[0]


def _looks(name: str) -> bool:
    """Whether the basis depends on the gradient: asked of the finder itself, so a new one needs no entry here."""
    generator = torch.Generator().manual_seed(weights.SEED)
    projection = Projection(shape=(6, 8), side="left", rank=2)
    one, other = (_found(name, torch.randn(6, 8, generator=generator), projection, known=None)[0] for _ in range(2))
    return not torch.equal(one, other)


def _full_svd(matrix: Matrix) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix.grad, full_matrices=False)
    rank = matrix.projection.rank
    return u[:, :rank] if matrix.projection.side == "left" else vh[:rank].mT


def _galore_torch(matrix: Matrix) -> Tensor:
    rank, side = matrix.projection.rank, matrix.projection.side
    projector = import_module("galore_torch.galore_projector").GaLoreProjector(rank, proj_type="std")
    basis = projector.get_orthogonal_matrix(matrix.grad, rank, type=side)
    return basis if side == "left" else basis.mT  # its right basis is (r, n)


def energy(matrix: Matrix, basis: Tensor) -> float:
    """Squared norm of the gradient that the basis keeps, ``||P^T G||_F^2`` or ``||G Q||_F^2``, in fp64."""
    low = matrix.projection.project(matrix.grad.double(), (basis.double(),))
    return float(low.square().sum())


def mean_overlap(batch: Sequence[Matrix], bases: Sequence[Tensor]) -> float:
    """How much of ``bases`` the known bases held on average, in [0, 1]: how warm a warm start was."""
    shares = [float(overlap(m.known.bases[0], basis)) for m, basis in zip(batch, bases, strict=True)]
    return sum(shares) / len(shares)
