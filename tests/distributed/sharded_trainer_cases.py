# SPDX-License-Identifier: Apache-2.0
"""Runs under the Trainer with FSDP2, alike for two processes and for one that sees the data of both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_galore import GaLoreStrategy, dtensors
from tests.modes.test_manual import Plain
from tests.modes.test_several_optimizers import DeclaredGan
from tests.strategies.modules import SETTINGS, Tiny, adamw

from .trainer_cases import CLIP, MODES, Case, Rows, Scheduled, fit


class Configured(Tiny):
    """Shards itself, every matrix along its rows: the second one, projected on the left, is misaligned then."""

    @override
    def configure_model(self) -> None:
        mesh = getattr(self.trainer.strategy, "_device_mesh", None)
        if mesh is None or any(map(dtensors.is_sharded, self.parameters())):  # one device, or the second call
            return
        for module in (*self.body, self.head):
            if any(True for _ in module.parameters()):
                fully_shard(module, mesh=mesh["data_parallel"])


class Stacked(Tiny):
    """Blocks in a list, each of which travels by itself; 7 columns cannot be divided evenly."""

    def __init__(self, make: Callable[..., Any] = adamw) -> None:
        super().__init__(make)
        blocks = [nn.Sequential(nn.Linear(11, 7), nn.Tanh(), nn.Linear(7, 11)) for _ in range(3)]
        self.body = nn.Sequential(nn.Linear(8, 11), *blocks, nn.LayerNorm(11), nn.Linear(11, 12))


class Cut(Tiny):
    """Tensor parallelism within the body, where both processes see the data of the first."""

    @override
    def configure_model(self) -> None:
        mesh = getattr(self.trainer.strategy, "_device_mesh", None)
        if mesh is not None and not any(map(dtensors.is_sharded, self.parameters())):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.body, mesh["tensor_parallel"], plan)

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        inputs = Rows.inputs(batch_idx, 0)
        return super().training_step([inputs, torch.sin(inputs[:, :4] * 2)], batch_idx)


def reordered(model: LightningModule) -> torch.optim.Optimizer:
    """Groups in another order than the model's parameters, and settings of their own."""
    params = dict(reversed(list(model.named_parameters())))
    vectors = [param for param in params.values() if param.ndim < 2]
    matrices = [param for param in params.values() if param.ndim > 1]
    return torch.optim.AdamW(
        [{"params": vectors, "lr": 5e-3}, {"params": matrices[1:]}, {"params": matrices[:1]}], 1e-2
    )


def plain_adamw(model: LightningModule) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


TENSOR_PARALLEL = {"tensor_parallel_size": 2}  # of two devices; data_parallel_size is what is left


def _cases() -> dict[str, Case]:
    cases = {}
    for mode in MODES:
        cases[f"{mode}-automatic"] = Case(mode, model=Scheduled)
        cases[f"{mode}-manual"] = Case(mode, model=Plain)
        cases[f"{mode}-accumulation"] = Case(mode, trainer={"accumulate_grad_batches": 2})
        cases[f"{mode}-bf16"] = Case(mode, trainer={"precision": "bf16-mixed"}, tolerance=0.05)
        cases[f"{mode}-configured"] = Case(mode, model=Configured)
        cases[f"{mode}-stacked"] = Case(mode, {"check_replicas_every": 1}, model=Stacked)
        cases[f"{mode}-tensor-parallel"] = Case(mode, TENSOR_PARALLEL, model=Cut)
        cases[f"{mode}-shard"] = Case(mode, {"basis_placement": "shard", "check_replicas_every": 3})
        if mode != "layerwise":
            cases[f"{mode}-clipped"] = Case(mode, trainer={"gradient_clip_val": CLIP})
            cases[f"{mode}-gan"] = Case(mode, model=DeclaredGan)
    cases["step-clipped-configured"] = Case("step", trainer={"gradient_clip_val": CLIP}, model=Configured)
    by_value = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    cases["layerwise-clipped"] = Case("layerwise", trainer=by_value)
    cases["step-clipped-by-value"] = Case("step", trainer=by_value)
    cases["project-clipped-accumulation"] = Case(
        "project", trainer={"gradient_clip_val": CLIP, "accumulate_grad_batches": 2}
    )
    return cases


