# SPDX-License-Identifier: Apache-2.0
"""The battery over every way to find a basis: a new entry of SUBSPACES is tested by standing there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import linalg, storage
from lightning_galore.config import GaLoreConfig, SubspaceName
from lightning_galore.subspace import SIDE_CODES, SUBSPACES, Projection, resolve_side, seeded_generator
from tests.helpers import assert_orthonormal, assert_same_subspace, assert_state_whole, decaying_matrix

SHAPES = [(40, 24), (24, 40), (24, 24)]
SIDES: list[Any] = ["left", "right", "full"]
NAMES = list(SUBSPACES)


def find(
    name: str, grad: Tensor, *, side: Any = "right", rank: int = 4, seed: int = 0, refresh: int = 0, **options: Any
) -> tuple[Tensor, ...] | None:
    generator = seeded_generator(grad.device, seed=seed, name="weight", refresh=refresh)
    projection = Projection(shape=(grad.shape[0], grad.shape[1]), side=side, rank=rank)
    return SUBSPACES[name]().find(grad, projection, generator=generator, **options)


def found(name: str, grad: Tensor, **options: Any) -> tuple[Tensor, ...]:
    bases = find(name, grad, **options)
    assert bases is not None
    return bases


def no_svd(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("an SVD was run")


def failing_svd(*args: Any, **kwargs: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


def test_every_subspace_can_be_named() -> None:
    assert {"auto", *SUBSPACES} == set(SubspaceName.__args__)  # type: ignore[attr-defined]
    assert GaLoreConfig().subspace in SUBSPACES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 4, 24])
def test_bases_have_their_shapes_and_are_orthonormal(name: str, shape: Any, side: Any, rank: int) -> None:
    bases = found(name, decaying_matrix(*shape), side=side, rank=rank)
    assert tuple(basis.shape for basis in bases) == Projection(shape=shape, side=side, rank=rank).basis_shapes
    for basis in bases:
        assert bool(torch.isfinite(basis).all())
        if SUBSPACES[name].orthonormal:
            assert_orthonormal(basis)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bases_are_stored_whole_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    (basis,) = found(name, decaying_matrix(40, 24, dtype=dtype))
    assert basis.dtype == linalg.decomposition_dtype(dtype)
    stored = storage.write(basis, storage="param", param_dtype=dtype)
    assert stored.dtype == dtype
    assert_state_whole({"basis": stored})
    if SUBSPACES[name].orthonormal:
        assert_orthonormal(stored)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rank", [1, 4, 64, 96])
def test_randomized_captures_nearly_the_energy_of_the_exact_svd(side: Any, rank: int) -> None:
    for shape in ((160, 96), (96, 160), (96, 96)):
        grad = decaying_matrix(*shape)
        (basis,), (best,) = (found(name, grad, side=side, rank=rank) for name in ("randomized", "svd"))
        oriented = grad if side == "left" else grad.mT
        share = linalg.captured_energy(oriented, basis) / linalg.captured_energy(oriented, best)
        assert 0.99 <= float(share) <= 1 + 1e-5


def test_svd_is_the_best_subspace() -> None:
    grad = decaying_matrix(40, 24, dtype=torch.float64)
    exact = torch.linalg.svd(grad, full_matrices=False)
    (left, right) = found("svd", grad, side="full")
    assert_same_subspace(left, exact.U[:, :4], atol=1e-12)
    assert_same_subspace(right, exact.Vh[:4].mT, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_name_and_refresh_give_the_same_basis(name: str) -> None:
    grad = decaying_matrix(40, 24)
    one, other = (found(name, grad, side="full", refresh=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["randomized", "gaussian", "random_orthonormal"])
def test_other_seed_or_refresh_gives_another_basis(name: str) -> None:
    grad = decaying_matrix(40, 24)
    (first,) = found(name, grad)
    for change in ({"seed": 1}, {"refresh": 1}):
        (other,) = found(name, grad, **change)
        assert not torch.equal(first, other)


def test_generator_depends_on_each_of_its_keys() -> None:
    keys = {"seed": 0, "name": "a", "refresh": 0}
    variants: list[dict[str, Any]] = [keys, {**keys, "seed": 1}, {**keys, "name": "b"}, {**keys, "refresh": 1}]
    draws = [float(torch.rand(1, generator=seeded_generator(torch.device("cpu"), **key))) for key in variants]
    assert len(set(draws)) == 4
    assert draws[0] == float(
        torch.rand(1, generator=seeded_generator(torch.device("cpu"), seed=0, name="a", refresh=0))
    )


@pytest.mark.parametrize("name", NAMES)
def test_global_random_state_is_left_alone(name: str) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    found(name, decaying_matrix(40, 24))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", SIDES)
def test_rank_deficient_gradient_gives_a_whole_basis(name: str, side: Any) -> None:
    grad = torch.outer(torch.arange(1.0, 41.0), torch.arange(1.0, 25.0))
    for basis in found(name, grad, side=side, rank=8):
        if SUBSPACES[name].orthonormal:
            assert_orthonormal(basis)
        else:
            assert bool(torch.isfinite(basis).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
def test_gradient_without_a_direction_gives_none_and_reaches_no_decomposition(
    name: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    monkeypatch.setattr(torch.linalg, "qr", no_svd)
    grad = torch.zeros(12, 8)
    grad[5, 3] = bad
    assert find(name, grad) is None


@pytest.mark.parametrize("name", ["gaussian", "random_orthonormal"])
def test_random_subspaces_never_run_an_svd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    assert find(name, decaying_matrix(40, 24), side="full") is not None


@pytest.mark.parametrize("name", ["randomized", "svd"])
def test_failed_decomposition_gives_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", failing_svd)
    assert find(name, decaying_matrix(40, 24)) is None


@pytest.mark.parametrize("name", NAMES)
def test_signs_are_fixed_unless_asked_otherwise(name: str) -> None:
    grad = decaying_matrix(40, 24)
    free = found(name, grad, side="full", rank=16, fix_signs=False)
    fixed = found(name, grad, side="full", rank=16)
    # With this gradient LAPACK's signs and the random ones are not the fixed ones already.
    changed = any(not torch.equal(basis, other) for basis, other in zip(fixed, free, strict=True))
    assert changed == SUBSPACES[name].orthonormal
    for basis, other in zip(fixed, free, strict=True):
        assert torch.equal(basis.abs(), other.abs())
        if SUBSPACES[name].orthonormal:
            assert bool((basis.gather(0, basis.abs().argmax(0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("name", ["svd", "randomized"])
def test_negated_gradient_has_the_same_basis(name: str) -> None:
    grad = decaying_matrix(40, 24)
    for one, other in zip(found(name, grad, side="full"), found(name, -grad, side="full"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_gaussian_keeps_lengths_in_the_mean() -> None:
    grad = torch.zeros(16, 400)
    grad[0, 0] = 1.0
    bases = [found("gaussian", grad, rank=100, refresh=i)[0] for i in range(20)]
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
