# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are the logs of one run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
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
        notes: What else was found and left out, for the reader of the report.
    """

    folder: Path
    metrics: Path | None
    events: tuple[Path, ...]
    refreshes: Path | None
    notes: tuple[str, ...]


def locate(run_dir: Path) -> Sources:
    """Find the logs of the newest run under ``run_dir``.

    ``run_dir`` is taken by itself if it holds a log. Otherwise the ``version_*`` with the highest number wins, and
    between several experiments the one that was written last.

    Args:
        run_dir: The folder of a run, or of several.

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
    folder = _newest(candidates, found, run_dir)
    if len(candidates) > 1:
        notes.append(
            f"{len(candidates)} runs were found; this is the newest, {_relative(folder, run_dir)}. "
            "Give the folder of another one to draw that."
        )
    beside = folder / REFRESHES
    elsewhere = _newest(loose, found, run_dir) / REFRESHES if loose else None
    return Sources(
        folder=folder,
        metrics=folder / METRICS if folder in with_metrics else None,
        events=tuple(folder / name for name in sorted(found[folder]) if _is_events(name) and folder in with_events),
        refreshes=beside if REFRESHES in found[folder] else elsewhere,
        notes=tuple(notes),
    )


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


def _newest(folders: Iterable[Path], found: dict[Path, set[str]], run_dir: Path) -> Path:
    folders = sorted(folders)
    if run_dir in folders:
        return run_dir

    def written(folder: Path) -> float:
        return max((folder / name).stat().st_mtime for name in found[folder])

    def version(folder: Path) -> int:
        match = _VERSION.fullmatch(folder.name)
        return int(match[1]) if match else -1

    # The numbers survive a copy of the folder, times of modification often do not.
    newest: dict[Path, Path] = {}
    for folder in folders:
        held = newest.get(folder.parent)
        if held is None or (version(folder), written(folder)) > (version(held), written(held)):
            newest[folder.parent] = folder
    return max(newest.values(), key=written)


def _relative(folder: Path, run_dir: Path) -> str:
    return str(folder.relative_to(run_dir))
