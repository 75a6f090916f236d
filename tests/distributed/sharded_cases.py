# SPDX-License-Identifier: Apache-2.0
"""Runs under FSDP2 in plain torch: two processes, each with a part of every weight, against one that has all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, Muon, NAdam, Optimizer, RMSprop
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from lightning_galore import GaLoreOptimizer, dtensors
from lightning_galore.memory import Footprint
from lightning_galore.sharding import Sharding, shard_placement

from .cases import MODES, Branches, Case, Chain, Twice, alone, dense, loss_of, settings_of, start
from .processes import WORLD

STEPS = 11  # refreshes at 0, 5 and 10 where they are not staggered


class Even(Chain):
    """Sizes that two processes divide evenly, so that columns can be divided too: tall, wide and wide."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 18))


class Bare(Chain):
    """No biases: matrices are all that Muon takes."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(24, 41, bias=False), nn.Tanh(), nn.Linear(41, 17, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers, nn.Linear(17, 18, bias=False))


class Deep(Chain):
    """Many weights of one shape, all refreshed in one step."""

    def __init__(self) -> None:
        super().__init__()
        middle = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.Tanh())]
        self.layers = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), *middle, nn.Linear(32, 18))


class Recomputed(Chain):
    """Activations are computed again in backward."""

    @override
    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[no-untyped-call]
        return x


class Unused(Branches):
    """Layers that nobody uses."""

    @override
    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        return super().forward(x, 1, micro)


class Wayward(Chain):
    """One weight has no gradient to speak of at its first refresh, and an infinite one on one process at a later."""

    step = 0

    def __init__(self) -> None:
        super().__init__()
        self.odd = nn.Linear(24, 30, bias=False)

    @override
    def forward(self, x: Tensor, rank: int, micro: int) -> Tensor:
        factor = {0: 0.0, 5: float("inf") if rank else 1.0}.get(self.step, 1.0)
        odd = self.odd(x).tanh().sum() * 0.01
        # The outputs are finite, and so are all gradients but one.
        return self.layers(x) + Scaled.apply(odd, factor)  # type: ignore[no-untyped-call]


class Scaled(torch.autograd.Function):
    """Its value, and its gradient times a factor."""

    @staticmethod
    @override
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    @override
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


@dataclass(frozen=True)
class ShardedCase(Case):
    """One run.

    Args:
        long: Cut each matrix along the dimension that is not projected, instead of its rows.
        mesh: Of the processes: two that share all weights; or replicas of them (first), each shared by some (second).
        policy: Dtypes in which weights are gathered and gradients summed.
        syncs: Whether gradients of all micro-batches are reduced, or only of the last.
        apart: Shard each layer by itself, not the model as one.
        counted: Note what travels, which takes time.
    """

    long: bool = False
    mesh: tuple[int, ...] = (WORLD,)
    policy: MixedPrecisionPolicy = MixedPrecisionPolicy()
    syncs: bool = True
    apart: bool = True
    counted: bool = False


@dataclass
class ShardedRun:
    """What a run left on one process.

    Args:
        weights: Whole, by name.
        state: Of each projected weight, whole.
        kept: Bytes of the optimizer's state that this process holds, counted tensor by tensor: bases, and the rest.
        kept_low: Of that what projected weights hold.
        predicted: Before the first step.
        held: After the last.
        wire: Of each step what it handed to which collective, in elements.
        norms: Of each step's gradients.
        refreshes: Bases that this process has found.
        most_whole: Most whole gradients that this process had at a time.
    """

    weights: dict[str, Tensor]
    state: dict[str, Any]
    kept: tuple[int, int]
    kept_low: int
    predicted: Footprint
    held: Footprint
    wire: list[list[tuple[str, int]]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    refreshes: int = 0
    most_whole: int = 0


class Wire(TorchDispatchMode):
    """Notes every collective, of ``torch.distributed`` and of DTensors, with the elements that go into it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with the parts
        name = func._schema.name
        room, _, called = name.partition("::")
        if room in ("c10d", "_c10d_functional") and called not in ("wait_tensor", "_wrap_tensor_autograd"):
            given = args[1] if called in ("_allgather_base_", "_reduce_scatter_base_", "gather_") else args[0]
            tensors = [given] if isinstance(given, Tensor) else given
            self.sent.append((called, sum(tensor.numel() for tensor in tensors)))
        return func(*args, **(kwargs or {}))


def shard(model: nn.Module, case: ShardedCase) -> None:
    names = ("replicas", "shards") if len(case.mesh) == 2 else None
    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=names)
    place = shard_placement(case.mesh[-1], case.settings.get("proj_type", "std")) if case.long else None
    shard_one = partial(fully_shard, mesh=mesh, shard_placement_fn=place, mp_policy=case.policy)
    if case.apart:
        for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
            shard_one(layer)
    shard_one(model)


