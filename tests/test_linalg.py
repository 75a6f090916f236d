# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import linalg
from tests.helpers import assert_orthonormal, assert_same_subspace, decaying_matrix

SHAPES = [(96, 80), (80, 96), (80, 80)]


def randomized(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = linalg.randomized_pair(matrix, rank, oversampling=8, power_iterations=2, generator=generator)
    assert pair is not None
    return pair


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
    pair = linalg.svd_pair(decaying_matrix(6, 5, dtype=dtype), 2)
    assert pair is not None
    assert {basis.dtype for basis in pair} == {expected}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 80])
def test_svd_pair_reproduces_the_matrix(shape: tuple[int, int], rank: int) -> None:
    matrix = decaying_matrix(*shape, dtype=torch.float64)
    pair = linalg.svd_pair(matrix, rank)
    assert pair is not None
    left, right = pair
    assert (left.shape, right.shape) == ((shape[0], rank), (shape[1], rank))
    assert_orthonormal(left)
    assert_orthonormal(right)
    values = torch.linalg.svdvals(matrix)[:rank]
    torch.testing.assert_close(left.mT @ matrix @ right, torch.diag(values), rtol=0, atol=1e-12)


def test_failed_svd_is_tried_once_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = decaying_matrix(12, 8)
    exact = linalg.svd_pair(matrix, 3)
    calls = fail_for(monkeypatch, torch.float32)
    pair = linalg.svd_pair(matrix, 3)
    assert calls == [torch.float32, torch.float64]
    assert exact is not None
    assert pair is not None
    assert_same_subspace(pair[0], exact[0])


def test_svd_that_fails_twice_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fail_for(monkeypatch, torch.float32, torch.float64)
    assert linalg.svd_pair(torch.randn(6, 4), 2) is None
    assert calls == [torch.float32, torch.float64]
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"oversampling": 8, "power_iterations": 1, "generator": generator}
    assert linalg.randomized_pair(torch.randn(6, 4), 2, **options) is None


def test_svd_that_returns_nan_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def svd(matrix: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        m, n = matrix.shape
        nan = torch.full((m, n), torch.nan)
        return nan, nan[0], nan.mT

    monkeypatch.setattr(torch.linalg, "svd", svd)
    assert linalg.svd_pair(torch.randn(4, 4), 2) is None


@pytest.mark.parametrize("shape", [(160, 96), (96, 160), (96, 96)])
@pytest.mark.parametrize("rank", [1, 4, 64, 96])
def test_randomized_pair_keeps_nearly_the_best_energy(shape: tuple[int, int], rank: int) -> None:
    matrix = decaying_matrix(*shape)
    exact = linalg.svd_pair(matrix.double(), rank)
    assert exact is not None
    left, right = randomized(matrix, rank)
    for basis, best, oriented in ((left, exact[0], matrix), (right, exact[1], matrix.mT)):
        assert_orthonormal(basis)
        share = linalg.captured_energy(oriented, basis) / linalg.captured_energy(oriented.double(), best)
        assert 0.99 <= float(share) <= 1 + 1e-5


def test_randomized_pair_finds_an_exactly_low_rank_matrix() -> None:
    matrix = decaying_matrix(40, 3) @ decaying_matrix(3, 30, seed=1)
    left, right = randomized(matrix, 3)
    torch.testing.assert_close(left @ (left.mT @ matrix @ right) @ right.mT, matrix, rtol=0, atol=1e-6)


def test_randomized_pair_of_a_rank_deficient_matrix_is_orthonormal() -> None:
    matrix = torch.outer(torch.arange(1.0, 31.0), torch.arange(1.0, 21.0))
    for basis in randomized(matrix, 8):
        assert_orthonormal(basis)


@pytest.mark.parametrize("magnitude", [1e-36, 1e-20, 1e30])
def test_magnitude_of_a_gradient_does_not_matter(magnitude: float) -> None:
    matrix = decaying_matrix(30, 20)
    expected, found = randomized(matrix, 4), randomized(matrix * magnitude, 4)
    for one, other in zip(expected, found, strict=True):
        assert_orthonormal(other)
        assert_same_subspace(one, other, atol=1e-4)


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
    pair = linalg.svd_pair(matrix, 5)
    assert pair is not None
    expected = float(values[:5].sum() / values.sum())
    assert float(linalg.captured_energy(matrix, pair[0])) == pytest.approx(expected, abs=1e-12)
    assert float(linalg.captured_energy(matrix.mT, pair[1])) == pytest.approx(expected, abs=1e-12)


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
