# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_galore import linalg
from lightning_galore.lift import LIFTS
from lightning_galore.subspace import Projection
from tests.reference import galore_reference as reference

SHAPES = [(12, 7), (7, 12), (9, 9)]
SIDES: list[Any] = ["left", "right", "full"]


def bases_for(projection: Projection, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = projection.basis_shapes
    return tuple(linalg.orthonormalize(torch.randn(d, r, generator=generator).double()).to(dtype) for d, r in shapes)


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_project_back_is_the_formula(shape: tuple[int, int], side: Any, rank: int) -> None:
    projection = Projection(shape=shape, side=side, rank=rank)
    bases = bases_for(projection, torch.float64)
    weight = random(*shape, dtype=torch.float64)
    update = random(*projection.low_shape, dtype=torch.float64)
    expected = weight + 0.25 * reference.project_back(update, bases, side)
    LIFTS["project_back"]().apply_(weight, update, projection, bases, scale=0.25)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_project_undoes_project_back(shape: tuple[int, int], side: Any) -> None:
    projection = Projection(shape=shape, side=side, rank=3)
    bases = bases_for(projection, torch.float64)
    update = random(*projection.low_shape, dtype=torch.float64)
    weight = torch.zeros(shape, dtype=torch.float64)
    LIFTS["project_back"]().apply_(weight, update, projection, bases, scale=1.0)
    torch.testing.assert_close(projection.project(weight, bases), update, rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bf16_weight_is_rounded_once(side: Any, basis_dtype: torch.dtype) -> None:
    projection = Projection(shape=(16, 12), side=side, rank=4)
    bases = bases_for(projection, basis_dtype)
    weight = random(16, 12, dtype=torch.bfloat16)
    update = random(*projection.low_shape, dtype=torch.bfloat16)
    exact = weight.double() + 0.5 * reference.project_back(update.double(), tuple(b.double() for b in bases), side)
    LIFTS["project_back"]().apply_(weight, update, projection, bases, scale=0.5)
    assert weight.dtype == torch.bfloat16
    # Half a unit in the last place (2**-9 relative) is one rounding; a two-sided bf16 basis rounds its inner product.
    steps = 2 if side == "full" and basis_dtype == torch.bfloat16 else 1
    error = (weight.double() - exact).abs()
    # A product is rounded before it is added where the basis is wider, which costs at most as much again.
    assert bool((error <= steps * 2.0**-9 * (exact.abs() + (exact - weight.double()).abs() + 2.0)).all())


@pytest.mark.parametrize("side", SIDES)
def test_wider_basis_leaves_no_more_than_the_last_rounding(side: Any) -> None:
    projection = Projection(shape=(16, 12), side=side, rank=4)
    bases = bases_for(projection, torch.float32)
    weight, update = torch.zeros(16, 12, dtype=torch.bfloat16), random(*projection.low_shape, dtype=torch.bfloat16)
    exact = reference.project_back(update.double(), tuple(basis.double() for basis in bases), side)
    LIFTS["project_back"]().apply_(weight, update, projection, bases, scale=1.0)
    torch.testing.assert_close(weight.double(), exact, rtol=2.0**-8, atol=1e-6)


def test_weight_is_updated_in_place_without_a_full_size_temporary() -> None:
    projection = Projection(shape=(256, 128), side="right", rank=2)
    bases = bases_for(projection, torch.float32)
    weight, update = random(256, 128, dtype=torch.float32), random(256, 2, dtype=torch.float32)
    address = weight.data_ptr()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        LIFTS["project_back"]().apply_(weight, update, projection, bases, scale=1.0)
    assert weight.data_ptr() == address
    assert all(event.self_cpu_memory_usage < 256 * 128 * 4 for event in profile.key_averages())


@pytest.mark.parametrize("side", SIDES)
def test_shapes_of_a_projection(side: Any) -> None:
    projection = Projection(shape=(10, 6), side=side, rank=2)
    bases = bases_for(projection, torch.float32)
    low = projection.project(random(10, 6, dtype=torch.bfloat16), bases)
    assert low.shape == projection.low_shape == {"left": (2, 6), "right": (10, 2), "full": (2, 2)}[side]
    assert low.dtype == torch.bfloat16