def sharded(case: ShardedCase) -> tuple[nn.Module, GaLoreOptimizer]:
    model = start(case)
    shard(model, case)
    return model, GaLoreOptimizer(case.base(model), model, **settings_of(case))


def together(case: ShardedCase, rank: int) -> ShardedRun:
    """One process's part of a run."""
    return trained(*sharded(case), case, rank)


def trained(model: nn.Module, optimizer: GaLoreOptimizer, case: ShardedCase, rank: int) -> ShardedRun:
    predicted = optimizer.footprint()
    found = _watch_refreshes(optimizer)
    wire, norms = [], []
    with _WholeGradients() as whole:
        for step in range(case.steps):
            optimizer.zero_grad()
            with Wire() if case.counted else nullcontext() as counter:
                backward(model, optimizer, case, step, rank)
                if case.norms:
                    norms.append(float(optimizer.grad_norm()))
                optimizer.step()
            wire.append(counter.sent if counter is not None else [])
    return ShardedRun(
        weights=whole_weights(model),
        state={target.name: whole_state(optimizer.state.get(param)) for param, target in optimizer.targets.items()},
        kept=kept_bytes(optimizer, optimizer.state),
        kept_low=sum(kept_bytes(optimizer, optimizer.targets)),
        predicted=predicted,
        held=optimizer.footprint(),
        wire=wire,
        norms=norms,
        refreshes=len(found),
        most_whole=whole.most,
    )


def backward(model: nn.Module, optimizer: Any, case: ShardedCase, step: int, rank: int) -> None:
    for micro in range(case.accumulate):
        last = micro == case.accumulate - 1
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last or case.syncs)
        loss = loss_of(model, step, micro, rank, case.dtype) / case.accumulate
        if last or not isinstance(optimizer, GaLoreOptimizer):
            loss.backward()
            continue
        with optimizer.accumulate():
            loss.backward()


def plain_wire(case: ShardedCase, rank: int) -> list[tuple[str, int]]:
    """What a step of the bare optimizer hands to collectives: FSDP2's own traffic."""
    model = start(case)
    shard(model, case)
    optimizer = case.base(model)
    with Wire() as wire:
        backward(model, optimizer, case, 0, rank)
        optimizer.step()
    return wire.sent


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: dense(value).clone() for name, value in model.named_parameters()}


def whole_state(state: Any) -> dict[str, Any]:
    return {key: dtensors.whole(value) if isinstance(value, Tensor) else value for key, value in (state or {}).items()}


def kept_bytes(optimizer: GaLoreOptimizer, params: Iterable[Tensor]) -> tuple[int, int]:
    """Bytes of bases, and of all other tensors of the state, as they lie in this process's memory."""
    bases = others = 0
    for param in params:
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                nbytes = dtensors.local(value).untyped_storage().nbytes()
                bases += nbytes if key.startswith("galore_basis") else 0
                others += 0 if key.startswith("galore_basis") else nbytes
    return bases, others


def _watch_refreshes(optimizer: GaLoreOptimizer) -> list[str]:
    refresher, found = optimizer._projector.refresher, []
    find = refresher.refresh
    refresher.refresh = lambda one: (found.append(one.target.name), find(one))[1]  # type: ignore[method-assign,func-returns-value]
    return found


