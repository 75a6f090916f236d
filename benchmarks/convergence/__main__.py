# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.convergence``: run what is not finished, then the table, JSON and picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import machine, results
from benchmarks.convergence.data import load_text
from benchmarks.convergence.model import SIZES
from benchmarks.convergence.plot import picture
from benchmarks.convergence.runner import Experiment, Spec, save_gradients
from benchmarks.convergence.store import Store
from benchmarks.convergence.sweep import RATES, SEEDS, Sweep, carry_out
from benchmarks.convergence.table import FULL_RANK, report_of, rows_of
from benchmarks.convergence.variants import BASELINE, PRESETS, VARIANTS, why_not

_RUNS = Path("runs") / "convergence.jsonl"
_GRADIENTS_LR = 1.5e-3


def main(args: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        args: The arguments; ``sys.argv`` by default.

    Returns:
        The exit status: 1 when a variant failed, or nothing was there to tell.
    """
    parser = _parser()
    chosen = parser.parse_args(args)
    torch.set_num_threads(chosen.threads)
    size = SIZES[chosen.size]
    chosen.variants = chosen.variants or list(PRESETS if chosen.presets else VARIANTS)
    chosen.baseline = chosen.baseline or (FULL_RANK if chosen.presets else BASELINE)
    where = machine.describe(torch.device("cpu"), threads=chosen.threads)
    try:
        experiment = Experiment(size=size, rank=chosen.rank or size.rank, steps=chosen.steps)
        skipped = {name: reason for name in chosen.variants if (reason := _reason(name, experiment))}
        sweep = Sweep(
            experiment=experiment,
            text=load_text(chosen.text),
            variants=tuple(name for name in chosen.variants if name not in skipped),
            seeds=tuple(chosen.seeds),
            rates=tuple(chosen.rates),
            baseline=chosen.baseline,
        )
        share = _share(chosen.shard)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    lines = [f"{name} is left out: {reason}" for name, reason in skipped.items()]
    for line in lines:
        _say(line)
    if chosen.save_gradients:
        return _write_gradients(chosen.save_gradients, sweep)
    store = Store(chosen.runs)
    failures: list[str] = []
    if not chosen.table_only:
        mine = Sweep(**{**vars(sweep), "variants": sweep.variants[share]})
        failures = carry_out(mine, store, machine=where, said=_say)
        store.refresh()
    return max(_tell(chosen, sweep, store, where, [*lines, *failures]), 1 if failures else 0)


def _reason(name: str, experiment: Experiment) -> str | None:
    variant = VARIANTS.get(name)
    return why_not(variant.of_length(experiment.steps), rank=experiment.rank) if variant else None


def _share(shard: str) -> slice:
    """Which of the variants a process does: ``2/3`` is every third from the second."""
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"shard={shard!r} must be i/n with 1 <= i <= n, such as 1/2.")
    return slice(int(index) - 1, None, int(count))


def _tell(chosen: argparse.Namespace, sweep: Sweep, store: Store, where: dict[str, Any], left_out: list[str]) -> int:
    name = "presets" if chosen.presets else "convergence"
    name += "" if chosen.size == "small" else f"-{chosen.size}"
    try:
        report = report_of(sweep, store, name=name, machine=where, left_out=left_out)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    console = Console() if sys.stdout.isatty() else Console(width=140)
    results.show(report, console)
    figure = picture(sweep, store, rows_of(sweep, store), headline=machine.headline(where))
    path = results.write(report, figure, chosen.out)
    console.print(f"All figures: {path}; picture: {path.with_suffix('.png').name}", highlight=False)
    return 0


def _write_gradients(path: Path, sweep: Sweep) -> int:
    steps = sweep.experiment.steps
    spec = Spec(
        experiment=sweep.experiment,
        variant=VARIANTS[FULL_RANK],
        lr=_GRADIENTS_LR,
        seed=sweep.seeds[0],
        text_sha256=sweep.text.sha256,
    )
    kept = save_gradients(spec, sweep.text, steps={steps * part // 4 for part in range(4)} | {steps - 1})
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(kept, path)
    _say(f"{len(kept)} gradients of full-rank AdamW written to {path}")
    return 0


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description="Train one small language model with each method, and compare validation losses. "
        "A sweep that was stopped goes on where it was.",
        epilog="Variants: " + "; ".join(f"{name} ({variant.text})" for name, variant in VARIANTS.items()),
    )
    add = parser.add_argument
    add("--variants", nargs="+", metavar="NAME", help="which; all by default")
    add("--presets", action="store_true", help="one variant a preset, beside full-rank AdamW; a report of their own")
    add("--baseline", metavar="NAME", help=f"what the others are compared with (default: {BASELINE}, or {FULL_RANK})")
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=list(SEEDS),
        help="the first tunes the learning rate (default: 0 1 2 3 4)",
    )
    add("--rates", nargs="+", type=float, default=list(RATES), help="grid of learning rates, ascending")
    add("--steps", type=int, default=400, help="optimizer steps of a run (default: 400)")
    add("--size", choices=list(SIZES), default="small", help="of the model (default: small)")
    add("--rank", type=int, help="of the low-rank variants (default: a quarter of the hidden size)")
    add("--text", type=Path, help="a file or folder to train on (default: Python's standard library)")
    add("--threads", type=int, default=1, help="of torch (default: 1)")
    add("--shard", default="1/1", metavar="I/N", help="do the I-th of N shares of the variants; one process each")
    add("--runs", type=Path, default=_RUNS, help=f"file of finished runs (default: {_RUNS})")
    add("--out", type=Path, default=results.FOLDER, help="folder of the table's JSON and picture")
    add("--table-only", action="store_true", help="train nothing, tell what is finished")
    add(
        "--save-gradients", type=Path, metavar="FILE", help="only write gradients of one full-rank run, for the finders"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
