# SPDX-License-Identifier: Apache-2.0
"""The table of docs/choosing.md, from the committed results: ``python -m benchmarks.choosing``."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.convergence.table import FULL_RANK
from benchmarks.results import FOLDER

#: Reports of ``benchmarks.convergence --presets``, the same with ``--task sst2``, and ``benchmarks.presets``.
LANGUAGE, FINE, STEPS = "presets", "presets-sst2", "preset-steps"
_HEADER = (
    "method",
    "loss",
    "minus AdamW",
    "SST-2 accuracy",
    "minus AdamW",
    "state, of AdamW's",
    "step, of AdamW's: r = 128",
    "r = 8",
    "its learning rates",
)


def newest(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The latest report of a name.

    Args:
        name: Of the report, without its date.
        folder: Of the results.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = sorted(folder.glob(f"[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]-{name}.json"))
    if not found:
        raise FileNotFoundError(f"folder={str(folder)!r} holds no report {name!r}; run the benchmark that writes it.")
    held: dict[str, Any] = json.loads(found[-1].read_text(encoding="utf-8"))
    return held


def table(language: Mapping[str, Any], fine: Mapping[str, Any], steps: Mapping[str, Any]) -> str:
    """The comparison in Markdown, the lowest loss first.

    Args:
        language: The report ``LANGUAGE``.
        fine: The report ``FINE``.
        steps: The report ``STEPS``.
    """
    tuned = {row["variant"]: row for row in fine["measurements"]}
    rows = [row for row in language["measurements"] if row["mean"] is not None]
    unit = next(row["state_bytes"] for row in rows if row["variant"] == FULL_RANK)
    lines = [_line(_HEADER), _line(["---"] * len(_HEADER))]
    for row in sorted(rows, key=lambda row: float(row["mean"])):
        name = row["variant"]
        other = tuned.get(name, {})
        times = [case["presets"].get(name, {}).get("times_adamw") for case in steps["measurements"]]
        count = len(row["losses"])
        cells = [
            f"`{name}`" if row["kind"] == "galore" and name != "default" else _PLAIN.get(name, name),
            _with_error(row["mean"], row["deviation"] / math.sqrt(count) if row["deviation"] is not None else None),
            _with_error(row["difference"], row["error"], sign="+"),
            _with_error(other.get("score"), other.get("score_error")),
            _with_error(other.get("score_difference"), other.get("score_difference_error"), sign="+"),
            f"{row['state_bytes'] / unit:.2f}",
            *("-" if one is None else _times(one) for one in times),
            " and ".join(f"{one['lr']:g}" for one in (row, other) if one.get("lr")),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


_PLAIN = {
    "adamw": "AdamW, full rank",
    "adamw-8bit": "AdamW8bit, full rank",
    "default": "no `method`: the defaults",
}


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _with_error(value: float | None, error: float | None, *, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")


def _times(times: Mapping[str, Mapping[str, float]]) -> str:
    """Ordinary steps and, where refreshes show, the mean over 200 steps."""
    ordinary, amortised = (times[kind]["median"] for kind in ("ordinary", "amortised"))
    return f"{ordinary:.1f}" if amortised < 1.05 * ordinary else f"{ordinary:.1f} ({amortised:.1f})"


if __name__ == "__main__":
    sys.stdout.write(table(newest(LANGUAGE), newest(FINE), newest(STEPS)) + "\n")
