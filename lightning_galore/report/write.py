# SPDX-License-Identifier: Apache-2.0
"""Puts a report into its folder, whole or not at all."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from lightning_galore.report.find import ReportError
from lightning_galore.report.page import MARK

PAGE = "index.html"


def check_target(run_dir: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse a target that would destroy something, before anything is drawn.

    Raises:
        FileNotFoundError: If the folder in which ``out`` would stand does not exist.
        FileExistsError: If ``out`` is a folder of something else and ``overwrite`` is False.
        ReportError: If ``out`` is a file, or the run itself.
    """
    if out == run_dir or out in run_dir.parents:
        raise ReportError(f"out={out} holds the run itself; give a folder of its own, such as {run_dir / 'report'}.")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"The folder of out={out} does not exist; make it first.")
    if not out.exists():
        return
    if not out.is_dir():
        raise ReportError(f"out={out} is a file; give the name of a folder.")
    if any(out.iterdir()) and not _is_report(out) and not overwrite:
        raise FileExistsError(
            f"out={out} exists and is not a report. Choose another folder, or pass overwrite=True (--overwrite) to "
            "write into it; files of other names stay."
        )


def write_files(out: Path, files: dict[str, bytes], known: set[str]) -> None:
    """Write ``files`` beside ``out`` and move them there.

    A new folder, and one that holds a report and nothing else, is put in place as a whole. Into any other folder the
    files are moved one by one, the page last: what else stands there stays.

    Args:
        out: The folder of the report.
        files: Contents by name.
        known: All names that a report may have; those of an older report that are not written now are removed.
    """
    beside = f".{out.name}.{secrets.token_hex(4)}"
    fresh, old = out.with_name(f"{beside}.tmp"), out.with_name(f"{beside}.old")
    fresh.mkdir()  # and not mkdtemp, whose folders nobody else may read
    try:
        for name, content in files.items():
            (fresh / name).write_bytes(content)
        if not out.exists():
            fresh.rename(out)
        elif {path.name for path in out.iterdir()} <= known:
            out.rename(old)
            try:
                fresh.rename(out)
            except BaseException:
                old.rename(out)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            for name in sorted(files, key=lambda name: name == PAGE):
                (fresh / name).replace(out / name)
            for name in known - set(files):
                (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _is_report(folder: Path) -> bool:
    page = folder / PAGE
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return MARK.encode() in file.read(1024)
