# SPDX-License-Identifier: Apache-2.0
"""What an optimizer step costs: ordinary, with a refresh, and amortised; against other packages and full-rank AdamW.

How near it comes to the machine's limits, and what memory it takes. Run it with ``python -m benchmarks.steps``;
README.md beside it says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure

from benchmarks import limits, optimizers, peers, pictures, weights
from benchmarks.optimizers import FULL_RANK, OURS
from benchmarks.options import Options, progress, run
from benchmarks.results import Report, Table, Target, milliseconds, ratio, rounded
from benchmarks.timing import Plan, Spread, side_by_side, times_faster
from benchmarks.weights import WeightSet

#: The gap that refreshes are spread over in the amortised time: the default, and the paper's.
AMORTISED_GAP = 200
KINDS = ("ordinary", "refresh", "amortised")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Args:
        weights: What is stepped.
        gap: Steps between two refreshes while measuring. Small, so that there are several; :data:`AMORTISED_GAP` is
            computed from the parts.
        gaps: How many whole gaps are measured after the first step.
    """

    weights: WeightSet
    gap: int = 9
    gaps: int = 3


_ROBERTA, _LLAMA_60M = weights.roberta_encoder(layers=4, rank=8), weights.llama_60m(rank=128)
CASES = (
    Case(weights=_ROBERTA),
    Case(weights=_LLAMA_60M),
    Case(weights=weights.llama_130m(layers=4, rank=256), gap=5, gaps=2),
)
#: At least this many times faster than galore-torch on a CPU at one thread.
PROMISES = {_ROBERTA.name: {"ordinary": 3.0, "amortised": 4.0}, _LLAMA_60M.name: {"ordinary": 1.3, "amortised": 1.5}}
QUICK_CASES = (
    Case(
        weights=WeightSet(name="small set, r=4", shapes=((64, 64), (96, 64), (64, 96)) * 2, rank=4),
        gap=4,
        gaps=2,
    ),
)


def measure(options: Options) -> tuple[Report, Figure]:
    """Time the steps of every case."""
    measured = []
    machine = options.machine()
    names, notes = optimizers.runnable(options.torch_device)
    for case in _cases(options):
        progress(f"steps of {case.weights.name}")
        measured.append(_measure_case(case, names, options))
    report = Report(
        name="steps-quick" if options.quick else "steps",
        machine=machine,
        settings={
            "clock": options.clock.name,
            "gradients": "Gaussian, the same for all",
            "amortised_gap": AMORTISED_GAP,
            "seed": weights.SEED,
            "order": "round robin, the first step is not timed",
        },
        measurements=measured,
        tables=[*(_table(held) for held in measured), limits.memory_table(measured), limits.table(measured)],
        targets=_targets(measured, options),
        notes=notes,
    )
    return report, _picture(report)


def _cases(options: Options) -> tuple[Case, ...]:
    if options.quick:
        return QUICK_CASES
    if options.device == "cuda":
        return (*CASES, Case(weights=weights.llama_1b(layers=24, rank=256)))
    # All 24 layers, once for each optimizer, are more than most machines have.
    return (*CASES, Case(weights=weights.llama_1b(layers=1, rank=512), gap=4, gaps=1)) if options.large else CASES


def _measure_case(case: Case, names: Sequence[str], options: Options) -> dict[str, Any]:
    device, rank = options.torch_device, case.weights.rank
    grads = optimizers.random_gradients(case.weights, device=device)
    # Not staggered, so that a step either refreshes every weight or none.
    made = {name: optimizers.make(name, optimizers.parameters(grads), rank=rank, gap=case.gap) for name in names}
    works = {name: optimizer.step for name, optimizer in made.items()}
    rounds = case.gap * case.gaps
    rates = limits.Rates.measure(options.clock, device)
    done = side_by_side(works, clock=options.clock, plan=Plan(seconds=0, least=rounds, most=rounds))
    kinds = {name: by_kind(seconds, gap=case.gap) for name, seconds in done.seconds.items()}
    # The last round refreshed, so this step is an ordinary one.
    peaks = {name: limits.peak_bytes(work, device) for name, work in works.items()}
    return {
        "limits": limits.compared(case.weights, rates, Spread.of(kinds[OURS]["ordinary"]).median),
        "name": case.weights.name,
        "rank": rank,
        "matrices": len(case.weights.shapes),
        "gap": case.gap,
        "rounds": rounds,
        "optimizers": {
            name: {
                "median_s": {kind: Spread.of(own[kind]).median for kind in KINDS},
                "times_faster_than": {
                    other: {kind: asdict(times_faster(own[kind], than=kinds[other][kind])) for kind in KINDS}
                    for other in kinds
                },
                "state_bytes": limits.state_bytes(made[name]),
                "step_peak_bytes": peaks[name],
                "seconds": rounded(done.seconds[name]),
            }
            for name, own in kinds.items()
        },
    }


