# SPDX-License-Identifier: Apache-2.0
"""The battery over every way to find a basis: a new entry of SUBSPACES is tested by standing there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_galore import linalg, storage
from lightning_galore.config import GaLoreConfig, SubspaceName
from lightning_galore.subspace import SIDE_CODES, SUBSPACES, Projection, resolve_side, seeded_generator
from tests.helpers import assert_orthonormal, assert_same_subspace, assert_state_whole, decaying_matrix
from tests.reference import finders_reference as reference
from tests.subspace.common import NAMES, SHAPES, SIDES, found

# Share of the best rank-r energy that a finder must keep of a decaying matrix; None for those that do not look at it.
SHARES: dict[str, float | None] = {
    "randomized": 0.999,
    "svd": 1 - 1e-6,
    "gram": 1 - 1e-6,
    "power": 0.999,
    "track": 0.999,
    "blend": 0.999,
    "columns": 0.4,
    "cross_head": 0.999,  # of weights without heads; tests/family has those with them
    "gaussian": None,
    "random_orthonormal": None,
    "coordinates": None,
    "block": None,
    "tucker": 1 - 1e-6,  # of a matrix; tensors are in tests/family
    "tucker_warm": 1 - 1e-6,
}
EXACT = ["svd", "gram", "tucker", "tucker_warm"]
RANDOM = ["gaussian", "random_orthonormal", "coordinates", "block"]
UNIT = ["coordinates", "block"]  # unit vectors
SEEDED = ["randomized", "power", "track", "cross_head", *RANDOM]
# Those that know singular values.
SPECTRAL = ["randomized", "svd", "gram", "power", "track", "blend", "cross_head", "tucker", "tucker_warm"]


def test_every_subspace_can_be_named_and_built() -> None:
    assert {"auto", *SUBSPACES} == set(SubspaceName.__args__)  # type: ignore[attr-defined]
    assert set(SHARES) == set(SUBSPACES)
    for name in NAMES:
        finder = SUBSPACES[name].build(GaLoreConfig(rank=4, subspace=name))  # type: ignore[arg-type]
        assert type(finder) is SUBSPACES[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("shape", "rank"), [*((shape, rank) for shape in SHAPES for rank in (1, 4, 24)), ((1, 7), 1), ((7, 1), 1)]
)
def test_bases_have_their_shapes_and_are_orthonormal(name: str, shape: Any, side: Any, rank: int) -> None:
    bases = found(name, decaying_matrix(*shape), side=side, rank=rank).bases
    assert tuple(basis.shape for basis in bases) == Projection(shape=shape, side=side, rank=rank).basis_shapes
    for basis in bases:
        assert bool(torch.isfinite(basis).all())
        if SUBSPACES[name].orthonormal:
            assert_orthonormal(basis)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bases_are_stored_whole_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    result = found(name, decaying_matrix(40, 24, dtype=dtype))
    (basis,) = result.bases
    assert basis.dtype == linalg.decomposition_dtype(dtype)
    assert result.spectrum is None or result.spectrum.dtype == basis.dtype
    stored = storage.write(basis, storage="param", param_dtype=dtype).codes
    assert stored.dtype == dtype
    assert_state_whole({"basis": stored})
    if SUBSPACES[name].orthonormal:
        assert_orthonormal(stored)


@pytest.mark.parametrize("name", [name for name in NAMES if SHARES[name] is not None])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 4, 64, 96])
def test_basis_keeps_its_share_of_the_best_energy(name: str, side: Any, rank: int) -> None:
    for shape in ((160, 96), (96, 160), (96, 96)):
        grad = decaying_matrix(*shape)
        best = reference.best_energy(grad, rank)
        projection = Projection(shape=shape, side=side, rank=rank)
        for matrix, basis in zip(projection.oriented(grad), found(name, grad, side=side, rank=rank).bases, strict=True):
            share = reference.energy(matrix, basis) / best
            assert SHARES[name] <= share <= 1 + 1e-5, f"{shape}: {share}"  # type: ignore[operator]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_finders_give_the_singular_vectors(name: str, shape: Any) -> None:
    grad = decaying_matrix(*shape, dtype=torch.float64)
    exact = torch.linalg.svd(grad, full_matrices=False)
    for basis, expected in zip(found(name, grad, side="full").bases, (exact.U, exact.Vh.mT), strict=True):
        torch.testing.assert_close(basis, linalg.fix_signs(expected[:, :4]), rtol=0, atol=1e-12)


def test_gram_keeps_small_directions_that_squares_in_fp32_would_lose() -> None:
    """sigma_1 / sigma_r = 1e6, as in gradients of real training."""
    left, right = (linalg.orthonormalize(decaying_matrix(n, n, dtype=torch.float64)) for n in (20, 30))
    grad = ((left * torch.logspace(0, -6, 20, dtype=torch.float64)) @ right[:, :20].mT).float()
    exact = torch.linalg.svd(grad.double(), full_matrices=False)
    for basis, vectors in zip(found("gram", grad, side="full", rank=18).bases, (exact.U, exact.Vh.mT), strict=True):
        cosines = (vectors[:, :18].mT @ basis.double()).diagonal().abs()
        assert float(cosines.min()) > 0.999


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [4, 70])
def test_spectrum_is_that_of_the_gradient(name: str, side: Any, rank: int) -> None:
    for shape in ((120, 80), (80, 120)):
        grad = 3e4 * decaying_matrix(*shape)
        values = torch.linalg.svdvals(grad)
        spectrum = found(name, grad, side=side, rank=rank).spectrum
        assert spectrum is not None
        assert spectrum.ndim == 1
        assert len(spectrum) >= rank
        assert bool((spectrum.diff() <= 0).all())
        assert bool((spectrum <= values[: len(spectrum)] * (1 + 1e-5)).all())
        tolerance = 1e-5 if name in EXACT else 2e-2
        torch.testing.assert_close(spectrum[:4], values[:4], rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SPECTRAL])
def test_finder_that_knows_no_singular_values_gives_no_spectrum(name: str) -> None:
    assert found(name, decaying_matrix(40, 24)).spectrum is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_are_those_of_largest_norm(side: Any) -> None:
    grad = torch.randn(10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = grad if side == "left" else grad.mT
    matrix[:, [1, 5, 6]] *= 10
    assert_same_subspace(
        found("columns", grad, side=side, rank=3).bases[0], linalg.orthonormalize(matrix[:, [1, 5, 6]]), atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_name_and_refresh_give_the_same_basis(name: str) -> None:
    grad = decaying_matrix(40, 24)
    one, other = (found(name, grad, side="full", refresh=3).bases for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", [name for name in SEEDED if name != "block"])  # which has few choices
def test_other_seed_or_refresh_gives_another_basis(name: str) -> None:
    grad = decaying_matrix(40, 24)
    (first,) = found(name, grad).bases
    for change in ({"seed": 1}, {"refresh": 1}):
        (other,) = found(name, grad, **change).bases
        assert not torch.equal(first, other)


def test_generator_depends_on_each_of_its_keys() -> None:
    keys = {"seed": 0, "name": "a", "draw": 0}
    variants: list[dict[str, Any]] = [keys, {**keys, "seed": 1}, {**keys, "name": "b"}, {**keys, "draw": 1}]
    draws = [float(torch.rand(1, generator=seeded_generator(torch.device("cpu"), **key))) for key in variants]
    assert len(set(draws)) == 4
    assert draws[0] == float(torch.rand(1, generator=seeded_generator(torch.device("cpu"), seed=0, name="a", draw=0)))


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    found(name, decaying_matrix(40, 24))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
def test_signs_are_fixed_unless_asked_otherwise(name: str) -> None:
    grad = decaying_matrix(40, 24)
    free = found(name, grad, side="full", rank=16, fix_signs=False).bases
    fixed = found(name, grad, side="full", rank=16).bases
    # With this gradient LAPACK's signs and the random ones are not the fixed ones already.
    changed = any(not torch.equal(basis, other) for basis, other in zip(fixed, free, strict=True))
    assert changed == (SUBSPACES[name].orthonormal and name not in UNIT)
    for basis, other in zip(fixed, free, strict=True):
        assert torch.equal(basis.abs(), other.abs())
        if SUBSPACES[name].orthonormal:
            assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("name", [name for name in NAMES if SHARES[name] is not None])
def test_negated_gradient_has_the_same_basis(name: str) -> None:
    grad = decaying_matrix(40, 24)
    pair = (found(name, matrix, side="full").bases for matrix in (grad, -grad))
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RANDOM)
def test_one_side_draws_its_own_numbers_only(name: str) -> None:
    for side, other in (("left", (40, 30)), ("right", (30, 24))):
        one, same = (found(name, decaying_matrix(*shape), side=side).bases for shape in ((40, 24), other))
        assert torch.equal(one[0], same[0])


def test_gaussian_keeps_lengths_in_the_mean() -> None:
    grad = torch.zeros(16, 400)
    grad[0, 0] = 1.0
    bases = [found("gaussian", grad, rank=100, refresh=i).bases[0] for i in range(20)]
    mean = torch.stack([basis @ basis.mT for basis in bases]).mean(0)
    assert float(mean.diagonal().mean()) == pytest.approx(1.0, abs=0.02)
    assert float((mean - torch.eye(400)).abs().max()) < 0.2


@pytest.mark.parametrize(
    ("proj_type", "tall", "square", "wide"),
    [
        ("std", "right", "right", "left"),
        ("reverse_std", "left", "left", "right"),
        ("left", "left", "left", "left"),
        ("right", "right", "right", "right"),
        ("full", "full", "full", "full"),
    ],
)
def test_sides_follow_galore_torch(proj_type: Any, tall: str, square: str, wide: str) -> None:
    sides = [resolve_side(proj_type, shape) for shape in ((5, 3), (4, 4), (3, 5))]
    assert sides == [tall, square, wide]
    assert set(sides) <= set(SIDE_CODES)
