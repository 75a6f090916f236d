# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import quantized
from benchmarks.quantized import ROWS, SMALL


def test_the_published_codes_err_as_published_and_ours_do_not() -> None:
    found = quantized._accuracy(512, 128)["storages"]
    published, decoded, read = (
        found[name] for name in ("published int4 (min-max, 256)", "int4, as decoded", "int4, as read")
    )
    assert 0.10 < published["relative_error"] < 0.13
    assert decoded["relative_error"] < 0.9 * published["relative_error"]
    assert read["departure"] < 0.01 * decoded["departure"] < 0.01 * published["departure"]
    assert read["relative_error"] < decoded["relative_error"]
    assert found["int8, as read"]["relative_error"] < 0.1 * read["relative_error"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bytes_are_counted_from_what_is_there(row: Any) -> None:
    if row.moments_in_8bit:
        pytest.importorskip("bitsandbytes")
    measured = quantized._bytes_of(SMALL, row)
    assert measured["predicted_is_held"]
    assert measured["gradients"]["layerwise"] == 0
    assert 0 < measured["gradients"]["project"] < measured["gradients"]["step"]
    numel = sum(param.numel() for param in SMALL.build().parameters())
    assert measured["gradients"]["step"] == 2 * numel
    assert measured["weights"] == 2 * numel if row.name == "galore" else measured["weights"] <= 2 * numel


def test_an_optimizer_that_lies_about_its_bytes_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = quantized.step_and_count
    monkeypatch.setattr(
        quantized, "step_and_count", lambda optimizer: {**real(optimizer), "bases": real(optimizer)["bases"] + 1}
    )
    assert not quantized._bytes_of(SMALL, ROWS[0])["predicted_is_held"]


def test_timed_steps_are_ordinary_ones() -> None:
    grads = [torch.randn(24, 16)]
    for settings in quantized._STORAGES.values():
        optimizer = quantized._ordinary(grads, 4, settings)
        (weight,) = optimizer.targets
        for _ in range(3):
            optimizer.step()
        assert optimizer.state[weight]["galore_refreshes"] == 1
        assert optimizer.state[weight]["galore_step"] == 4
