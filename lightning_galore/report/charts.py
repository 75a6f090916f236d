# SPDX-License-Identifier: Apache-2.0
"""The charts of a report, in the order of the page. A new one is a function and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning_galore.report.costs import draw_gap_and_rank, draw_memory, draw_refreshes
from lightning_galore.report.lines import draw_captured_energy, draw_drift, draw_learning_rate, draw_loss
from lightning_galore.report.maps import draw_drift_map, draw_spectrum
from lightning_galore.report.page import Section
from lightning_galore.report.read import RunLog
from lightning_galore.report.style import DARK, LIGHT, Drawn, Missing, Theme, png, styled


@dataclass(frozen=True)
class Chart:
    """A chart.

    Args:
        slug: The name of its file and its anchor.
        title: Its heading.
        caption: How to read it.
        draw: Draws it, or raises :class:`Missing`.
    """

    slug: str
    title: str
    caption: str
    draw: Callable[[RunLog, Theme], Drawn]


CHARTS = (
    Chart("loss", "Loss", "Training and validation loss as they were logged.", draw_loss),
    Chart(
        "learning_rate",
        "Learning rate",
        "One line for the param groups that share a schedule.",
        draw_learning_rate,
    ),
    Chart(
        "drift",
        "Drift",
        "How much of a subspace its refresh replaced: 0 is the same subspace, 1 one at right angles to it. "
        "Low drift means that the weight could be refreshed less often.",
        draw_drift,
    ),
    Chart(
        "drift_map",
        "Drift of each weight",
        "Each cell is the time between two refreshes of a weight, coloured by how far its subspace turned in it: "
        "dark stayed, bright was replaced. Grey has no value: before the first refresh of a weight and after its last.",
        draw_drift_map,
    ),
    Chart(
        "captured_energy",
        "Captured energy",
        "Share of the gradient's squared norm that the subspace holds, right at a refresh and, where it was logged, "
        "between two of them. What is missing is not trained on: a low share asks for a higher rank, one that falls "
        "between refreshes for a shorter gap.",
        draw_captured_energy,
    ),
    Chart(
        "spectrum",
        "Spectrum",
        "The largest singular values of the projected gradient, as shares of the largest. A steep fall says that a "
        "lower rank would do, a flat one that the rank cuts through the gradient.",
        draw_spectrum,
    ),
    Chart(
        "gap_and_rank",
        "Gap and rank",
        "Optimizer steps from one refresh to the next, and the width of the subspaces.",
        draw_gap_and_rank,
    ),
    Chart(
        "refreshes",
        "Refreshes",
        "How many subspaces were found so far, and how much of the time of a step that took.",
        draw_refreshes,
    ),
    Chart(
        "memory",
        "Memory",
        "Bytes of optimizer state of the projected weights with their bases, and the peak of the device.",
        draw_memory,
    ),
)


def draw_all(log: RunLog) -> list[Section]:
    """Every chart in both palettes; one that cannot be drawn comes without pictures and says why."""
    return [_section(chart, log) for chart in CHARTS]


def _section(chart: Chart, log: RunLog) -> Section:
    pictures: dict[str, bytes] = {}
    alt = ""
    try:
        for theme in (LIGHT, DARK):
            with styled(theme):
                drawn = chart.draw(log, theme)
                pictures[theme.name], alt = png(drawn.figure), drawn.alt
    except Missing as missing:
        return Section(
            slug=chart.slug, title=chart.title, caption=chart.caption, why=missing.why, remedy=missing.remedy
        )
    return Section(
        slug=chart.slug,
        title=chart.title,
        caption=chart.caption,
        alt=alt,
        light=pictures[LIGHT.name],
        dark=pictures[DARK.name],
    )
