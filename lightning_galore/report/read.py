# SPDX-License-Identifier: Apache-2.0
"""Reads the logs of a run. They are text that anybody may have written: what does not fit is left out and counted."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from lightning_galore.report.find import ReportError, Sources

#: Whatever is larger than this in size is drawn as missing: the arithmetic of axes would overflow.
LARGEST = 1e30
_LARGEST_STEP = 1e15
_LARGEST_FILE = 1 << 30
_MOST_EVENTS = 200_000
_MOST_SINGULAR_VALUES = 64
_HELD_OUT = {"val", "valid", "validation", "eval", "dev", "test"}
_PREFIXES = ("lr-", "galore/", "galore_drift", "galore_energy")


@dataclass(frozen=True)
class Series:
    """What was logged under one name, by ascending step.

    Args:
        name: The name it was logged by.
        steps: One number a value, no two the same.
        values: NaN where the run logged something that is not finite.
    """

    name: str
    steps: list[float]
    values: list[float]

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The pairs of step and value that can be drawn."""
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """One refresh of one weight's subspace: a row of ``galore_refreshes.csv``. None stands for an empty field.

    Args:
        step: Optimizer step.
        optimizer: Index of the optimizer.
        weight: The parameter's name.
        shape: Such as ``768x3072``.
        side: Where the basis stands.
        rank: Its width.
        gap: Steps until the next refresh.
        drift: 1 - overlap with the basis before, in [0, 1].
        captured_energy: Share of the gradient's squared norm that the subspace holds, in [0, 1].
        found: Whether a new basis was found.
        spectrum: The largest singular values of the projected gradient, in descending order.
    """

    step: float
    optimizer: int
    weight: str
    shape: str
    side: str
    rank: float | None
    gap: float | None
    drift: float | None
    captured_energy: float | None
    found: bool
    spectrum: tuple[float, ...]


@dataclass
class RunLog:
    """All that a report draws from.

    Args:
        series: By name.
        refreshes: By step; one for each step, optimizer and weight.
        columns: Every name that was logged, also those that no chart uses.
        notes: What was left out, in sentences.
    """

    series: dict[str, Series] = field(default_factory=dict)
    refreshes: list[Refresh] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def is_loss(name: str) -> bool:
    """Whether ``name`` is that of a loss."""
    return "loss" in name.lower() and not name.startswith(_PREFIXES)


def held_out(name: str) -> bool:
    """Whether the name of a loss says that it is not the training loss."""
    return bool(_HELD_OUT & set(re.split(r"[^a-z]+", name.lower())))


def read_log(sources: Sources) -> RunLog:
    """Read the logs that were found.

    Raises:
        ReportError: If a file is too large.
    """
    log = RunLog(notes=list(sources.notes))
    if sources.metrics is not None:
        _read_metrics(sources.metrics, log)
    elif sources.events:
        _read_events(sources.events, log)
    if sources.refreshes is not None:
        _read_refreshes(sources.refreshes, log)
    for series in log.series.values():
        broken = [step for step, value in zip(series.steps, series.values, strict=True) if math.isnan(value)]
        if broken:
            log.notes.append(
                f"{series.name}: {len(broken):,} of {len(series.values):,} values are not finite, the first at step "
                f"{broken[0]:,.0f}; they are gaps in the line."
            )
    return log


def _read_metrics(path: Path, log: RunLog) -> None:
    points: dict[str, dict[float, float]] = {}
    unplaced = 0
    for row in _rows(path, log, needs=("step",)):
        step = _number(row.pop("step"), least=0, most=_LARGEST_STEP)
        if step is None:
            unplaced += 1
            continue
        for name, text in row.items():
            value = _float(text) if text and _is_drawn(name) else None
            if value is not None:
                points.setdefault(name, {})[step] = value
    _note_unplaced(unplaced, path, log)
    _keep_series(points, log)


def _read_events(paths: tuple[Path, ...], log: RunLog) -> None:
    _check_size(*paths)
    # Not a plain import: tensorboard is no dependency, and whether it is there was asked before.
    accumulator = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    events = accumulator(str(paths[0].parent), size_guidance={"scalars": _MOST_EVENTS})
    events.Reload()
    tags = events.Tags()["scalars"]
    log.columns = sorted(tags)
    _keep_series(
        {
            tag: {float(event.step): _drawable(event.value) for event in events.Scalars(tag)}
            for tag in tags
            if _is_drawn(tag)
        },
        log,
    )


