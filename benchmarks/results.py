# SPDX-License-Identifier: Apache-2.0
"""How a measurement is told: a report, shown as tables and written as JSON and picture, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.machine import headline
from benchmarks.timing import Spread

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something that the package promises, beside what was measured.

    Args:
        text: What is promised.
        value: What was measured.
        bound: What it is held to.
        at_least: Whether ``value`` must reach ``bound``; else it must not pass it.
    """

    text: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows and columns; the first column is a name, the others are figures."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """One measurement.

    Args:
        name: Short name, the end of the file's name.
        machine: Where it was measured, from :func:`benchmarks.machine.describe`.
        settings: How.
        measurements: Every figure, raw times included; made of what JSON knows.
        tables: The same for people.
        targets: Promises, kept or not.
        notes: What was left out, and why.
    """

    name: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    measurements: list[dict[str, Any]]
    tables: list[Table]
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def show(report: Report, console: Console) -> None:
    """Print the tables, the targets and the notes of a report."""
    for table in report.tables:
        _print_table(table, console)
    if report.targets:
        rows = [_target_cells(target) for target in report.targets]
        _print_table(Table(title="targets", header=("promise", "measured", "bound", ""), rows=rows), console)
    for note in report.notes:
        console.print(f"Note: {note}", highlight=False)
    console.print(headline(report.machine), style="dim", highlight=False)


def _print_table(table: Table, console: Console) -> None:
    grid = RichTable(title=table.title, title_justify="left")
    for index, title in enumerate(table.header):
        # Where the console is narrow, headers and names are broken over lines, but never a figure.
        widest = max((Text.from_markup(row[index]).cell_len for row in table.rows), default=0)
        grid.add_column(title, justify="right" if index else "left", min_width=widest if index else min(widest, 36))
    for row in table.rows:
        grid.add_row(*row)
    console.print(grid)


def _target_cells(target: Target) -> tuple[str, ...]:
    sign = ">=" if target.at_least else "<="
    verdict = "[green]pass[/]" if target.passed else "[bold red]FAIL[/]"
    return target.text, f"{target.value:.4g}", f"{sign} {target.bound:g}", verdict


def write(report: Report, figure: Figure, folder: Path) -> Path:
    """Write ``<date>-<name>.png`` and then ``<date>-<name>.json``; those of the same day are replaced.

    Args:
        report: What was measured.
        figure: The same as a picture.
        folder: Where to; made if it is not there.

    Returns:
        The path of the JSON file. Where it is there, the picture is too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{report.machine['date'][:10]}-{report.name}"
    held = asdict(report)
    del held["tables"]  # the measurements say the same
    held["targets"] = [{**asdict(target), "passed": target.passed} for target in report.targets]
    text = json.dumps(held, indent=1, allow_nan=False) + "\n"
    path = folder / f"{stem}.json"
    _whole(folder / f"{stem}.png", lambda part: figure.savefig(part, format="png", dpi=110))
    _whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    return path


def _whole(path: Path, write_part: Callable[[Path], object]) -> None:
    """Write beside ``path`` and move into place."""
    part = path.with_name(f".{path.name}.part")
    try:
        write_part(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def rounded(seconds: Sequence[float]) -> list[float]:
    """Times for the JSON file, to four digits: more are noise."""
    return [float(f"{value:.4g}") for value in seconds]


def milliseconds(seconds: float) -> str:
    """A time for a table: ``12.3``, ``1,234``."""
    return f"{seconds * 1e3:,.1f}" if seconds < 0.1 else f"{seconds * 1e3:,.0f}"


def megabytes(count: float) -> str:
    """Bytes for a table, in MB of a million: ``12.3``."""
    return f"{count / 1e6:,.1f}"


def ratio(spread: Spread, *, digits: int = 1) -> str:
    """A paired ratio for a table: ``12.3 [11.0-13.1]``, the median and the 10th and 90th percentile."""
    return f"{spread.median:.{digits}f} [{spread.p10:.{digits}f}-{spread.p90:.{digits}f}]"
