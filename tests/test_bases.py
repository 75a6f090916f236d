# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_galore import linalg, storage
from lightning_galore.bases import StoredBases
from lightning_galore.storage import INT4
from tests.helpers import assert_orthonormal, same_bits
from tests.reference import codes_reference as reference

#: Tall, wide for its rank, square; from one column to as many as rows.
SHAPES = [(768, 1), (768, 8), (512, 128), (64, 16), (65, 13), (33, 1), (64, 48), (64, 64), (100, 100), (7, 3)]


def basis_of(rows: int, rank: int, *, seed: int = 0) -> Tensor:
    return linalg.orthonormalize(torch.randn(rows, rank, generator=torch.Generator().manual_seed(seed)))


def kept_as(kept: str, *bases: Tensor, orthonormal: bool = True) -> StoredBases:
    return StoredBases.write(bases, kept=kept, param_dtype=torch.float32, orthonormal=orthonormal)


@pytest.mark.parametrize(("rows", "rank"), SHAPES)
@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_what_is_read_is_orthonormal_and_near(rows: int, rank: int, kept: str) -> None:
    basis = basis_of(rows, rank)
    stored = kept_as(kept, basis)
    (part,) = stored.parts
    raw, read = part.read(torch.float64), stored.read(torch.float64)[0]
    assert part.codes.dtype == (torch.int8 if kept == "int8" else torch.uint8)
    assert reference.departure(read) < 0.05 * reference.departure(raw)
    torch.testing.assert_close(read, reference.polar(raw), rtol=0, atol=0.02)
    error = float((read - basis.double()).norm()) / rank**0.5
    assert error <= (0.01 if kept == "int8" else 0.12)
    # Nearly all of a gradient in the span of the basis is still seen.
    assert float(linalg.overlap(basis.double(), read)) > 0.98
    assert error <= float((raw - basis.double()).norm()) / rank**0.5 * 1.02


def test_int4_of_a_large_basis_errs_by_nine_percent_and_less_than_the_plain_quantiser() -> None:
    basis = basis_of(2048, 128)
    raw = kept_as("int4", basis).parts[0].read(torch.float32)
    errors = [float((one.double() - basis.double()).norm()) / 128**0.5 for one in (raw, reference.min_max(basis))]
    assert errors[0] <= 0.095
    assert errors[0] < 0.9 * errors[1]
    # As it is decoded, the basis stretches and shrinks: that is what reading puts right.
    assert reference.departure(raw) > 0.01
    assert reference.departure(kept_as("int4", basis).read(torch.float32)[0]) < 1e-4


@pytest.mark.parametrize("kept", ["param", "fp32", "bf16", "fp16"])
def test_plain_storages_give_the_very_tensor(kept: str) -> None:
    stored = kept_as(kept, basis_of(20, 3), basis_of(30, 3))
    assert not stored.is_coded
    assert [one is part.codes for one, part in zip(stored.read(torch.float64), stored.parts, strict=True)] == [True] * 2


@pytest.mark.parametrize("kept", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_reading_twice_gives_the_same_bits(kept: str, dtype: torch.dtype) -> None:
    stored = kept_as(kept, basis_of(100, 12))
    again = StoredBases(parts=tuple(stored.parts), orthonormal=True)
    assert same_bits(stored.read(dtype), again.read(dtype))
    assert stored.read(dtype)[0].dtype == dtype
    # Corrected in fp32 at least, and rounded once.
    wide = stored.read(torch.promote_types(dtype, torch.float32))
    assert same_bits(stored.read(dtype), [one.to(dtype) for one in wide])
    assert_orthonormal(stored.read(dtype)[0], atol=max(0.005, 4 * torch.finfo(dtype).eps))


def test_both_sides_and_their_bytes() -> None:
    stored = kept_as("int4", basis_of(40, 5), basis_of(33, 5))
    assert [tuple(one.shape) for one in stored.read(torch.float32)] == [(40, 5), (33, 5)]
    assert stored.nbytes == INT4.nbytes(200) + INT4.nbytes(165)
    assert stored.rank == 5
    assert stored.is_coded


def differences_and_mean(rows: int) -> Tensor:
    """``(e_0 - e_1, e_2 - e_3, ...) / sqrt(2)`` and a dense last column, whose entries are tiny beside the others."""
    pairs = torch.kron(torch.eye(rows // 2), torch.tensor([[1.0], [-1.0]])) / 2**0.5
    return torch.cat([pairs, torch.full((rows, 1), rows**-0.5)], dim=1)


def test_a_basis_of_which_4_bits_spoil_a_column_is_kept_in_8() -> None:
    basis = differences_and_mean(64)
    lost = storage.write(basis, storage="int4", param_dtype=torch.float32).read(torch.float32)
    assert float((lost - basis)[:, -1].norm()) > 0.25
    assert not linalg.is_nearly_orthonormal(lost)
    stored = kept_as("int4", basis, basis_of(64, 33))
    assert [part.codes.dtype for part in stored.parts] == [torch.int8, torch.uint8]  # each by itself
    read = stored.read(torch.float32)[0]
    assert_orthonormal(read, atol=1e-4)
    assert float((read - basis).norm(dim=0).max()) < 0.1


def test_a_basis_that_no_codes_hold_is_kept_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    basis, tried = basis_of(20, 3), list[Tensor]()
    monkeypatch.setattr(linalg, "is_nearly_orthonormal", lambda one: tried.append(one))
    stored = kept_as("int4", basis)
    assert len(tried) == 2
    assert same_bits(stored.read(torch.float32), [basis])


def test_a_basis_that_is_not_orthonormal_is_not_made_so() -> None:
    basis = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)) / 3
    for kept in ("int8", "int4"):
        stored = kept_as(kept, basis, orthonormal=False)
        assert stored.parts[0].codes.dtype == (torch.int8 if kept == "int8" else torch.uint8)
        assert same_bits(stored.read(torch.float32), [stored.parts[0].read(torch.float32)])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_basis_that_is_not_finite_raises_nothing_and_stays_so(bad: float) -> None:
    basis = basis_of(100, 4)
    basis[3, 1] = bad
    assert not bool(torch.isfinite(kept_as("int4", basis).read(torch.float32)[0]).all())
