# SPDX-License-Identifier: Apache-2.0
"""What travels between processes, counted by the team itself and by a look at the collectives."""

from __future__ import annotations

import math
from typing import Any

import pytest

from .cases import CASES, build
from .test_plain import run_of

pytestmark = pytest.mark.multiprocess
BACKWARD_CASES = [name for name, case in CASES.items() if case.mode != "step"]
TRAFFIC = [name for name in BACKWARD_CASES if "traffic" in name]


@pytest.mark.parametrize("name", BACKWARD_CASES)
def test_both_counts_agree(plain: list[dict[str, Any]], name: str) -> None:
    for rank in (0, 1):
        run = run_of(plain, name, rank)
        assert run.sent == run.counted
        assert min(run.sent) > 0


@pytest.mark.parametrize("name", ["project-1-float32", "project-2-float32", "layerwise-2-float32", *TRAFFIC])
def test_an_ordinary_step_sends_low_rank_and_dense_entries(plain: list[dict[str, Any]], name: str) -> None:
    model, optimizer = build(CASES[name])
    params = list(model.parameters())
    low = sum(math.prod(target.projection.low_shape) for target in optimizer.targets.values())
    dense = sum(param.numel() for param in params if param not in optimizer.targets)
    exactly = 4 * (low + dense + len(params))  # a count of users for each parameter
    for rank in (0, 1):
        sent = run_of(plain, name, rank).sent
        assert min(sent) == exactly
        assert sent.count(exactly) >= len(sent) // 4
        assert max(sent) > exactly  # a refresh


@pytest.mark.parametrize("name", TRAFFIC)
def test_a_whole_gap_sends_hardly_more_than_the_share_of_the_rank(plain: list[dict[str, Any]], name: str) -> None:
    model, optimizer = build(CASES[name])
    gap, first = 20, CASES[name].steps - 20
    full = 4 * sum(param.numel() for param in model.parameters())
    share = sum(math.prod(t.projection.low_shape) for t in optimizer.targets.values()) * 4 / full
    for rank in (0, 1):
        sent = run_of(plain, name, rank).sent[first : first + gap]
        assert max(sent) > 2 * min(sent)  # each weight was refreshed once
        assert sum(sent) <= (share + 1 / gap) * 1.1 * gap * full


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mode_step_adds_bases_only(plain: list[dict[str, Any]], accumulate: int) -> None:
    sent = [run_of(plain, f"step-{accumulate}-float32", rank).sent for rank in (0, 1)]
    assert {0} < set(sent[0])
    assert max(map(max, sent)) < 4 * 4 * 41 * 2
