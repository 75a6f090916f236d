# SPDX-License-Identifier: Apache-2.0
"""What an ordinary step, one without a refresh, may cost in any mode: no wait, no copy, no look at everything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_galore import GaLoreOptimizer

from .common import MODES
from .tracker import LiveBytes, Operators

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "clipped": {"clip_weight_norm": 0.1},
    "reverse_std": {"proj_type": "reverse_std"},
    "full": {"proj_type": "full"},
    "bf16, stochastic": {"stochastic_round": True},
    "int4 bases": {"basis_storage": "int4"},
    "dense_lr_factor": {"dense_lr_factor": 0.5},
}


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1, fused=True)


def coupled(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=0.1)


class Chain(nn.Module):
    """Square layers, and a norm that is not projected."""

    def __init__(self, layers: int, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=dtype) for _ in range(layers))
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.width, self.dtype = width, dtype

    def backward(self) -> None:
        rows = torch.ones(2, self.width, dtype=self.dtype)
        for layer in self.layers:
            rows = layer(rows)
        self.norm(rows).square().sum().backward()


def ordinary(
    mode: str,
    *,
    layers: int = 3,
    width: int = 32,
    rank: int = 4,
    make: Callable[[Any], torch.optim.Optimizer] = adamw,
    dtype: torch.dtype = torch.float32,
    apart: bool = False,
    **settings: Any,
) -> Callable[[], None]:
    """A backward and a step that refresh nothing, after one that did.

    Args:
        mode: That of the optimizer.
        layers: Number of weights.
        width: Of the weights.
        rank: Of their subspaces.
        make: Makes the wrapped optimizer.
        dtype: Of the model.
        apart: Whether each parameter has a group of its own.
        **settings: Of the optimizer.
    """
    model = Chain(layers, width, dtype)
    params = [{"params": [param]} for param in model.parameters()] if apart else model.parameters()
    optimizer = GaLoreOptimizer(
        make(params), model, mode=mode, rank=rank, target_modules=".*layers.*", update_proj_gap=10**6, stagger=False,
        **settings,
    )  # fmt: skip

    def step() -> None:
        model.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


@pytest.mark.parametrize("make", [adamw, coupled])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(mode: str, kind: str, make: Any) -> None:
    """A number that is read from a tensor stops a GPU's queue. Torch's own AdamW reads none where it is fused."""
    dtype = torch.bfloat16 if "bf16" in kind else torch.float32
    step = ordinary(mode, make=make, dtype=dtype, **SETTINGS[kind])
    with Operators() as seen:
        step()
    assert any("mm" in name or "linear" in name for name in seen.names)
    reads = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item")
    assert [name for name in seen.names if name.split(".")[1] in reads] == []


def test_a_read_is_seen() -> None:
    with Operators() as seen:
        float(torch.ones(3).sum())
    assert seen.names[-1] == "aten._local_scalar_dense.default"


@pytest.mark.parametrize("rank", [4, 40])
@pytest.mark.parametrize("mode", MODES)
def test_no_temporary_is_of_a_weight_s_size(mode: str, rank: int) -> None:
    """Besides the gradients, which backward makes: the same backward with and without us."""
    layers, width = 3, 1024
    one = 4 * width * width
    low = 4 * width * rank
    work = max(low, 2**20)  # a low-rank tensor, or a block of the lift
    step = ordinary(mode, layers=layers, width=width, rank=rank)
    with LiveBytes() as tracker:
        step()
    gradients = layers if mode == "step" else 1
    slack = 64 * width  # activations and their gradients
    assert tracker.peak <= gradients * one + 2 * layers * low + 2 * work + slack
    assert tracker.peak - gradients * one < one


@pytest.mark.parametrize("mode", MODES)
def test_rounding_takes_work_space_of_one_weight(mode: str) -> None:
    """A bf16 weight that is rounded at random is copied into fp32, one weight after the other."""
    peaks = {}
    for layers in (2, 6):
        step = ordinary(mode, layers=layers, width=256, dtype=torch.bfloat16, stochastic_round=True)
        with LiveBytes() as tracker:
            step()
        gradients = layers if mode == "step" else 1
        peaks[layers] = tracker.peak - gradients * 2 * 256 * 256
    assert peaks[6] <= peaks[2] + 4 * (2 * 2 * 256 * 4) + 8192
    assert peaks[6] <= 6 * 4 * 256 * 256


def calls(work: Callable[[], None]) -> int:
    """How many functions are called, those of C too: a measure of the interpreter's work that a clock is not."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("apart", [False, True], ids=["one group", "a group each"])
@pytest.mark.parametrize("mode", MODES)
def test_work_grows_linearly_with_the_weights(mode: str, apart: bool) -> None:
    few, more, most = (calls(ordinary(mode, layers=n, width=8, apart=apart)) for n in (20, 40, 80))
    # What a step costs besides cancels out of the differences.
    assert most - more <= 2.1 * (more - few)


@pytest.mark.parametrize("mode", MODES)
def test_work_per_weight_is_bounded(mode: str) -> None:
    """So that a step over many small weights is not the interpreter's. Counted; raise it only for a reason."""
    few, most = (calls(ordinary(mode, layers=n, width=8)) for n in (20, 40))
    assert (most - few) / 20 <= {"step": 260, "project": 355, "layerwise": 600}[mode]


@pytest.mark.parametrize("mode", MODES)
def test_arithmetic_is_twice_the_weight_times_the_rank(mode: str) -> None:
    """One product projects, one lifts; as many operators at any rank."""
    operators, width, layers = {}, 64, 3
    forward = 2 * width * width * layers
    backward = 2 * forward - 2 * width * width  # the first layer's input needs no gradient
    for rank in (2, 4, 8, 16):
        step = ordinary(mode, layers=layers, width=width, rank=rank)
        with Operators() as seen:
            step()
        operators[rank] = len(seen.names)
        assert seen.multiplications == forward + backward + layers * 2 * width * width * rank
    assert len(set(operators.values())) == 1
