# SPDX-License-Identifier: Apache-2.0
"""The charts of values over time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from lightning_galore.report.read import RunLog, Series, held_out, is_loss
from lightning_galore.report.series import History, history, quantiles, running_mean, thinned
from lightning_galore.report.style import Drawn, Missing, Theme, canvas, from_zero, legend, log_axis, step_axis, text

SCHEDULER = "Add SubspaceScheduler(...) of lightning_galore.callbacks to the Trainer's callbacks."
_MOST_LINES = 8
_SMOOTH_FROM = 100

Points = Sequence[tuple[float, float]]


def draw_loss(log: RunLog, theme: Theme) -> Drawn:
    """Training and validation loss; a dense line is drawn faintly, with its running mean over it."""
    found = [series for name, series in log.series.items() if is_loss(name) and series.finite]
    if not found:
        raise Missing(
            f"No logged name contains “loss”. {_logged(log)}",
            'Log it in training_step, e.g. self.log("train_loss", loss).',
        )
    found = sorted(found, key=lambda series: (held_out(series.name), series.name))
    figure, (ax,) = canvas()
    handles, labels = [], []
    for series, colour in zip(found[:_MOST_LINES], theme.cycle, strict=False):
        label = text(series.name)
        points = series.finite
        if len(points) >= _SMOOTH_FROM and not held_out(series.name):
            window = max(len(points) // 50, 5)
            line(ax, thinned(pairs(series)), colour, alpha=0.3, linewidth=0.8)
            handles.append(line(ax, running_mean(points, window), colour))
            label += f" (bold: mean of {window})"
        else:
            handles.append(line(ax, thinned(pairs(series)), colour, marks=True))
        labels.append(label)
    values = [value for series in found[:_MOST_LINES] for _, value in series.finite]
    logarithmic = min(values) > 0 and max(values) / min(values) > 100
    if logarithmic:
        ax.set_yscale("log")
        log_axis(ax.yaxis)
    ax.set_ylabel("loss (logarithmic)" if logarithmic else "loss")
    step_axis(ax)
    legend(ax, handles, labels)
    return Drawn(figure, f"Line chart of the loss by step. {ends(found)}")


def draw_learning_rate(log: RunLog, theme: Theme) -> Drawn:
    """What LearningRateMonitor logged; groups with the same schedule share a line."""
    other = ("-momentum", "-weight_decay")
    found = [
        one for name, one in log.series.items() if name.startswith("lr-") and not name.endswith(other) and one.finite
    ]
    if not found:
        raise Missing(
            f"No logged name starts with “lr-”. {_logged(log)}",
            "Add LearningRateMonitor() of lightning.pytorch.callbacks to the Trainer's callbacks.",
        )
    same: dict[tuple[tuple[float, float], ...], list[Series]] = {}
    for series in found:
        same.setdefault(tuple(series.finite), []).append(series)
    figure, (ax,) = canvas()
    handles, labels = [], []
    for (points, group), colour in zip(list(same.items())[:_MOST_LINES], theme.cycle, strict=False):
        handles.append(line(ax, thinned(points), colour, marks=True))
        labels.append(text(group[0].name) + (f" and {len(group) - 1} more" if len(group) > 1 else ""))
    from_zero(ax)
    ax.set_ylabel("learning rate")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    step_axis(ax)
    legend(ax, handles, labels)
    return Drawn(figure, f"Line chart of the learning rate by step. {ends([group[0] for group in same.values()])}")


def draw_drift(log: RunLog, theme: Theme) -> Drawn:
    """Drift of all weights in one line: median, spread and the largest."""
    found = history(log, lambda refresh: refresh.drift, "galore_drift")
    logged = {"mean over weights": "galore/drift_mean", "largest": "galore/drift_max"}
    return _shares(log, theme, found, logged, what="drift", extreme=1.0, of="drift")


def draw_captured_energy(log: RunLog, theme: Theme) -> Drawn:
    """Captured energy of all weights in one line: median, spread and the lowest."""
    found = history(log, lambda refresh: refresh.captured_energy, "galore_energy")
    logged = {"mean over weights": "galore/captured_energy"}
    return _shares(
        log, theme, found, logged, what="captured energy", extreme=0.0, of="captured_energy", beside="between refreshes"
    )


def _shares(
    log: RunLog,
    theme: Theme,
    found: History,
    logged: dict[str, str],
    *,
    what: str,
    extreme: float,
    of: str,
    beside: str = "",
) -> Drawn:
    """A share of every weight by step, from the table of refreshes, or else what was logged of it.

    ``beside`` names what was logged if it says something else than the table, and so is drawn with it.
    """
    series = [(label, one) for label, name in logged.items() for label, one in named(log, name, label)]
    if not found and not series:
        raise Missing(f"Neither galore_refreshes.csv has {of} nor was {next(iter(logged.values()))} logged.", SCHEDULER)
    figure, (ax,) = canvas()
    if found:
        handles, labels = spread(ax, found, theme, extreme=extreme)
        steps, (median,) = quantiles(found, 0.5)
        said = f"Median over {len(found)} weights: {median[0]:.3g} at step {steps[0]:,.0f}, {median[-1]:.3g} at step "
        said += f"{steps[-1]:,.0f}."
        for (_, one), colour in zip(series if beside else [], theme.cycle[2:], strict=False):
            handles.append(line(ax, thinned(pairs(one)), colour, linewidth=1.2))
            labels.append(f"mean, {beside}")
            said += f" {ends([one])}"
    else:
        handles = [
            line(ax, thinned(pairs(one)), colour, marks=True)
            for (_, one), colour in zip(series[:_MOST_LINES], theme.cycle, strict=False)
        ]
        labels, said = [label for label, _ in series[:_MOST_LINES]], ends([one for _, one in series])
    ax.set_ylim(-0.02, 1.02)
    ax.set_ylabel(f"{what} (share)")
    step_axis(ax, "optimizer step" if found else "step")
    legend(ax, handles, labels)
    return Drawn(figure, f"Line chart of the {what} by step. {said}")


def spread(
    ax: Axes, found: History, theme: Theme, *, extreme: float | None, stairs: bool = False
) -> tuple[list[Any], list[str]]:
    """The median over weights, a band around it, and one extreme; without it the band holds every weight."""
    low, high = (0.0, 1.0) if extreme is None else (0.1, 0.9)
    steps, (lows, medians, highs, extremes) = quantiles(found, low, 0.5, high, extreme or 0.0)
    colour, accent = theme.cycle[0], theme.cycle[1]
    median = line(ax, list(zip(steps, medians, strict=True)), colour, marks=True, stairs=stairs)
    if len(found) == 1:
        return [median], ["the only weight"]
    band = ax.fill_between(
        steps, lows, highs, color=colour, alpha=0.2, linewidth=0, step="post" if stairs else None, zorder=1
    )
    handles, labels = [median, band], ["median over weights", "all weights" if extreme is None else "10 to 90 %"]
    if extreme is not None:
        handles.append(line(ax, list(zip(steps, extremes, strict=True)), accent, linewidth=1.2, linestyle="--"))
        labels.append("largest" if extreme else "lowest")
    return handles, labels


def named(log: RunLog, name: str, label: str) -> list[tuple[str, Series]]:
    """The series of one name, or one for each optimizer with its index behind, with what the legend says."""
    if name in log.series and log.series[name].finite:
        return [(label, log.series[name])]
    pattern = re.compile(re.escape(name) + r"_(\d{1,4})")
    numbered = [(int(match[1]), one) for key, one in log.series.items() if (match := pattern.fullmatch(key))]
    ordered = sorted(((index, one) for index, one in numbered if one.finite), key=lambda pair: pair[0])
    return [(f"{label}, optimizer {index}", one) for index, one in ordered]


def pairs(series: Series) -> list[tuple[float, float]]:
    """Steps and values, with the gaps."""
    return list(zip(series.steps, series.values, strict=True))


def line(ax: Axes, points: Points, colour: str, *, marks: bool = False, stairs: bool = False, **options: Any) -> Any:
    """A line; few points are marked, so that a single one can be seen."""
    few = len(points) <= (30 if marks else 1)
    (line,) = ax.plot(
        [step for step, _ in points],
        [value for _, value in points],
        color=colour,
        marker="o" if few else None,
        markersize=3.5,
        drawstyle="steps-post" if stairs else "default",
        **options,
    )
    return line


def ends(found: list[Series]) -> str:
    """The first and the last value of each series, in words."""
    said = []
    for series in found[:_MOST_LINES]:
        (first, start), (last, end) = series.finite[0], series.finite[-1]
        said.append(f"{series.name}: {start:,.4g} at step {first:,.0f}, {end:,.4g} at step {last:,.0f}.")
    return " ".join(said)


def _logged(log: RunLog) -> str:
    names = [name for name in log.columns if name not in ("step", "epoch")]
    if not names:
        return "No metrics were logged."
    return f"Logged were: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}."
