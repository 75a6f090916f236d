# SPDX-License-Identifier: Apache-2.0
"""What ``fused_backward`` saves of a whole training step: time, and bytes that the forward pass keeps for backward.

Run it with ``python -m benchmarks.fused``; README.md beside it says how to read it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks import pictures
from benchmarks.optimizers import FULL_RANK
from benchmarks.options import Options, progress, run
from benchmarks.results import Report, Table, Target, megabytes, milliseconds, ratio, rounded
from benchmarks.timing import Plan, Spread, side_by_side, times_faster
from benchmarks.training import CASES, FINE_TUNING, NEVER, PRE_TRAINING, QUICK_CASES, Case, by_kind, loss_of
from benchmarks.weights import SEED
from lightning_galore import GaLoreOptimizer

ORDINARY, FUSED, COMPRESSED = "mode project", "the same, fused_backward", "the same, compress_activations"
SETTINGS: dict[str, dict[str, Any]] = {
    FULL_RANK: {},
    ORDINARY: {"fused_backward": False},
    FUSED: {"fused_backward": True},
    COMPRESSED: {"fused_backward": True, "compress_activations": True},
}
UNFUSED = "ordinary path"
CONVOLUTION_WAYS: dict[str, dict[str, Any]] = {
    UNFUSED: {"fused_backward": False},
    "fused, left": {"fused_backward": True, "proj_type": "left"},
    "fused, right": {"fused_backward": True, "proj_type": "right"},
}
#: Channels, side of the picture, rank.
CONVOLUTIONS = ((64, 56, 8), (128, 28, 8), (128, 28, 32), (256, 14, 64), (512, 7, 8))
QUICK_CONVOLUTIONS = ((8, 6, 2),)
#: Most that a whole step may take, of fused AdamW's, on a CPU at one thread.
MOST = {FINE_TUNING: 0.80, PRE_TRAINING: 0.95}
#: Most bytes that the forward pass of fine-tuning may keep, of those that full-rank training keeps.
KEPT = {FUSED: 0.90, COMPRESSED: 0.75}


def measure(options: Options) -> tuple[Report, Figure]:
    """Time the training steps of every case, each way to train on a model of its own."""
    machine, measured = options.machine(), []
    for case in QUICK_CASES if options.quick else CASES:
        progress(f"fused backward of {case.name}")
        measured.append(_measure_case(case, options))
    report = Report(
        name="fused-quick" if options.quick else "fused",
        machine=machine,
        settings={
            "clock": options.clock.name,
            "model": "random weights, random tokens, no dropout; no step refreshes",
            "order": "each round one whole training step of each, in turns",
            "seed": SEED,
        },
        measurements=measured,
        tables=[_table(held) for held in measured],
        targets=_targets(measured, options),
    )
    return report, _picture(report)


def _measure_case(case: Case, options: Options) -> dict[str, Any]:
    steps, kept = {}, {}
    for name in SETTINGS:
        steps[name], keeps = _training(name, case, options.torch_device)
        steps[name]()  # makes the state, and the only refresh
        kept[name] = keeps()
    compared = side_by_side(steps, clock=options.clock, plan=_exactly(case.rounds))
    ways = _ways(compared.seconds, FULL_RANK)
    return {
        "name": case.name,
        "rank": case.rank,
        "rounds": case.rounds,
        "ways": {name: {**way, "kept_bytes": kept[name]} for name, way in ways.items()},
    }


def _exactly(rounds: int) -> Plan:
    return Plan(seconds=0.0, least=rounds, most=rounds)


def _ways(seconds: dict[str, list[float]], compared_with: str) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "median_s": {"whole": Spread.of(own).median},
            "steps_of_full_rank": asdict(times_faster(seconds[compared_with], than=own)),
            "seconds": rounded(own),
        }
        for name, own in seconds.items()
    }


def _training(name: str, case: Case, device: torch.device) -> tuple[Callable[[], None], Callable[[], int]]:
    """A whole training step, and the bytes that its forward pass keeps."""
    torch.manual_seed(SEED)
    model = case.make().to(device)
    forward = loss_of(model, case, device)
    optimizer = _optimizer(name, model, case.rank)

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    return step, lambda: kept_bytes(forward, model)


def measure_convolutions(options: Options) -> tuple[Report, Figure]:
    """Time forward and backward of single convolutions in mode project, fused and not."""
    machine, measured = options.machine(), []
    for channels, size, rank in QUICK_CONVOLUTIONS if options.quick else CONVOLUTIONS:
        progress(f"a convolution of {channels} channels, {size} x {size}")
        measured.append(_measure_convolution(channels, size, rank, options))
    rows = [
        (
            held["name"],
            name,
            milliseconds(row["median_s"]["whole"]),
            ratio(Spread(**row["steps_of_full_rank"]), digits=2),
        )
        for held in measured
        for name, row in held["ways"].items()
    ]
    report = Report(
        name="fused-convolutions-quick" if options.quick else "fused-convolutions",
        machine=machine,
        settings={
            "clock": options.clock.name,
            "what": "forward and backward of one 3 x 3 convolution, hooks included; random input and output gradient",
            "seed": SEED,
        },
        measurements=measured,
        tables=[
            Table(
                title="a convolution's forward and backward",
                header=("channels, picture, rank", "mode project", "ms", "of the ordinary path"),
                rows=rows,
            )
        ],
    )
    title = "Forward and backward of a 3 x 3 convolution, batch 16, of those of the ordinary path"
    label = "of the ordinary path (log), p10-p90: shorter is faster"
    figure = pictures.whole_steps(report, ways="ways", is_ours=lambda name: name != UNFUSED, title=title, xlabel=label)
    return report, figure


def _measure_convolution(channels: int, size: int, rank: int, options: Options) -> dict[str, Any]:
    torch.manual_seed(SEED)
    x = torch.randn(16, channels, size, size, device=options.torch_device, requires_grad=True)
    passes = {name: _passes(x, rank, **settings) for name, settings in CONVOLUTION_WAYS.items()}
    compared = side_by_side(passes, clock=options.clock, plan=_exactly(3 if options.quick else 9))
    return {"name": f"{channels}, {size} x {size}, r={rank}", "ways": _ways(compared.seconds, UNFUSED)}


def _passes(x: Tensor, rank: int, **settings: Any) -> Callable[[], None]:
    """Forward and backward of a convolution of its own, whose basis is there."""
    model = nn.Sequential(nn.Conv2d(x.shape[1], x.shape[1], 3, padding=1, bias=False)).to(x.device)
    base = torch.optim.SGD(model.parameters(), lr=1e-3)
    how = {"mode": "project", "rank": rank, "update_proj_gap": NEVER, "stagger": False, **settings}
    optimizer = GaLoreOptimizer(base, model, target_modules=[nn.Conv2d], **how)
    grad = torch.randn_like(x)
    model(x).backward(grad)
    optimizer.step()

    def run_once() -> None:
        optimizer.zero_grad()
        x.grad = None
        model(x).backward(grad)

    return run_once


def _optimizer(name: str, model: nn.Module, rank: int) -> torch.optim.Optimizer:
    if name == FULL_RANK:
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    targets, others = by_kind(model)
    groups: list[dict[str, Any]] = [{"params": targets, "rank": rank}, {"params": others, "rank": None}]
    base = torch.optim.AdamW(groups, lr=1e-4, fused=True)
    settings = {"mode": "project", "update_proj_gap": NEVER, "stagger": False, **SETTINGS[name]}
    return GaLoreOptimizer(base, model, **settings)


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for backward, but for parameters; each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    del loss
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    return sum(size for place, size in kept.items() if place not in own)


def _targets(measured: list[dict[str, Any]], options: Options) -> list[Target]:
    ways = {held["name"]: held["ways"] for held in measured}
    kept = [
        Target(
            text=f"kept by the forward pass of {FINE_TUNING}, {name}, of what {FULL_RANK} keeps",
            value=ways[FINE_TUNING][name]["kept_bytes"] / ways[FINE_TUNING][FULL_RANK]["kept_bytes"],
            bound=bound,
            at_least=False,
        )
        for name, bound in KEPT.items()
        if FINE_TUNING in ways
    ]
    if options.device != "cpu" or options.threads != 1:
        return kept
    return kept + [
        Target(
            text=f"a whole training step of {name} with fused_backward, in those of {FULL_RANK}",
            value=ways[name][FUSED]["steps_of_full_rank"]["median"],
            bound=bound,
            at_least=False,
        )
        for name, bound in MOST.items()
        if name in ways
    ]


def _table(held: dict[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = [
        (
            name,
            milliseconds(row["median_s"]["whole"]),
            ratio(Spread(**row["steps_of_full_rank"]), digits=3),
            megabytes(row["kept_bytes"]),
        )
        for name, row in held["ways"].items()
    ]
    return Table(
        title=f"fused backward: {held['name']} ({held['rounds']} rounds)",
        header=("way to train", "whole step, ms", f"in steps of {FULL_RANK}", "kept for backward, MB"),
        rows=rows,
    )


def _picture(report: Report) -> Figure:
    return pictures.whole_steps(
        report,
        ways="ways",
        is_ours=lambda name: name != FULL_RANK,
        title=f"Whole training step without a refresh, in steps of {FULL_RANK}",
        xlabel="AdamW's steps (log), p10-p90: shorter is faster",
    )


if __name__ == "__main__":
    sys.exit(run([measure, measure_convolutions], prog="python -m benchmarks.fused"))
