# SPDX-License-Identifier: Apache-2.0
"""How long a new basis takes, and what it captures: every finder against full SVD and galore-torch.

Run it with ``python -m benchmarks.refresh``; README.md beside it says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import finders, peers, pictures, weights
from benchmarks.finders import DEFAULT, FULL_SVD, Finder, Matrix
from benchmarks.options import Options, progress, run
from benchmarks.results import Report, Table, Target, milliseconds, ratio, rounded
from benchmarks.timing import Clock, Plan, Spread, side_by_side, times_faster
from benchmarks.weights import WeightSet

#: Ranks at which real gradients are looked at, as far as they are smaller than the matrices.
GRADIENT_RANKS = (4, 8, 16, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison.

    Args:
        weights: What is refreshed as a whole.
        plan: How often.
        promise: How many times faster the default finder must be than whom; None promises nothing.
        captured: Share of the best energy that it must keep meanwhile, in [0, 1].
    """

    weights: WeightSet
    plan: Plan
    promise: tuple[str, float] | None = None
    captured: float = 0.99


CASES = (
    Case(weights=weights.single(768, 768, rank=8), plan=Plan(seconds=6)),
    Case(weights=weights.single(768, 3072, rank=8), plan=Plan(seconds=8, least=5)),
    Case(weights=weights.single(768, 768, rank=128), plan=Plan(seconds=6)),
    Case(weights=weights.single(512, 1376, rank=128), plan=Plan(seconds=6)),
    Case(weights=weights.single(2048, 5461, rank=512), plan=Plan(seconds=0), promise=(FULL_SVD, 15.0)),
    Case(
        weights=weights.roberta_encoder(layers=4, rank=8),
        plan=Plan(seconds=0),
        promise=(peers.GALORE_TORCH, 30.0),
    ),
    Case(weights=weights.llama_60m(rank=128), plan=Plan(seconds=0)),
)

QUICK_CASES = (
    Case(weights=weights.single(96, 160, rank=8), plan=Plan(seconds=0)),
    Case(weights=WeightSet(name="small set, r=4", shapes=((64, 64), (96, 64), (64, 96)), rank=4), plan=Plan(seconds=0)),
)


def measure(options: Options) -> tuple[Report, Figure]:
    """Time the finders on every case, and look at real gradients if there are any."""
    cases = QUICK_CASES if options.quick else CASES
    machine = options.machine()
    measured = []
    for case in cases:
        progress(f"refresh of {case.weights.name}")
        measured.append(_measure_case(case, options))
    tables = [_table(case) for case in measured]
    targets = [target for case, held in zip(cases, measured, strict=True) for target in _targets(case, held)]
    if options.gradients is not None:
        held = real_energies(weights.load_gradients(options.gradients, device=options.torch_device))
        tables.append(_energy_table(held))
        measured.append({"name": "real gradients", "ranks": held})
    report = Report(
        name="refresh-quick" if options.quick else "refresh",
        machine=machine,
        settings=_settings(options.clock),
        measurements=measured,
        tables=tables,
        targets=targets,
        notes=peers.missing(),
    )
    return report, _picture(report)


def _settings(clock: Clock) -> dict[str, Any]:
    return {
        "clock": clock.name,
        "gradients": f"singular values i^-{weights.DECAY}, white noise with {weights.NOISE:.0%} of their energy",
        "known_bases": f"of the {DEFAULT} finder on a gradient that shares half of its energy",
        "seed": weights.SEED,
        "order": "round robin, one untimed run before",
    }


def _measure_case(case: Case, options: Options) -> dict[str, Any]:
    batch = finders.matrices(
        weights.gradients(case.weights, device=options.torch_device),
        rank=case.weights.rank,
    )
    every = {**finders.ours(), **finders.theirs()}
    works = {name: _refresh_all(find, batch) for name, find in every.items()}
    done = side_by_side(works, clock=options.clock, plan=case.plan)
    best = [finders.energy(m, basis) for m, basis in zip(batch, done.outcomes[FULL_SVD], strict=True)]
    rows = {}
    for name in every:
        shares = _shares(batch, done.outcomes[name], best)
        rows[name] = {
            "median_s": Spread.of(done.seconds[name]).median,
            "captured_worst": min(shares),
            "captured_mean": sum(shares) / len(shares),
            "times_faster_than": {
                other: asdict(times_faster(done.seconds[name], than=done.seconds[other])) for other in finders.theirs()
            },
            "seconds": rounded(done.seconds[name]),
        }
    return {
        "name": case.weights.name,
        "rank": case.weights.rank,
        "matrices": len(batch),
        "rounds": len(done.seconds[FULL_SVD]),
        "overlap_of_known_bases": finders.mean_overlap(batch, done.outcomes[FULL_SVD]),
        "finders": rows,
    }


