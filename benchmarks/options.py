# SPDX-License-Identifier: Apache-2.0
"""What every benchmark is told, and the one way to start them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import machine, results
from benchmarks.results import Report
from benchmarks.timing import Clock, clock_for


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to measure.

    Args:
        quick: Small shapes and few rounds: shows that everything runs, and gives no figure to quote.
        threads: Threads of torch. One gives CPU time, which other processes disturb least; more give wall time.
        device: Where to measure.
        large: Also the weights of LLaMA-1B; on a GPU they are always there.
        out: Folder of the results.
        gradients: A file of real gradients, ``torch.save`` of a dictionary from name to tensor, on which the finders'
            captured energy is measured too.
    """

    quick: bool = False
    threads: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    large: bool = False
    out: Path = results.FOLDER
    gradients: Path | None = None

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads={self.threads} must be at least 1.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch finds no GPU; use device='cpu'.")
        if self.gradients is not None and not self.gradients.is_file():
            raise ValueError(f"gradients={str(self.gradients)!r} is not a file; write one with torch.save.")

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.device)

    @property
    def clock(self) -> Clock:
        """What times are taken with."""
        return clock_for(self.torch_device, threads=self.threads)

    def machine(self) -> dict[str, Any]:
        """The header of the report."""
        return machine.describe(self.torch_device, threads=self.threads)


Measure = Callable[[Options], tuple[Report, Figure]]


def run(measures: Sequence[Measure], *, prog: str, args: Sequence[str] | None = None) -> int:
    """Measure, show and write.

    Args:
        measures: The benchmarks, in their order. Each is written as soon as it is there.
        prog: The command, for its help.
        args: The arguments; ``sys.argv`` by default.

    Returns:
        0, or 1 when a promise was not kept.
    """
    parser = ArgumentParser(prog=prog, description="Measure this package and its peers side by side.")
    parser.add_class_arguments(Options, skip={"quick", "large"})
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute, no figure to quote")
    parser.add_argument("--large", action="store_true", help="also the weights of LLaMA-1B")
    chosen = parser.parse_args(args)
    try:
        options = Options(**chosen.as_dict())
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    console = Console(width=120) if not sys.stdout.isatty() else Console()
    broken: list[str] = []
    for measure in measures:
        report, figure = measure(options)
        results.show(report, console)
        path = results.write(report, figure, options.out)
        console.print(f"All figures: {path}; picture: {path.with_suffix('.png').name}\n", highlight=False)
        broken += [target.text for target in report.targets if not target.passed]
    for text in broken:
        sys.stderr.write(f"A promise was not kept: {text}.\n")
    return 1 if broken else 0


def progress(text: str) -> None:
    """Say on stderr what is being measured now."""
    sys.stderr.write(f"measuring {text} ...\n")
    sys.stderr.flush()
