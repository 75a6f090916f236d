# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch

from lightning_galore import linalg
from lightning_galore.lift import LIFTS, Rounding, Update
from lightning_galore.storage import Int8Tensor
from lightning_galore.subspace import Projection
from tests.reference import galore_reference as reference

SHAPES = [(12, 7), (7, 12), (9, 9)]
SIDES: list[Any] = ["left", "right", "full"]


def bases_for(projection: Projection, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = projection.basis_shapes
    return tuple(linalg.orthonormalize(torch.randn(d, r, generator=generator).double()).to(dtype) for d, r in shapes)


def project_back_(
    weight: torch.Tensor,
    low_update: torch.Tensor,
    projection: Projection,
    bases: tuple[torch.Tensor, ...],
    **factors: float,
) -> None:
    update = Update(projection=projection, bases=bases, low_update=low_update, low_grad=low_update, **factors)
    LIFTS["project_back"]().apply_(weight, update)


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
    project_back_(weight, update, projection, bases, scale=0.25)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_project_undoes_project_back(shape: tuple[int, int], side: Any) -> None:
    projection = Projection(shape=shape, side=side, rank=3)
    bases = bases_for(projection, torch.float64)
    update = random(*projection.low_shape, dtype=torch.float64)
    weight = torch.zeros(shape, dtype=torch.float64)
    project_back_(weight, update, projection, bases, scale=1.0)
    torch.testing.assert_close(projection.project(weight, bases), update, rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bf16_weight_is_rounded_once(side: Any, basis_dtype: torch.dtype) -> None:
    projection = Projection(shape=(16, 12), side=side, rank=4)
    bases = bases_for(projection, basis_dtype)
    weight = random(16, 12, dtype=torch.bfloat16)
    update = random(*projection.low_shape, dtype=torch.bfloat16)
    exact = weight.double() + 0.5 * reference.project_back(update.double(), tuple(b.double() for b in bases), side)
    project_back_(weight, update, projection, bases, scale=0.5)
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
    project_back_(weight, update, projection, bases, scale=1.0)
    torch.testing.assert_close(weight.double(), exact, rtol=2.0**-8, atol=1e-6)


def test_weight_is_updated_in_place_without_a_full_size_temporary() -> None:
    projection = Projection(shape=(256, 128), side="right", rank=2)
    bases = bases_for(projection, torch.float32)
    weight, update = random(256, 128, dtype=torch.float32), random(256, 2, dtype=torch.float32)
    address = weight.data_ptr()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        project_back_(weight, update, projection, bases, scale=1.0)
    assert weight.data_ptr() == address
    assert all(event.self_cpu_memory_usage < 256 * 128 * 4 for event in profile.key_averages())


@pytest.mark.parametrize("side", SIDES)
def test_shapes_of_a_projection(side: Any) -> None:
    projection = Projection(shape=(10, 6), side=side, rank=2)
    bases = bases_for(projection, torch.float32)
    low = projection.project(random(10, 6, dtype=torch.bfloat16), bases)
    assert low.shape == projection.low_shape == {"left": (2, 6), "right": (10, 2), "full": (2, 2)}[side]
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shrink", [1.0, 0.9, 0.0])
def test_shrinking_and_adding_is_the_formula(side: Any, shrink: float) -> None:
    projection = Projection(shape=(12, 7), side=side, rank=3)
    bases = bases_for(projection, torch.float64)
    weight, update = random(12, 7, dtype=torch.float64), random(*projection.low_shape, dtype=torch.float64)
    expected = shrink * weight + 0.25 * reference.project_back(update, bases, side)
    project_back_(weight, update, projection, bases, scale=0.25, shrink=shrink)
    torch.testing.assert_close(weight, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16])
def test_shrinking_and_adding_is_one_rounding(side: Any, basis_dtype: torch.dtype) -> None:
    """A decay of 1e-3 is below half a bf16 step: rounded by itself it would be lost."""
    projection = Projection(shape=(64, 48), side=side, rank=4)
    bases = bases_for(projection, basis_dtype)
    weight = random(64, 48, dtype=torch.bfloat16)
    update = 0.01 * random(*projection.low_shape, dtype=torch.bfloat16)
    back = reference.project_back(update.double(), tuple(basis.double() for basis in bases), side)
    exact = 0.999 * weight.double() + back
    project_back_(weight, update, projection, bases, scale=1.0, shrink=0.999)
    torch.testing.assert_close(weight.double(), exact, rtol=2.0**-8 * 1.01, atol=1e-6)
    share_of_nearest = float((weight == exact.bfloat16()).double().mean())
    assert share_of_nearest > 0.99


# -- rounding ----------------------------------------------------------------------------------------------------------


def opened(
    weight: torch.Tensor, *, stochastic: bool, change: float, step: int = 0, name: str = "w", seed: int = 0
) -> Any:
    """Add ``change`` to a weight; return what the block was given."""
    with torch.no_grad(), Rounding(stochastic=stochastic, seed=seed).opened(weight, name=name, step=step) as given:
        given.add_(change)
    return given


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_needs_no_random_rounding_is_the_weight_itself(dtype: torch.dtype, stochastic: bool) -> None:
    weight = torch.nn.Parameter(random(6, 5, dtype=dtype))
    rounds = stochastic and dtype == torch.bfloat16
    assert Rounding(stochastic=stochastic, seed=0).concerns(weight) is rounds
    expected = weight.detach() + 0.25
    given = opened(weight, stochastic=stochastic, change=0.25)
    assert (given is weight) is not rounds
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.detach(), expected, rtol=2**-7 if rounds else 0, atol=2**-9 if rounds else 0)


