# SPDX-License-Identifier: Apache-2.0
"""Which of the runs that were found is drawn: the newest of which a log says something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_galore.report.find import REFRESHES, ReportError, Sources
from lightning_galore.report.page import Section
from lightning_galore.report.read import RunLog, held_out, is_loss, read_log

_MOST_NAMES = 4


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The run that is drawn.

    Args:
        sources: Its files.
        log: What was read from them.
        sections: Its charts; one picture at least.
        note: Why this one, where there were several.
    """

    sources: Sources
    log: RunLog
    sections: list[Section]
    note: str


def choose(runs: Sequence[Sources], run_dir: Path, draw_all: Callable[[RunLog], list[Section]]) -> Chosen:
    """Draw the newest run that holds something to draw.

    ``validate``, ``test``, ``predict`` and a ``fit`` that failed leave folders too, which hold nothing, or the one
    point of an evaluation; those are taken only where there is nothing else.

    Args:
        runs: The newest first.
        run_dir: In which they are, for the words.
        draw_all: Draws a log; a section without a picture has nothing to say.

    Raises:
        ReportError: If no run holds anything to draw.
    """
    empty: list[Path] = []
    evaluations: list[Path] = []
    second: list[tuple[Sources, RunLog, int]] = []
    for sources in runs:
        log = read_log(sources)
        of_its_own = bool(log.refreshes) and sources.refreshes == sources.folder / REFRESHES
        if not of_its_own and _at_most_evaluates(log):
            second.append((sources, log, len(empty)))
            (evaluations if log.series else empty).append(sources.folder)
        elif sections := _drawn(log, draw_all):
            note = _note(runs, sources, run_dir, empty, evaluations)
            return Chosen(sources=sources, log=log, sections=sections, note=note)
        else:
            empty.append(sources.folder)
    for sources, log, newer in second:
        if sections := _drawn(log, draw_all):
            note = _note(runs, sources, run_dir, empty[:newer], [])
            return Chosen(sources=sources, log=log, sections=sections, note=note)
    raise ReportError(_nothing(runs, run_dir))


def _drawn(log: RunLog, draw_all: Callable[[RunLog], list[Section]]) -> list[Section]:
    sections = draw_all(log)
    return sections if any(section.light for section in sections) else []


def _at_most_evaluates(log: RunLog) -> bool:
    """Whether the metrics are those of ``validate`` or ``test``, a loss on held-out data at one step, or none."""
    return all(is_loss(name) and held_out(name) and len(series.steps) == 1 for name, series in log.series.items())


def _note(runs: Sequence[Sources], taken: Sources, run_dir: Path, empty: list[Path], evaluations: list[Path]) -> str:
    nothing = [*taken.without_log, *(folder for folder in empty if folder not in taken.without_log)]
    if len(runs) == 1 and not nothing:
        return ""
    said = f"{len(runs)} {'runs were' if len(runs) > 1 else 'run was'} found; this is the newest"
    name = taken.folder.relative_to(run_dir)
    if not nothing and not evaluations:
        return f"{said}, {name}. Give the folder of another one to draw that."
    passed = []
    if nothing:
        passed.append(f"{_names(nothing, run_dir)} {'holds' if len(nothing) == 1 else 'hold'} nothing")
    if evaluations:
        held = "holds" if len(evaluations) == 1 else "hold"
        passed.append(f"{_names(evaluations, run_dir)} {held} an evaluation only")
    return f"{said} with something to draw, {name}; {', '.join(passed)}. Give the folder of another one to draw that."


def _names(folders: list[Path], run_dir: Path) -> str:
    names = [str(folder.relative_to(run_dir)) for folder in folders]
    left = len(names) - _MOST_NAMES
    return " and ".join(", ".join([*names[:_MOST_NAMES], *([f"{left} more"] if left > 0 else [])]).rsplit(", ", 1))


def _nothing(runs: Sequence[Sources], run_dir: Path) -> str:
    remedy = 'Log a loss (self.log("train_loss", loss)) and train with callbacks=[SubspaceScheduler()].'
    if len(runs) > 1:
        said = f"Nothing to draw in any of the {len(runs)} runs in {run_dir}: no loss, no subspaces."
        return " ".join([said, remedy, *runs[0].notes])
    log = read_log(runs[0])
    names = [name for name in log.columns if name not in ("step", "epoch")]
    logged = f"logged were {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "nothing was logged"
    return " ".join([f"Nothing to draw in {runs[0].folder}: {logged}.", remedy, *log.notes[:2]])
