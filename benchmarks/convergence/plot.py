# SPDX-License-Identifier: Apache-2.0
"""The picture: how the loss falls, and where each seed ends."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.convergence.store import Run, Store
from benchmarks.convergence.sweep import Sweep
from benchmarks.convergence.table import Row
from benchmarks.convergence.variants import VARIANTS

_MOST_CURVES = 8  # more cannot be told apart
_OTHERS = "tab:blue"
_PEERS = "tab:orange"


def picture(sweep: Sweep, store: Store, rows: Sequence[Row], *, headline: str) -> Figure:
    """Validation loss over the steps (mean over seeds), and every seed's end as a dot.

    Args:
        sweep: The comparison.
        store: Its finished runs.
        rows: The table, in its order.
        headline: One line on the machine.
    """
    figure = Figure(figsize=(12, 2.5 + 0.32 * max(8, len(rows))), layout="constrained")
    curves, dots = figure.subplots(1, 2)
    _curves(curves, sweep, store, [row for row in rows if row.losses])
    _dots(dots, rows, sweep.baseline)
    figure.suptitle(f"{sweep.experiment.title}; {sweep.text.name}", fontsize=9)
    figure.supxlabel(headline, fontsize=7)
    return figure


def _curves(axes: Axes, sweep: Sweep, store: Store, rows: Sequence[Row]) -> None:
    spread = [row for index, row in enumerate(rows) if len(rows) <= _MOST_CURVES or index < _MOST_CURVES - 2]
    named = {row.variant for row in spread} | {sweep.baseline, "adamw"}
    for row in rows:
        if row.variant in named:
            points = _mean_curve(list(sweep.seed_runs(row.variant, store).values()))
            style = "--" if VARIANTS[row.variant].kind != "galore" else "-"
            axes.plot([step for step, _ in points], [loss for _, loss in points], style, marker=".", label=row.variant)
    axes.set(xlabel="optimizer steps", ylabel="validation loss")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=8)


def _mean_curve(runs: Sequence[Run]) -> list[tuple[int, float]]:
    """Mean over runs at the steps that all of them have."""
    curves = [dict(run.result.curve) for run in runs]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return [(step, fmean(curve[step] for curve in curves)) for step in steps]


def _dots(axes: Axes, rows: Sequence[Row], baseline: str) -> None:
    for place, row in enumerate(rows):
        losses = [loss for loss in row.losses.values() if loss is not None]
        color = _OTHERS if VARIANTS[row.variant].kind == "galore" else _PEERS
        axes.plot(losses, [place] * len(losses), "o", color=color, alpha=0.5, markersize=4)
        if row.mean is not None:
            axes.plot([row.mean], [place], "|", color=color, markersize=14, markeredgewidth=2)
        if row.tuning_loss is not None:
            axes.plot([row.tuning_loss], [place], "x", color="gray", markersize=4)
    mean = next((row.mean for row in rows if row.variant == baseline), None)
    if mean is not None:
        axes.axvline(mean, color="black", linewidth=0.7, linestyle=":")
    axes.set_yticks(range(len(rows)), [row.variant for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel="final validation loss: seeds (dots), mean (bar), tuning seed (cross)")
    axes.grid(alpha=0.3, axis="x")