CASES = _cases()
#: What is saved and resumed: settings of the strategy, and the module.
SAVED: dict[str, tuple[dict[str, Any], Callable[[], LightningModule]]] = {
    **{mode: ({"mode": mode}, Tiny) for mode in MODES},
    "configured": ({"mode": "project"}, Configured),
    "groups": ({"mode": "step"}, partial(Tiny, reordered)),
    "adaptive": ({"mode": "project", "rank_rule": "energy", "rank_energy": 0.6, "rank": 6, "stagger": False}, Tiny),
    "int4": ({"mode": "layerwise", "basis_storage": "int4"}, Tiny),
    "shard": ({"mode": "step", "basis_placement": "shard", "proj_type": "full"}, Tiny),
    "gan": ({"mode": "project"}, DeclaredGan),
    "cut": ({"mode": "project", **TENSOR_PARALLEL}, Cut),
}
#: Of those, what goes through one file too.
IN_ONE_FILE = (*MODES, "groups", "adaptive", "gan", "cut")


class OneParameter(Tiny):
    """A parameter that FSDP2 has not been told of."""

    def __init__(self) -> None:
        super().__init__()
        self.loose = nn.Parameter(torch.ones(4))


class Shared(Tiny):
    """Two children that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(12, 4)
        self.again.weight = self.head.weight


class Forgetful(Tiny):
    """Shards all but its head."""

    @override
    def configure_model(self) -> None:
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])


class Partly(Tiny):
    """Shards one of the weights that are projected."""

    @override
    def configure_model(self) -> None:
        fully_shard(self.body[0], mesh=self.device_mesh["data_parallel"])


#: Refused at setup: settings of the strategy, of the Trainer, the module, and words of the message.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[], LightningModule], str]] = {
    "int8 weights": (
        {"weight_storage": "int8"},
        {},
        Tiny,
        r"weight_storage='int8' with sharded.*weight_storage='param'",
    ),
    "q-galore": ({"method": "q-galore", "mode": "layerwise"}, {}, Tiny, r"weight_storage='int8' with sharded"),
    "track": ({"subspace": "track"}, {}, Tiny, r"subspace='track' with sharded weights.*Use 'randomized'"),
    "int4 in parts": (
        {"basis_placement": "shard", "basis_storage": "int4"},
        {},
        Tiny,
        r"basis_placement='shard' with basis_storage='int4'.*Set basis_placement='replicate'",
    ),
    "int8 in parts": (
        {"basis_placement": "shard", "basis_storage": "int8"},
        {},
        Tiny,
        r"basis_placement='shard' with basis_storage='int8'.*keep the basis in bf16",
    ),
    "fused layers": (
        {"fused_backward": True, "mode": "project"},
        {},
        Tiny,
        r"fused_backward=True with sharded weights.*Set fused_backward=False, or use GaLoreDDPStrategy",
    ),
    "adafactor": (
        {},
        {},
        lambda: Tiny(lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2)),
        r"base=Adafactor cannot step weights that are sharded.*Use torch\.optim\.AdamW or SGD",
    ),
    "bitsandbytes": ({}, {}, lambda: Tiny(_of_bitsandbytes), r"base=AdamW8bit of bitsandbytes cannot step.*AdamW"),
    "torchao": ({}, {}, lambda: Tiny(_of_torchao), r"base=AdamW8bit of torchao cannot step.*AdamW"),
    "own parameter": ({}, {}, OneParameter, r"loose of shape \(4,\) is a parameter of the LightningModule itself"),
    "shared": ({}, {}, Shared, r"again\.weight is shared with head.*Put both into one module"),
    "not all sharded": ({}, {}, Forgetful, r"head\.weight, head\.bias: not sharded.*Call fully_shard on a module"),
    "mixed": ({}, {}, Partly, r"not all sharded alike \(body\.0\.weight: mesh.*body\.2\.weight: not sharded\)"),
    "tensor parallel": (
        {"data_parallel_size": 1},
        {},
        Tiny,
        r"tensor_parallel_size > 1 needs a plan.*override configure_model, or leave it 1",
    ),
    "clip by norm": (
        {"mode": "layerwise"},
        {"gradient_clip_val": 0.5},
        Tiny,
        r'mode="layerwise" has moved the weights',
    ),
    "clip by value": (
        {"mode": "project"},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        Tiny,
        r'mode="project" has only low-rank gradients',
    ),
}


def _of_bitsandbytes(model: LightningModule) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=1e-2)  # type: ignore[no-any-return]


def _of_torchao(model: LightningModule) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=1e-2)  # type: ignore[no-any-return]


def on_one(settings: dict[str, Any], model: LightningModule, **more: Any) -> dict[str, Any]:
    """A run on one device."""
    ours = {key: value for key, value in settings.items() if key not in ("check_replicas_every", *TENSOR_PARALLEL)}
    return fit(model, GaLoreStrategy(**{**SETTINGS, **ours}), **more)


class CliTiny(Tiny):
    """Brings its data, and weights that the default rank projects."""

    def __init__(self, width: int = 160) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 140), nn.Linear(140, 12))

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Rows(), batch_size=None)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