class _WholeGradients:
    """Counts the gathered gradients that are alive whenever another has been gathered."""

    def __init__(self) -> None:
        self.most = 0

    def __enter__(self) -> _WholeGradients:
        self._original = original = Sharding.gathered
        alive: list[ref[Tensor]] = []

        def gathered(sharding: Sharding, matrix: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            tensor = original(sharding, matrix, *args, **kwargs)
            if tensor.shape == matrix.shape and tensor.numel() > dtensors.local(matrix).numel():
                alive.append(ref(tensor))
            self.most = max(self.most, sum(one() is not None for one in alive))
            return tensor

        Sharding.gathered = gathered  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Sharding.gathered = self._original  # type: ignore[method-assign]


def of(kind: Callable[..., Optimizer], **settings: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: kind(model.parameters(), **settings)


def _bases() -> dict[str, Callable[[nn.Module], Optimizer]]:
    return {
        "sgd": of(SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
        "sgd-bare": of(SGD, lr=0.1),
        "adam": of(Adam, lr=1e-2, weight_decay=0.1),
        "adamax": of(Adamax, lr=1e-2),
        "amsgrad": of(AdamW, lr=1e-2, amsgrad=True),
        "nadam": of(NAdam, lr=1e-2),
        "rmsprop": of(RMSprop, lr=1e-3, centered=True, momentum=0.9),
        "adagrad": of(Adagrad, lr=1e-2),
        "foreach": of(AdamW, lr=1e-2, foreach=True),
        "loop": of(AdamW, lr=1e-2, foreach=False),
        "fused": of(AdamW, lr=1e-2, fused=True),
        "maximize": of(AdamW, lr=1e-3, maximize=True),
        "muon": of(Muon, lr=1e-2),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "shard": {"basis_placement": "shard"},
    "full": {"proj_type": "full"},
    "full-shard": {"proj_type": "full", "basis_placement": "shard"},
    "left": {"proj_type": "left"},
    "right": {"proj_type": "right"},
    "reverse": {"proj_type": "reverse_std"},
    "grid": {"stagger": False, "moments": "rotate"},
    "keep": {"moments": "keep"},
    "reset": {"moments": "reset"},
    "adaptive": {"schedule": "adaptive"},
    "energy": {"schedule": "energy", "min_gap": 2, "refresh_below": 0.95},
    "cos": {"schedule": "cos"},
    "rank-energy": {"rank_rule": "energy", "rank_energy": 0.7, "rank": 12, "stagger": False},
    "rank-energy-shard": {"rank_rule": "energy", "rank_energy": 0.7, "rank": 12, "basis_placement": "shard"},
    "svd": {"subspace": "svd", "stagger": False},
    "power": {"subspace": "power"},
    "columns": {"subspace": "columns"},
    "int8-basis": {"basis_storage": "int8"},
    "int4-basis": {"basis_storage": "int4"},
    "bf16-basis": {"basis_storage": "bf16", "basis_placement": "shard"},
    "clip": {"clip_weight_norm": 0.02},
}
#: Where the modes go different ways.
IN_ALL_MODES = ("shard", "full", "full-shard", "reverse", "grid", "energy", "rank-energy", "int4-basis", "clip")
BUDGET = 6_000


def _cases() -> Iterator[tuple[str, ShardedCase]]:
    make, fp64 = partial(ShardedCase, steps=STEPS), torch.float64
    for mode in MODES:
        double = partial(make, mode, dtype=fp64)
        yield f"{mode}-float32", make(mode)
        yield f"{mode}-even", double(model=Even, counted=True)
        yield f"{mode}-long", double(model=Even, long=True, counted=True)
        yield f"{mode}-long-shard", double({"basis_placement": "shard"}, model=Even, long=True, counted=True)
        yield f"{mode}-even-reverse", double({"proj_type": "reverse_std"}, model=Even, counted=True)
        yield f"{mode}-even-full", double({"proj_type": "full"}, model=Even, counted=True, tolerance=1e-11)
        yield f"{mode}-norms", double(norms=True)
        yield f"{mode}-accumulate", double(accumulate=2, norms=True)
        yield f"{mode}-no-sync", double(accumulate=2, syncs=False)
        for name, settings in SETTINGS.items():
            if mode == "step" or name in IN_ALL_MODES:
                yield (
                    f"{mode}-{name}",
                    double(settings, tolerance=1e-11 if "full" in name else None, norms=name == "full"),
                )
        yield f"{mode}-recomputed", double(model=Recomputed)
        yield f"{mode}-twice", double(model=Twice)
        yield f"{mode}-as-one", double(apart=False)
        yield f"{mode}-unused", double(model=Unused)
        yield f"{mode}-wayward", double({"stagger": False}, model=Wayward)
        yield f"{mode}-deep", double({"stagger": False, "update_proj_gap": 10}, model=Deep)
        budget = {"rank_rule": "energy", "rank_energy": 0.9, "rank": 12, "state_budget": BUDGET}
        yield f"{mode}-rank-budget", double(budget)  # in bytes of each process, so one alone decides otherwise
        yield f"{mode}-hybrid", double(mesh=(1, 2))
        yield f"{mode}-replicas", double(mesh=(2, 1))
        bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        yield f"{mode}-bf16", make(mode, policy=bf16, tolerance=0.03)
    for name, base in _bases().items():
        for mode in ("step", "layerwise") if name in ("sgd", "adagrad", "fused", "muon") else ("step",):
            # Muon orthogonalises in bf16, and takes nothing but matrices.
            model, tolerance = (Bare, 2e-3) if name == "muon" else (Chain, None)
            yield f"{mode}-{name}", make(mode, dtype=fp64, base=base, model=model, tolerance=tolerance)
    coarse = {"accumulator_storage": "int8"}
    yield "project-int8-accumulator", make("project", coarse, accumulate=2, tolerance=0.03)


@lru_cache
def reference(name: str) -> Any:
    return alone(CASES[name])


CASES = dict(_cases())
#: Nothing but tensor parallelism; the third weight, which nobody cuts, is left out.
TENSOR_PARALLEL = {
    mode: ShardedCase(mode, {"ignore_modules": ["layers.4"]}, dtype=torch.float64, model=Even, steps=STEPS, norms=True)
    for mode in MODES
}
