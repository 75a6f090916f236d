# SPDX-License-Identifier: Apache-2.0
"""Charts of a run from its logs, as pictures and as one HTML page.

The readers (``find``, ``choose``, ``read``, ``series``) know no drawing, the charts (``lines``, ``costs``, ``maps``) no
files, and only ``write`` writes. matplotlib is imported when the first report is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from typing_extensions import override

from lightning_galore.report.choose import choose
from lightning_galore.report.find import ReportError, Sources, locate
from lightning_galore.report.write import PAGE, check_target, write_files

__all__ = ["ReportError", "ReportFiles", "write_report"]


@dataclass(frozen=True, kw_only=True)
class ReportFiles:
    """What :func:`write_report` wrote.

    Args:
        folder: Where.
        page: The page with every chart in it.
        charts: The pictures.
        missing: Charts that could not be drawn, by name, with the reason.
        source: The folder of the log that was read.
        notes: What of the logs was left out.
    """

    folder: Path
    page: Path
    charts: tuple[Path, ...]
    missing: dict[str, str]
    source: Path
    notes: tuple[str, ...]

    @override
    def __str__(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.page}: {len(self.charts)} charts of {self.source}",
            *(f"note: {text}" for text in self.notes),
            *(f"not drawn: {name}. {why}" for name, why in self.missing.items()),
        ]
        return "\n".join(lines)


def write_report(run_dir: Path, out: Path | None = None, *, overwrite: bool = False) -> ReportFiles:
    """Draw a run from its logs: loss, subspaces, refreshes, memory.

    Reads ``metrics.csv`` of CSVLogger or, without one, TensorBoard event files, and ``galore_refreshes.csv``. What is
    missing is left out, and the page says how to log it.

    Args:
        run_dir: The folder of a run, or of several: then the newest ``version_*`` with something to draw is taken.
        out: Where to write ``index.html`` and a PNG for each chart; the folder ``report`` in ``run_dir`` by default. A
            report that stands there is replaced.
        overwrite: Write into ``out`` also if it holds something else. Other files in it stay.

    Returns:
        What was written, and what is missing.

    Raises:
        FileNotFoundError: If ``run_dir`` or the folder of ``out`` does not exist.
        FileExistsError: If ``out`` holds something that is not a report, and ``overwrite`` is False.
        ReportError: If there is nothing to draw; the message says what was looked for.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "A report is drawn with matplotlib, which is not installed. "
            'Install it with: pip install "lightning-galore[recipes]"',
            name="matplotlib",
        )
    run_dir = Path(run_dir).resolve()
    target = (run_dir / "report" if out is None else Path(out)).resolve()
    runs = locate(run_dir)
    check_target(run_dir, target, overwrite=overwrite)
    # The charts import matplotlib.
    from lightning_galore.report.charts import CHARTS, draw_all
    from lightning_galore.report.page import render

    chosen = choose(runs, run_dir, draw_all)
    sources, log, sections = chosen.sources, chosen.log, chosen.sections
    log.notes[:0] = [chosen.note] if chosen.note else []
    pictures = {f"{section.slug}.png": section.light for section in sections if section.light is not None}
    missing = {section.title: section.why for section in sections if section.light is None}
    page = render(
        name=str(Path(run_dir.name) / sources.folder.relative_to(run_dir)),
        origin=_origin(sources, run_dir),
        log=log,
        sections=sections,
        version=_version(),
    )
    known = {PAGE, *(f"{chart.slug}.png" for chart in CHARTS)}
    write_files(target, {**pictures, PAGE: page.encode("utf-8", errors="replace")}, known)
    return ReportFiles(
        folder=target,
        page=target / PAGE,
        charts=tuple(target / name for name in pictures),
        missing=missing,
        source=sources.folder,
        notes=tuple(log.notes),
    )


def _origin(sources: Sources, run_dir: Path) -> str:
    """Which files were read. Relative: a page that is passed on should not tell how the machine is laid out."""
    files = [path for path in (sources.metrics, *sources.events, sources.refreshes) if path is not None]
    names = [str(path.relative_to(run_dir)) for path in files]
    return f"Drawn from {', '.join(names[:4])}{' and more' if len(names) > 4 else ''}."


def _version() -> str:
    try:
        return version("lightning-galore")
    except PackageNotFoundError:  # the source tree is on the path and not installed
        return ""
