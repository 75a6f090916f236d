# SPDX-License-Identifier: Apache-2.0
"""Gradients that are hard to decompose, and decompositions that fail: over every way to find a basis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore.subspace import SUBSPACES, Projection
from tests.helpers import assert_orthonormal, assert_same_subspace, decaying_matrix
from tests.reference import finders_reference as reference
from tests.subspace.common import NAMES, SIDES, find, found

# Those that find the gradient's dominant subspace.
LOOKING = ["randomized", "svd", "gram", "power", "track", "blend", "tucker", "tucker_warm"]


def no_decomposition(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("a decomposition was run")


def failing(*args: Any, **kwargs: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


def deficient() -> dict[str, Tensor]:
    """Gradients of less than rank 8."""
    single, twins = torch.zeros(40, 24), decaying_matrix(40, 24)
    single[7, 5] = -2.0
    twins[:, 3:] = twins[:, :1]
    return {"outer": torch.outer(torch.arange(1.0, 41.0), torch.arange(1.0, 25.0)), "single": single, "twins": twins}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", list(deficient()))
def test_rank_deficient_gradient_gives_a_whole_basis(name: str, side: Any, kind: str) -> None:
    grad = deficient()[kind]
    bases = found(name, grad, side=side, rank=8).bases
    for basis, matrix in zip(bases, Projection(shape=(40, 24), side=side, rank=8).oriented(grad), strict=True):
        if SUBSPACES[name].orthonormal:
            assert_orthonormal(basis)
        assert bool(torch.isfinite(basis).all())
        if name in LOOKING:
            assert reference.energy(matrix, basis) == pytest.approx(reference.best_energy(grad, 8), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
def test_gradient_without_a_direction_gives_none_and_reaches_no_decomposition(
    name: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for decomposition in ("svd", "qr", "eigh"):
        monkeypatch.setattr(torch.linalg, decomposition, no_decomposition)
    grad = torch.zeros(12, 8)
    grad[5, 3] = bad
    assert find(name, grad) is None
    grad += 1.0
    assert bad == 0.0 or find(name, grad) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_of_one_sign_is_a_gradient(name: str, sign: float) -> None:
    assert find(name, torch.full((12, 8), sign)) is not None


@pytest.mark.parametrize("name", [n for n in NAMES if SUBSPACES[n].orthonormal and n not in ("coordinates", "block")])
def test_basis_that_is_not_finite_gives_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grad = decaying_matrix(40, 24)  # made before QR is spoilt
    real_qr, real_svd, real_eigh = torch.linalg.qr, torch.linalg.svd, torch.linalg.eigh
    spoil = lambda result: type(result)(tuple(torch.full_like(part, torch.nan) for part in result))  # noqa: E731
    monkeypatch.setattr(torch.linalg, "qr", lambda *args, **options: spoil(real_qr(*args, **options)))
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **options: spoil(real_svd(*args, **options)))
    monkeypatch.setattr(torch.linalg, "eigh", lambda *args, **options: spoil(real_eigh(*args, **options)))
    assert find(name, grad) is None


@pytest.mark.parametrize("name", ["gaussian", "random_orthonormal", "columns", "coordinates", "block"])
def test_cheap_subspaces_never_run_an_svd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", no_decomposition)
    monkeypatch.setattr(torch.linalg, "eigh", no_decomposition)
    assert find(name, decaying_matrix(40, 24), side="full") is not None


@pytest.mark.parametrize("name", LOOKING)
def test_failed_decomposition_gives_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", failing)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    assert find(name, decaying_matrix(40, 24)) is None


@pytest.mark.parametrize("side", SIDES)
def test_gram_falls_back_to_the_svd(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    grad = decaying_matrix(40, 24)
    expected = found("svd", grad, side=side)
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    for basis, other in zip(found("gram", grad, side=side).bases, expected.bases, strict=True):
        assert torch.equal(basis, other)
    monkeypatch.undo()
    huge = found("gram", decaying_matrix(40, 24, dtype=torch.float64) * 1e200)
    torch.testing.assert_close(huge.bases[0].float(), found("svd", grad).bases[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*LOOKING, "columns"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_magnitude_of_a_gradient_does_not_matter(name: str, side: Any, magnitude: float) -> None:
    grad = decaying_matrix(40, 24)
    plain, scaled = (found(name, matrix, side=side) for matrix in (grad, grad * magnitude))
    for one, other in zip(plain.bases, scaled.bases, strict=True):
        assert_orthonormal(other)
        assert_same_subspace(one, other, atol=1e-4)
    if plain.spectrum is not None and scaled.spectrum is not None:
        torch.testing.assert_close(scaled.spectrum[:4] / magnitude, plain.spectrum[:4], rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", SIDES)
def test_layout_of_a_gradient_does_not_matter(name: str, side: Any) -> None:
    grad = decaying_matrix(40, 24)
    wide = torch.randn(40, 48)
    wide[:, ::2] = grad
    for layout in (grad.mT.contiguous().mT, wide[:, ::2]):
        assert not layout.is_contiguous()
        before = layout.clone()
        bases = found(name, layout, side=side).bases
        assert torch.equal(layout, before), "the gradient was written to"
        for one, other in zip(bases, found(name, grad, side=side).bases, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4)
