# SPDX-License-Identifier: Apache-2.0
"""A plan as a table for people."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

from lightning_galore.planner.planning import Column, Peak, Plan

GIB = 2**30


def gib(size: int) -> str:
    """Bytes in GiB, with MiB where that is more readable."""
    if size >= 0.1 * GIB or size == 0:
        return f"{size / GIB:.2f}"
    return f"{size / GIB:.4f}"


def as_text(plan: Plan, width: int = 200) -> str:
    """The plan as plain text."""
    rich = _rich()
    buffer = io.StringIO()
    console = rich["Console"](file=buffer, width=width, color_system=None)
    show(plan, console)
    lines = [line.rstrip() for line in buffer.getvalue().splitlines()]
    return "\n".join(lines).strip("\n")


def show(plan: Plan, console: Any) -> None:
    """Print the plan on a rich console."""
    where = ""
    if plan.devices.count > 1:
        where = f", on each of {plan.devices.count} devices ({plan.devices.strategy})"
    console.print(
        f"{plan.model}: {plan.parameters / 1e6:,.1f} M parameters, {plan.precision}, {plan.batch}, rank {plan.rank}{where}",
        soft_wrap=True,
    )
    console.print(_columns(plan))
    for column in plan.columns:
        if column.missing:
            console.print(f"{column.label}: {column.missing}", soft_wrap=True)
    if plan.budget is not None:
        _show_fits(plan, console)


def _columns(plan: Plan) -> Any:
    shown = [column for column in plan.columns if column.weights]
    table = _rich()["Table"](box=_rich()["SIMPLE_HEAD"], pad_edge=False)
    table.add_column("GiB (2^30 bytes)")
    for column in shown:
        table.add_column(column.label, justify="right")
    for title, name in (
        ("weights", "weights"),
        ("gradients after backward", "gradients"),
        ("moments", "moments"),
        ("bases", "bases"),
        ("one refresh", "refresh_workspace"),
    ):
        table.add_row(title, *(gib(getattr(column, name)) for column in shown))
    for checkpointing in (False, True):
        if not any(_peak(column, checkpointing) for column in shown):
            continue
        table.add_section()
        title = "recomputed: " if checkpointing else ""
        table.add_row(f"{title}activations", *(_of(c, checkpointing, lambda p: gib(p.activations)) for c in shown))
        table.add_row(f"{title}PEAK", *(_of(c, checkpointing, lambda p: gib(p.total)) for c in shown), style="bold")
        table.add_row("  the same in GB (10^9)", *(_of(c, checkpointing, lambda p: f"{p.total / 1e9:.2f}") for c in shown))
        table.add_row("  when", *(_of(c, checkpointing, _when) for c in shown))
    return table


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


def _of(column: Column, checkpointing: bool, show_: Any) -> str:
    peak = _peak(column, checkpointing)
    return "-" if peak is None else str(show_(peak))


def _when(peak: Peak) -> str:
    when = peak.where.partition(",")[0]
    return f"{when} ({peak.step})" if peak.step != "ordinary" else when


def _rich() -> dict[str, Any]:
    try:
        console, table, box = (import_module(f"rich.{name}") for name in ("console", "table", "box"))
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The table needs rich, which is not installed: pip install rich (or use --json, or plan(...).as_dict()).",
            name=error.name,
        ) from error
    return {"Console": console.Console, "Table": table.Table, "SIMPLE_HEAD": box.SIMPLE_HEAD}
