# SPDX-License-Identifier: Apache-2.0
"""Finders that go on from the last basis: what they keep, what they follow, and when they start anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from lightning_galore import linalg
from lightning_galore.config import GaLoreConfig
from lightning_galore.subspace import SUBSPACES, Known, Projection
from lightning_galore.subspace.track import Track
from tests.helpers import assert_orthonormal, assert_same_subspace, decaying_matrix
from tests.reference import finders_reference as reference
from tests.subspace.common import NAMES, SHAPES, SIDES, find, found

CONTINUOUS = [name for name in NAMES if SUBSPACES[name].continuous]


def random_bases(shape: Any, side: Any, rank: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = Projection(shape=shape, side=side, rank=rank).basis_shapes
    blocks = [torch.randn(size, dtype=torch.float64, generator=generator) for size in shapes]
    return tuple(linalg.orthonormalize(block).to(dtype) for block in blocks)


def random_momentum(shape: Any, side: Any, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    low = Projection(shape=shape, side=side, rank=rank).low_shape
    return 0.05 * torch.randn(low, dtype=torch.float64, generator=generator)


def drifting(step: int, shape: tuple[int, int], *, angle: float = 0.15) -> Tensor:
    """Gradients whose dominant subspace turns by ``angle`` a step towards another one and past it."""
    one, other = decaying_matrix(*shape, seed=1), decaying_matrix(*shape, seed=2)
    return math.cos(angle * step) * one + math.sin(angle * step) * other


def test_the_finders_that_follow_are_known() -> None:
    assert CONTINUOUS == ["power", "track", "blend", "tucker", "tucker_warm"]
    assert [name for name in NAMES if SUBSPACES[name].uses_momentum] == ["track", "blend"]


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("shape", "rank"), [*((shape, rank) for shape in SHAPES for rank in (1, 4, 24)), ((96, 80), 70), ((80, 96), 80)]
)
def test_warm_bases_have_their_shapes_and_are_orthonormal(name: str, side: Any, shape: Any, rank: int) -> None:
    known = Known(bases=random_bases(shape, side, rank), momentum=random_momentum(shape, side, rank))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        result = found(name, decaying_matrix(*shape, dtype=dtype), side=side, rank=rank, known=known)
        assert tuple(b.shape for b in result.bases) == Projection(shape=shape, side=side, rank=rank).basis_shapes
        for basis in result.bases:
            assert basis.dtype == linalg.decomposition_dtype(dtype)
            assert_orthonormal(basis)
        assert result.spectrum is not None
        assert len(result.spectrum) >= rank
        assert bool((result.spectrum.diff() <= 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_known_is_not_written_to_and_repeats(name: str) -> None:
    known = Known(bases=random_bases((40, 24), "full", 4), momentum=random_momentum((40, 24), "full", 4))
    before = [tensor.clone() for tensor in (*known.bases, known.momentum) if tensor is not None]
    one, other = (found(name, decaying_matrix(40, 24), side="full", known=known) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.bases, other.bases, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*known.bases, known.momentum), strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in CONTINUOUS])
def test_other_finders_do_not_look_at_what_is_known(name: str) -> None:
    grad, known = decaying_matrix(40, 24), Known(bases=random_bases((40, 24), "full", 4))
    pair = (found(name, grad, side="full", known=choice).bases for choice in (known, None))
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("rank", "share"), [(4, 0.995), (16, 0.999), (64, 0.995)])
def test_power_keeps_up_with_drifting_gradients(side: Any, rank: int, share: float) -> None:
    shape = (160, 120)
    bases = found("power", drifting(0, shape), side=side, rank=rank).bases
    for step in range(1, 11):
        grad = drifting(step, shape)
        bases = found("power", grad, side=side, rank=rank, refresh=step, known=Known(bases=bases)).bases
        for matrix, basis in zip(Projection(shape=shape, side=side, rank=rank).oriented(grad), bases, strict=True):
            kept = reference.energy(matrix, basis) / reference.best_energy(grad, rank)
            assert kept >= share, f"step {step}: {kept}"


@pytest.mark.parametrize("side", SIDES)
def test_track_keeps_up_with_the_first_moment(side: Any) -> None:
    """Noise far larger than the signal: only what the moment has gathered can show the subspace."""
    shape, rank = (60, 40), 4
    signal = decaying_matrix(60, 4, seed=1) @ decaying_matrix(4, 40, seed=2)
    signal = signal / signal.norm()
    projection = Projection(shape=shape, side=side, rank=rank)
    kept = {}
    for uses_momentum in (True, False):
        moment, bases = torch.zeros(shape), None
        for step in range(60):
            grad = signal + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(step))
            moment = 0.95 * moment + 0.05 * grad
            known = None
            if bases is not None:
                low = projection.project(moment / (1 - 0.95 ** (step + 1)), bases)
                known = Known(bases=bases, momentum=low if uses_momentum else None)
            bases = found("track", grad, side=side, refresh=step, known=known).bases
        assert bases is not None
        kept[uses_momentum] = float(projection.project(signal, bases).square().sum())
    assert kept[True] > 0.75
    assert kept[True] > kept[False] + 0.1


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("with_momentum", [True, False])
def test_track_is_its_formula(side: Any, shape: Any, rho: float, with_momentum: bool) -> None:
    grad, bases = decaying_matrix(*shape, dtype=torch.float64), random_bases(shape, side, 4)
    momentum = random_momentum(shape, side, 4) if with_momentum else None
    result = found(Track(rho), grad, side=side, known=Known(bases=bases, momentum=momentum))
    for basis, expected in zip(result.bases, reference.tracked(grad, side, bases, momentum, rho), strict=True):
        torch.testing.assert_close(basis, expected, rtol=0, atol=1e-10)


def test_track_follows_the_tracked_matrix_at_other_ranks_too() -> None:
    """With more columns than the last basis had, the moment of the old ones still counts."""
    shape, old = (40, 24), random_bases((40, 24), "right", 4)
    momentum, grad = random_momentum(shape, "right", 4), decaying_matrix(40, 24, dtype=torch.float64)
    for rank in (2, 6):
        (basis,) = found(Track(0.99), grad, rank=rank, known=Known(bases=old, momentum=momentum)).bases
        wide, narrow = (basis, old[0]) if rank > 4 else (old[0], basis)
        blend = 0.99 * momentum @ old[0].mT / momentum.norm() + 0.01 * grad / grad.norm()
        assert basis.shape == (24, rank)
        assert float((wide.mT @ narrow).square().sum()) > 0.999 * min(rank, 4)
        assert reference.energy(blend.mT, basis) > 0.3 * reference.best_energy(blend, rank)


def test_track_takes_its_weight_from_the_configuration() -> None:
    assert Track.build(GaLoreConfig(tracking_rho=0.25)).rho == 0.25
    assert Track().rho == GaLoreConfig().tracking_rho


@pytest.mark.parametrize("rank", [4, 70])
@pytest.mark.parametrize("other", [-3, 0, 3])
@pytest.mark.parametrize("side", SIDES)
def test_power_starts_from_a_basis_of_another_rank(rank: int, other: int, side: Any) -> None:
    grad = decaying_matrix(96, 80)
    old = found("svd", grad, side=side, rank=rank + other).bases
    bases = found("power", grad, side=side, rank=rank, known=Known(bases=old)).bases
    for basis, before in zip(bases, old, strict=True):
        assert basis.shape == (before.shape[0], rank)
        common = min(rank, rank + other, 4)
        assert_same_subspace(basis[:, :common], before[:, :common], atol=2e-2)


def test_a_narrower_basis_leaves_room_for_fresh_columns() -> None:
    """Were all 20 old columns to fill the block, a power iteration could not see what is new."""
    grad, rows = torch.zeros(60, 60), torch.arange(60)
    grad[rows, rows] = torch.where(rows < 4, 1.0, 1e-3)
    old = torch.eye(60)[:, 10:30]
    (basis,) = found("power", grad, rank=4, known=Known(bases=(old,))).bases
    assert reference.energy(grad.mT, basis) > 0.99 * reference.best_energy(grad, 4)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("rank", [4, 70])
@pytest.mark.parametrize("fix_signs", [True, False])
def test_vectors_keep_the_signs_of_the_last_basis(name: str, rank: int, fix_signs: bool) -> None:
    grad = decaying_matrix(96, 80)
    exact = found("svd", grad, side="full", rank=rank).bases
    signs = torch.where(torch.arange(rank) % 2 == 0, 1.0, -1.0)
    old = tuple(basis * sign for basis, sign in zip(exact, (signs, -signs), strict=True))
    bases = found(name, grad, side="full", rank=rank, known=Known(bases=old), fix_signs=fix_signs).bases
    for basis, before in zip(bases, old, strict=True):
        cosines = (basis * before).sum(0)
        assert bool((cosines >= 0).all())
        assert float(cosines[:4].min()) > 0.99


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [4, 64])
def test_gradient_that_does_not_touch_the_last_basis_starts_anew(name: str, side: Any, rank: int) -> None:
    """From such a basis a power iteration would get nothing but zeros, for ever."""
    grad = torch.zeros(160, 160)
    grad[:80, :80] = decaying_matrix(80, 80)
    unseen = torch.eye(160)[:, 80 : 80 + rank]
    sides = Projection(shape=(160, 160), side=side, rank=rank).oriented(grad)
    bases = found(name, grad, side=side, rank=rank, known=Known(bases=(unseen,) * len(sides))).bases
    for matrix, basis in zip(sides, bases, strict=True):
        assert reference.energy(matrix, basis) > 0.99 * reference.best_energy(grad, rank)


def test_moment_that_is_not_finite_is_left_alone() -> None:
    grad, bases = decaying_matrix(40, 24), random_bases((40, 24), "right", 4)
    momentum = torch.full((40, 4), torch.nan)
    (basis,) = found("track", grad, known=Known(bases=bases, momentum=momentum)).bases
    assert reference.energy(grad.mT, basis) > 0.999 * reference.best_energy(grad, 4)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_magnitude_of_what_is_followed_does_not_matter(name: str, rank: int, magnitude: float) -> None:
    grad, bases = decaying_matrix(96, 80), random_bases((96, 80), "right", rank)
    momentum = random_momentum((96, 80), "right", rank).float()
    one, other = (
        found(name, grad * factor, rank=rank, known=Known(bases=bases, momentum=momentum * factor))
        for factor in (1.0, magnitude)
    )
    assert_same_subspace(one.bases[0], other.bases[0], atol=1e-3)
    assert one.spectrum is not None
    assert other.spectrum is not None
    torch.testing.assert_close(other.spectrum[:4] / magnitude, one.spectrum[:4], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("rank", [4, 64])
def test_spectrum_of_a_followed_basis(name: str, rank: int) -> None:
    grad = 3e4 * decaying_matrix(96, 80)
    (old,) = found("svd", grad, rank=rank).bases
    spectrum = found(name, grad, rank=rank, known=Known(bases=(old,))).spectrum
    assert spectrum is not None
    torch.testing.assert_close(spectrum[:rank], torch.linalg.svdvals(grad)[:rank], rtol=1e-3, atol=0)


class LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that an operation allocated."""

    def __init__(self, grad: Tensor) -> None:
        super().__init__()
        self.own = grad.untyped_storage().data_ptr()
        self.numel = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() != self.own:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("svd", "gram", "tucker", "tucker_warm")])
@pytest.mark.parametrize("side", SIDES)
def test_nothing_of_the_size_of_the_gradient_is_allocated(name: str, side: Any) -> None:
    """A refresh comes when memory is shortest."""
    grad, bases = decaying_matrix(96, 80), random_bases((96, 80), side, 4, dtype=torch.float32)
    known = Known(bases=bases, momentum=random_momentum((96, 80), side, 4).float())
    for choice in (known, None) if name != "blend" else (known,):  # which begins with an exact SVD, once
        with LargestResult(grad) as largest:
            assert find(name, grad, side=side, known=choice) is not None
        assert 0 < largest.numel <= 96 * (4 + 16)
