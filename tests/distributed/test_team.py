# SPDX-License-Identifier: Apache-2.0
"""Averages in a fixed order, shares of work, and the search for what differs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .plain_worker import NUMBERS, ORDERS

pytestmark = pytest.mark.multiprocess


@pytest.mark.parametrize("bucket_bytes", [1, 40, 2**20])
@pytest.mark.parametrize("arrival", ORDERS)
def test_averages_whatever_comes_when(plain: list[dict[str, Any]], arrival: str, bucket_bytes: int) -> None:
    one, other = (results[f"average-{arrival}-{bucket_bytes}"] for results in plain)
    wanted = [10.0 * i + 0.5 for i in range(NUMBERS)]
    wanted[2], wanted[4] = 0.0, 20.0  # nobody had the third; the fifth was 40 on one process
    kinds = (torch.float32, torch.float64, torch.bfloat16)
    for results in (one, other):
        for i, value in enumerate(results["values"]):
            assert value.dtype == kinds[i % 3]
            torch.testing.assert_close(value, torch.full((i + 1, 2), wanted[i], dtype=kinds[i % 3]))
        assert results["done"] == [0, 1, 3, 4, 5, 6]
        assert results["absent"] == [2]
    assert (one["filled"], other["filled"]) == ([2], [2, 4])


def test_small_buckets_land_before_the_end(plain: list[dict[str, Any]]) -> None:
    assert [results["average-same-1"]["early"] for results in plain] == [[0], [0]]
    assert [results["average-same-1048576"]["early"] for results in plain] == [[], []]


def test_what_was_dropped_does_not_disturb_what_follows(plain: list[dict[str, Any]]) -> None:
    for results in plain:
        assert results["dropped"].tolist() == [10.5] * 3


def test_work_is_divided_evenly_and_alike(plain: list[dict[str, Any]]) -> None:
    assert plain[0]["divided"] == plain[1]["divided"] == [[0, 1, 1, 1, 0], [0, 1, 0, 1], [], [0]]


def test_one_bit_is_found_and_named(plain: list[dict[str, Any]]) -> None:
    for results in plain:
        assert results["differing"] == {"none": [], "bit": ["basis"], "swap": ["codes"]}
