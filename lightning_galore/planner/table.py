# SPDX-License-Identifier: Apache-2.0
"""A plan as a table for people."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

from typing_extensions import override

from lightning_galore.planner.results import Column, Peak, Plan

GIB = 2**30


class Unit(NamedTuple):
    """What bytes are counted in, and its decimal neighbour, in which cards are sold."""

    size: int
    name: str
    decimal: int
    decimal_name: str

    @override
    def __str__(self) -> str:
        return f"{self.name} (2^{self.size.bit_length() - 1} bytes)"


_UNITS = (Unit(2**30, "GiB", 10**9, "GB"), Unit(2**20, "MiB", 10**6, "MB"), Unit(2**10, "KiB", 10**3, "kB"))


def as_text(plan: Plan, width: int = 200) -> str:
    """The plan as plain text."""
    rich = _rich()
    buffer = io.StringIO()
    console = rich["Console"](file=buffer, width=width, color_system=None)
    show(plan, console)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")


def console_for(file: Any) -> Any:
    """A rich console on a file or a terminal; a file has no width, so it gets a wide one."""
    console = _rich()["Console"](file=file)
    return console if console.is_terminal else _rich()["Console"](file=file, width=200)


def waiting(text: str) -> AbstractContextManager[Any]:
    """Show that something goes on, where someone looks at a terminal and rich is there to draw it."""
    try:
        status: AbstractContextManager[Any] = _rich()["Console"](stderr=True).status(text)
    except ModuleNotFoundError:
        return nullcontext()
    return status


def show(plan: Plan, console: Any) -> None:
    """Print the plan on a rich console."""
    where = ""
    if plan.devices.count > 1:
        where = f", on each of {plan.devices.count} devices ({plan.devices.strategy})"
    what = f"{plan.parameters / 1e6:,.1f} M parameters, {plan.precision}, {plan.batch}, rank {plan.rank}"
    console.print(f"{plan.model}: {what}{where}", soft_wrap=True)
    console.print(_columns(plan))
    for reason in dict.fromkeys(column.missing for column in plan.columns if column.missing):
        without = [column.label for column in plan.columns if column.missing == reason]
        console.print(f"{', '.join(without)}: {reason}", soft_wrap=True, style="dim")
    if plan.budget is not None:
        _show_fits(plan, console)


def unit_of(plan: Plan) -> Unit:
    """The unit of a plan's table, by the largest number in it."""
    sizes = [size for c in _shown(plan) for size in (c.weights, c.moments, *(peak.total for peak in c.peaks))]
    return next((unit for unit in _UNITS if max(sizes, default=0) >= unit.size), _UNITS[-1])


def _shown(plan: Plan) -> list[Column]:
    return [column for column in plan.columns if column.weights]


def _columns(plan: Plan) -> Any:
    shown = _shown(plan)
    chosen = unit_of(plan)
    unit, decimal = chosen.size, chosen.decimal
    table = _rich()["Table"](box=_rich()["SIMPLE_HEAD"], pad_edge=False)
    table.add_column(str(chosen))
    for column in shown:
        table.add_column(column.label, justify="right")
    for title, key in (
        ("weights", "weights"),
        ("gradients after backward", "gradients"),
        ("moments", "moments"),
        ("bases", "bases"),
        ("one refresh", "refresh_workspace"),
    ):
        table.add_row(title, *(_number(getattr(column, key), unit) for column in shown))
    for recomputed in (False, True):
        peaks = [_peak(column, recomputed) for column in shown]
        if not any(peaks):
            continue
        table.add_section()
        title = "recomputed" if recomputed else ""
        table.add_row(f"activations {title}", *(_number(p.activations if p else None, unit) for p in peaks))
        table.add_row(f"PEAK {title}", *(_number(p.total if p else None, unit) for p in peaks), style="bold")
        table.add_row(
            f"  in {chosen.decimal_name} ({decimal:.0e})".replace("e+0", "e"),
            *(_number(p.total if p else None, decimal) for p in peaks),
        )
        table.add_row("  when", *(_when(p) if p else "-" for p in peaks))
    return table


def _number(size: int | None, unit: int) -> str:
    return "-" if size is None else f"{size / unit:,.2f}"


def _show_fits(plan: Plan, console: Any) -> None:
    assert plan.budget is not None
    budget = f"{plan.budget / 1e9:.2f} GB ({plan.budget / GIB:.2f} GiB)"
    if not plan.fits:
        console.print(
            f"Nothing of this fits into {budget}. Shorter sequences, a smaller model or more devices would help.",
            soft_wrap=True,
        )
        return
    console.print(f"Fits into {budget}, the least given up first:", soft_wrap=True)
    table = _rich()["Table"](box=_rich()["SIMPLE_HEAD"], pad_edge=False)
    for title in ("", "rank", "batch", "recompute", "peak GB", "what it trades"):
        table.add_column(title, overflow="fold")
    for fit in plan.fits:
        table.add_row(
            fit.label,
            "-" if fit.rank is None else str(fit.rank),
            "as given" if fit.batch_size is None else str(fit.batch_size),
            "yes" if fit.checkpointing else "no",
            f"{fit.total / 1e9:.2f}",
            fit.trades,
        )
    console.print(table)


def _peak(column: Column, checkpointing: bool) -> Peak | None:
    return next((peak for peak in column.peaks if peak.checkpointing == checkpointing), None)


def _when(peak: Peak) -> str:
    when = peak.where.partition(",")[0]
    return f"{when} ({peak.step})" if peak.step != "ordinary" else when


def _rich() -> dict[str, Any]:
    try:
        console, table, box = (import_module(f"rich.{name}") for name in ("console", "table", "box"))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The table needs rich, which is not installed: pip install lightning-galore[recipes] (or use --json, or "
            "plan(...).as_dict()).",
            name=error.name,
        ) from error
    return {"Console": console.Console, "Table": table.Table, "SIMPLE_HEAD": box.SIMPLE_HEAD}
