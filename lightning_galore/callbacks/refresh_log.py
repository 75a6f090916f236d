# SPDX-License-Identifier: Apache-2.0
"""A table of refreshes on disk, one line each, for ``lightning-galore report``: loggers take numbers, not events."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning_galore.refresh import RefreshEvent

FILE_NAME = "galore_refreshes.csv"
COLUMNS = (
    "step",
    "optimizer",
    "weight",
    "shape",
    "side",
    "rank",
    "gap",
    "overlap",
    "captured_energy",
    "found",
    "spectrum",
)


class RefreshLog:
    """Appends to the table; nothing is written, and no folder made, before there is a line.

    Args:
        folder: Where it stands.
        every: Fewest steps between two lines of a weight. A basis that moves at every step would fill the disk.
    """

    def __init__(self, folder: Path, *, every: int) -> None:
        self.path = folder / FILE_NAME
        self._every = every
        self._last: dict[tuple[int, str], int] = {}
        self._lines: list[tuple[object, ...]] = []

    def add(self, optimizer: int, event: RefreshEvent) -> None:
        """Note one refresh; :meth:`flush` writes it.

        Args:
            optimizer: Number of the optimizer in the Trainer.
            event: What happened.
        """
        key = (optimizer, event.name)
        if key in self._last and 0 <= event.step - self._last[key] < self._every:
            return
        self._last[key] = event.step
        shape = "x".join(map(str, event.shape))
        overlap = "" if event.overlap is None else f"{event.overlap:.6g}"
        energy = "" if event.energy is None else f"{event.energy:.6g}"
        spectrum = " ".join(f"{value:.6g}" for value in event.spectrum)
        self._lines.append(
            (event.step, optimizer, event.name, shape, event.side, event.rank, event.gap, overlap, energy,
             int(event.found), spectrum)
        )  # fmt: skip

    def flush(self) -> None:
        """Append what has been noted."""
        if not self._lines:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(COLUMNS)
            writer.writerows(self._lines)
        self._lines.clear()
