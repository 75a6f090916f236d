# SPDX-License-Identifier: Apache-2.0
"""What a plan says: bytes of several ways to train, and which of them fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from typing_extensions import override

from lightning_galore.config import Mode, Rank
from lightning_galore.planner.sharing import Devices


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The worst moment of a training step, on each device.

    Args:
        total: Bytes.
        by_category: The same by category; ``workspace`` is what the optimizer needs for a moment,
            ``communication`` what several devices add.
        where: What runs at that moment.
        step: ``first``, ``ordinary`` or ``refresh``: the step that it is in.
        activations: Bytes that the forward pass leaves for backward.
        checkpointing: Whether activations are recomputed.
    """

    total: int
    by_category: Mapping[str, int]
    where: str
    step: str
    activations: int
    checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class Column:
    """One way to train, in bytes on each device.

    Args:
        name: The candidate's name.
        label: Its heading.
        mode: When gradients are projected and weights move.
        weights: Parameters and buffers.
        gradients: Alive after backward.
        moments: State of the optimizer.
        bases: Of projected weights.
        refresh_workspace: Temporaries of the largest single refresh.
        peaks: Without and with activation checkpointing, where known.
        missing: Why there is no more than this.
    """

    name: str
    label: str
    mode: Mode
    weights: int = 0
    gradients: int = 0
    moments: int = 0
    bases: int = 0
    refresh_workspace: int = 0
    peaks: tuple[Peak, ...] = ()
    missing: str = ""

    @property
    def least(self) -> Peak | None:
        """The lower of the peaks."""
        return min(self.peaks, key=lambda peak: peak.total, default=None)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A way to train that fits.

    Args:
        name: The candidate.
        label: Its heading.
        rank: Of the low-rank ones, None for the others.
        batch_size: Sequences a batch, None where the batch was given.
        checkpointing: Whether activations are recomputed.
        total: Bytes at the peak.
        trades: What it gives up for that, in words.
    """

    name: str
    label: str
    rank: Rank | None
    batch_size: int | None
    checkpointing: bool
    total: int
    trades: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What ``plan`` has found; ``print(plan)`` shows it as a table.

    Args:
        model: Its name.
        parameters: How many numbers are trained.
        rank: Of the low-rank columns.
        batch: What a batch is, in words.
        precision: Of weights and operations.
        devices: How many, and what they divide.
        columns: The ways to train.
        budget: Bytes on each device, if there is a limit.
        fits: What fits into it.
    """

    model: str
    parameters: int
    rank: Rank
    batch: str
    precision: str
    devices: Devices
    columns: tuple[Column, ...]
    budget: int | None = None
    fits: tuple[Fit, ...] = ()

    def column(self, name: str) -> Column:
        """The column of a candidate."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"{name!r} was not planned; there are {', '.join(column.name for column in self.columns)}.")

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers and words, for JSON. Bytes."""
        return asdict(self)

    @override
    def __str__(self) -> str:
        from lightning_galore.planner.table import as_text

        return as_text(self)