def by_kind(seconds: list[float], *, gap: int) -> dict[str, list[float]]:
    """The times of ordinary steps, of refresh steps, and their mean over :data:`AMORTISED_GAP` steps.

    Args:
        seconds: Of steps 1, 2, ... in seconds; step 0 was the untimed one. Steps ``gap``, ``2 gap``, ... refresh.
        gap: Divides the number of steps. Each gap gives one amortised time, from the median of its ordinary steps and
            its refresh, so that these can be paired too.
    """
    blocks = [seconds[start : start + gap] for start in range(0, len(seconds), gap)]
    ordinary = [Spread.of(block[:-1]).median for block in blocks]
    refresh = [block[-1] for block in blocks]
    return {
        "ordinary": [value for block in blocks for value in block[:-1]],
        "refresh": refresh,
        "amortised": [
            ((AMORTISED_GAP - 1) * usual + rare) / AMORTISED_GAP for usual, rare in zip(ordinary, refresh, strict=True)
        ],
    }


def _targets(measured: Sequence[dict[str, Any]], options: Options) -> list[Target]:
    if options.device != "cpu" or options.threads != 1:
        return []
    return [
        Target(
            text=f"{kind} step of {held['name']}: times faster than {peers.GALORE_TORCH}",
            value=held["optimizers"][OURS]["times_faster_than"][peers.GALORE_TORCH][kind]["median"],
            bound=bound,
        )
        for held in measured
        for kind, bound in PROMISES.get(held["name"], {}).items()
        if peers.GALORE_TORCH in held["optimizers"]
    ]


def _table(held: dict[str, Any]) -> Table:
    rows = []
    for name, row in held["optimizers"].items():
        for kind in KINDS:
            others = {other: Spread(**row["times_faster_than"][other][kind]) for other in (OURS, FULL_RANK)}
            cells = ("" if other == name else ratio(spread, digits=2) for other, spread in others.items())
            rows.append((f"{name}: {kind}", milliseconds(row["median_s"][kind]), *cells))
    return Table(
        title=f"optimizer step: {held['name']} ({held['rounds']} rounds; amortised over {AMORTISED_GAP} steps)",
        header=("step", "ms", *(f"times faster than {name}" for name in (OURS, FULL_RANK))),
        rows=rows,
    )


def _picture(report: Report) -> Figure:
    """A panel a case and kind: what a step costs in steps of full-rank AdamW."""
    panels = [
        pictures.Panel(
            title=f"{held['name']}\n{kind}",
            bars=[
                pictures.Bar(
                    label=name,
                    spread=Spread(**held["optimizers"][FULL_RANK]["times_faster_than"][name][kind]),
                    text=f"{milliseconds(row['median_s'][kind])} ms",
                    ours=name == OURS,
                )
                for name, row in held["optimizers"].items()
            ],
        )
        for held in report.measurements
        for kind in KINDS
    ]
    return pictures.bar_panels(
        panels,
        title=f"Optimizer step: its cost in steps of {FULL_RANK}; amortised over {AMORTISED_GAP} steps",
        footer=report,
        xlabel="AdamW steps (log), p10-p90: shorter is faster",
        columns=len(KINDS),
    )


if __name__ == "__main__":
    sys.exit(run([measure], prog="python -m benchmarks.steps"))
