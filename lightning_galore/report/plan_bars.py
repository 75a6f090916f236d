# SPDX-License-Identifier: Apache-2.0
"""A memory plan as stacked bars: what is held at the worst moment of each way to train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from lightning_galore.report.style import LIGHT, Theme, canvas, legend, png, styled, text


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Args:
        label: Beside it.
        parts: Bytes by category, in the order in which they are stacked.
    """

    label: str
    parts: Mapping[str, int]


def draw_plan(
    bars: Sequence[Bar], title: str, *, unit: int, unit_name: str, budget: int | None = None, theme: Theme = LIGHT
) -> Figure:
    """Stacked bars, the first one on top.

    Args:
        bars: One for each way to train.
        title: Above them.
        unit: Bytes of one unit of the axis.
        unit_name: Its name.
        budget: Bytes, drawn as a line.
        theme: Colours.
    """
    known = dict.fromkeys(name for bar in bars for name in bar.parts)
    names = [name for name in known if any(bar.parts.get(name) for bar in bars)]
    figure, (ax,) = canvas(height=1.5 + 0.34 * len(bars))
    handles = []
    left = [0.0] * len(bars)
    for name, colour in zip(names, theme.cycle, strict=False):
        widths = [bar.parts.get(name, 0) / unit for bar in bars]
        handles.append(ax.barh(range(len(bars)), widths, left=left, color=colour, height=0.66))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        ax.text(total, place, f" {total:,.2f}", va="center", color=theme.ink)
    if budget is not None:
        ax.axvline(budget / unit, color=theme.ink, linewidth=1.2, linestyle="--")
        names, handles = [*names, f"budget, {budget / 1e9:.3g} GB"], [*handles, ax.get_lines()[-1]]  # type: ignore[list-item]
    ax.set_yticks(range(len(bars)), [text(bar.label, 40) for bar in bars])
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0.0, max([*left, (budget or 0) / unit]) * 1.14 or 1.0)
    ax.set_xlabel(f"{unit_name} at the peak")
    figure.suptitle(text(title, 110), fontsize=9.5, color=theme.ink)
    legend(ax, handles, names)
    return figure


def write_plan(
    path: Path, bars: Sequence[Bar], title: str, *, unit: int, unit_name: str, budget: int | None = None
) -> None:
    """Write :func:`draw_plan` as a PNG file."""
    with styled(LIGHT):
        data = png(draw_plan(bars, title, unit=unit, unit_name=unit_name, budget=budget))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
