# SPDX-License-Identifier: Apache-2.0
"""What weights, bases and moments in few bits take, how well they hold a basis, and what a step over them costs.

Run it with ``python -m benchmarks.quantized``; README.md beside it says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks import optimizers, peers, pictures, weights
from benchmarks.options import Options, progress, run
from benchmarks.results import Report, Table, Target, milliseconds, ratio, rounded
from benchmarks.timing import Plan, Spread, side_by_side, times_faster
from benchmarks.weights import SEED, WeightSet
from lightning_galore import GaLoreOptimizer
from lightning_galore.bases import StoredBases
from lightning_galore.state_keys import BASIS, LIFT, TRANSFORM, is_ours
from lightning_galore.storage import CODECS, nbytes

MODES = ("step", "project", "layerwise")
CATEGORIES = ("weights", "bases", "moments")


@dataclass(frozen=True, kw_only=True)
class Model:
    """All weights of a model: the matrices that are projected, and the rest."""

    matrices: WeightSet
    rest: tuple[tuple[int, ...], ...]

    def build(self) -> nn.Module:
        """In bf16, with linear modules that are never called: bytes depend on shapes only."""
        model = nn.Module()
        model.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for m, n in self.matrices.shapes)
        model.rest = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in self.rest)
        return model.bfloat16()


# Embedding, head, norms; of RoBERTa-base also the biases, and no head.
LLAMA_60M = Model(matrices=weights.llama_60m(rank=128), rest=((32_000, 512),) * 2 + ((512,),) * 17)
ROBERTA = Model(
    matrices=weights.roberta_encoder(layers=12, rank=8),
    rest=((50_265, 768), (514, 768), (1, 768), *((768,),) * (2 + 12 * 9), *((3072,),) * 12),
)
SMALL = Model(matrices=WeightSet(name="small set, r=4", shapes=((96, 64), (64, 96)), rank=4), rest=((100, 64), (64,)))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to keep things: settings of the package, and whether moments are in 8 bits."""

    name: str
    settings: Mapping[str, Any]
    moments_in_8bit: bool = False

    def optimizer(self, model: nn.Module, *, rank: int, mode: str) -> GaLoreOptimizer:
        """Over all weights of ``model``."""
        base: Optimizer = AdamW(model.parameters(), lr=optimizers.LR)
        if self.moments_in_8bit:
            from bitsandbytes.optim import AdamW8bit

            base = AdamW8bit(model.parameters(), lr=optimizers.LR)
        return GaLoreOptimizer(base, model, rank=rank, mode=mode, stagger=False, **self.settings)


ROWS = (
    Row(name="galore", settings={"method": "galore2"}),
    Row(name="galore-8bit", settings={"method": "galore-8bit", "subspace": "randomized"}, moments_in_8bit=True),
    Row(name="q-galore", settings={"method": "q-galore"}, moments_in_8bit=True),
)


def measure(options: Options) -> tuple[Report, Figure]:
    """Count bytes, compare bases, time steps."""
    missing = peers.missing(peers.BITSANDBYTES)
    rows = [row for row in ROWS if not (row.moments_in_8bit and missing)]
    models = (SMALL,) if options.quick else (LLAMA_60M, ROBERTA)
    bytes_held = [_bytes_of(model, row) for model in models for row in rows]
    accuracies = [_accuracy(*shape) for shape in ((64, 8), (64, 16)) + (() if options.quick else _SHAPES)]
    timed = [_times(case, options) for case in ((SMALL.matrices,) if options.quick else _TIMED)]
    report = Report(
        name="quantized-quick" if options.quick else "quantized",
        machine=options.machine(),
        settings={"clock": options.clock.name, "seed": SEED, "bases": "random orthonormal columns"},
        measurements=[*bytes_held, *accuracies, *timed],
        tables=[_bytes_table(bytes_held), _accuracy_table(accuracies), *map(_times_table, timed)],
        targets=_targets([] if options.quick else bytes_held, accuracies),
        notes=missing,
    )
    return report, _picture(bytes_held, report)


# -- bytes -------------------------------------------------------------------------------------------------------------


def _bytes_of(model: Model, row: Row) -> dict[str, Any]:
    progress(f"bytes of {model.matrices.name}, {row.name}")
    measured: dict[str, Any] = {"name": model.matrices.name, "row": row.name, "gradients": {}}
    equal = True
    for mode in MODES:
        made = model.build()
        optimizer = row.optimizer(made, rank=model.matrices.rank, mode=mode)
        predicted = asdict(optimizer.footprint())
        held = step_and_count(optimizer)
        equal = equal and held == predicted
        measured["gradients"][mode] = held.pop("gradients")
        measured |= held
        measured["projected"] = sum(map(_own_bytes, optimizer.targets, map(optimizer.state.get, optimizer.targets)))
    measured["predicted_is_held"] = equal
    return measured


