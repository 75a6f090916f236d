# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import linalg, storage
from lightning_galore.bases import StoredBases
from lightning_galore.coordinates import Coordinates
from lightning_galore.low_grad import Accumulator, LowGrad, clip_
from lightning_galore.storage import INT8
from lightning_galore.subspace import Projection
from lightning_galore.target_table import Target
from tests.helpers import same_bits

SHAPE, RANK = (48, 40), 4
KEPT = ["param", "fp32", "bf16", "int8"]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def accumulator(kept: str, *, seed: int = 0) -> Accumulator | None:
    draws = count(1000 * seed)
    return None if kept == "param" else Accumulator(kept, lambda: torch.Generator().manual_seed(next(draws)))


def low_grad_of(
    grad: Tensor, *, kept: str = "param", side: Any = "right", basis_storage: str = "param", seed: int = 0
) -> LowGrad:
    projection = Projection(shape=SHAPE, side=side, rank=RANK)
    found = [linalg.orthonormalize(gaussian(d, r, seed=5)) for d, r in projection.basis_shapes]
    stored = StoredBases.write(found, kept=basis_storage, param_dtype=grad.dtype, orthonormal=True)
    coordinates = Coordinates(projection, stored, None, dtype=grad.dtype)
    return LowGrad(
        coordinates.project(grad),
        target=Target(name="w", projection=projection),
        coordinates=coordinates,
        refresh=None,
        accumulator=accumulator(kept, seed=seed),
    )


