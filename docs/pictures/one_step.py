# SPDX-License-Identifier: Apache-2.0
"""Draws ``one_step.svg``: what a step does with one weight. Run it as ``python docs/pictures/one_step.py``."""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

M, N, R = 2.4, 3.2, 0.5  # of the drawing: a weight m x n, rank r
FULL, LOW, STATE = "#b8c4ea", "#3f51b5", "#f2a541"


def matrix(ax: Axes, x: float, y: float, height: float, width: float, name: str, colour: str) -> None:
    """A rectangle around ``(x, y)``, with its name in it or, if it is too thin, beside it."""
    ax.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor="#222", lw=0.8))
    ax.text(x, y, name, ha="center", va="center", fontsize=13, color="white" if colour == LOW else "black")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], words: str, bend: float = 0.0) -> None:
    """An arrow with what it does above its middle."""
    style = f"arc3,rad={bend}"
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, connectionstyle=style, color="#444"))
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.14)
    ax.text(*middle, words, ha="center", va="bottom", fontsize=10.5, color="#222", linespacing=1.35)


def draw() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(11, 3.55))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(0.1, 17.5)
    ax.set_ylim(-2.5, 3.1)
    ax.set_aspect("equal")
    ax.axis("off")
    y = 1.2
    matrix(ax, 1.9, y, M, N, "$G$", FULL)
    ax.text(1.9, y + M / 2 + 0.15, "gradient, $m \\times n$", ha="center", va="bottom", fontsize=11)
    arrow(ax, (3.65, y), (5.35, y), "project\n$P^\\top G$")
    matrix(ax, 7.1, y, R, N, "$R$", LOW)
    ax.text(7.1, y + R / 2 + 0.15, "low-rank gradient, $r \\times n$", ha="center", va="bottom", fontsize=11)
    arrow(ax, (8.85, y), (10.35, y), "your\noptimizer")
    matrix(ax, 12.1, y, R, N, "$N$", LOW)
    ax.text(12.1, y + R / 2 + 0.15, "its update, $r \\times n$", ha="center", va="bottom", fontsize=11)
    arrow(ax, (13.85, y), (14.35, y), "")
    ax.text(15.85, y + 0.15, "lift", ha="center", va="bottom", fontsize=11)
    ax.text(15.95, y - 0.2, "$W \\leftarrow W - \\eta\\, \\alpha\\, P N$", ha="center", va="center", fontsize=13)
    # What is kept from step to step.
    low = -1.35
    matrix(ax, 4.5, low, M * 0.8, R * 0.8, "$P$", STATE)
    ax.text(4.95, low, "basis, $m \\times r$,\nfound anew every\n$T$ steps", ha="left", va="center", fontsize=10.5)
    arrow(ax, (4.5, low + M * 0.4 + 0.05), (4.5, y - 0.1), "")
    for place, name in ((low + 0.32, "$M$"), (low - 0.32, "$V$")):
        matrix(ax, 9.6, place, R, N, name, STATE)
    ax.text(11.4, low, "its moments, $r \\times n$\ninstead of $m \\times n$", ha="left", va="center", fontsize=10.5)
    arrow(ax, (9.6, low + 0.65), (9.6, y - 0.1), "")
    return figure


if __name__ == "__main__":
    mpl.rcParams.update({"svg.hashsalt": "one_step", "mathtext.fontset": "stix", "font.family": "sans-serif"})
    draw().savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None}, facecolor="white")
