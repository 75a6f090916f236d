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

#: What was said of stretches of time, by weight: (from, to, value).
Stretches = dict[str, list[tuple[float, float, float]]]


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


def drift_in_time(log: RunLog) -> Stretches:
    """The drift of each weight with the time in which it came about: from the refresh before to its own.

    A weight of the table that has no drift yet has its place, and no stretch. Without a table the series of
    ``galore_drift/<weight>`` stand in, and a stretch lasts from one log to the next.
    """
    logged = sorted({step for series in log.series.values() for step in series.steps})
    begin = min([*logged[:1], *(refresh.step for refresh in log.refreshes)], default=0.0)
    found: Stretches = {}
    for key, refreshes in by_weight(log).items():
        found[key], since = [], None
        for refresh in refreshes:
            if refresh.drift is not None:
                # Nothing before it: the run was resumed, and the refresh before stands in an older log.
                left = min(begin, refresh.step - 1) if since is None else since
                found[key].append((left, refresh.step, refresh.drift))
            if refresh.found:  # else the basis stayed
                since = refresh.step
    if any(found.values()):
        return found
    for key, points in history(log, lambda refresh: refresh.drift, "galore_drift").items():
        first = points[0][0]
        before = bisect_left(logged, first)
        lefts = [logged[before - 1] if before else first - 1, *(step for step, _ in points)]
        found[key] = [(left, right, value) for left, (right, value) in zip(lefts, points, strict=False)]
    return found


def raster(found: Stretches) -> tuple[list[float], list[list[float]]]:
    """A picture of weights by time.

    Args:
        found: The stretches of each weight; one at least has some.

    Returns:
        The edges of the columns, at most ``MOST_COLUMNS`` + 1, and one row a weight: the mean of what was said of the
        time of a column, NaN where nothing was.
    """
    edges = sorted({edge for stretches in found.values() for left, right, _ in stretches for edge in (left, right)})
    edges = _at_most(edges, MOST_COLUMNS + 1)
    return edges, [_row(stretches, edges) for stretches in found.values()]


def _row(stretches: list[tuple[float, float, float]], edges: list[float]) -> list[float]:
    sums, widths = [0.0] * (len(edges) - 1), [0.0] * (len(edges) - 1)
    for left, right, value in stretches:
        for column in range(bisect_right(edges, left) - 1, bisect_left(edges, right)):
            width = min(right, edges[column + 1]) - max(left, edges[column])
            sums[column] += width * value
            widths[column] += width
    return [total / width if width else math.nan for total, width in zip(sums, widths, strict=True)]
