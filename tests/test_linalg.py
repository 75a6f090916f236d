# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import linalg
from tests.helpers import assert_orthonormal, assert_same_subspace, captured_energy, decaying_matrix
from tests.reference import codes_reference

SHAPES = [(96, 80), (80, 96), (80, 80)]


def iterated(matrix: Tensor, rank: int, *, passes: int = 5, seed: int = 0) -> linalg.SVDFactors:
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + 8, *matrix.shape)
    start = linalg.gaussian(matrix.shape[passes % 2], width, like=matrix, generator=generator)
    factors = linalg.subspace_iteration(matrix, start, rank=rank, passes=passes)
    assert factors is not None
    return factors


def iterated_pair(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    factors = iterated(matrix, rank)
    return factors.left, factors.right


def fail_for(monkeypatch: pytest.MonkeyPatch, *dtypes: torch.dtype) -> list[torch.dtype]:
    """Let the SVD fail to converge in these dtypes; return the list of dtypes that it is called with."""
    real, calls = torch.linalg.svd, []

    def svd(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(matrix.dtype)
        if matrix.dtype in dtypes:
            raise torch.linalg.LinAlgError("did not converge")
        return real(matrix, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", svd)
    return calls


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_decompositions_run_in_at_least_fp32(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert linalg.decomposition_dtype(dtype) == expected
    for decompose in (linalg.svd_factors, linalg.gram_factors):
        parts = decompose(decaying_matrix(5, 6, dtype=dtype), 2)
        assert parts is not None
        assert {part.dtype for part in parts} == {expected}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 80])
def test_svd_factors_reproduce_the_matrix(shape: tuple[int, int], rank: int) -> None:
    matrix = decaying_matrix(*shape, dtype=torch.float64)
    factors = linalg.svd_factors(matrix, rank)
    assert factors is not None
    left, spectrum, right = factors
    assert (left.shape, right.shape) == ((shape[0], rank), (shape[1], rank))
    assert_orthonormal(left)
    assert_orthonormal(right)
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(spectrum, values, rtol=0, atol=1e-12)
    torch.testing.assert_close(left.mT @ matrix @ right, torch.diag(values[:rank]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(80, 96), (80, 80), (1, 5)])
def test_gram_factors_are_those_of_the_svd(shape: tuple[int, int]) -> None:
    matrix = decaying_matrix(*shape, dtype=torch.float64)
    rank = min(7, *shape)
    exact, factors = linalg.svd_factors(matrix, rank), linalg.gram_factors(matrix, rank)
    assert exact is not None
    assert factors is not None
    torch.testing.assert_close(linalg.fix_signs(factors[0]), linalg.fix_signs(exact.left), rtol=0, atol=1e-12)
    torch.testing.assert_close(factors[1], exact.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("magnitude", [1e-200, 1e200])
def test_gram_factors_give_none_when_squares_leave_the_range(magnitude: float) -> None:
    assert linalg.gram_factors(decaying_matrix(5, 6, dtype=torch.float64) * magnitude, 2) is None


def test_failed_svd_is_tried_once_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = decaying_matrix(12, 8)
    exact = linalg.svd_factors(matrix, 3)
    calls = fail_for(monkeypatch, torch.float32)
    factors = linalg.svd_factors(matrix, 3)
    assert calls == [torch.float32, torch.float64]
    assert exact is not None
    assert factors is not None
    assert {part.dtype for part in factors} == {torch.float32}
    assert_same_subspace(factors.left, exact.left)


def test_svd_that_fails_twice_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail_for(monkeypatch, torch.float32, torch.float64)
    assert linalg.svd_factors(torch.randn(6, 4), 2) is None
    assert calls == [torch.float32, torch.float64]
    assert linalg.subspace_iteration(torch.randn(6, 4), torch.randn(6, 3), rank=2, passes=2) is None


def test_svd_that_returns_nan_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def svd(matrix: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        m, n = matrix.shape
        nan = torch.full((m, n), torch.nan)
        return nan, nan[0], nan.mT

    monkeypatch.setattr(torch.linalg, "svd", svd)
    assert linalg.svd_factors(torch.randn(4, 4), 2) is None


@pytest.mark.parametrize("shape", [(160, 96), (96, 160), (96, 96)])
@pytest.mark.parametrize("rank", [1, 4, 64, 96])
def test_subspace_iteration_keeps_nearly_the_best_energy(shape: tuple[int, int], rank: int) -> None:
    matrix = decaying_matrix(*shape)
    exact = linalg.svd_factors(matrix.double(), rank)
    assert exact is not None
    left, right = iterated_pair(matrix, rank)
    for basis, best, oriented in ((left, exact.left, matrix), (right, exact.right, matrix.mT)):
        assert_orthonormal(basis)
        share = captured_energy(oriented, basis) / captured_energy(oriented.double(), best)
        assert 0.99 <= float(share) <= 1 + 1e-5


def test_subspace_iteration_finds_an_exactly_low_rank_matrix() -> None:
    matrix = decaying_matrix(40, 3) @ decaying_matrix(3, 30, seed=1)
    left, right = iterated_pair(matrix, 3)
    torch.testing.assert_close(left @ (left.mT @ matrix @ right) @ right.mT, matrix, rtol=0, atol=1e-6)


def test_subspace_iteration_of_a_rank_deficient_matrix_is_orthonormal() -> None:
    matrix = torch.outer(torch.arange(1.0, 31.0), torch.arange(1.0, 21.0))
    for basis in iterated_pair(matrix, 8):
        assert_orthonormal(basis)


@pytest.mark.parametrize("magnitude", [1e-36, 1e-20, 1e30])
def test_magnitude_of_a_gradient_does_not_matter(magnitude: float) -> None:
    matrix = decaying_matrix(30, 20)
    expected, found = iterated_pair(matrix, 4), iterated_pair(matrix * magnitude, 4)
    for one, other in zip(expected, found, strict=True):
        assert_orthonormal(other)
        assert_same_subspace(one, other, atol=1e-4)


@pytest.mark.parametrize("passes", [2, 3, 4, 5])
def test_subspace_iteration_gains_with_more_passes(passes: int) -> None:
    """On a flat spectrum, the hard case; and the values are those of what was found, none above the true ones."""
    matrix = torch.randn(80, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fewer, more = (iterated(matrix, 4, passes=count) for count in (passes, passes + 2))
    assert float(fewer.values[:4].sum()) < float(more.values[:4].sum())
    energies = [float(captured_energy(matrix, factors.left)) for factors in (fewer, more)]
    assert energies[0] < energies[1]
    assert float(captured_energy(matrix.mT, more.right)) < energies[1]
    assert bool((more.values <= torch.linalg.svdvals(matrix)[: len(more.values)] + 1e-12).all())


def test_subspace_iteration_keeps_directions_that_squares_would_lose() -> None:
    """Singular values down to 1e-5 of the first, whose squares are below fp32's rounding error."""
    left, right = (linalg.orthonormalize(decaying_matrix(n, n, dtype=torch.float64)) for n in (60, 80))
    values = torch.cat([torch.logspace(0, -5, 6, dtype=torch.float64), torch.full((54,), 1e-9, dtype=torch.float64)])
    matrix = ((left * values) @ right[:, :60].mT).float()
    basis = iterated(matrix, 6, passes=4).left
    assert float((left[:, :6].mT @ basis.double()).square().sum(1).min()) > 0.99


@pytest.mark.parametrize("careful", [True, False])
def test_power_iteration_is_its_formula(careful: bool) -> None:
    matrix = 50 * decaying_matrix(30, 20, dtype=torch.float64)
    start = linalg.orthonormalize(torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    found = linalg.power_iteration(lambda x: matrix @ x, lambda x: matrix.mT @ x, start, careful=careful)
    assert found is not None
    expected = torch.linalg.qr(matrix @ (matrix.mT @ start)).Q
    torch.testing.assert_close(linalg.fix_signs(found[0]), linalg.fix_signs(expected), rtol=0, atol=1e-10)
    exact = linalg.svd_factors(matrix, 4)
    assert exact is not None
    again = linalg.power_iteration(lambda x: matrix @ x, lambda x: matrix.mT @ x, exact.left.flip(1), careful=careful)
    assert again is not None
    torch.testing.assert_close(again[1], exact.values[:4], rtol=1e-10, atol=0)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_power_iteration_of_nothing_gives_none(value: float) -> None:
    matrix = torch.full((6, 5), value)
    assert linalg.power_iteration(lambda x: matrix @ x, lambda x: matrix.mT @ x, torch.ones(6, 2), careful=True) is None


def test_align_signs_follows_the_old_vectors() -> None:
    old = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]])
    basis = torch.tensor([[-0.9, 0.1, 0.0], [0.1, -0.9, 0.0], [0.0, 0.0, -1.0]])
    expected = torch.tensor([[0.9, 0.1, 0.0], [-0.1, -0.9, 0.0], [0.0, 0.0, -1.0]])
    assert torch.equal(linalg.align_signs(basis, old), expected)
    assert torch.equal(linalg.align_signs(basis[:, :1], old.bfloat16()), expected[:, :1])
    across = torch.tensor([[0.0], [0.0], [1.0]])
    assert torch.equal(linalg.align_signs(across, old), across)


def test_orthonormalize_keeps_the_span() -> None:
    block = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    basis = linalg.orthonormalize(block)
    assert_orthonormal(basis)
    torch.testing.assert_close(basis @ (basis.mT @ block), block)


def test_orthonormalize_survives_a_rank_deficient_block() -> None:
    block = torch.ones(12, 3)
    basis = linalg.orthonormalize(block)
    assert_orthonormal(basis)
    torch.testing.assert_close(basis @ (basis.mT @ block), block)


def test_fix_signs_makes_the_largest_entry_positive() -> None:
    basis = torch.tensor([[0.6, 0.1], [-0.8, 0.2], [0.0, -0.9]])
    expected = torch.tensor([[-0.6, -0.1], [0.8, -0.2], [0.0, 0.9]])
    assert torch.equal(linalg.fix_signs(basis), expected)
    assert torch.equal(linalg.fix_signs(-basis), expected)
    assert torch.equal(linalg.fix_signs(expected), expected)


def test_overlap_is_blind_to_signs_and_order() -> None:
    basis = linalg.orthonormalize(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)))
    changed = basis[:, [3, 1, 4, 0, 2]] * torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    assert float(linalg.overlap(basis, changed)) == pytest.approx(1.0, abs=1e-6)
    rotated = basis @ linalg.orthonormalize(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
    assert float(linalg.overlap(basis, rotated)) == pytest.approx(1.0, abs=1e-6)


def test_overlap_is_the_mean_squared_cosine() -> None:
    identity = torch.eye(6)
    assert float(linalg.overlap(identity[:, :2], identity[:, 2:4])) == 0.0
    assert float(linalg.overlap(identity[:, :2], identity[:, 1:3])) == 0.5
    tilted = torch.tensor([[0.6], [0.8], [0], [0], [0], [0]])
    assert float(linalg.overlap(identity[:, :1], tilted)) == pytest.approx(0.36)


def test_overlap_of_bf16_bases_is_computed_in_fp32() -> None:
    basis = linalg.orthonormalize(torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).bfloat16()
    result = linalg.overlap(basis, basis)
    assert result.dtype == torch.float32
    assert float(result) == pytest.approx(1.0, abs=1e-2)


def test_captured_energy_against_the_singular_values() -> None:
    matrix = decaying_matrix(30, 20, dtype=torch.float64)
    values = torch.linalg.svdvals(matrix).square()
    factors = linalg.svd_factors(matrix, 5)
    assert factors is not None
    expected = float(values[:5].sum() / values.sum())
    assert float(captured_energy(matrix, factors.left)) == pytest.approx(expected, abs=1e-12)
    assert float(captured_energy(matrix.mT, factors.right)) == pytest.approx(expected, abs=1e-12)


def test_identity_basis_is_the_first_unit_vectors() -> None:
    basis = linalg.identity_basis(4, 2, like=torch.zeros(1, dtype=torch.bfloat16))
    assert basis.dtype == torch.bfloat16
    assert basis.tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]


def test_gaussian_is_standard_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = linalg.gaussian(400, 300, like=torch.zeros(1, dtype=torch.bfloat16), generator=generator)
    assert sample.dtype == torch.float32
    assert float(sample.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(sample.std()) == pytest.approx(1.0, abs=0.01)


def test_overlap_of_bases_of_other_widths_counts_the_narrower_one() -> None:
    identity = torch.eye(6)
    assert float(linalg.overlap(identity[:, :2], identity[:, :4])) == 1.0
    assert float(linalg.overlap(identity[:, :4], identity[:, :2])) == 1.0
    assert float(linalg.overlap(identity[:, :2], identity[:, 1:5])) == 0.5


@pytest.mark.parametrize("shape", [(60, 20), (64, 64), (5, 1), (1, 1)])
@pytest.mark.parametrize("bend", [0.0, 0.05, 0.15])
def test_nearest_orthonormal_is_the_polar_factor(shape: tuple[int, int], bend: float) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = linalg.orthonormalize(torch.randn(*shape, dtype=torch.float64, generator=generator))
    sizes = 1 + bend * (2 * torch.rand(shape[1], dtype=torch.float64, generator=generator) - 1)
    turn = linalg.orthonormalize(torch.randn(shape[1], shape[1], dtype=torch.float64, generator=generator))
    bent = basis @ (turn * sizes) @ turn.mT
    found = linalg.nearest_orthonormal(bent)
    # The first term that the series leaves out, with E = 2 bend + bend^2 at most.
    left = 35 / 128 * (2 * bend + bend**2) ** 4 / (1 - 2 * bend) + 1e-13
    assert float(torch.linalg.matrix_norm(found - codes_reference.polar(bent), 2)) <= left
    torch.testing.assert_close(codes_reference.polar(bent), basis, rtol=0, atol=1e-12)


@pytest.mark.parametrize("error", [-0.4, -0.2, 0.2, 0.4])
def test_nearest_orthonormal_leaves_less_than_a_twentieth(error: float) -> None:
    """At the edge of what counts as nearly orthonormal; of the departure and of the distance to the polar factor."""
    basis = torch.eye(6, 3, dtype=torch.float64)
    bent = basis * (1 + error) ** 0.5
    assert linalg.is_nearly_orthonormal(bent * (1 - 1e-12 if error > 0 else 1 + 1e-12))
    assert not linalg.is_nearly_orthonormal(basis * (1 + 1.01 * 0.4) ** 0.5)
    assert not linalg.is_nearly_orthonormal(basis * (1 - 1.01 * 0.4) ** 0.5)
    found = linalg.nearest_orthonormal(bent)
    assert codes_reference.departure(found) < 0.05 * codes_reference.departure(bent)
    assert float((found - basis).norm()) < 0.05 * float((bent - basis).norm())


def test_one_lost_column_is_not_nearly_orthonormal() -> None:
    basis = torch.eye(6, 3)
    basis[:, 1] = 0
    assert not linalg.is_nearly_orthonormal(basis)
    assert not linalg.is_nearly_orthonormal(torch.full((6, 3), torch.nan))
