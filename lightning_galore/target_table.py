# SPDX-License-Identifier: Apache-2.0
"""What is projected, and the table that says of every parameter why it was taken or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from typing_extensions import override

from lightning_galore.subspace import Projection


@dataclass(frozen=True, kw_only=True)
class Target:
    """A weight that is projected.

    Args:
        name: The parameter's name in the model, without what ``torch.compile`` adds.
        projection: Its side, rank and shapes.
    """

    name: str
    projection: Projection


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """One parameter of the table: taken with a target, or left full-rank for a reason."""

    name: str
    shape: tuple[int, ...]
    target: Target | None
    reason: str = ""
    state_bytes: int | None = None


@dataclass(frozen=True)
class TargetTable:
    """Every parameter with what happens to it; ``str`` of it is a readable table."""

    rows: tuple[TargetRow, ...]

    @property
    def taken(self) -> list[TargetRow]:
        """The projected weights."""
        return [row for row in self.rows if row.target]

    def with_bytes(self, held: Mapping[Target, int]) -> TargetTable:
        """The table with the bytes of each target's state."""
        rows = (replace(row, state_bytes=held.get(row.target)) if row.target else row for row in self.rows)
        return TargetTable(tuple(rows))

    @override
    def __str__(self) -> str:
        lines = [("parameter", "shape", "side", "rank", "state bytes", "why not")]
        for row in self.rows:
            projection = row.target.projection if row.target else None
            lines.append(
                (
                    row.name,
                    "x".join(map(str, row.shape)) or "scalar",
                    projection.side if projection else "-",
                    projection.label if projection else "-",
                    "-" if row.state_bytes is None else f"{row.state_bytes:,}",
                    row.reason,
                )
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([text[0], "-" * max(map(len, text)), *text[1:], self.summary()])

    def summary(self) -> str:
        """One line: how much is projected, and what its state takes."""
        weights = sum(math.prod(row.shape) for row in self.taken)
        total = sum(math.prod(row.shape) for row in self.rows)
        text = f"{len(self.taken)} of {len(self.rows)} parameters are projected, {weights:,} of {total:,} entries"
        held = [row.state_bytes for row in self.taken if row.state_bytes is not None]
        return f"{text}; low-rank state {_readable(sum(held))}." if held else f"{text}."


def _readable(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
