# SPDX-License-Identifier: Apache-2.0
"""Convolutions that make low-rank gradients themselves: the weights of the ordinary path, and no full gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from tests.helpers import max_difference

from .common import BACKWARD_MODES
from .tracker import LiveBytes

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
FUSED = "forward"  # what a fused module has of its own


class Convolutional(nn.Module):
    """Two convolutions, wide and tall as matrices, with everything that a convolution may have."""

    def __init__(self, dims: int = 2, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = CONVOLUTIONS[dims]
        self.first = conv(3, 12, 3, **{"stride": 2, "padding": 1, "dilation": 1, **options})
        self.last = conv(12, 20, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh())
        return out


def train(
    mode: str, *, fused: bool, dims: int = 2, channels_last: bool = False, steps: int = 15, **settings: Any
) -> Any:
    """fp64 steps; weights refresh one after the other over a gap of five."""
    options = settings.pop("options", {})
    model = Convolutional(dims, **options).double()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    chosen = {"rank": 4, "scale": 1.0, "update_proj_gap": 5, "target_modules": ["first", "last"], **settings}
    optimizer = GaLoreOptimizer(base, model, mode=mode, fused_backward=fused, **chosen)
    for step in range(steps):
        x = torch.randn(2, 3, *[7] * dims, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, optimizer


def difference(mode: str, **how: Any) -> float:
    (fused, _), (ordinary, _) = (train(mode, fused=one, **how) for one in (True, False))
    start = Convolutional(how.get("dims", 2), **how.get("options", {}))
    assert max_difference(ordinary.parameters(), start.parameters()) > 0.01
    return max_difference(fused.parameters(), ordinary.parameters())


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("proj_type", ["std", "left", "right", "full"])
def test_weights_are_those_of_the_ordinary_path(mode: str, proj_type: str) -> None:
    assert difference(mode, proj_type=proj_type) <= 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "how",
    [
        {"dims": 1},
        {"dims": 3},
        {"channels_last": True},
        {"options": {"stride": 1, "padding": (0, 2), "dilation": (2, 1)}},
        {"basis_storage": "int8"},
    ],
    ids=str,
)
def test_every_geometry(how: dict[str, Any], side: str) -> None:
    assert difference("project", proj_type=side, **how) <= 1e-12


def test_what_is_no_plain_convolution_takes_the_ordinary_path() -> None:
    for options in ({"groups": 3}, {"padding_mode": "circular"}, {"stride": 1, "padding": "same"}):
        model, _ = train("project", fused=True, steps=2, options=options)
        assert FUSED not in vars(model.first)
        assert FUSED in vars(model.last)
        assert difference("project", options=options) <= 1e-12
    model, _ = train("project", fused=True, steps=2, subspace="tucker")
    assert FUSED not in vars(model.first)
    model, held = train("project", fused=True, steps=2, update_proj_gap=1000, stagger=False)
    assert model(torch.randn(3, 7, 7, dtype=torch.float64)).shape == (20, 4, 4), "one picture, no batch"
    assert held.targets


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_full_gradient_is_ever_there(mode: str, side: str) -> None:
    """That of 48 x 48 kernels of nine entries is larger than anything else here."""
    for fused in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(48, 48, 3, padding=1, bias=False))
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = {"rank": 2, "update_proj_gap": 1000, "stagger": False, "target_modules": ["0"], "proj_type": side}
        optimizer = GaLoreOptimizer(base, model, mode=mode, fused_backward=fused, **settings)
        x = torch.randn(1, 48, 5, 5)
        for _ in range(2):
            optimizer.zero_grad()
            with LiveBytes() as tracker:
                model(x).square().mean().backward()
            optimizer.step()
        assert (tracker.largest < model[0].weight.nbytes) is fused


def test_in_half_precision() -> None:
    torch.manual_seed(0)
    losses = []
    for fused in (True, False):
        model = Convolutional()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2)
        settings = {"rank": 4, "scale": 1.0, "update_proj_gap": 5, "target_modules": ["first", "last"]}
        optimizer = GaLoreOptimizer(base, model, mode="project", fused_backward=fused, **settings)
        for step in range(15):
            x = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