def _refresh_all(find: Finder, batch: Sequence[Matrix]) -> Callable[[], list[Tensor]]:
    return lambda: [find(matrix) for matrix in batch]


def _shares(batch: Sequence[Matrix], bases: Sequence[Tensor], best: Sequence[float]) -> list[float]:
    """Energy that each basis keeps, relative to the best that one of its rank can."""
    return [finders.energy(m, basis) / most for m, basis, most in zip(batch, bases, best, strict=True)]


def real_energies(grads: dict[str, Tensor]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and worst captured energy of our finders on real gradients, by rank and name."""
    held: dict[str, dict[str, dict[str, float]]] = {}
    for rank in GRADIENT_RANKS:
        batch = finders.matrices([grad for grad in grads.values() if min(grad.shape) > rank], rank=rank)
        if not batch:
            continue
        progress(f"captured energy of {len(batch)} real gradients at rank {rank}")
        best = [finders.energy(m, finders.theirs()[FULL_SVD](m)) for m in batch]
        held[str(rank)] = {}
        for name, find in finders.ours().items():
            shares = _shares(batch, [find(matrix) for matrix in batch], best)
            held[str(rank)][name] = {"mean": sum(shares) / len(shares), "worst": min(shares)}
    return held


def _targets(case: Case, held: dict[str, Any]) -> list[Target]:
    own = held["finders"][DEFAULT]
    if case.promise is None or case.promise[0] not in own["times_faster_than"]:
        return []
    than, times = case.promise
    text = f"refresh of {case.weights.name}: subspace={DEFAULT!r}"
    return [
        Target(text=f"{text}, times faster than {than}", value=own["times_faster_than"][than]["median"], bound=times),
        Target(text=f"{text}, captured energy", value=own["captured_worst"], bound=case.captured),
    ]


def _table(held: dict[str, Any]) -> Table:
    others = list(finders.theirs())
    rows = [
        (
            name,
            milliseconds(row["median_s"]),
            *(ratio(Spread(**row["times_faster_than"][other])) for other in others),
            f"{row['captured_worst']:.4f}",
            f"{row['captured_mean']:.4f}",
        )
        for name, row in held["finders"].items()
    ]
    return Table(
        title=f"refresh: {held['name']} ({held['rounds']} rounds; overlap with the known bases "
        f"{held['overlap_of_known_bases']:.2f})",
        header=("finder", "ms", *(f"times faster than {other}" for other in others), "captured, worst", "mean"),
        rows=rows,
    )


def _energy_table(held: dict[str, dict[str, dict[str, float]]]) -> Table:
    names = list(next(iter(held.values()))) if held else []
    rows = [(name, *(f"{row[name]['mean']:.4f} / {row[name]['worst']:.4f}" for row in held.values())) for name in names]
    return Table(
        title="captured energy on the real gradients, mean / worst",
        header=("finder", *(f"r={rank}" for rank in held)),
        rows=rows,
    )


def _picture(report: Report) -> Figure:
    """A panel a case: how many times faster than the full SVD, with what was captured behind each bar."""
    panels = []
    for held in report.measurements:
        if "finders" not in held:
            continue
        bars = [
            pictures.Bar(
                label=name,
                spread=Spread(**row["times_faster_than"][FULL_SVD]),
                text=f"keeps {row['captured_worst']:.3f}",
                ours=name not in finders.theirs(),
            )
            for name, row in held["finders"].items()
        ]
        panels.append(pictures.Panel(title=held["name"], bars=bars))
    return pictures.bar_panels(
        panels,
        title="Refresh: times faster than torch.linalg.svd; what it keeps of the best energy, at worst",
        footer=report,
        xlabel="times faster (log), p10-p90",
    )


if __name__ == "__main__":
    sys.exit(run([measure], prog="python -m benchmarks.refresh"))
