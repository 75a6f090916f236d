# SPDX-License-Identifier: Apache-2.0
"""What an optimizer step of each preset costs, side by side with full-rank AdamW's, and what it keeps.

Run it with ``python -m benchmarks.presets``. What the presets learn, ``benchmarks.convergence --presets`` compares.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim import Optimizer

from benchmarks import pictures, weights
from benchmarks.convergence.build import Task, build
from benchmarks.convergence.table import FULL_RANK
from benchmarks.convergence.variants import PRESETS, VARIANTS, Variant, why_not
from benchmarks.options import Options, progress, run
from benchmarks.results import Report, Table, milliseconds, ratio, rounded
from benchmarks.steps import AMORTISED_GAP, by_kind
from benchmarks.timing import Plan, Spread, side_by_side, times_faster
from benchmarks.weights import SEED, WeightSet
from lightning_galore import GaLoreOptimizer
from lightning_galore.storage import nbytes

GAP, GAPS = 6, 2
#: So that the first step of each gap refreshes all weights, and no other one does, whatever a preset would choose.
_EVENLY: dict[str, Any] = {"stagger": False, "schedule": "fixed", "reset_gap": 0, "reset_warmup": 0}
_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_KINDS = ("ordinary", "amortised")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Layers of a model.

    Args:
        name: Of the model.
        layer: Shapes of one layer's matrices, queries, keys and values first.
        layers: How many.
        rank: Of the low-rank presets that name none.
    """

    name: str
    layer: tuple[tuple[int, int], ...]
    layers: int
    rank: int

    def model(self) -> nn.Module:
        """Linear modules that are never called, and a norm that is not projected; the same each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            layers = (
                nn.ModuleDict(
                    {name: nn.Linear(n, m, bias=False) for name, (m, n) in zip(_NAMES, self.layer, strict=False)}
                )
                for _ in range(self.layers)
            )
            return nn.ModuleDict({"layers": nn.ModuleList(layers), "norm": nn.LayerNorm(self.layer[0][1])})


def _first_layers(name: str, known: WeightSet, *, matrices: int, layers: int) -> Case:
    return Case(
        name=f"{name}, {layers} layers, r={known.rank}", layer=known.shapes[:matrices], layers=layers, rank=known.rank
    )


CASES = (
    _first_layers("LLaMA-60M", weights.llama_60m(rank=128), matrices=7, layers=2),
    _first_layers("RoBERTa-base", weights.roberta_encoder(layers=1, rank=8), matrices=6, layers=2),
)
QUICK_CASES = (Case(name="small", layer=((64, 64),) * 3 + ((96, 64),), layers=1, rank=8),)


def measure(options: Options) -> tuple[Report, Figure]:
    """Time the steps of every preset."""
    notes: list[str] = []
    measured = [_measure(case, options, notes) for case in (QUICK_CASES if options.quick else CASES)]
    report = Report(
        name="preset-steps-quick" if options.quick else "preset-steps",
        machine=options.machine(),
        settings={
            "clock": options.clock.name,
            "gradients": "Gaussian, the same at every step",
            "gap": GAP,
            "gaps": GAPS,
            "amortised_gap": AMORTISED_GAP,
            "forced": _EVENLY,
            "seed": SEED,
        },
        measurements=measured,
        tables=[_table(held) for held in measured],
        notes=[
            "state: of the projected weights, bases, moments and all that is kept beside them; weights: those weights.",
            f"amortised: one refresh in {AMORTISED_GAP} steps, of galore-track and ldadam one a step.",
            *dict.fromkeys(notes),
        ],
    )
    return report, _picture(report)


def _measure(case: Case, options: Options, notes: list[str]) -> dict[str, Any]:
    progress(f"steps of {case.name}")
    made: dict[str, list[Optimizer]] = {}
    for name in PRESETS:
        variant = VARIANTS[name].of_length(10**6)  # what comes late in a run does not come here
        if reason := why_not(variant, rank=case.rank):
            notes.append(f"{name} is left out: {reason}")
            continue
        made[name] = _made(case, variant, options.torch_device)
    works = {name: _stepping(optimizers) for name, optimizers in made.items()}
    rounds = GAP * GAPS
    done = side_by_side(works, clock=options.clock, plan=Plan(seconds=0, least=rounds, most=rounds))
    kinds = {name: by_kind(seconds, gap=GAP) for name, seconds in done.seconds.items()}
    full = kinds[FULL_RANK]
    return {
        "name": case.name,
        "rank": case.rank,
        "presets": {
            name: {
                **_bytes(made[name]),
                "times_adamw": {kind: asdict(times_faster(full[kind], than=own[kind])) for kind in own},
                "median_s": {kind: Spread.of(own[kind]).median for kind in own},
                "seconds": rounded(done.seconds[name]),
            }
            for name, own in kinds.items()
        },
    }


def _made(case: Case, variant: Variant, device: torch.device) -> list[Optimizer]:
    """The optimizers of a preset over new weights with gradients."""
    if variant.kind == "galore":
        variant = replace(variant, settings={**variant.settings, **_EVENLY})
    model = case.model().to(device)
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    common = {"rank": case.rank, "update_proj_gap": GAP}
    optimizers = build(variant, Task(model=model, matrices=matrices, lr=1e-4, common=common, dense_lr=1e-4))
    generator = torch.Generator().manual_seed(SEED)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param)
    return optimizers


def _bytes(optimizers: list[Optimizer]) -> dict[str, int]:
    """What is kept for the matrices, by the optimizer's own count where it is one of this package; and their own."""
    first = optimizers[0]
    matrices = first.param_groups[0]["params"]
    if isinstance(first, GaLoreOptimizer):
        state = sum(status.state_bytes for status in first.subspaces())
    else:
        state = nbytes([first.state[weight] for weight in matrices])
    return {"state_bytes": state, "weight_bytes": nbytes(matrices)}


def _stepping(optimizers: list[Optimizer]) -> Any:
    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return step


def _table(held: Mapping[str, Any]) -> Table:
    rows = []
    for name, row in held["presets"].items():
        times = (ratio(Spread(**row["times_adamw"][kind])) for kind in _KINDS)
        sizes = (f"{row[key] / 1e6:.2f}" for key in ("state_bytes", "weight_bytes"))
        rows.append((name, *times, milliseconds(row["median_s"]["ordinary"]), *sizes))
    return Table(
        title=f"optimizer step: {held['name']}",
        header=("preset", "times AdamW's", f"amortised over {AMORTISED_GAP} steps", "ms", "state MB", "weights MB"),
        rows=rows,
    )


def _picture(report: Report) -> Figure:
    panels = [
        pictures.Panel(
            title=f"{held['name']}\n{kind}",
            bars=[
                pictures.Bar(
                    label=name,
                    spread=Spread(**row["times_adamw"][kind]),
                    text=f"{row['state_bytes'] / 1e6:.2f} MB",
                    ours=VARIANTS[name].kind == "galore",
                )
                for name, row in held["presets"].items()
            ],
        )
        for held in report.measurements
        for kind in _KINDS
    ]
    return pictures.bar_panels(
        panels,
        title="Optimizer step of each preset, in steps of fused AdamW; behind it what it keeps for these weights",
        footer=report,
        xlabel="AdamW steps (log), p10-p90: shorter is faster",
        columns=len(_KINDS),
    )


if __name__ == "__main__":
    sys.exit(run([measure], prog="python -m benchmarks.presets"))
