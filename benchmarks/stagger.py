# SPDX-License-Identifier: Apache-2.0
"""How evenly the refreshes are spread: the cost of every step of a whole gap and more, the first steps included.

Run it with ``python -m benchmarks.stagger``; README.md beside it says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from torch.optim import Optimizer

from benchmarks import optimizers, peers, pictures, weights
from benchmarks.options import Options, progress, run
from benchmarks.results import Report, Table, Target, milliseconds, rounded
from benchmarks.timing import Clock, Spread, in_turn, percentile, quiet
from benchmarks.weights import WeightSet

STAGGERED, AT_ONCE = "lightning-galore, stagger=True", "lightning-galore, stagger=False"
#: Most that a staggered step may cost, in ordinary steps.
BOUND = 2.0
_ORDINARY = "ordinary step"
_NEVER = 10**9  # a gap that no run reaches
_SAMPLED = 4  # an ordinary step is timed in every fourth round: enough for a median


@dataclass(frozen=True, kw_only=True)
class Case:
    """One distribution.

    Args:
        weights: What is stepped.
        gap: Steps between two refreshes of a weight.
        steps: How many are timed, from the very first on.
        repeats: How often they are run anew. Of each step the median counts, for it is timed only once a run.
        beside: Whether the unstaggered ones run too: refreshes at once, and galore-torch.
    """

    weights: WeightSet
    gap: int
    steps: int
    repeats: int = 3
    beside: bool = True


CASES = (
    # Two gaps: with the second refresh of every weight.
    Case(weights=weights.roberta_encoder(layers=4, rank=8), gap=50, steps=100),
    Case(weights=weights.llama_60m(rank=128), gap=200, steps=200, beside=False),
)
QUICK_CASES = (
    Case(
        weights=WeightSet(name="small set, r=4", shapes=((64, 64), (96, 64), (64, 96)) * 2, rank=4),
        gap=8,
        steps=16,
        repeats=2,
    ),
)


def measure(options: Options) -> tuple[Report, Figure]:
    """Time every step of every case."""
    machine = options.machine()
    measured = []
    for case in QUICK_CASES if options.quick else CASES:
        progress(f"{case.steps} steps of {case.weights.name}")
        measured.append(_measure_case(case, options))
    report = Report(
        name="stagger-quick" if options.quick else "stagger",
        machine=machine,
        settings={
            "clock": options.clock.name,
            "gradients": "Gaussian, the same for all",
            "seed": weights.SEED,
            "order": "round robin; ours beside an optimizer that is warm and never refreshes",
        },
        measurements=measured,
        tables=[_table(held) for held in measured],
        targets=[] if options.quick else _targets(measured),
        notes=peers.missing(),
    )
    return report, _picture(report)


def _measure_case(case: Case, options: Options) -> dict[str, Any]:
    grads = optimizers.random_gradients(case.weights, device=options.torch_device)
    runs = [_one_run(case, grads, options.clock, repeat) for repeat in range(case.repeats)]
    held = {}
    for name in runs[0]:
        if name == _ORDINARY:
            continue
        relative = [_relative(name, run) for run in runs]
        costs = [percentile(step, 50) for step in zip(*relative, strict=True)]
        held[name] = {
            "ordinary_s": percentile([_usual(name, run) for run in runs], 50),
            "median": percentile(costs, 50),
            "p90": percentile(costs, 90),
            "p99": percentile(costs, 99),
            "max": max(costs),
            "max_at_step": costs.index(max(costs)),
            "max_of_single_runs": asdict(Spread.of([max(steps) for steps in relative])),
            "costs": rounded(costs),
        }
    return {
        "name": case.weights.name,
        "rank": case.weights.rank,
        "matrices": len(case.weights.shapes),
        "gap": case.gap,
        "steps": case.steps,
        "repeats": case.repeats,
        "optimizers": held,
    }


def _one_run(case: Case, grads: Sequence[Tensor], clock: Clock, repeat: int) -> dict[str, list[float]]:
    """Seconds of steps 0, 1, ... of new optimizers, and of some ordinary steps of ours."""
    rank = case.weights.rank
    usual = optimizers.ours(grads, rank=rank, gap=_NEVER, stagger=False)
    made: dict[str, Optimizer | None] = {STAGGERED: optimizers.ours(grads, rank=rank, gap=case.gap, stagger=True)}
    if case.beside:
        made[AT_ONCE] = optimizers.ours(grads, rank=rank, gap=case.gap, stagger=False)
        made[peers.GALORE_TORCH] = optimizers.galore_torch(grads, rank=rank, gap=case.gap)
    steps = {name: optimizer.step for name, optimizer in made.items() if optimizer is not None}
    for _ in range(3):  # finds its bases, makes its moments, and warms the machine
        usual.step()
    seconds: dict[str, list[float]] = {name: [] for name in (_ORDINARY, *steps)}
    with quiet():
        for step in range(case.steps):
            if step % _SAMPLED == 0:
                seconds[_ORDINARY].append(clock.seconds(usual.step))
            for name in in_turn(list(steps), step + repeat):
                seconds[name].append(clock.seconds(steps[name]))
    return seconds


def _usual(name: str, run: dict[str, list[float]]) -> float:
    """Seconds of a step without a refresh: of ours beside; galore-torch's own median, for few of them refresh."""
    return percentile(run[name if name == peers.GALORE_TORCH else _ORDINARY], 50)


def _relative(name: str, run: dict[str, list[float]]) -> list[float]:
    usual = _usual(name, run)
    return [seconds / usual for seconds in run[name]]


def _targets(measured: list[dict[str, Any]]) -> list[Target]:
    return [
        Target(
            text=f"dearest of {held['steps']} steps, T={held['gap']}, {held['name']}, in ordinary steps",
            value=held["optimizers"][STAGGERED]["max"],
            bound=BOUND,
            at_least=False,
        )
        for held in measured
    ]


def _table(held: dict[str, Any]) -> Table:
    rows = [
        (
            name,
            milliseconds(row["ordinary_s"]),
            *(f"{row[key]:.2f}" for key in ("median", "p90", "p99", "max")),
            str(row["max_at_step"]),
            f"{row['max_of_single_runs']['median']:.2f}",
        )
        for name, row in held["optimizers"].items()
    ]
    return Table(
        title=f"cost of each of {held['steps']} steps in ordinary steps: {held['name']}, T={held['gap']} "
        f"({held['repeats']} runs, the median of each step)",
        header=("optimizer", "ordinary, ms", "median", "p90", "p99", "max", "at step", "max of one run"),
        rows=rows,
    )


def _picture(report: Report) -> Figure:
    panels = [
        pictures.Curves(
            title=f"{held['name']}, T={held['gap']}",
            curves={name: row["costs"] for name, row in held["optimizers"].items()},
            bound=BOUND,
            colours={STAGGERED: pictures.OURS, AT_ONCE: pictures.OURS_PLAIN, peers.GALORE_TORCH: pictures.THEIRS},
        )
        for held in report.measurements
    ]
    return pictures.curve_panels(
        panels,
        title="What every step costs, from the first on, in ordinary steps",
        footer=report,
        xlabel="step",
        ylabel="ordinary steps (log)",
    )


if __name__ == "__main__":
    sys.exit(run([measure], prog="python -m benchmarks.stagger"))
