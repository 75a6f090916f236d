# SPDX-License-Identifier: Apache-2.0
"""Runs in plain torch, alike for the processes of a team and for one process that sees all their data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_galore import GaLoreOptimizer, dtensors
from lightning_galore.distributed import Team

from .processes import WORLD

ROWS = 8  # of one micro-batch on one process
MODES = ("step", "project", "layerwise")


class Chain(nn.Module):
    """Three weights of different shapes, none square: tall, wide and nearly square."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 41), nn.Tanh(), nn.Linear(41, 17), nn.Tanh(), nn.Linear(17, 18))

    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        return self.layers(x)


class Twice(nn.Module):
    """One weight that a forward pass uses twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(24, 41), nn.Linear(41, 41), nn.Linear(41, 18)

    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        x = self.first(x).tanh()
        return self.last(self.again(self.again(x).tanh()).tanh())


class Branches(nn.Module):
    """A layer that the second process never uses, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(24, 41), nn.Linear(41, 18)
        self.only_first, self.idle = nn.Linear(41, 40), nn.Linear(24, 19)
        self.more = nn.Linear(40, 18)

    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        x = self.first(x).tanh()
        y = self.last(x)
        return y if rank else y + self.more(self.only_first(x).tanh())


class Matrices(nn.Module):
    """Matrices only, so that nearly all gradients can be projected."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 256, bias=False), nn.Linear(256, 18, bias=False)
        self.middle = nn.Linear(256, 256, bias=False)

    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        return self.second(self.middle(self.first(x).tanh()).tanh())


class Heads(nn.Module):
    """Queries, whose five heads of eight rows may share a basis, and a layer that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.last = nn.Linear(24, 40), nn.Linear(40, 18)

    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        return self.last(self.q_proj(x).tanh())


class Convs(nn.Module):
    """Weights of order 3 and 4, one in channels_last, and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.wave, self.image = nn.Conv1d(2, 9, 5), nn.Conv2d(9, 12, (1, 3))
        self.image.weight.data = self.image.weight.data.to(memory_format=torch.channels_last)
        self.last = nn.Linear(72, 18)

    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        x = self.wave(x.reshape(len(x), 2, 12)).tanh()
        return self.last(self.image(x[:, :, None]).tanh().flatten(1))


class Early(Branches):
    """A layer whose gradient comes with the first micro-batch only, and on the first process only."""

    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        return super().forward(x, rank or micro, micro)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        mode: Where gradients are projected.
        settings: Of the optimizer, on top of small ones.
        accumulate: Micro-batches a step.
        dtype: Of weights and data.
        model: Makes the model.
        base: Makes the optimizer that is wrapped.
        steps: How many.
        threads: Of the second process.
        norms: Whether to ask for the gradient's norm before each step.
        one_by_one: Whether the reference takes the processes' batches one by one, as micro-batches.
        tolerance: Largest difference to the reference; None is that of the dtype.
    """

    mode: str
    settings: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    dtype: torch.dtype = torch.float32
    model: Callable[[], nn.Module] = Chain
    base: Callable[[nn.Module], torch.optim.Optimizer] = adamw
    steps: int = 20
    threads: int = 1
    norms: bool = False
    one_by_one: bool = False
    tolerance: float | None = None


@dataclass
class Run:
    """What a run left.

    Args:
        weights: By name.
        state: Of each projected weight.
        sent: Bytes of each step, as the team counts them.
        counted: The same, as seen at the collectives.
        ranks: Of each projected weight after each step.
        norms: Of each step's gradients.
        refreshes: Bases that this process has found.
    """

    weights: dict[str, Tensor]
    state: dict[str, Any]
    sent: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    norms: list[float] = field(default_factory=list)
    refreshes: int = 0


def batch(step: int, micro: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro + rank)
    inputs = torch.randn(ROWS, 24, generator=generator)
    return inputs.to(dtype), torch.sin(2 * inputs[:, :18]).to(dtype)


def loss_of(model: nn.Module, step: int, micro: int, rank: int, dtype: torch.dtype) -> Tensor:
    inputs, wanted = batch(step, micro, rank, dtype)
    model.step = step  # type: ignore[assignment]  # for one that behaves otherwise at some
    return nn.functional.mse_loss(model(inputs, rank, micro), wanted)