def _own_bytes(weight: Tensor, state: Any) -> int:
    return nbytes(weight) + nbytes({key: value for key, value in state.items() if not key.startswith("qmap")})


def step_and_count(optimizer: GaLoreOptimizer) -> dict[str, int]:
    """Bytes of the tensors that are there: gradients after a backward, the others after a step.

    Args:
        optimizer: Over parameters without gradients.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    generator = torch.Generator().manual_seed(SEED)
    for param in params:
        (param * torch.randn(param.shape, generator=generator).to(param)).sum().backward()
    waiting = optimizer.hooks.waiting.values()
    gradients = nbytes([param.grad for param in params]) + sum(low_grad.nbytes for low_grad in waiting)
    optimizer.step()
    items = [item for state in optimizer.state.values() for item in state.items()]
    shared = {id(value): value for key, value in items if key.startswith("qmap")}
    return {
        "weights": nbytes(params),
        "bases": nbytes([value for key, value in items if is_ours(key) and not key.startswith((LIFT, TRANSFORM))])
        + sum(8 for key, value in items if key == BASIS and isinstance(value, int)),
        "moments": nbytes([value for key, value in items if not is_ours(key) and id(value) not in shared] + [shared]),
        "gradients": gradients,
        "lifts": nbytes([value for key, value in items if key.startswith(LIFT)]),
        "transforms": nbytes([value for key, value in items if key.startswith(TRANSFORM)]),
    }


def _bytes_table(measured: list[dict[str, Any]]) -> Table:
    rows = []
    for held in measured:
        total = sum(held[category] for category in CATEGORIES)
        gradients = (f"{held['gradients'][mode] / 2**20:,.1f}" for mode in MODES[:-1])
        parts = (f"{held[category] / 2**20:,.1f}" for category in CATEGORIES)
        own, whole = f"{held['projected'] / 2**20:,.1f}", f"{total / 2**20:,.1f}"
        rows.append((f"{held['name'].split(',')[0]}: {held['row']}", *parts, whole, own, *gradients))
    header = ("MiB", *CATEGORIES, "these three", "of projected weights", *(f"gradients, {mode}" for mode in MODES[:-1]))
    title = "bytes held, predicted to the byte before the first step; mode layerwise holds no gradients"
    return Table(title=title, header=header, rows=rows)


# -- accuracy ----------------------------------------------------------------------------------------------------------

_SHAPES = ((768, 8), (512, 128), (1024, 256), (2048, 512))


def _accuracy(d: int, r: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(SEED)
    basis = torch.linalg.qr(torch.randn(d, r, generator=generator)).Q
    ways: dict[str, Callable[[], Tensor]] = {
        "published int4 (min-max, 256)": lambda: _min_max(basis, group=256),
        **{f"{kept}, as decoded": lambda kept=kept: _read(basis, kept, corrected=False) for kept in ("int8", "int4")},
        **{
            f"{kept}, as read": lambda kept=kept: _read(basis, kept, corrected=True)
            for kept in ("bf16", "int8", "int4")
        },
    }
    identity = torch.eye(r)
    found = {}
    for name, way in ways.items():
        held = way()
        found[name] = {
            "relative_error": float((held - basis).norm() / r**0.5),
            "departure": float((held.mT @ held - identity).norm() / r**0.5),
            "outside_the_span": float((held - basis @ (basis.mT @ held)).norm() / r**0.5),
        }
    return {"name": f"basis {d}x{r}", "bytes": {k: c.nbytes(d * r) for k, c in CODECS.items()}, "storages": found}


def _read(basis: Tensor, kept: str, *, corrected: bool) -> Tensor:
    stored = StoredBases.write([basis], kept=kept, param_dtype=basis.dtype, orthonormal=corrected)
    return stored.read(torch.float32)[0].float()


def _min_max(value: Tensor, *, group: int) -> Tensor:
    """Asymmetric 4-bit codes with a clamped zero point, as Q-GaLore's formula says (arXiv 2407.08296)."""
    flat = value.flatten()
    groups = torch.cat([flat, flat.new_zeros(-flat.numel() % group)]).view(-1, group)
    low, high = groups.aminmax(dim=1, keepdim=True)
    unit = ((high - low) / 15).clamp(min=1e-5)
    zero = (-(low / unit).round()).clamp(0, 15)
    codes = ((groups / unit).round() + zero).clamp(0, 15)
    return ((codes - zero) * unit).flatten()[: flat.numel()].view_as(value)


