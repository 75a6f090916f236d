# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import gemm
from tests.modes.tracker import LiveBytes, Operators

# On either side of every bound in gemm.py: blocks of rows, with a rest, and less than one.
SHAPES = [(9, 7), (300, 257), (700, 1024)]
RANKS = [1, 5, 40]
needs_onednn = pytest.mark.skipif(not gemm._has_onednn(), reason="no oneDNN product on this processor")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=[True, False], ids=["onednn", "mm"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param)
    with torch.no_grad():
        yield


def layouts(matrix: Tensor) -> list[Tensor]:
    """The same numbers in row-major and column-major order, and in neither."""
    strided = torch.empty(matrix.shape[0], 2 * matrix.shape[1], dtype=matrix.dtype)[:, ::2]
    return [matrix, matrix.mT.contiguous().mT, strided.copy_(matrix)]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_the_matrix_product(shape: tuple[int, int], rank: int) -> None:
    matrix, block = random(*shape), random(shape[1], rank, seed=1)
    exact = matrix.double() @ block.double()
    for one in layouts(matrix):
        for other in layouts(block):
            result = gemm.product(one, other)
            assert result.dtype == torch.float32
            # The rounding of a sum of n products: about sqrt(n) / 2**24 of its size, here with a large margin.
            torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-6 * shape[1] ** 0.5 * 8)
            assert torch.equal(result, gemm.product(one, other))


@pytest.mark.parametrize("beta", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_added_in_place(shape: tuple[int, int], rank: int, beta: float) -> None:
    left, right = random(shape[0], rank, seed=1), random(shape[1], rank, seed=2)
    before = random(*shape)
    exact = beta * before.double() + 0.5 * left.double() @ right.double().mT
    for matrix in layouts(before):
        for own, other in zip(layouts(left), layouts(right), strict=True):
            result = matrix.clone()
            address = result.data_ptr()
            gemm.add_product_(result, own, other, alpha=0.5, beta=beta)
            assert result.data_ptr() == address
            torch.testing.assert_close(result.double(), exact, rtol=0, atol=1e-6 * (2 + rank**0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    matrix, block = random(600, 512, dtype=dtype), random(512, 8, dtype=dtype, seed=1)
    assert torch.equal(gemm.product(matrix, block), (block.mT @ matrix.mT).mT)
    result, expected = matrix.clone(), matrix.clone()
    left = random(600, 8, dtype=dtype, seed=2)
    gemm.add_product_(result, left, block, alpha=0.5, beta=0.9)
    assert torch.equal(result, expected.addmm_(left, block.mT, alpha=0.5, beta=0.9))


@pytest.mark.parametrize("rank", [2, 8, 64])
@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 4096)])
def test_no_temporary_is_of_the_matrix_size(shape: tuple[int, int], rank: int) -> None:
    matrix, left, right = random(*shape), random(shape[0], rank), random(shape[1], rank)
    with LiveBytes() as tracker:
        gemm.product(matrix, right)
        gemm.product(matrix.mT, left)
        gemm.add_product_(matrix, left, right, alpha=0.5, beta=0.9)
    assert tracker.largest <= max(4 * gemm._BLOCK, 4 * max(shape) * rank)
    assert tracker.largest < matrix.nbytes / 2


def uses_onednn(matrix: Tensor, block: Tensor) -> bool:
    with Operators() as seen:
        gemm.product(matrix, block)
    return any("linear_pointwise" in name for name in seen.names)


@needs_onednn
def test_onednn_takes_what_is_large_enough(library: None) -> None:
    enabled = torch.backends.mkldnn.enabled
    large, block = random(512, 768), random(768, 8)
    assert uses_onednn(large, block) is enabled
    assert uses_onednn(random(768, 512).mT, block) is enabled
    assert uses_onednn(nn.Parameter(large), block) is enabled
    assert not uses_onednn(large[:32], block)
    assert not uses_onednn(random(1024, 768), block[:, :1])  # a matrix times a vector is what it is bad at
    assert not uses_onednn(large[:, ::2], block[:384])


def lifts_with_onednn(*shape: int, rank: int, beta: float) -> bool:
    matrix, left, right = torch.zeros(shape), random(shape[0], rank), random(shape[1], rank)
    with Operators() as seen:
        gemm.add_product_(matrix, left, right, alpha=1.0, beta=beta)
    return any("linear_pointwise" in name for name in seen.names)


@needs_onednn
def test_the_lift_goes_where_it_is_faster() -> None:
    enabled = torch.backends.mkldnn.enabled
    assert lifts_with_onednn(512, 768, rank=8, beta=0.9) is enabled
    assert lifts_with_onednn(512, 768, rank=32, beta=1.0) is enabled
    assert lifts_with_onednn(2048, 1024, rank=4, beta=1.0) is enabled
    assert not lifts_with_onednn(512, 768, rank=8, beta=1.0)
    assert not lifts_with_onednn(2048, 1024, rank=16, beta=1.0)
    assert not lifts_with_onednn(64, 64, rank=8, beta=0.9)


@needs_onednn
def test_what_onednn_cannot_do_is_left_to_torch() -> None:
    block = random(768, 8)
    assert not uses_onednn(random(512, 768, dtype=torch.float64), block.double())
    assert not uses_onednn(torch.empty(512, 768, device="meta"), block.to("meta"))
    subclass = torch.Tensor._make_subclass(type("Sharded", (Tensor,), {}), random(512, 768))
    assert not uses_onednn(subclass, block)
    with torch.enable_grad():
        weight = nn.Parameter(random(512, 768))
        gemm.product(weight, block).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0], block.sum(1))
