# SPDX-License-Identifier: Apache-2.0
"""Draws ``alive.svg``: the bytes that come and go in one step of each mode, as a tracker sees them.

Six square layers, an ordinary step (no refresh), AdamW. Run it as ``python docs/pictures/alive.py``.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import nn
from typing_extensions import override

from lightning_galore import GaLoreOptimizer
from lightning_galore.planner import MemoryTracker

WIDTH, LAYERS, RANK, ROWS = 1024, 6, 8, 4
ONE = WIDTH * WIDTH * 4  # bytes of the gradient of a layer
COLOURS = {"step": "#3f51b5", "project": "#f2a541", "layerwise": "#2e9e6b"}


class Series(MemoryTracker):
    """Notes the bytes after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: list[int] = []

    @override
    def _look(self) -> None:
        super()._look()
        self.totals.append(self.total)


def one_step(mode: str) -> tuple[list[float], int]:
    """Bytes after each operation of one step, in gradients of a layer, and how many of them are the optimizer's."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    base = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer = GaLoreOptimizer(base, model, rank=RANK, mode=mode, update_proj_gap=1000, stagger=False)
    tracker = Series()
    for step in range(3):
        inputs = torch.randn(ROWS, WIDTH)
        if step == 2:
            tracker.__enter__()
        loss = model(inputs).square().mean()
        loss.backward()
        backward = len(tracker.totals)
        optimizer.step()
        if step == 2:
            tracker.__exit__(None, None, None)
        optimizer.zero_grad()
    return [total / ONE for total in tracker.totals], len(tracker.totals) - backward


def draw() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.add_subplot()
    for mode, colour in COLOURS.items():
        totals, own = one_step(mode)
        forward = len(totals) - own
        # Forward and backward in [0, 1], the optimizer's step in [1, 1.35].
        places = [i / forward for i in range(forward)] + [1 + 0.35 * i / max(own, 1) for i in range(1, own + 1)]
        ax.plot(
            places,
            totals,
            color=colour,
            lw=1.8,
            drawstyle="steps-post",
            label=f'mode="{mode}": at most {max(totals):.1f}',
        )
    ax.axvline(1, color="#999", lw=0.8, ls="--")
    ax.set_xticks([0.5, 1.175], ["forward and backward", "optimizer.step"])
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("bytes beyond weights and state,\nin gradients of one layer")
    ax.set_ylim(0)
    ax.set_xlim(0, 1.35)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper left")
    return figure


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "alive", "svg.fonttype": "path", "font.family": "sans-serif"})
    draw().savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
