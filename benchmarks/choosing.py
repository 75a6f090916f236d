# SPDX-License-Identifier: Apache-2.0
"""The table of docs/choosing.md, from the newest results: ``python -m benchmarks.choosing`` prints it.

With ``--write`` it takes the place of the one on the page.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence.table import FULL_RANK
from benchmarks.results import FOLDER

#: Reports of ``benchmarks.convergence --presets``, the same with ``--task sst2``, and ``benchmarks.presets``.
LANGUAGE, FINE, STEPS = "presets", "presets-sst2", "preset-steps"
PAGE = Path(__file__).parent.parent / "docs" / "choosing.md"
_HEADER = ("method", "loss", "minus AdamW", "seeds", "learning rate", "state, of AdamW's")
_FINE = ("{task} accuracy", "minus AdamW", "seeds", "learning rate")
_STEP = "step, of AdamW's: {case}"


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


def of_results(folder: Path = FOLDER) -> str:
    """The table of the newest reports.

    Args:
        folder: Of the results.

    Raises:
        FileNotFoundError: If one is missing; that of the GLUE task may be.
    """
    fine = newest(FINE, folder) if any(folder.glob(f"*-{FINE}.json")) else None
    return table(newest(LANGUAGE, folder), newest(STEPS, folder), fine)


def table(language: Mapping[str, Any], steps: Mapping[str, Any], fine: Mapping[str, Any] | None = None) -> str:
    """The comparison in Markdown, the lowest loss first.

    Args:
        language: The report ``LANGUAGE``.
        steps: The report ``STEPS``.
        fine: The report ``FINE``, if there is one.
    """
    tuned = {row["variant"]: row for row in fine["measurements"]} if fine else {}
    rows = [row for row in language["measurements"] if row["mean"] is not None]
    unit = next(row["state_bytes"] for row in rows if row["variant"] == FULL_RANK)
    more = [title.format(task=fine["settings"]["text"]["name"]) for title in _FINE] if fine else []
    header = [*_HEADER, *(_STEP.format(case=f"r = {case['rank']}") for case in steps["measurements"]), *more]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in sorted(rows, key=lambda row: float(row["mean"])):
        name = row["variant"]
        times = [case["presets"].get(name, {}).get("times_adamw") for case in steps["measurements"]]
        count = len(row["losses"])
        cells = [
            _PLAIN.get(name, f"`{name}`"),
            _with_error(row["mean"], None if row["deviation"] is None else row["deviation"] / math.sqrt(count)),
            _with_error(row["difference"], row["error"], sign="+"),
            str(count),
            _rate(row),
            f"{row['state_bytes'] / unit:.2f}",
            *("-" if one is None else _times(one) for one in times),
            *(_fine_cells(tuned.get(name, {})) if fine else ()),
        ]
        lines.append(_line(cells))
    return "\n".join(lines)


def _fine_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        _with_error(row.get("score"), row.get("score_error")),
        _with_error(row.get("score_difference"), row.get("score_difference_error"), sign="+"),
        str(len(row.get("scores", ()))),
        _rate(row),
    )


_PLAIN = {
    "adamw": "AdamW, full rank",
    "adamw-8bit": "AdamW8bit, full rank",
    "default": "no `method`: the defaults",
}


def written(page: str, table: str) -> str:
    """The page with ``table`` in the place of the one that it has.

    Args:
        page: Markdown with one table that begins with the same column.
        table: What :func:`table` returned.

    Raises:
        ValueError: If there is no such table, or more than one.
    """
    pattern = re.compile(rf"^\| {re.escape(_HEADER[0])} \| {re.escape(_HEADER[1])} .*\n(?:\|.*\n)+", re.MULTILINE)
    changed, count = pattern.subn(lambda _: table + "\n", page)
    if count != 1:
        raise ValueError(f"page has {count} tables of the comparison, must have one.")
    return changed


def _rate(row: Mapping[str, Any]) -> str:
    """The tuned learning rate; with a star where it is the outermost that was tried."""
    if not row.get("lr"):
        return "-"
    return f"{row['lr']:g}" + ("*" if row["lr_at_edge"] else "")


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


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: The arguments; ``sys.argv`` by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing", description="The table of docs/choosing.md.")
    parser.add_argument("--write", action="store_true", help="put it into the page")
    chosen = parser.parse_args(args)
    told = of_results()
    if chosen.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), told), encoding="utf-8")
    sys.stdout.write(told + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