def start(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model().to(case.dtype)


def settings_of(case: Case) -> dict[str, Any]:
    small = {"rank": 4, "update_proj_gap": 5, "scale": 1.0, "mode": case.mode, "target_modules": [nn.Linear]}
    return {**small, **case.settings}


def build(case: Case) -> tuple[nn.Module, GaLoreOptimizer]:
    model = start(case)
    settings = settings_of(case)
    return model, GaLoreOptimizer(case.base(model), model, **settings)


def dense(value: Tensor) -> Tensor:
    """A weight in numbers, whatever it is kept in, and whole; collective if it is kept in parts."""
    value = dtensors.whole(value.detach())
    return value.dequantize() if type(value) not in (Tensor, nn.Parameter) else value


def left(model: nn.Module, optimizer: GaLoreOptimizer) -> Run:
    """Copies of what a run has come to."""
    weights = {name: dense(value).clone() for name, value in model.named_parameters()}
    return Run(weights=weights, state={t.name: dict(optimizer.state[p]) for p, t in optimizer.targets.items()})


class Traffic:
    """Counts the bytes of collectives by itself: those of an all-reduce, and of what this process broadcasts."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __enter__(self) -> Traffic:
        self._originals = dist.all_reduce, dist.broadcast
        all_reduce, broadcast = self._originals

        def counting_all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.nbytes += tensor.numel() * tensor.element_size()
            return all_reduce(tensor, *args, **kwargs)

        def counting_broadcast(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == kwargs["group_src"]:
                self.nbytes += tensor.numel() * tensor.element_size()
            return broadcast(tensor, *args, **kwargs)

        dist.all_reduce, dist.broadcast = counting_all_reduce, counting_broadcast
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce, dist.broadcast = self._originals


def together(case: Case, rank: int) -> Run:
    """One process's part of a run in a team."""
    torch.set_num_threads(case.threads if rank else 1)
    model, optimizer = build(case)
    team, wrapped = Team(), model
    optimizer.join(team)
    if case.mode == "step":
        wrapped = DistributedDataParallel(model, find_unused_parameters=case.model is Branches)
    sent, counted, norms = [], [], []
    refresher, found = optimizer._projector.refresher, []
    find = refresher.refresh
    refresher.refresh = lambda one: (found.append(one), find(one))[1]  # type: ignore[method-assign,func-returns-value]
    ranks: dict[str, list[int]] = {target.name: [] for target in optimizer.targets.values()}
    for step in range(case.steps):
        before = team.sent
        with Traffic() as traffic:
            optimizer.zero_grad()
            for micro in range(case.accumulate):
                with ExitStack() as stack:
                    if micro < case.accumulate - 1:
                        stack.enter_context(optimizer.accumulate())
                        stack.enter_context(wrapped.no_sync() if wrapped is not model else nullcontext())
                    (loss_of(wrapped, step, micro, rank, case.dtype) / case.accumulate).backward()
            if case.norms:
                norms.append(float(optimizer.grad_norm()))
            optimizer.step()
        sent.append(team.sent - before)
        counted.append(traffic.nbytes)
        for param, target in optimizer.targets.items():
            ranks[target.name].append(optimizer._projector.state_of(param).projection.rank)
    torch.set_num_threads(1)
    run = left(model, optimizer)
    run.sent, run.counted, run.ranks, run.norms, run.refreshes = sent, counted, ranks, norms, len(found)
    return run


def alone(case: Case) -> Run:
    """The same run in one process."""
    model, optimizer = build(case)
    norms = []
    together_or_not = [[rank] for rank in range(WORLD)] if case.one_by_one else [list(range(WORLD))]
    parts = [(micro, ranks) for micro in range(case.accumulate) for ranks in together_or_not]
    for step in range(case.steps):
        optimizer.zero_grad()
        for micro, ranks in parts:
            with nullcontext() if (micro, ranks) == parts[-1] else optimizer.accumulate():
                losses = torch.stack([loss_of(model, step, micro, rank, case.dtype) for rank in ranks])
                (losses.sum() / case.accumulate / WORLD).backward()
        if case.norms:
            norms.append(float(optimizer.grad_norm()))
        optimizer.step()
    run = left(model, optimizer)
    run.norms = norms
    return run


@lru_cache
def reference(name: str) -> Run:
    return alone(CASES[name])


def _cases() -> dict[str, Case]:
    cases = {}
    for mode in MODES:
        for accumulate in (1, 2):
            for dtype in (torch.float32, torch.float64):
                name = f"{mode}-{accumulate}-{str(dtype)[6:]}"
                cases[name] = Case(mode, accumulate=accumulate, dtype=dtype)
        alone = SETTINGS if mode == "project" else SETTINGS | FULL_GRADIENT
        cases |= {f"{mode}-{name}": Case(mode, settings, dtype=torch.float64) for name, settings in alone.items()}
        for name, settings in FULL_GRADIENT.items() if mode != "project" else ():
            cases[f"{mode}-{name}-2"] = Case(mode, settings, accumulate=2, dtype=torch.float64)
        cases[f"{mode}-twice"] = Case(mode, model=Twice, dtype=torch.float64)
        cases[f"{mode}-branches"] = Case(mode, model=Branches, dtype=torch.float64)
        cases[f"{mode}-branches-2"] = Case(mode, model=Branches, dtype=torch.float64, accumulate=2)
        heads = {"method": "galore-plus", "head_size": 8}
        cases[f"{mode}-galore-plus"] = Case(mode, heads, model=Heads, dtype=torch.float64)
        for name, settings in TENSORS.items():
            cases[f"{mode}-{name}"] = Case(mode, {**NAMED, **settings}, model=Convs, dtype=torch.float64)
        cases[f"{mode}-threads"] = Case(mode, {"rank": 16}, model=Matrices, threads=4, tolerance=2e-5)
    for mode in MODES[1:]:
        cases[f"{mode}-early"] = Case(mode, model=Early, dtype=torch.float64, accumulate=2)
        for accumulate in (1, 2):
            clip = {"clip_weight_norm": 0.02}
            cases[f"{mode}-clip-{accumulate}"] = Case(
                mode, clip, accumulate=accumulate, dtype=torch.float64, one_by_one=True
            )
            cases[f"{mode}-norms-{accumulate}"] = Case(
                mode, accumulate=accumulate, dtype=torch.float64, one_by_one=True, norms=True
            )
        cases |= _fused(mode)
        cases[f"{mode}-int8-weights"] = Case(mode, {"weight_storage": "int8"}, tolerance=0.02)
        cases[f"{mode}-int8-accumulator"] = Case(mode, {"accumulator_storage": "int8"}, accumulate=2, tolerance=0.03)
        gap = {"rank": 8, "update_proj_gap": 20}
        cases[f"{mode}-traffic"] = Case(mode, {**gap, "stagger": False}, model=Matrices)
        cases[f"{mode}-traffic-staggered"] = Case(mode, gap, model=Matrices, steps=60)
    for mode in ("step", "layerwise"):  # which have the full gradient
        for name in ("apollo", "apollo-mini", "fira"):
            cases[f"{mode}-{name}"] = Case(mode, {"method": name}, dtype=torch.float64)
        cases[f"{mode}-apollo-2"] = Case(mode, {"method": "apollo"}, dtype=torch.float64, accumulate=2)
    cases["layerwise-q-apollo"] = Case("layerwise", {"method": "q-apollo"}, tolerance=0.02)  # DDP refuses "step"
    cases["step-norms"] = Case("step", dtype=torch.float64, norms=True)
    cases["step-clip"] = Case("step", {"clip_weight_norm": 0.02}, dtype=torch.float64)
    return cases


def _fused(mode: str) -> dict[str, Case]:
    fused, exact = {"fused_backward": True}, torch.float64
    return {
        f"{mode}-fused-1": Case(mode, fused, dtype=exact),
        f"{mode}-fused-2": Case(mode, fused, accumulate=2, dtype=exact),
        f"{mode}-fused-twice": Case(mode, fused, model=Twice, dtype=exact),
        f"{mode}-fused-branches": Case(mode, fused, model=Branches, dtype=exact),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "grid": {"stagger": False, "moments": "rotate"},
    "adaptive": {"schedule": "adaptive"},
    "energy": {"schedule": "energy", "min_gap": 2, "refresh_below": 0.95},
    "rank-energy": {"rank_rule": "energy", "rank_energy": 0.7, "rank": 12, "stagger": False},
    "rank-budget": {"rank_rule": "energy", "rank_energy": 0.9, "rank": 12, "state_budget": 16_000},
    "track": {"method": "galore-track"},
    "keep": {"moments": "keep"},
    "rotate-first": {"moments": "rotate_first"},
    "full": {"proj_type": "full"},
    "int8-basis": {"basis_storage": "int8"},
    "int4-basis": {"basis_storage": "int4"},
    "bf16-basis": {"basis_storage": "bf16"},
    "seed": {"subspace": "gaussian", "basis_storage": "seed"},
    "rank-shrink": {"method": "adarankgrad", "rank_energy": 0.7, "rank": 12},
    "spam": {"method": "spam", "spam_theta": 100.0, "reset_gap": 8, "reset_warmup": 2},
    "stable-spam": {"method": "stable-spam", "reset_gap": 8},
    "natural": {"transform": "natural"},
    "golore": {"method": "golore", "random_after": 6},
    "swan": {"method": "swan"},
}
# Methods that refuse mode "project".
FULL_GRADIENT: dict[str, dict[str, Any]] = {
    "ldadam": {"method": "ldadam"},
    "frugal": {"method": "frugal", "update_proj_gap": 6},
}
NAMED = {"target_modules": [nn.Linear, nn.Conv1d, nn.Conv2d]}
TENSORS: dict[str, dict[str, Any]] = {
    "folded": {},
    "tucker": {"subspace": "tucker", "moments": "rotate", "rank": 3},
    "tucker-int8": {"subspace": "tucker", "basis_storage": "int8", "rank": 2},
}
CASES = _cases()
