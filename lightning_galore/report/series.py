# SPDX-License-Identifier: Apache-2.0
"""Arithmetic on what was read: thinning, smoothing, and what holds between two refreshes. No drawing."""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from statistics import fmean

from lightning_galore.report.read import Refresh, RunLog

MOST_POINTS = 2000
MOST_COLUMNS = 240

#: The events of each weight, by ascending step: (step, value).
History = dict[str, list[tuple[float, float]]]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``layer.10`` after ``layer.9``.

    Example:
        >>> sorted(["h.10.q", "h.9.q", "head"], key=natural)
        ['h.9.q', 'h.10.q', 'head']
    """
    return [(int(part), "") if part.isdecimal() and len(part) < 19 else (-1, part) for part in re.split(r"(\d+)", name)]


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points that draw the same picture: the lowest and the highest of each stretch stay.

    A stretch in which nothing is finite stays as one gap.
    """
    if len(points) <= most:
        return list(points)
    stretches = max(most // 2 - 1, 1)  # two of each, and the ends
    kept = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        finite = [j for j in stretch if math.isfinite(points[j][1])]
        if finite:
            kept |= {min(finite, key=lambda j: points[j][1]), max(finite, key=lambda j: points[j][1])}
        else:
            kept.add(stretch[0])
    return [points[j] for j in sorted(kept)]


def running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of about ``window`` values around each, at no more steps than can be drawn.

    Around, and not before, so that a falling line is not shown late. Each mean is summed anew: adding and subtracting
    would keep the rounding error of one spike for ever.
    """
    half = window // 2
    stride = max(len(points) // (MOST_POINTS // 2), 1)
    return [
        (points[i][0], fmean(value for _, value in points[max(i - half, 0) : i + half + 1]))
        for i in range(0, len(points), stride)
    ]


def weight_key(refresh: Refresh, *, several: bool) -> str:
    """What a weight is called where several optimizers may hold weights of the same name."""
    return f"{refresh.optimizer}: {refresh.weight}" if several else refresh.weight


def by_weight(log: RunLog) -> dict[str, list[Refresh]]:
    """The refreshes of each weight, weights in the order of their layers."""
    several = len({refresh.optimizer for refresh in log.refreshes}) > 1
    found: dict[str, list[Refresh]] = {}
    for refresh in log.refreshes:
        found.setdefault(weight_key(refresh, several=several), []).append(refresh)
    return {key: found[key] for key in sorted(found, key=natural)}


def history(log: RunLog, value: Callable[[Refresh], float | None], prefix: str | None = None) -> History:
    """A value of each weight over time, from the table of refreshes.

    Args:
        log: What was read.
        value: Picks the value of one refresh.
        prefix: Series of ``<prefix>/<weight>`` stand in where the table says nothing.
    """
    found: History = {}
    for key, refreshes in by_weight(log).items():
        points = [(refresh.step, picked) for refresh in refreshes if (picked := value(refresh)) is not None]
        if points:
            found[key] = points
    if found or prefix is None:
        return found
    # With several optimizers, <prefix>_<index>/<weight>.
    pattern = re.compile(re.escape(prefix) + r"(?:_(\d+))?/(.+)")
    for name, series in log.series.items():
        match = pattern.fullmatch(name)
        if match and series.finite:
            found[f"{match[1]}: {match[2]}" if match[1] else match[2]] = series.finite
    return {key: found[key] for key in sorted(found, key=natural)}


def quantiles(found: History, *levels: float) -> tuple[list[float], list[list[float]]]:
    """Quantiles over the weights at each step at which one of them refreshed; a weight's value holds until its next.

    Returns:
        The steps, and for each level its values.
    """
    steps = _at_most(sorted({step for points in found.values() for step, _ in points}), MOST_COLUMNS)
    places = [([step for step, _ in points], points) for points in found.values()]
    rows: list[list[float]] = [[] for _ in levels]
    for step in steps:
        held = sorted(points[i - 1][1] for known, points in places if (i := bisect_right(known, step)))
        for row, level in zip(rows, levels, strict=True):
            row.append(_quantile(held, level))
    return steps, rows


def _quantile(ordered: list[float], level: float) -> float:
    place = level * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _at_most(steps: list[float], most: int) -> list[float]:
    if len(steps) <= most:
        return steps
    return [steps[i * (len(steps) - 1) // (most - 1)] for i in range(most)]


def raster(found: History, start: float) -> tuple[list[float], list[list[float]]]:
    """A picture of weights by time. A cell holds what the refresh at its end, or the next one after, said.

    Args:
        found: The events of each weight.
        start: Where time begins: the step of the first refresh.

    Returns:
        The edges of the columns, and one row a weight; NaN after a weight's last event.
    """
    ends = sorted({step for points in found.values() for step, _ in points if step > start})
    if not ends:
        ends = [start + 1]
    edges = [start, *_at_most(ends, MOST_COLUMNS)]
    return edges, [_row(points, edges) for points in found.values()]


def _row(points: list[tuple[float, float]], edges: list[float]) -> list[float]:
    steps = [step for step, _ in points]
    row = []
    for left, right in zip(edges, edges[1:]):  # noqa: B905  # the second is shorter by one
        inside = points[bisect_right(steps, left) : bisect_right(steps, right)]
        after = bisect_left(steps, right)
        if inside:
            row.append(fmean(value for _, value in inside))
        else:
            row.append(points[after][1] if after < len(points) else math.nan)
    return row
