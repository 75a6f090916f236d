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
from benchmarks.convergence import glue
from benchmarks.convergence.data import Text, load_text
from benchmarks.convergence.language import Experiment, save_gradients, train
from benchmarks.convergence.model import SIZES
from benchmarks.convergence.plot import picture
from benchmarks.convergence.runner import Schedule, Spec
from benchmarks.convergence.store import Store
from benchmarks.convergence.sweep import MOST_EXTRA, RATES, SEEDS, Data, Sweep, carry_out
from benchmarks.convergence.table import FULL_RANK, report_of, rows_of
from benchmarks.convergence.variants import BASELINE, PRESETS, VARIANTS, why_not

_RUNS = Path("runs") / "convergence.jsonl"
_GRADIENTS_LR = 1.5e-3
LANGUAGE = "lm"


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
    chosen.variants = chosen.variants or list(PRESETS if chosen.presets else VARIANTS)
    chosen.baseline = chosen.baseline or (FULL_RANK if chosen.presets else BASELINE)
    where = machine.describe(torch.device("cpu"), threads=chosen.threads)
    try:
        experiment, data = _what(chosen)
        skipped = {name: reason for name in chosen.variants if (reason := _reason(name, experiment))}
        sweep = Sweep(
            experiment=experiment,
            text=data,
            variants=tuple(name for name in chosen.variants if name not in skipped),
            seeds=tuple(chosen.seeds),
            rates=tuple(chosen.rates or (RATES if chosen.task == LANGUAGE else glue.RATES)),
            baseline=chosen.baseline,
            most_extra=chosen.extra,
        )
        share = _share(chosen.shard)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    lines = [f"{name} is left out: {reason}" for name, reason in skipped.items()]
    for line in lines:
        _say(line)
    if chosen.save_gradients:
        if not isinstance(data, Text):
            parser.error(f"--save-gradients keeps those of a language model, not of --task {chosen.task}")
        return _write_gradients(chosen.save_gradients, sweep, data)
    store = Store(chosen.runs)
    failures: list[str] = []
    if not chosen.table_only:
        mine = Sweep(**{**vars(sweep), "variants": sweep.variants[share]})
        run_one = train if chosen.task == LANGUAGE else glue.train
        failures = carry_out(mine, store, machine=where, said=_say, run_one=run_one)
        store.refresh()
    return max(_tell(chosen, sweep, store, where, [*lines, *failures]), 1 if failures else 0)


def _what(chosen: argparse.Namespace) -> tuple[Schedule, Data]:
    """The experiment and what it learns from.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If an option makes no sense.
    """
    given = {name: value for name in ("rank", "steps") if (value := getattr(chosen, name)) is not None}
    if chosen.task != LANGUAGE:
        plan = glue.Fine(task=chosen.task, layers=chosen.layers, **given)
        return plan, glue.load_rows(glue.folder_of(plan.task, chosen.text), plan)
    size = SIZES[chosen.size]
    return Experiment(**{"size": size, "rank": size.rank, **given}), load_text(chosen.text)


def _reason(name: str, experiment: Schedule) -> str | None:
    variant = VARIANTS.get(name)
    return why_not(variant.of_length(experiment.steps), **experiment.common) if variant else None


def _share(shard: str) -> slice:
    """Which of the variants a process does: ``2/3`` is every third from the second."""
    index, _, count = shard.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"shard={shard!r} must be i/n with 1 <= i <= n, such as 1/2.")
    return slice(int(index) - 1, None, int(count))


def _tell(chosen: argparse.Namespace, sweep: Sweep, store: Store, where: dict[str, Any], left_out: list[str]) -> int:
    name = chosen.name or ("presets" if chosen.presets else "convergence")
    name += "" if chosen.size == "small" else f"-{chosen.size}"
    name += "" if chosen.task == LANGUAGE else f"-{chosen.task}"
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


def _write_gradients(path: Path, sweep: Sweep, text: Text) -> int:
    steps = sweep.experiment.steps
    spec = Spec(
        experiment=sweep.experiment,
        variant=VARIANTS[FULL_RANK],
        lr=_GRADIENTS_LR,
        seed=sweep.seeds[0],
        text_sha256=text.sha256,
    )
    kept = save_gradients(spec, text, steps={steps * part // 4 for part in range(4)} | {steps - 1})
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
    add("--rates", nargs="+", type=float, help="grid of learning rates, ascending")
    add("--extra", type=int, default=MOST_EXTRA, help=f"at most so many rates beyond the grid (default: {MOST_EXTRA})")
    add("--task", choices=[LANGUAGE, *glue.NAMES], default=LANGUAGE, help=f"a language model ({LANGUAGE}), or of GLUE")
    add("--steps", type=int, help="optimizer steps of a run (default: 400, of GLUE 40)")
    add("--layers", type=int, default=6, help="of MiniLM that are kept, from the first (GLUE; default: 6)")
    add("--size", choices=list(SIZES), default="small", help="of the model (default: small)")
    add("--rank", type=int, help="of the low-rank variants (default: a quarter of the hidden size; of GLUE 8)")
    add(
        "--text",
        type=Path,
        help="a file or folder to train on (default: Python's standard library; of GLUE the task's folder in the one "
        f"that {glue.FOLDER_VARIABLE} names)",
    )
    add("--threads", type=int, default=1, help="of torch (default: 1)")
    add("--shard", default="1/1", metavar="I/N", help="do the I-th of N shares of the variants; one process each")
    add("--runs", type=Path, default=_RUNS, help=f"file of finished runs (default: {_RUNS})")
    add("--name", help="of the table's files (default: presets or convergence), size and task are added")
    add("--out", type=Path, default=results.FOLDER, help="folder of the table's JSON and picture")
    add("--table-only", action="store_true", help="train nothing, tell what is finished")
    add(
        "--save-gradients", type=Path, metavar="FILE", help="only write gradients of one full-rank run, for the finders"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
