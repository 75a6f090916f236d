# SPDX-License-Identifier: Apache-2.0
"""The pictures of the reports: one look for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.machine import headline
from benchmarks.results import Report, milliseconds
from benchmarks.timing import Spread

# This package, a second curve of it, and the others.
OURS, OURS_PLAIN, THEIRS = "#2a6f97", "#e09f3e", "#a9a9a9"
_COLUMNS = 4
_PARTS = ("#2a6f97", "#e09f3e", "#7cb5a3", "#c9c9c9")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar, with its 10th and 90th percentile.

    Args:
        label: Who.
        spread: How long the bar is.
        text: Written behind it.
        ours: Whether it is coloured as this package's.
    """

    label: str
    spread: Spread
    text: str = ""
    ours: bool = True


@dataclass(frozen=True, kw_only=True)
class Panel:
    """The bars of one case, the first on top."""

    title: str
    bars: list[Bar]


def bar_panels(
    panels: Sequence[Panel], *, title: str, footer: Report, xlabel: str, columns: int = _COLUMNS, room: float = 30.0
) -> Figure:
    """A grid of bar charts over a logarithmic axis, where 1 is a line; ``room`` times the longest bar is its end."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    tallest = max(len(panel.bars) for panel in panels)
    longest = max(len(bar.label) for panel in panels for bar in panel.bars)
    figure, axes = grid(rows, columns, width=max(4.2, 2.4 + 0.08 * longest), height=0.9 + 0.3 * tallest)
    for panel, ax in zip(panels, axes, strict=False):
        _bars(ax, panel, room)
        ax.set_xlabel(xlabel, fontsize=8)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    finish(figure, title=title, report=footer)
    return figure


def whole_steps(report: Report, *, ways: str, is_ours: Callable[[str], bool], title: str, xlabel: str) -> Figure:
    """A panel a case: whole training steps in those of full-rank AdamW.

    Args:
        report: Its measurements have a name and, under ``ways``, for each way to train ``steps_of_full_rank`` and
            ``median_s["whole"]``.
        ways: The key.
        is_ours: Whether a way is coloured as this package's.
        title: Of the picture.
        xlabel: Of the axis.
    """
    panels = [
        Panel(
            title=held["name"],
            bars=[
                Bar(
                    label=name,
                    spread=Spread(**row["steps_of_full_rank"]),
                    text=f"{milliseconds(row['median_s']['whole'])} ms",
                    ours=is_ours(name),
                )
                for name, row in held[ways].items()
            ],
        )
        for held in report.measurements
    ]
    return bar_panels(panels, title=title, footer=report, xlabel=xlabel, columns=3, room=2.5)


def _bars(ax: Axes, panel: Panel, room: float) -> None:
    places = range(len(panel.bars))
    spreads = [bar.spread for bar in panel.bars]
    ax.barh(
        places,
        [spread.median - 1 for spread in spreads],
        left=1.0,  # what is equal has no bar
        xerr=([spread.median - spread.p10 for spread in spreads], [spread.p90 - spread.median for spread in spreads]),
        color=[OURS if bar.ours else THEIRS for bar in panel.bars],
        error_kw={"elinewidth": 1, "ecolor": "#444444"},
    )
    for place, bar in zip(places, panel.bars, strict=True):
        ax.annotate(
            f"{bar.spread.median:.3g}x  {bar.text}",
            (max(bar.spread.p90, 1.0), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    ax.set_xscale("log")
    ax.set_xlim(0.7 * min(1.0, *(s.p10 for s in spreads)), room * max(1.0, *(s.p90 for s in spreads)))
    ax.xaxis.set_major_formatter("{x:g}")
    if room < 10:  # hardly a decade: name what stands between its ends
        ax.set_xticks([0.5, 0.7, 1, 2], labels=["0.5", "0.7", "1", "2"], minor=False)
        ax.minorticks_off()
    ax.axvline(1.0, color="black", linewidth=0.8)
    ax.set_yticks(list(places), [bar.label for bar in panel.bars], fontsize=8)
    ax.invert_yaxis()
    ax.set_title(panel.title, fontsize=10)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Values over steps 0, 1, ...; ``bound`` is a dashed line."""

    title: str
    curves: dict[str, list[float]]
    bound: float
    colours: dict[str, str]


def curve_panels(panels: Sequence[Curves], *, title: str, footer: Report, xlabel: str, ylabel: str) -> Figure:
    """One chart below the other over a logarithmic axis."""
    figure, axes = grid(len(panels), 1, width=9.0, height=2.8)
    for panel, ax in zip(panels, axes, strict=True):
        for name, values in panel.curves.items():
            colour = panel.colours.get(name)
            ax.plot(range(len(values)), values, ".-", markersize=4, linewidth=0.8, label=name, color=colour)
        ax.axhline(panel.bound, color="black", linestyle="--", linewidth=0.8, label=f"bound: {panel.bound:g}")
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("")
        highest = max(panel.bound, *(max(values) for values in panel.curves.values()))
        ax.set_ylim(0.7, 4 * highest)  # room for the legend
        ax.set_ylabel(ylabel, fontsize=8)
        ax.set_xlabel(xlabel, fontsize=8)
        ax.set_title(panel.title, fontsize=10)
        ax.legend(fontsize=8, frameon=False, loc="upper right")
    finish(figure, title=title, report=footer)
    return figure


def stacked_bars(
    stacks: Mapping[str, Sequence[float]], *, parts: Sequence[str], title: str, footer: Report, xlabel: str
) -> Figure:
    """One bar a row, the first on top, made of ``parts``; its sum stands behind it."""
    figure, (ax,) = grid(1, 1, width=9.0, height=0.6 + 0.45 * len(stacks))
    labels, starts = list(stacks), [0.0] * len(stacks)
    for index, part in enumerate(parts):
        lengths = [stacks[label][index] for label in labels]
        ax.barh(labels, lengths, left=starts, label=part, color=_PARTS[index])
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for place, total in enumerate(starts):
        ax.annotate(f"{total:,.0f}", (total, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(xlabel, fontsize=8)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    finish(figure, title=title, report=footer)
    return figure


def grid(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels, each ``width`` by ``height`` inches; no window is needed for it."""
    figure = Figure(figsize=(max(7.0, width * columns), height * rows + 0.8), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def finish(figure: Figure, *, title: str, report: Report) -> None:
    """The title, and below what was measured where, so that a picture that travels alone still says it."""
    figure.suptitle(title, fontsize=11)
    words = f"{report.settings['clock']}; {headline(report.machine)}"
    figure.supxlabel(words, fontsize=7, color="#555555")
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