def _accuracy_table(measured: list[dict[str, Any]]) -> Table:
    rows = [
        (
            f"{held['name']}: {name}",
            *(f"{100 * found[key]:.4f}" for key in ("relative_error", "departure", "outside_the_span")),
        )
        for held in measured
        for name, found in held["storages"].items()
    ]
    header = ("percent", "relative error", "|B^T B - I| / sqrt(r)", "error outside the span")
    return Table(title="bases in few bits", header=header, rows=rows)


# -- time --------------------------------------------------------------------------------------------------------------

_TIMED = (weights.roberta_encoder(layers=4, rank=8), weights.llama_60m(rank=128))
_STORAGES: dict[str, dict[str, Any]] = {
    "as the weight": {},
    "basis int8": {"basis_storage": "int8"},
    "basis int4": {"basis_storage": "int4"},
    "weights int8, basis int4": {"basis_storage": "int4", "weight_storage": "int8"},
    "weights bf16": {"bf16": True},
    "weights bf16, stochastic": {"bf16": True, "stochastic_round": True},
}


def _times(case: WeightSet, options: Options) -> dict[str, Any]:
    progress(f"steps of {case.name}")
    grads = optimizers.random_gradients(case, device=options.torch_device)
    works = {name: _ordinary(grads, case.rank, settings).step for name, settings in _STORAGES.items()}
    done = side_by_side(works, clock=options.clock, plan=Plan(seconds=0, least=9, most=9))
    first = done.seconds["as the weight"]
    return {
        "name": case.name,
        "rank": case.rank,
        "steps": {
            name: {
                "median_s": Spread.of(seconds).median,
                "ratio": asdict(times_faster(first, than=seconds)),
                "seconds": rounded(seconds),
            }
            for name, seconds in done.seconds.items()
        },
    }


def _ordinary(grads: Iterable[Tensor], rank: int, settings: Mapping[str, Any]) -> GaLoreOptimizer:
    """One that has refreshed all its bases, and will not again."""
    settings = dict(settings)
    dtype = torch.bfloat16 if settings.pop("bf16", False) else torch.float32
    model = nn.ModuleList(nn.Linear(g.shape[1], g.shape[0], bias=False, device=g.device, dtype=dtype) for g in grads)
    base = AdamW(model.parameters(), lr=optimizers.LR, fused=True)
    optimizer = GaLoreOptimizer(base, model, rank=rank, update_proj_gap=10_000, stagger=False, **settings)
    for param, grad in zip(model.parameters(), grads, strict=True):
        param.grad = grad.to(dtype)
    optimizer.step()
    return optimizer


def _times_table(held: dict[str, Any]) -> Table:
    rows = [
        (name, milliseconds(row["median_s"]), ratio(Spread(**row["ratio"]), digits=2))
        for name, row in held["steps"].items()
    ]
    header = ("kept", "ms", "times the step of fp32 weights and bases")
    return Table(title=f"ordinary optimizer step: {held['name']}", header=header, rows=rows)


# -- promises and picture ----------------------------------------------------------------------------------------------


def _targets(held: list[dict[str, Any]], accuracies: list[dict[str, Any]]) -> list[Target]:
    wrong = sum(not row["predicted_is_held"] for row in held)
    targets = [Target(text="rows whose bytes are not as predicted", value=wrong, bound=0, at_least=False)]
    by_name = {(row["name"], row["row"]): row["projected"] for row in held}
    for (name, row), value in by_name.items():
        if row == "q-galore":
            text = f"q-galore's share of galore's bytes, projected weights of {name}"
            # 8 of 16 bits and the scales: where the states are next to nothing, half cannot be reached.
            targets.append(Target(text=text, value=value / by_name[name, "galore"], bound=0.505, at_least=False))
    for one in accuracies:
        before, after = (one["storages"][f"int4, {how}"]["departure"] for how in ("as decoded", "as read"))
        text = f"departure from orthonormality of int4, {one['name']}: what is left of it"
        targets.append(Target(text=text, value=after / before, bound=0.05, at_least=False))
    return targets


def _picture(held: list[dict[str, Any]], report: Report) -> Figure:
    """Stacked bars: what each method holds of each model, with the gradients of two modes."""
    stacks = {
        f"{row['name'].split(',')[0]}\n{row['row']}, {mode}": [
            *(row[category] / 2**20 for category in CATEGORIES),
            row["gradients"][mode] / 2**20,
        ]
        for row in held
        for mode in ("step", "layerwise")
    }
    return pictures.stacked_bars(
        stacks,
        parts=(*CATEGORIES, "gradients"),
        title="Bytes held, weights in bf16 unless they are int8",
        footer=report,
        xlabel="MiB",
    )


if __name__ == "__main__":
    sys.exit(run([measure], prog="python -m benchmarks.quantized"))
