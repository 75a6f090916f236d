# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are the logs of one run, and which run is newer than another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from importlib.util import find_spec
from pathlib import Path

METRICS = "metrics.csv"
REFRESHES = "galore_refreshes.csv"
_EVENTS = "events.out.tfevents."
_VERSION = re.compile(r"version_(\d+)")


class ReportError(ValueError):
    """A report cannot be made; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The logs of one run.

    Args:
        folder: Where the run logged.
        metrics: ``metrics.csv`` of Lightning's CSVLogger.
        events: TensorBoard event files, read where there is no ``metrics.csv``.
        refreshes: ``galore_refreshes.csv``, one row a refresh of a subspace.
        without_log: Newer ``version_*`` beside it that hold no log at all.
        notes: What else was found and left out, for the reader of the report.
    """

    folder: Path
    metrics: Path | None
    events: tuple[Path, ...]
    refreshes: Path | None
    without_log: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def locate(run_dir: Path) -> list[Sources]:
    """Find the logs of the runs under ``run_dir``, the newest first.

    ``run_dir`` itself comes first if it holds a log. Otherwise it is the ``version_*`` with the highest number, and
    between several experiments the one that was written last.

    Args:
        run_dir: The folder of a run, or of several.

    Returns:
        One at least.

    Raises:
        FileNotFoundError: If it is not a folder.
        ReportError: If there is no log under it.
    """
    if not run_dir.is_dir():
        raise FileNotFoundError(
            f"run_dir={run_dir} is not a folder. Give the one in which a run logged, such as lightning_logs/version_0."
        )
    found = _logs_under(run_dir)
    with_metrics = {folder for folder, names in found.items() if METRICS in names}
    with_events = {folder for folder, names in found.items() if any(_is_events(name) for name in names)}
    notes: list[str] = []
    if with_events - with_metrics and find_spec("tensorboard") is None:
        notes.append("TensorBoard event files were left out: reading them needs `pip install tensorboard`.")
        with_events = set()
    # A table of refreshes beside the metrics of another run is that run's, and not of the one that is drawn.
    loose = {folder for folder, names in found.items() if REFRESHES in names} - with_metrics - with_events
    candidates = with_metrics | with_events or loose
    if not candidates:
        raise ReportError(
            f"run_dir={run_dir} holds no log: looked in it and below for {METRICS} (CSVLogger), TensorBoard event "
            f"files and {REFRESHES}. Log with Trainer(logger=CSVLogger({str(run_dir)!r}), "
            f"callbacks=[SubspaceScheduler(...), LearningRateMonitor()]). {' '.join(notes)}".rstrip()
        )
    lent = _newest_first(loose, found, run_dir)[0] / REFRESHES if loose else None
    empty = _without_log(candidates - {run_dir}, found)
    return [
        Sources(
            folder=folder,
            metrics=folder / METRICS if folder in with_metrics else None,
            events=tuple(folder / name for name in sorted(found[folder]) if _is_events(name) and folder in with_events),
            refreshes=folder / REFRESHES if REFRESHES in found[folder] else lent,
            without_log=tuple(one for one in empty.get(folder.parent, ()) if _version(one) > _version(folder)),
            notes=tuple(notes),
        )
        for folder in _newest_first(candidates, found, run_dir)
    ]


def _logs_under(run_dir: Path) -> dict[Path, set[str]]:
    """The folders under ``run_dir`` that hold logs, with the names of those; links are not followed."""
    found: dict[Path, set[str]] = {}
    for folder, subfolders, names in os.walk(run_dir):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        logs = {
            name
            for name in names
            if (name in (METRICS, REFRESHES) or _is_events(name)) and os.path.isfile(os.path.join(folder, name))
        }
        if logs:
            found[Path(folder)] = logs
    return found


def _is_events(name: str) -> bool:
    return name.startswith(_EVENTS)


def _newest_first(folders: Iterable[Path], found: dict[Path, set[str]], run_dir: Path) -> list[Path]:
    def written(folder: Path) -> float:
        return max((folder / name).stat().st_mtime for name in found[folder])

    # The numbers survive a copy of the folder, times of modification often do not.
    ages = {folder: (_version(folder), written(folder)) for folder in sorted(folders)}
    waiting: dict[Path, list[Path]] = {}
    for folder in sorted(ages, key=lambda folder: ages[folder]):
        waiting.setdefault(folder.parent, []).append(folder)
    heads = [(-ages[some[-1]][1], parent) for parent, some in waiting.items()]
    heapify(heads)
    ordered = [run_dir] if run_dir in ages else []
    while heads:
        _, parent = heappop(heads)
        folder = waiting[parent].pop()
        if folder != run_dir:
            ordered.append(folder)
        if waiting[parent]:
            heappush(heads, (-ages[waiting[parent][-1]][1], parent))
    return ordered


def _without_log(folders: Iterable[Path], logs: Iterable[Path]) -> dict[Path, list[Path]]:
    """What commands that failed early have left beside ``folders``, by parent: the settings, and no log."""
    holding = {above for log in logs for above in (log, *log.parents)}
    return {
        parent: sorted(
            (other for other in parent.iterdir() if _version(other) >= 0 and other.is_dir() and other not in holding),
            key=_version,
            reverse=True,
        )
        for parent in {folder.parent for folder in folders if _version(folder) >= 0}
    }


def _version(folder: Path) -> int:
    match = _VERSION.fullmatch(folder.name)
    return int(match[1]) if match else -1
