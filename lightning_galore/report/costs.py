# SPDX-License-Identifier: Apache-2.0
"""The charts of what low-rank training costs and saves: refreshes, their time, memory."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from lightning_galore.report.lines import SCHEDULER, Points, ends, line, named, pairs, spread
from lightning_galore.report.read import RunLog, Series
from lightning_galore.report.series import history, quantiles, thinned
from lightning_galore.report.style import Drawn, Missing, Theme, absent, canvas, from_zero, legend, step_axis

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def draw_gap_and_rank(log: RunLog, theme: Theme) -> Drawn:
    """How long a subspace is kept, and how wide it is."""
    panels = (
        ("gap (steps)", history(log, lambda refresh: refresh.gap), "galore/gap_mean"),
        ("rank", history(log, lambda refresh: refresh.rank), "galore/rank_mean"),
    )
    if not any(found or named(log, name, "") for _, found, name in panels):
        raise Missing("Neither galore_refreshes.csv has gap or rank nor was galore/gap_mean logged.", SCHEDULER)
    figure, axes = canvas(columns=2)
    said = []
    for ax, (what, found, name) in zip(axes, panels, strict=True):
        series = named(log, name, "mean over weights")
        if found:
            handles, labels = spread(ax, found, theme, extreme=None, stairs=True)
            _, (median,) = quantiles(found, 0.5)
            said.append(f"{what}: median {median[0]:,.4g} at first, {median[-1]:,.4g} at last.")
        elif series:
            handles = [line(ax, thinned(pairs(one)), c) for (_, one), c in zip(series, theme.cycle, strict=False)]
            labels = [label for label, _ in series]
            said.append(ends([one for _, one in series]))
        else:
            absent(ax, theme, f"{what}: not logged")
            continue
        from_zero(ax)
        ax.set_ylabel(what)
        ax.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        step_axis(ax, "optimizer step" if found else "step", ticks=6)
        legend(ax, handles, labels)
    return Drawn(figure, f"Two line charts by step, the gap between refreshes and the rank. {' '.join(said)}")


def draw_refreshes(log: RunLog, theme: Theme) -> Drawn:
    """How many refreshes there were, and what they cost."""
    counts = named(log, "galore/refreshes", "refreshes") or _counted(log)
    shares = named(log, "galore/refresh_time_share", "share of step time")
    if not counts and not shares:
        raise Missing("Neither galore_refreshes.csv was found nor was galore/refreshes logged.", SCHEDULER)
    figure, (left, right) = canvas(columns=2)
    if counts:
        for (_, series), colour in zip(counts, theme.cycle, strict=False):
            line(left, thinned(series.finite), colour, stairs=True)
        left.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        from_zero(left)
        left.set_ylabel("refreshes so far, all weights")
    else:
        absent(left, theme, "number of refreshes: galore/refreshes was not logged")
    if shares:
        for (_, series), colour in zip(shares, theme.cycle, strict=False):
            line(right, thinned(pairs(series)), colour, marks=True)
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        from_zero(right)
        right.set_ylabel("share of the step time")
    else:
        absent(right, theme, "share of the step time: galore/refresh_time_share was not logged")
    for ax, several in ((left, counts), (right, shares)):
        if several:
            step_axis(ax, ticks=6)
        if len(several) > 1:
            legend(ax, ax.get_lines(), [label for label, _ in several])
    said = ends([series for _, series in [*counts, *shares]])
    return Drawn(figure, f"Two line charts by step, the number of refreshes and their share of the step time. {said}")


def _counted(log: RunLog) -> list[tuple[str, Series]]:
    """Refreshes so far, where only the table of them is there."""
    steps = sorted({refresh.step for refresh in log.refreshes if refresh.found})
    if not steps:
        return []
    at = dict.fromkeys(steps, 0)
    for refresh in log.refreshes:
        if refresh.found:
            at[refresh.step] += 1
    total, totals = 0, []
    for step in steps:
        total += at[step]
        totals.append(float(total))
    return [("refreshes", Series("refreshes", steps, totals))]


def draw_memory(log: RunLog, theme: Theme) -> Drawn:
    """Bytes of optimizer state, what was saved, and the peak of the device."""
    state, saved = _summed(log, "galore/state_bytes"), _summed(log, "galore/bytes_saved")
    peak = [one for _, one in named(log, "galore/peak_memory_bytes", "")]
    if not state and not peak:
        raise Missing("Neither galore/state_bytes nor galore/peak_memory_bytes was logged.", SCHEDULER)
    figure, (left, right) = canvas(columns=2)
    said = []
    if state:
        said.append(_draw_state(left, theme, state, saved))
    else:
        absent(left, theme, "optimizer state: galore/state_bytes was not logged")
    if peak:
        unit, name = unit_of(max(value for one in peak for _, value in one.finite))
        for one, colour in zip(peak, theme.cycle[2:], strict=False):
            line(right, [(step, value / unit) for step, value in thinned(one.finite)], colour, marks=True)
        from_zero(right)
        right.set_ylabel(f"peak memory of the device ({name})")
        said.append(f"Peak memory at last: {peak[0].finite[-1][1] / unit:,.4g} {name}.")
    else:
        absent(right, theme, "peak memory: galore/peak_memory_bytes is logged on CUDA devices only")
    for ax, there in ((left, state), (right, peak)):
        if there:
            step_axis(ax, ticks=6)
    return Drawn(figure, f"Two charts of memory by step. {' '.join(said)}")


def _draw_state(ax: Axes, theme: Theme, state: Points, saved: Points) -> str:
    total = dict(saved)
    unit, name = unit_of(max(value + total.get(step, 0.0) for step, value in state))
    state = state if len(state) > 1 else [*state, (state[0][0] + 1, state[0][1])]
    steps = [step for step, _ in state]
    held = [value / unit for _, value in state]
    bands, labels = [ax.fill_between(steps, held, color=theme.cycle[0], alpha=0.85, linewidth=0, step="post")], ["held"]
    tops: list[float] = []
    if total:
        last = 0.0
        for (step, _), value in zip(state, held, strict=True):
            last = total.get(step, last)
            tops.append(value + last / unit)
        bands.append(ax.fill_between(steps, held, tops, color=theme.cycle[0], alpha=0.22, linewidth=0, step="post"))
        labels.append("saved against full rank")
    from_zero(ax)
    ax.margins(x=0)
    ax.set_ylabel(f"state of projected weights ({name})")
    legend(ax, bands, labels)
    gain = f", {tops[-1] - held[-1]:,.4g} {name} less than at full rank" if total else ""
    return f"Optimizer state of the projected weights at last: {held[-1]:,.4g} {name}{gain}."


def _summed(log: RunLog, name: str) -> list[tuple[float, float]]:
    """The sum over the optimizers; what one said holds until it says something else."""
    found = [one.finite for _, one in named(log, name, "")]
    if len(found) <= 1:
        return thinned(found[0]) if found else []
    last = [0.0] * len(found)
    at: dict[float, float] = {}
    for step, index, value in sorted((step, i, value) for i, one in enumerate(found) for step, value in one):
        last[index] = value
        at[step] = sum(last)
    return thinned(list(at.items()))


def unit_of(largest: float) -> tuple[float, str]:
    """The unit in which ``largest`` bytes have the fewest digits, as bytes and by name."""
    return next(((unit, name) for unit, name in _UNITS if largest >= unit), (1.0, "bytes"))
