# SPDX-License-Identifier: Apache-2.0
"""The tracker: each storage once, by category, from birth to end; numbers where a program asks fakes for them."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from lightning_galore.planner import MemoryTracker
from lightning_galore.planner.fakes import fake_copy, fake_mode
from lightning_galore.storage import Int8Tensor


def test_views_share_and_what_was_there_does_not_count() -> None:
    outside = torch.zeros(100)
    with MemoryTracker() as tracker:
        view = outside[:50]
        one = torch.zeros(4)
        both = one[:2], one.view(2, 2)
        two = one + 1
        assert tracker.total == 32
        del two
        assert tracker.total == 16
        del one, both, view
    assert tracker.total == 0
    assert tracker.peak.total == tracker.peak.by_category["activations"] == 32


def test_categories_and_renaming() -> None:
    weight = torch.zeros(8)
    tracker = MemoryTracker()
    tracker.hold([weight], "weights")
    with tracker:
        tracker.phase = "optimizer"
        state = {"exp_avg": torch.zeros(8), "step": 3}
        assert tracker.live["workspace"] == 32
        tracker.hold(state, "moments")
        tracker.hold(weight, "weights")  # twice is once
    assert tracker.live == {**dict.fromkeys(tracker.live, 0), "weights": 32, "moments": 32}
    tracker.restart()
    assert tracker.peak.total == 64
    assert tracker.most["workspace"] == 0
    del state
    assert tracker.total == 32


def test_shares_decide_which_moment_is_the_worst() -> None:
    tracker = MemoryTracker(shares={"gradients": 0.1})
    with tracker:
        activations = torch.zeros(10)
        del activations
        gradient = torch.zeros(40)
        tracker.hold(gradient, "gradients")
        tracker.restart()
        activations = torch.zeros(10)
        del gradient
        assert tracker.peak.total == round(0.1 * 160) + 40
    assert tracker.peak.by_category["gradients"] == 160
    assert activations is not None


def test_int8_weights_are_their_codes_and_scales() -> None:
    weight = Int8Tensor.quantized(torch.ones(16, 32))
    tracker = MemoryTracker()
    tracker.hold(weight, "weights")
    assert tracker.total == 16 * 32 + 2 * 2


def test_nothing_refers_to_a_fake_so_that_int8_weights_can_take_its_place() -> None:
    size = (37, 41)  # of no other test: only the first of a shape is remembered
    copied = fake_copy(nn.Linear(*size, bias=False), fake_mode())
    assert weakref.getweakrefs(copied.weight) == []


def test_fakes_answer_and_share() -> None:
    module = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    module[1].weight = module[0].weight
    mode = fake_mode()
    copied = fake_copy(module, mode, torch.bfloat16)
    assert copied[0].weight is copied[1].weight  # type: ignore[index]
    assert copied[0].weight.dtype is torch.bfloat16  # type: ignore[index,union-attr]
    assert module[0].weight.dtype is torch.float32
    with mode, MemoryTracker(answers=True):
        weight = copied[0].weight.detach()  # type: ignore[index,operator,union-attr]
        assert float(weight.sum()) == 1.0  # type: ignore[operator]
        assert bool((weight > 3).all())  # type: ignore[operator]
        assert not torch.equal(weight, weight + 1)  # type: ignore[arg-type,operator]
