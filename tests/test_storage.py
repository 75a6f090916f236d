# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from lightning_galore import storage


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("param", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_storage_dtype(kind: str, expected: torch.dtype) -> None:
    assert storage.storage_dtype(kind, torch.float64) == expected
    assert storage.write(torch.zeros(2, 2), storage=kind, param_dtype=torch.float64).dtype == expected


@pytest.mark.parametrize("kind", list(storage.DTYPES))
def test_written_basis_is_no_view(kind: str) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(32, 24, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    for view in (u[:, :3], vh[:3].mT):
        assert view.untyped_storage().nbytes() > 3 * storage.nbytes(view)
        written = storage.write(view, storage=kind, param_dtype=torch.float32)
        assert written.is_contiguous()
        assert written.untyped_storage().nbytes() == storage.nbytes(written)
        assert written.untyped_storage().data_ptr() != view.untyped_storage().data_ptr()
        assert torch.equal(written, view.to(written.dtype))


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
