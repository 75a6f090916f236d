# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from lightning_galore import storage
from lightning_galore.storage import Int8Tensor

KINDS = [*storage.DTYPES, *storage.CODECS]


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("param", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_plain_storages_are_a_dtype(kind: str, expected: torch.dtype) -> None:
    stored = storage.write(gaussian(2, 3), storage=kind, param_dtype=torch.float64)
    assert stored.codes.dtype == expected
    assert stored.absmax is None
    assert not stored.is_coded
    assert stored.read(torch.float32) is stored.codes


@pytest.mark.parametrize(("kind", "codes"), [("int8", torch.int8), ("int4", torch.uint8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codes_say_themselves_how_they_are_read(kind: str, codes: torch.dtype, dtype: torch.dtype) -> None:
    value = gaussian(30, 7)
    stored = storage.write(value, storage=kind, param_dtype=torch.float32)
    assert stored.is_coded
    assert (stored.codes.dtype, stored.shape) == (codes, (30, 7))
    again = dataclasses.replace(stored).read(dtype)
    assert again.dtype == dtype
    assert again.shape == value.shape
    assert float((again.double() - value).norm() / value.norm()) < (0.01 if kind == "int8" else 0.12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_no_view(kind: str) -> None:
    u, _, vh = torch.linalg.svd(gaussian(32, 24), full_matrices=False)
    for view in (u[:, :3], vh[:3].mT):
        assert view.untyped_storage().nbytes() > 3 * storage.nbytes(view)
        written = storage.write(view, storage=kind, param_dtype=torch.float32)
        for part in (written.codes, written.absmax):
            if part is not None:
                assert part.is_contiguous()
                assert part.untyped_storage().nbytes() == storage.nbytes(part)
                assert part.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
        if not written.is_coded:
            assert torch.equal(written.codes, view.to(written.codes.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (63, 1), (5, 13), (64, 4), (257, 3), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_known_beforehand(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    stored = storage.write(gaussian(*shape), storage=kind, param_dtype=dtype)
    assert storage.nbytes([stored.codes, stored.absmax]) == storage.stored_bytes(shape, storage=kind, param_dtype=dtype)


@pytest.mark.parametrize("kind", list(storage.CODECS))
@pytest.mark.parametrize("shape", [(1, 1), (5, 13), (64, 4), (257, 3)])
def test_holds_knows_its_own_codes_and_no_others(kind: str, shape: tuple[int, int]) -> None:
    stored = storage.write(gaussian(*shape), storage=kind, param_dtype=torch.float32)
    codes, absmax = stored.codes, stored.absmax
    assert absmax is not None
    assert storage.holds(codes, absmax, shape)
    assert not storage.holds(codes, None, shape)
    assert not storage.holds(codes, absmax, (shape[0] + 2, shape[1]))
    assert not storage.holds(codes.float(), absmax, shape)
    assert not storage.holds(codes, absmax.float(), shape)
    assert not storage.holds(codes, absmax[:-1], shape)
    assert not storage.holds(codes.flatten()[:-1], absmax, shape)


def test_holds_counts_codes_and_scales_apart() -> None:
    """As many bytes as they should be together, but not each: decoding would fail, or mistake one for the other."""
    codes, absmax = torch.zeros(254, dtype=torch.int8), torch.zeros(2, dtype=torch.bfloat16)
    assert storage.nbytes([codes, absmax]) == storage.INT8.nbytes(256)
    assert not storage.holds(codes, absmax, (256,))
    assert not storage.holds(torch.zeros(256, dtype=torch.int8), torch.zeros(2, dtype=torch.int8), (256,))
    assert not storage.holds(torch.zeros(2, 128, dtype=torch.int8), absmax[:1], (256,))


def test_nbytes_walks_through_a_state() -> None:
    state = {
        "codes": torch.zeros(10, dtype=torch.uint8),
        "nested": {"exp_avg": torch.zeros(4, 2), "list": [torch.zeros(3, dtype=torch.bfloat16), None]},
        "step": 3,
        "name": "text",
        "empty": torch.zeros(0),
    }
    assert storage.nbytes(state) == 10 + 32 + 6
    assert storage.nbytes(None) == 0


def test_nbytes_counts_what_a_view_shows() -> None:
    assert storage.nbytes(torch.zeros(10, 10)[:, :2]) == 80


def test_nbytes_of_codes_is_what_they_take() -> None:
    weight = torch.nn.Parameter(Int8Tensor.quantized(gaussian(30, 20)))
    assert storage.nbytes({"weight": weight}) == storage.INT8.nbytes(600) == 600 + 3 * 2
