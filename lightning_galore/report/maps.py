# SPDX-License-Identifier: Apache-2.0
"""The charts with a row or a panel for each weight; they stay readable with hundreds."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from lightning_galore.report.lines import SCHEDULER
from lightning_galore.report.read import RunLog
from lightning_galore.report.series import Stretches, by_weight, drift_in_time, raster
from lightning_galore.report.style import Drawn, Missing, Theme, canvas, log_axis, note, step_axis, text

_EVERY_NAME = 40
_MOST_NAMES = 34
_MOST_PANELS = 12
_FLOOR = 1e-4
_MOMENTS = ("first", "middle", "last")

#: Of each weight, its spectrum at these moments; an empty one was not logged.
Spectra = dict[str, tuple[list[float], list[float], list[float]]]


def short_names(names: list[str]) -> list[str]:
    """Names without the dotted beginning that all share, and without ``.weight``.

    Example:
        >>> short_names(["net.layer.0.q.weight", "net.layer.1.q.weight"])
        ['layer.0.q', 'layer.1.q']
    """
    parts = [name.split(".") for name in names]
    shared = 0
    if len(names) > 1:
        shared = len(os.path.commonprefix([part[:-1] for part in parts]))
        # "layer" says what the number behind it counts.
        while shared and any(len(part) > shared and part[shared].isdecimal() for part in parts):
            shared -= 1
    return [".".join(part[shared:]).removesuffix(".weight") for part in parts]


def blocks(names: list[str]) -> list[tuple[int, str]]:
    """Where a layer begins, and its name: all up to the first number. A name without one is its own."""
    found: list[tuple[int, str]] = []
    for row, name in enumerate(names):
        match = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
        block = match[0] if match else name
        if not found or found[-1][1] != block:
            found.append((row, block))
    return found


def draw_drift_map(log: RunLog, theme: Theme) -> Drawn:
    """Drift of each weight from refresh to refresh."""
    found = drift_in_time(log)
    if not any(found.values()):
        twice = "A drift needs two refreshes of a weight: train for more than one update_proj_gap. "
        raise Missing(
            "No refresh has an overlap with the one before it, and no galore_drift/<weight> was logged.",
            (twice if log.refreshes else "") + SCHEDULER,
        )
    edges, rows = raster(found)
    figure, (ax,) = canvas(height=_height(len(rows)))
    mesh = _mesh(ax, edges, rows, Normalize(0, 1), theme)
    _name_rows([ax], short_names(list(found)), theme)
    step_axis(ax, "optimizer step" if log.refreshes else "step")
    _colorbar(figure, mesh, [ax], "drift (1 − overlap)", _height(len(rows)))
    without = _without_drift(log, found)
    if any(math.isnan(value) for row in rows for value in row):
        said = "No value: before the first refresh of a weight and after its last."
        note(figure, theme, " ".join([said, *without]), empty=True)
    last = {name: stretches[-1][2] for name, stretches in found.items() if stretches}
    most, least = max(last, key=lambda name: last[name]), min(last, key=lambda name: last[name])
    return Drawn(
        figure,
        f"Heat map of the drift of {len(found)} weights over {len(edges) - 1} intervals, from step {edges[0]:,.0f} to "
        f"{edges[-1]:,.0f}. At its last refresh {most} drifted most ({last[most]:.2f}) and {least} least "
        + " ".join([f"({last[least]:.2f}).", *without]),
    )


def _without_drift(log: RunLog, found: Stretches) -> list[str]:
    """Why rows are empty, in sentences."""
    refreshes = {key: sum(refresh.found for refresh in some) for key, some in by_weight(log).items()}
    once = sum(not stretches and refreshes[key] < 2 for key, stretches in found.items())
    other = sum(not stretches for stretches in found.values()) - once
    said = []
    if once:
        said.append(f"{once} of {len(found)} weights {_was(once)} refreshed only once, which gives no drift yet.")
    if other:
        said.append(f"{other} of {len(found)} weights {_was(other)} refreshed without an overlap in the log.")
    return said


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def draw_spectrum(log: RunLog, theme: Theme) -> Drawn:
    """Singular values of the projected gradient at the first, the middle and the last refresh of each weight."""
    found: Spectra = {}
    for name, refreshes in by_weight(log).items():
        spectra = [normal for refresh in refreshes if (normal := _normalised(refresh.spectrum))]
        if spectra:
            # Of one refresh there is only a first, of two a first and a last.
            middle = spectra[len(spectra) // 2] if len(spectra) > 2 else []
            found[name] = (spectra[0], middle, spectra[-1] if len(spectra) > 1 else [])
    if not found:
        raise Missing("galore_refreshes.csv was not found or has no singular values.", SCHEDULER)
    moments = [moment for index, moment in enumerate(_MOMENTS) if any(three[index] for three in found.values())]
    missing = _without_spectrum(found, weights=len(by_weight(log)))
    maps = len(found) > _MOST_PANELS
    figure = (_moment_maps if maps else _panels)(found, moments, theme)
    if missing:
        # Of a panel without a line no more can be seen than that; a map has rows without a value.
        empty = maps and any(not three[_MOMENTS.index(moment)] for three in found.values() for moment in moments)
        note(figure, theme, " ".join(missing), empty=empty)
    flat = {name: kept[-1] / kept[0] for name, three in found.items() if (kept := three[2] or three[0])}
    steep, level = min(flat, key=lambda name: flat[name]), max(flat, key=lambda name: flat[name])
    return Drawn(
        figure,
        f"Singular values of the projected gradients of {len(found)} weights, divided by the largest, at the "
        f"{' and '.join(', '.join(moments).rsplit(', ', 1))} refresh. At last the spectrum of {steep} falls most, to "
        f"{flat[steep]:.2g} of its largest, and that of {level} least, to "
        + " ".join([f"{flat[level]:.2g}.", *missing]),
    )


def _without_spectrum(found: Spectra, *, weights: int) -> list[str]:
    """What cannot be drawn, in sentences."""
    once = sum(not last for _, _, last in found.values())
    twice = sum(bool(last) and not middle for _, middle, last in found.values())
    said = []
    if once == len(found):
        said.append("Of each weight there is one refresh so far, so no middle and no last one.")
    else:
        if once:
            said.append(f"{once} of {len(found)} weights {_was(once)} refreshed once and {_has(once)} no last refresh.")
        if once + twice == len(found):
            said.append("No weight was refreshed three times, so there is no middle refresh.")
        elif once + twice:
            said.append(f"{once + twice} {_was(once + twice)} refreshed less than three times: no middle refresh.")
    if weights > len(found):
        left = weights - len(found)
        said.append(f"{left} of {weights} weights {_has(left)} no singular values in the log and no place here.")
    return said


def _has(count: int) -> str:
    return "has" if count == 1 else "have"


def _normalised(spectrum: tuple[float, ...]) -> list[float]:
    """Divided by the largest; empty where that cannot be done. Zeros end it: they have no logarithm."""
    if not spectrum or not 0 < spectrum[0] < math.inf:
        return []
    return [kept for value in spectrum if (kept := value / spectrum[0]) > 1e-12]


def _panels(found: Spectra, moments: list[str], theme: Theme) -> Figure:
    """One panel a weight."""
    columns = min(len(found), 4)
    rows = math.ceil(len(found) / columns)
    figure, axes = canvas(columns, rows, height=1.0 + 1.6 * rows, sharex=True, sharey=True)
    lines = {}
    for ax, name, spectra in zip(axes, short_names(list(found)), found.values(), strict=False):
        for moment, spectrum, colour, mark in zip(_MOMENTS, spectra, theme.ramp, "so^", strict=True):
            if spectrum:
                places = range(1, len(spectrum) + 1)
                (lines[moment],) = ax.plot(places, spectrum, color=colour, marker=mark, markersize=3, linewidth=1.4)
        ax.set_title(text(name, 26), fontsize=8.0)
        ax.grid(visible=False, axis="x")
    axes[0].set_yscale("log")
    log_axis(axes[0].yaxis)
    axes[0].set_ylim(max(_lowest(found) * 0.7, _FLOOR), 1.3)
    axes[0].xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for ax in axes[len(found) :]:
        ax.set_visible(False)
    for ax in axes[max(len(found) - columns, 0) : len(found)]:
        ax.tick_params(labelbottom=True)
        ax.set_xlabel("index of singular value", fontsize=8.0)
    figure.supylabel("share of the largest", fontsize=9)
    figure.legend([lines[m] for m in moments], [f"{m} refresh" for m in moments], loc="outside upper left", ncols=3)
    return figure


def _moment_maps(found: Spectra, moments: list[str], theme: Theme) -> Figure:
    """One row a weight, for more weights than panels have room."""
    height = _height(len(found))
    figure, axes = canvas(len(moments), height=height, sharey=True)
    width = max(len(spectrum) for spectra in found.values() for spectrum in spectra)
    scale = LogNorm(max(min(_lowest(found), 0.1), _FLOOR), 1.0, clip=True)
    edges = [place + 0.5 for place in range(width + 1)]
    meshes = []
    for ax, moment in zip(axes, moments, strict=True):
        shown = [spectra[_MOMENTS.index(moment)] for spectra in found.values()]
        rows = [spectrum + [math.nan] * (width - len(spectrum)) for spectrum in shown]
        meshes.append(_mesh(ax, edges, rows, scale, theme))
        ax.set_title(f"{moment} refresh")
        ax.set_xlabel("index of the singular value")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    _colorbar(figure, meshes[-1], axes, "share of the largest", height)
    _name_rows(axes, short_names(list(found)), theme)
    return figure


def _lowest(found: Spectra) -> float:
    return min(min(spectrum) for spectra in found.values() for spectrum in spectra if spectrum)


def _mesh(ax: Axes, edges: list[float], rows: list[list[float]], scale: Normalize, theme: Theme) -> Any:
    colours = colormaps["viridis"].with_extremes(bad=theme.empty)
    mesh = ax.pcolormesh(edges, range(len(rows) + 1), rows, cmap=colours, norm=scale)
    ax.set_ylim(len(rows), 0)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return mesh


def _colorbar(figure: Figure, mesh: Any, axes: list[Axes], label: str, height: float) -> None:
    """Of the same length in a low figure and in a high one."""
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, shrink=min(1.0, 3.0 / height), aspect=22, anchor=(0.0, 1.0))
    bar.set_label(label)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    if isinstance(mesh.norm, LogNorm):
        log_axis(bar.ax.yaxis)


def _name_rows(axes: list[Axes], names: list[str], theme: Theme) -> None:
    """Each weight's name where there is room, else each layer's or every few layers'; lines part the layers."""
    starts = blocks(names)
    if len(names) <= _EVERY_NAME:
        places, labels = [row + 0.5 for row in range(len(names))], names
    else:
        every = math.ceil(len(starts) / _MOST_NAMES)
        ends = [row for row, _ in starts[1:]] + [len(names)]
        middles = [(row + end) / 2 for (row, _), end in zip(starts, ends, strict=True)]
        places, labels = middles[::every], [block for _, block in starts[::every]]
    axes[0].set_yticks(places, [text(label, 34) for label in labels], fontsize=7.5)
    if len(starts) < len(names) and len(starts) <= 120:
        for ax in axes:
            for row, _ in starts[1:]:
                ax.axhline(row, color=theme.paper, linewidth=1.2 if len(names) <= _EVERY_NAME else 0.6)


def _height(rows: int) -> float:
    return min(max(1.2 + 0.19 * min(rows, _EVERY_NAME) + 0.012 * max(rows - _EVERY_NAME, 0), 2.6), 13.0)
