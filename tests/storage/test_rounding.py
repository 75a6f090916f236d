# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_galore.storage import round_stochastically_

DRAWS = 40_000
UNIT = 2.0**-7  # the distance of bf16 numbers between 1 and 2


def rounded(value: Tensor, seed: int = 0) -> Tensor:
    target = torch.zeros(value.shape, dtype=torch.bfloat16)
    round_stochastically_(target, value, torch.Generator().manual_seed(seed))
    return target


def neighbours(value: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers at or next to ``value``, of the least and of the largest magnitude."""
    near = value.bfloat16()
    toward = torch.nextafter(near, torch.zeros((), dtype=torch.bfloat16))
    inner = torch.where(near.float().abs() > value.abs(), toward, near)
    away = torch.nextafter(inner, (torch.inf * value.sign()).bfloat16())
    return inner, torch.where(inner.float() == value, inner, away)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("magnitude", [2.0**-118, 2.0**-20, 1.0, 2.0**100])
def test_right_in_the_mean_and_a_neighbour(sign: float, magnitude: float) -> None:
    shares = torch.tensor([0.0, 2.0**-16, 0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1 - 2.0**-16])
    units = torch.cat([128 + shares, 200 + shares, 255 + shares])
    scale = sign * magnitude * UNIT
    value = (units * scale).to(torch.float32)
    assert torch.equal(value.double() / scale, units.double())
    drawn = rounded(value.repeat(DRAWS, 1))
    inner, outer = neighbours(value)
    assert bool(((drawn == inner) | (drawn == outer)).all())
    exact = units.double() - units.double().floor()
    mean = drawn.double().mean(0) / scale - units.double()
    deviation = (exact * (1 - exact) / DRAWS).sqrt()
    # The rare ones follow Poisson's law: two more events than the bound are within it.
    assert bool((mean.abs() <= 4.5 * deviation + 2 / DRAWS * (exact > 0)).all())
    torch.testing.assert_close(drawn.double().div(scale).var(0), exact * (1 - exact), rtol=0.1, atol=1e-3)


def test_every_share_goes_up_just_as_often_as_it_says() -> None:
    """All 65536 lower halves, with all 65536 noises' sum: the mean over the halves is one half, less half a unit."""
    value = (0x3F800000 + torch.arange(1 << 16, dtype=torch.int32)).view(torch.float32)
    ups = torch.stack([rounded(value, seed) != 1.0 for seed in range(30)]).double()
    assert not bool(ups[:, 0].any())
    assert abs(float(ups.mean()) - 0.5) < 4 / (12 * 30 * 2**16) ** 0.5
    for quarter, expected in zip(ups.mean(0).chunk(4), (0.125, 0.375, 0.625, 0.875), strict=True):
        assert abs(float(quarter.mean()) - expected) < 4 * 0.5 / (30 * 2**14) ** 0.5


def test_what_bf16_holds_never_changes() -> None:
    """All numbers of bf16, zero of either sign, subnormal ones and infinity among them."""
    every = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
    for seed in range(20):
        assert torch.equal(rounded(every, seed).view(torch.int16), every.bfloat16().view(torch.int16))


def test_infinity_and_nan_pass() -> None:
    value = torch.tensor([torch.inf, -torch.inf, torch.nan]).repeat(1000)
    value = torch.cat([value, torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)])
    found = rounded(value)
    assert torch.equal(found.isnan(), value.isnan())
    assert torch.equal(found.isinf(), value.isinf())
    assert torch.equal(found[:2].float(), value[:2])


def test_a_seed_repeats_and_another_does_not() -> None:
    value = torch.randn(300, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(value, 1), rounded(value, 1))
    assert not torch.equal(rounded(value, 1), rounded(value, 2))


def test_signs_do_not_matter() -> None:
    value = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rounded(-value), -rounded(value))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (5, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rounded(value).float(), value, rtol=2**-7, atol=0)


def test_memory_order_does_not_matter() -> None:
    value = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(8, 6, dtype=torch.bfloat16).mT
    round_stochastically_(target, value.mT.contiguous().mT, torch.Generator().manual_seed(0))
    assert torch.equal(target, rounded(value))


def test_small_updates_arrive_that_nearest_rounding_loses() -> None:
    """400 updates of a hundredth of the distance between two numbers."""
    weight, lost = torch.ones(5000, dtype=torch.bfloat16), torch.ones(5000, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        round_stochastically_(weight, weight.float() + 0.01 * UNIT, generator)
        lost.add_(0.01 * UNIT)
    arrived = (weight.double() - 1) / UNIT
    assert abs(float(arrived.mean()) - 4.0) < 4 * (400 * 0.01 * 0.99 / 5000) ** 0.5
    assert bool((lost == 1).all())
