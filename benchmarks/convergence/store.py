# SPDX-License-Identifier: Apache-2.0
"""Finished runs, one line of JSON each: a sweep that was stopped goes on where it was, several may write at once."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.convergence.runner import Result, Spec


@dataclass(frozen=True, kw_only=True)
class Run:
    """One finished run.

    Args:
        key: Of its specification.
        variant: Name at the time.
        lr: Learning rate of the matrices.
        seed: Of weights, batches and random subspaces.
        config: Every setting of this package's optimizer, None for others.
        result: What it gave.
        machine: Where it ran, and the commit.
    """

    key: str
    variant: str
    lr: float
    seed: int
    config: dict[str, Any] | None
    result: Result
    machine: dict[str, Any]


class Store:
    """The runs in one file.

    Args:
        path: The file; its folder is made when the first run is written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[str, Run] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the file again: another process may have added to it."""
        if not self._path.exists():
            return
        for number, line in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                run = _run_of(json.loads(line))
            except (KeyError, TypeError, ValueError):
                # The half line of a process that was killed while it wrote: its run is done again.
                sys.stderr.write(f"{self._path}:{number} is not a whole run and is left out\n")
                continue
            self._runs[run.key] = run

    def find(self, spec: Spec) -> Run | None:
        """The finished run of ``spec``, unless this package has since given one of its settings another meaning."""
        run = self._runs.get(spec.key())
        if run is None or not _agree(run.config, spec.config()):
            return None
        return run

    def add(self, run: Run) -> None:
        """Append a run in one write, which no other process can split."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(asdict(run), allow_nan=False) + "\n"
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":  # after a half line
                line = "\n" + line
            os.write(file, line.encode())
        finally:
            os.close(file)
        self._runs[run.key] = run


#: Settings that play a part only where an axis has a certain choice; elsewhere their defaults may move.
ONLY_FOR = {
    "tracking_rho": ("subspace", "track"),
    "grow_above": ("schedule", "adaptive"),
    "shrink_below": ("schedule", "adaptive"),
    "refresh_below": ("schedule", "energy"),
    "rank_energy": ("rank_rule", "energy", "energy_shrink"),
    "head_size": ("subspace", "cross_head"),
    "spam_theta": ("transform", "spam"),
    "natural_history": ("transform", "natural"),
    "natural_damping": ("transform", "natural"),
}


def _agree(held: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether two configurations say the same of all that both know: a setting that came later had its old meaning."""
    if held is None or now is None:
        return held is None and now is None
    idle = {
        name
        for name, (axis, *choices) in ONLY_FOR.items()
        if held.get(axis) not in choices and now.get(axis) not in choices
    }
    return all(held[name] == now[name] for name in held.keys() & now.keys() - idle)


def _run_of(held: dict[str, Any]) -> Run:
    result = dict(held["result"])
    for name in ("curve", "train_curve"):
        result[name] = [(int(step), float(loss)) for step, loss in result[name]]
    return Run(**{**held, "result": Result(**result)})