def held(obj: object) -> int:
    """Bytes of all memory that an object's attributes keep alive."""
    found: dict[int, int] = {}

    def walk(one: object) -> None:
        if isinstance(one, Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            walk(one.grad if one.is_leaf else None)
        elif isinstance(one, (list, tuple)):
            for item in one:
                walk(item)
        elif type(one).__module__.startswith("lightning_galore"):
            for value in vars(one).values():
                walk(value)

    walk(obj)
    return sum(found.values())


# -- accumulator -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_waits_comes_back_once(kept: str, dtype: torch.dtype) -> None:
    waiting = accumulator(kept)
    assert waiting is not None
    assert not waiting.is_full
    value = gaussian(30, 20, dtype=dtype)
    waiting.put(value)
    assert waiting.is_full
    back = waiting.take(dtype)
    assert not waiting.is_full
    assert back.dtype == dtype
    tolerance = {"fp32": 2.0**-24, "bf16": 2.0**-8, "int8": 0.04}[kept] + torch.finfo(dtype).eps
    assert float((back - value).abs().max()) <= tolerance * float(value.abs().max())
    if kept == "fp32" and dtype != torch.float64:
        assert torch.equal(back, value)


@pytest.mark.parametrize(("kept", "expected"), [("fp32", 4), ("bf16", 2)])
def test_what_waits_is_a_copy_of_its_own_size(kept: str, expected: int) -> None:
    waiting, value = accumulator(kept), gaussian(30, 20)
    assert waiting is not None
    waiting.put(value)
    assert held(waiting) == 600 * expected
    value.zero_()
    assert bool(waiting.take(torch.float32).any())


def test_int8_sums_are_right_in_the_mean() -> None:
    """A sum of small parts beside a large one, 400 times over: within 4 standard errors, which are a few percent."""
    parts = [torch.full((256,), 0.3 / 127) for _ in range(8)]
    for part in parts:
        part[0] = 1.0
    sums = []
    for seed in range(400):
        waiting = accumulator("int8", seed=seed)
        assert waiting is not None
        waiting.put(parts[0])
        for part in parts[1:]:
            waiting.add(part)
        sums.append(waiting.take(torch.float64))
    arrived = torch.stack(sums)[:, 1:]
    exact = 8 * 0.3 / 127
    deviation = float(arrived.std()) / arrived.numel() ** 0.5
    assert abs(float(arrived.mean()) - exact) < 4 * deviation
    assert deviation < 0.02 * exact


# -- low-rank gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("side", ["left", "right", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis_storage", ["param", "int4"])
def test_micro_batches_add_up(kept: str, side: Any, dtype: torch.dtype, basis_storage: str) -> None:
    grads = [gaussian(*SHAPE, seed=seed, dtype=dtype) for seed in range(6)]
    low = low_grad_of(grads[0], kept=kept, side=side, basis_storage=basis_storage)
    bases = tuple(basis.double() for basis in low.coordinates.bases)
    exact = low.projection.project(torch.stack([grad.double() for grad in grads]).sum(0), bases)
    low.wait()
    for grad in grads[1:]:
        low.add_(grad)
        low.wait()
    assert low.grad.dtype == dtype
    error = float((low.grad.double() - exact).norm() / exact.norm())
    assert error <= {"int8": 0.03, "bf16": 0.01}.get(kept, 0.01 if dtype == torch.bfloat16 else 1e-6)
    assert low.proxy.grad is low.grad
    assert not bool(low.proxy.any())
    assert low.proxy.shape == low.grad.shape == low.projection.low_shape


def test_sums_of_bf16_gradients_are_better_in_fp32() -> None:
    errors = {}
    grads = [(gaussian(*SHAPE, seed=seed) + 1).bfloat16() for seed in range(64)]
    for kept in ("param", "bf16", "fp32"):
        low = low_grad_of(grads[0], kept=kept)
        low.wait()
        # Sums of the projected gradients as they are rounded: so this is about the adding alone.
        exact = sum(low.projection.project(grad, low.coordinates.bases).double() for grad in grads)
        for grad in grads[1:]:
            low.add_(grad)
            low.wait()
        errors[kept] = float((low.grad.double() - exact).norm() / exact.norm())  # type: ignore[union-attr]
    assert errors["fp32"] < 0.003  # the one rounding at the end
    assert errors["fp32"] < 0.5 * min(errors["bf16"], errors["param"])


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("basis_storage", ["param", "int4", "int8"])
def test_waiting_holds_no_more_than_what_waits(kept: str, basis_storage: str) -> None:
    """No decoded basis, no gradient in full precision beside its codes, and no zeros for the wrapped optimizer yet."""
    low = low_grad_of(gaussian(*SHAPE), kept=kept, basis_storage=basis_storage)
    numel = low.grad.numel()
    waiting = {"param": 4 * numel, "fp32": 4 * numel, "bf16": 2 * numel, "int8": INT8.nbytes(numel)}[kept]
    low.wait()
    assert held(low) == low.coordinates.stored.nbytes + waiting
    low.add_(gaussian(*SHAPE, seed=1))
    low.wait()
    assert held(low) == low.coordinates.stored.nbytes + waiting
    low.wait()  # once more does nothing
    assert held(low) == low.coordinates.stored.nbytes + waiting


@pytest.mark.parametrize("kept", KEPT)
def test_waiting_twice_rounds_once(kept: str) -> None:
    lows = [low_grad_of(gaussian(*SHAPE), kept=kept) for _ in range(2)]
    lows[0].wait()
    lows[1].wait()
    lows[1].wait()
    assert same_bits([lows[0].grad], [lows[1].grad])


@pytest.mark.parametrize("kept", KEPT)
def test_the_proxy_stays_the_same_object(kept: str) -> None:
    """Clipping and a GradScaler hold it from before another backward on."""
    low = low_grad_of(gaussian(*SHAPE), kept=kept)
    proxy = low.proxy
    before = low.grad.clone()
    low.wait()
    low.add_(gaussian(*SHAPE))
    low.wait()
    assert low.proxy is proxy
    assert proxy.grad is low.grad
    assert float((low.grad - 2 * before).norm() / before.norm()) < 0.05
    assert proxy.requires_grad


def test_bases_are_decoded_once_until_it_waits() -> None:
    low = low_grad_of(gaussian(*SHAPE), basis_storage="int4")
    first = low.coordinates.bases
    assert low.coordinates.bases is first
    low.wait()
    again = low.coordinates.bases
    assert again is not first
    assert again is low.coordinates.bases
    assert same_bits(first, again)
    assert storage.nbytes(again) == sum(d * r * 4 for d, r in low.projection.basis_shapes)


@pytest.mark.parametrize(("limit", "factor"), [(None, 1.0), (100.0, 1.0), (2.5, 0.5), (5.0, 1.0)])
def test_clip_scales_down_only(limit: float | None, factor: float) -> None:
    grad = torch.tensor([3.0, 4.0])
    clip_(grad, limit)
    torch.testing.assert_close(grad, factor * torch.tensor([3.0, 4.0]))
    clip_(None, limit)
    low = torch.tensor([3.0, 4.0])
    clip_(low, 5.0, norm_sq=torch.tensor(100.0))
    torch.testing.assert_close(low, torch.tensor([1.5, 2.0]))