@pytest.mark.parametrize("kept", ["bf16", "int8"])
@pytest.mark.parametrize("stochastic", [False, True])
def test_small_changes_arrive_at_random_only(kept: str, stochastic: bool) -> None:
    """100 changes of 2 % of a step."""
    weight: Any = torch.nn.Parameter(torch.ones(40, 256, dtype=torch.bfloat16))
    if kept == "int8":
        weight = torch.nn.Parameter(Int8Tensor.quantized(torch.linspace(-0.9, 0.9, 40 * 256).view(40, 256)))
        with torch.no_grad():
            weight[:, 0] = 1.0
    unit = 2.0**-7 if kept == "bf16" else 1 / 127
    before = weight.dequantize(torch.float64) if kept == "int8" else weight.detach().double()
    for step in range(100):
        with torch.no_grad(), Rounding(stochastic=stochastic, seed=0).opened(weight, name="w", step=step) as wide:
            assert wide.dtype == torch.float32 or not stochastic
            wide[:, 1:].add_(0.02 * unit)
    after = weight.dequantize(torch.float64) if kept == "int8" else weight.detach().double()
    arrived = ((after - before) / unit)[:, 1:]
    if stochastic:
        assert abs(float(arrived.mean()) - 2.0) < 4 * (100 * 0.02 * 0.98 / arrived.numel()) ** 0.5
    else:
        assert not bool(arrived.any())


@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_names_steps_and_seeds_draw_apart_and_repeat(kept: str) -> None:
    def outcome(**how: Any) -> torch.Tensor:
        start = random(30, 40, dtype=torch.float32)
        weight = torch.nn.Parameter(Int8Tensor.quantized(start) if kept == "int8" else start.bfloat16())
        opened(weight, stochastic=True, change=1e-3, **how)
        return weight.dequantize() if isinstance(weight, Int8Tensor) else weight.detach()

    first = outcome()
    assert torch.equal(first, outcome())
    for how in ({"step": 1}, {"name": "v"}, {"seed": 1}):
        assert not torch.equal(first, outcome(**how))


@pytest.mark.parametrize("kept", ["bf16", "int8"])
def test_nothing_is_written_where_the_change_fails(kept: str) -> None:
    start = random(6, 5, dtype=torch.float32)
    weight = torch.nn.Parameter(Int8Tensor.quantized(start) if kept == "int8" else start.bfloat16())
    before = weight.detach().clone()
    rounding = Rounding(stochastic=True, seed=0)
    with torch.no_grad(), suppress(ArithmeticError), rounding.opened(weight, name="w", step=0) as wide:
        wide.zero_()
        raise ArithmeticError
    assert torch.equal(weight.detach() - before, torch.zeros(6, 5, dtype=weight.dtype))