def _keep_series(points: dict[str, dict[float, float]], log: RunLog) -> None:
    for name in sorted(points):
        steps = sorted(points[name])
        log.series[name] = Series(name, steps, [points[name][step] for step in steps])


def _read_refreshes(path: Path, log: RunLog) -> None:
    events: dict[tuple[float, int, str], Refresh] = {}
    unplaced = 0
    for row in _rows(path, log, needs=("step", "weight")):
        step = _number(row["step"], least=0, most=_LARGEST_STEP)
        if step is None or not row["weight"]:
            unplaced += 1
            continue
        overlap = _number(row.get("overlap"), least=-1e-3, most=1.001)  # rounding may leave [0, 1] by a little
        energy = _number(row.get("captured_energy"), least=-1e-3, most=1.001)
        refresh = Refresh(
            step=step,
            optimizer=int(_number(row.get("optimizer"), least=0, most=1e6) or 0),
            weight=row["weight"],
            shape=row.get("shape") or "",
            side=row.get("side") or "",
            rank=_number(row.get("rank"), least=1, most=1e9),
            gap=_number(row.get("gap"), least=1, most=_LARGEST_STEP),
            drift=None if overlap is None else min(max(1.0 - overlap, 0.0), 1.0),
            captured_energy=None if energy is None else min(max(energy, 0.0), 1.0),
            found=(row.get("found") or "1").strip().lower() not in ("0", "0.0", "false"),
            spectrum=_spectrum(row.get("spectrum") or ""),
        )
        events[refresh.step, refresh.optimizer, refresh.weight] = refresh  # after a resume the later row holds
    _note_unplaced(unplaced, path, log)
    log.refreshes = [events[key] for key in sorted(events)]


def _spectrum(text: str) -> tuple[float, ...]:
    values = [_float(word) for word in text.split()[:_MOST_SINGULAR_VALUES]]
    if not values or any(value is None or not value >= 0 for value in values):
        return ()
    return tuple(sorted((value for value in values if value is not None), reverse=True))


def _rows(path: Path, log: RunLog, *, needs: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file that are whole, by the names of their columns.

    Line by line, so that a quote in a broken line cannot swallow the rest of the file.
    """
    _check_size(path)
    skipped: Counter[str] = Counter()
    header: list[str] | None = None
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for line in file:
            if not line.endswith(("\n", "\r")):
                skipped["cut off at the end of the file"] += 1
                break
            try:
                fields = next(csv.reader([line]), [])
            except csv.Error:
                fields = ["unreadable"]
            if header is None:
                header = fields
                missing = [name for name in needs if name not in header]
                if missing:
                    log.notes.append(f"{path.name} was left out: it has no column {missing[0]!r}.")
                    return
                log.columns = sorted({*log.columns, *header})
            elif len(fields) != len(header):
                skipped["of another length than the header"] += bool(fields)
            else:
                yield dict(zip(header, fields, strict=True))
    for why, count in skipped.items():
        if count:
            log.notes.append(f"{path.name}: {count:,} {'line' if count == 1 else 'lines'} left out, {why}.")


def _note_unplaced(count: int, path: Path, log: RunLog) -> None:
    if count:
        log.notes.append(
            f"{path.name}: {count:,} {'row' if count == 1 else 'rows'} left out, without a step or a name."
        )


def _check_size(*paths: Path) -> None:
    size = sum(path.stat().st_size for path in paths)
    if size > _LARGEST_FILE:
        raise ReportError(
            f"{paths[0]} has {size:,} bytes, more than the {_LARGEST_FILE:,} that a report reads. "
            "Log less often, e.g. with Trainer(log_every_n_steps=500), or give a shortened copy."
        )


def _is_drawn(name: str) -> bool:
    return is_loss(name) or name.startswith(_PREFIXES)


def _float(text: str) -> float | None:
    """None for what is no number at all, NaN for what cannot be drawn."""
    try:
        return _drawable(float(text))
    except ValueError:
        return None


def _drawable(value: float) -> float:
    return float(value) if abs(value) <= LARGEST else math.nan


def _number(text: str | None, *, least: float, most: float) -> float | None:
    value = _float(text) if text else None
    return value if value is not None and least <= value <= most else None
