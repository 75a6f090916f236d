# SPDX-License-Identifier: Apache-2.0
"""How every chart looks: one palette for light and one for dark pages, both safe for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter

DPI = 150
WIDTH = 8.0
HEIGHT = 3.2


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a chart.

    Args:
        name: ``light`` or ``dark``.
        paper: The background, that of the page's cards.
        ink: Text.
        muted: Ticks and notes.
        grid: Lines behind the data.
        empty: Cells without data.
        cycle: Lines, in the order in which they are taken (after Okabe and Ito, 2008).
        ramp: From the first to the last of an ordered few.
    """

    name: str
    paper: str
    ink: str
    muted: str
    grid: str
    empty: str
    cycle: tuple[str, ...]
    ramp: tuple[str, str, str]


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1b1f24",
    muted="#57606a",
    grid="#e3e6ea",
    empty="#dfe3e8",
    cycle=("#0072b2", "#d55e00", "#009e73", "#b0578d", "#56b4e9", "#b8860b", "#5b5f66", "#7a5cc2"),
    ramp=("#8fc1e3", "#3a83b8", "#0b3c61"),
)
DARK = Theme(
    name="dark",
    paper="#161b22",
    ink="#e6edf3",
    muted="#9aa5b1",
    grid="#2c333c",
    empty="#545d68",
    cycle=("#56b4e9", "#ff9a52", "#2fc79a", "#e59ac6", "#a7d3f2", "#e8c547", "#aab2bd", "#b3a0f2"),
    ramp=("#3f6f94", "#7fb6dd", "#e2f1fb"),
)


class Missing(Exception):  # noqa: N818  # not an error: the page says it in the chart's place
    """There is nothing to draw.

    Args:
        why: What was looked for.
        remedy: How to log it.
    """

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why, remedy)
        self.why = why
        self.remedy = remedy


@dataclass(frozen=True)
class Drawn:
    """A chart, and what it shows in words for who cannot see it."""

    figure: Figure
    alt: str


# The reader's own matplotlibrc must not reach in, nor may a name with a dollar sign be set as mathematics.
_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.linewidth": 0.8,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.borderaxespad": 0.2,
}


@contextmanager
def styled(theme: Theme) -> Iterator[None]:
    """Draw in the colours of ``theme``; the settings of the process are as before afterwards."""
    colours = {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.edgecolor": theme.muted,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "grid.color": theme.grid,
        "axes.prop_cycle": cycler(color=theme.cycle),
    }
    # matplotlib's own defaults first. The backend is the process's: setting it would load one with windows.
    settings: dict[Any, Any] = {
        key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")
    }
    settings.update(_STYLE)
    settings.update(colours)
    with matplotlib.rc_context(settings):
        yield


def canvas(columns: int = 1, rows: int = 1, *, height: float = HEIGHT, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with its axes, row by row; without pyplot, whose figures live on after an error."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, [ax for row in axes for ax in row]


def png(figure: Figure) -> bytes:
    """The picture as a file in memory, the same bytes for the same data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def from_zero(ax: Axes) -> None:
    """Start at zero, so that heights can be compared, with some air above the data."""
    top = max((float(ax.dataLim.y1), 0.0)) or 1.0
    ax.set_ylim(0.0, top * 1.08)


def log_axis(axis: Axis) -> None:
    """Powers of ten in plain digits: marking up superscripts would mark up the names too."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def step_axis(ax: Axes, label: str = "step", *, ticks: int = 7) -> None:
    """Whole numbers with separators along the bottom."""
    ax.set_xlabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.grid(visible=False, axis="x")


def legend(ax: Axes, handles: list[Any], labels: list[str]) -> None:
    """Above the axes, where it covers no data."""
    longest = max((len(label) for label in labels), default=0)
    columns = 1 if longest > 48 else 2 if longest > 26 else 4
    ax.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0.0, 1.01),
        ncols=min(columns, len(labels)),
        fontsize=8.5,
        columnspacing=1.4,
    )


def note(figure: Figure, theme: Theme, said: str, *, empty: bool) -> None:
    """A line below all axes, behind a patch of the colour of cells without data if there are any (``empty``)."""
    handle = Patch(facecolor=theme.empty) if empty else Line2D([], [], linestyle="none")
    figure.legend(
        [handle],
        [fill(said, 128)],
        loc="outside lower left",
        fontsize=8.0,
        labelcolor=theme.muted,
        handlelength=1.4 if empty else 0.0,
        handletextpad=0.6 if empty else 0.0,
    )


def absent(ax: Axes, theme: Theme, why: str) -> None:
    """Say in place of a panel why it is empty."""
    ax.set_axis_off()
    ax.text(
        0.5, 0.5, fill(why, 34), color=theme.muted, ha="center", va="center", transform=ax.transAxes, linespacing=1.5
    )


def text(name: str, most: int = 44) -> str:
    """A name from a file as the font can show it: no control characters, no scripts it lacks, not too long."""
    shown = "".join(char if char.isprintable() and ord(char) < 0x530 else "?" for char in name)
    if len(shown) > most:
        head = (most - 1) // 3
        shown = f"{shown[:head]}…{shown[-(most - 1 - head) :]}"  # the end tells weights apart
    return f" {shown}" if shown.startswith("_") else shown  # matplotlib hides labels that start with an underscore
