# SPDX-License-Identifier: Apache-2.0
"""Runs under the Trainer, alike for two processes and for one that sees the data of both."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_galore import GaLoreStrategy
from tests.modes.test_manual import Plain
from tests.modes.test_several_optimizers import DeclaredGan, SmallJudge
from tests.strategies.modules import SETTINGS, Make, Tiny, adamw

from .cases import dense
from .processes import WORLD

BATCHES, EPOCHS, ROWS = 8, 2, 6
MODES = ("step", "project", "layerwise")
CLIP = 0.05


class Rows(Dataset[list[Tensor]]):
    """Batches that depend on nothing but their index and the process; without several processes, those of all.

    Args:
        one_by_one: Let one process take the batches of all in turn, instead of together.
    """

    def __init__(self, *, one_by_one: bool = False) -> None:
        self.one_by_one = one_by_one
        self.several = int(os.environ.get("WORLD_SIZE", "1")) > 1

    def __len__(self) -> int:
        return BATCHES * (WORLD if self.one_by_one else 1)

    def __getitem__(self, index: int) -> list[Tensor]:
        ranks: Sequence[int] = range(WORLD)
        if self.several:
            ranks = [int(os.environ["RANK"])]
        elif self.one_by_one:
            index, rank = divmod(index, WORLD)
            ranks = [rank]
        inputs = torch.cat([self.inputs(index, rank) for rank in ranks])
        return [inputs, torch.sin(inputs[:, :4] * 2)]

    @staticmethod
    def inputs(index: int, rank: int) -> Tensor:
        return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(100 * index + rank))


class Normed(Tiny):
    """With batch statistics, which each process gathers from its own data.

    No bias before them: its gradient would be zero but for rounding errors, which Adam makes steps of.
    """

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.body = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 12), nn.LayerNorm(12))


class Dropped(Tiny):
    """With dropout, of other numbers on each process."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 12), nn.LayerNorm(12))

    @override
    def setup(self, stage: str) -> None:
        torch.manual_seed(100 + self.global_rank)


class Wide(Tiny):
    """With a weight that the default rank projects."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.body = nn.Sequential(nn.Linear(8, 160), nn.Tanh(), nn.Linear(160, 140), nn.Linear(140, 12))


class Scheduled(Tiny):
    """With a learning rate that falls at every step."""

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.make(self)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class CountingIO(TorchCheckpointIO):
    """Counts the checkpoints that this process writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.writes += 1
        super().save_checkpoint(*args, **kwargs)


@dataclass(frozen=True)
class Case:
    """One fit.

    Args:
        mode: Where gradients are projected.
        settings: Of the strategy, on top of small ones.
        trainer: Of the Trainer.
        model: What is trained.
        tolerance: Largest difference to one process; None where that is another computation.
        one_by_one: Whether one process must take the batches in turn, as micro-batches of a step.
    """

    mode: str
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    model: Callable[[], LightningModule] = Tiny
    tolerance: float | None = 2e-6
    one_by_one: bool = False


def _cases() -> dict[str, Case]:
    cases = {}
    for mode in MODES:
        cases[f"{mode}-automatic"] = Case(mode, model=Scheduled)
        cases[f"{mode}-manual"] = Case(mode, model=Plain)
        cases[f"{mode}-accumulation"] = Case(mode, trainer={"accumulate_grad_batches": 2})
        cases[f"{mode}-bf16"] = Case(mode, trainer={"precision": "bf16-mixed"}, tolerance=0.05)
        validated = {"limit_val_batches": 1, "num_sanity_val_steps": 0}
        cases[f"{mode}-normed"] = Case(mode, trainer=validated, model=Normed, tolerance=None)
        cases[f"{mode}-checked"] = Case(mode, {"check_replicas_every": 1}, model=Normed, tolerance=None)
    cases["step-clipped"] = Case("step", trainer={"gradient_clip_val": CLIP})
    cases["project-clipped"] = Case("project", trainer={"gradient_clip_val": CLIP}, one_by_one=True)
    cases["project-int8"] = Case("project", {"weight_storage": "int8", "check_replicas_every": 1}, tolerance=0.02)
    cases["layerwise-gan"] = Case("layerwise", model=DeclaredGan)
    cases["project-gan"] = Case("project", model=DeclaredGan)
    cases["step-bucket-view"] = Case("step", {"gradient_as_bucket_view": True})
    return cases


CASES = _cases()
#: Refused at setup: strategy settings, Trainer settings, module.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[], LightningModule]]] = {
    "int8 in mode step": ({"mode": "step", "weight_storage": "int8"}, {}, Tiny),
    "bucket view": ({"mode": "project", "gradient_as_bucket_view": True}, {}, Tiny),
    "static graph": ({"mode": "layerwise", "static_graph": True, "bucket_cap_mb": 5}, {}, Tiny),
    "comm hook": ({"mode": "project", "ddp_comm_hook": print}, {}, Tiny),
    "model averaging": ({"mode": "project", "model_averaging_period": 2}, {}, Tiny),
    "clip by value": (
        {"mode": "layerwise"},
        {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
        Tiny,
    ),
    "clip by norm": ({"mode": "layerwise"}, {"gradient_clip_val": 0.5}, Tiny),
    "nothing to project": ({"mode": "project"}, {}, SmallJudge),
}


def make_trainer(strategy: Any, **settings: Any) -> Trainer:
    """A silent Trainer on as many processes as there are."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": int(os.environ.get("WORLD_SIZE", "1")),
        "max_epochs": EPOCHS,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    return Trainer(strategy=strategy, **{**quiet, **settings})


def fit(
    model: LightningModule, strategy: Any, *, ckpt_path: Path | None = None, one_by_one: bool = False, **settings: Any
) -> dict[str, Any]:
    """Fit, and tell what came of it."""
    seed_everything(1, verbose=False)
    trainer = make_trainer(strategy, **settings)
    data = DataLoader(Rows(one_by_one=one_by_one), batch_size=None)
    trainer.fit(model, data, data, ckpt_path=None if ckpt_path is None else str(ckpt_path))
    return {
        "weights": {name: dense(value).clone() for name, value in model.named_parameters()},
        "buffers": {name: value.clone() for name, value in model.named_buffers()},
        "steps": trainer.global_step,
        "lrs": getattr(model, "lrs", None),
        "strategy": [cls.__name__ for cls in type(trainer.strategy).__mro__],
        "world": trainer.world_size,
    }


def checkpoints(folder: Path) -> list[Callback]:
    """Writes one file an epoch."""
    return [ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, every_n_epochs=1)]


def run_alone(case: Case, **settings: Any) -> dict[str, Any]:
    """A case in one process."""
    ours = {name: value for name, value in case.settings.items() if name not in ("check_replicas_every", *DDP_ONLY)}
    more = {**case.trainer, **settings}
    if case.one_by_one:
        more["accumulate_grad_batches"] = WORLD
    strategy = GaLoreStrategy(**{**SETTINGS, **ours}, mode=case.mode)  # type: ignore[arg-type]
    return fit(case.model(), strategy, one_by_one=case.one_by_one, **more)


DDP_ONLY = ("gradient_as_bucket_view",)
