# SPDX-License-Identifier: Apache-2.0
"""Tiny modules, data and loops that the Trainer-level tests share."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_galore import GaLoreOptimizer, GaLoreStrategy

RANK = 3
BATCHES = 6  # of one epoch
SETTINGS: dict[str, Any] = {"rank": RANK, "update_proj_gap": 4, "scale": 1.0}
PROJECTED = ("body.0.weight", "body.2.weight")  # (16, 8) on the right and (12, 16) on the left

Make = Callable[["Tiny"], Any]


def adamw(model: LightningModule, lr: float = 1e-2) -> torch.optim.AdamW:
    """AdamW with weight decay in a group of matrices and none in the other, as users write it."""
    decay = [param for param in model.parameters() if param.ndim > 1]
    rest = [param for param in model.parameters() if param.ndim <= 1]
    groups = [
        {"params": decay, "weight_decay": 0.1, "name": "decay"},
        {"params": rest, "weight_decay": 0.0, "name": "no_decay"},
    ]
    return torch.optim.AdamW(groups, lr=lr)


class Tiny(LightningModule):
    """Two weights that are projected, a norm, and a head that ``all-linear`` leaves out; it keeps a diary."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 12), nn.LayerNorm(12))
        self.head = nn.Linear(12, 4)
        self.make = make
        self.losses: list[float] = []
        self.lrs: list[list[float]] = []
        self.steps: list[int] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(self.trainer.global_step)
        self.lrs.append([group["lr"] for optimizer in self.trainer.optimizers for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        return self.make(self)


def batches(epochs: int = 1, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """The same batches as :func:`loader`, for plain loops."""
    return [[one.to(dtype) for one in batch] for _ in range(epochs) for batch in loader()]


def loader(count: int = BATCHES, batch_size: int = 8) -> DataLoader[Any]:
    """Batches in a fixed order, so that two runs see the same ones."""
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(count * batch_size, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, torch.sin(inputs[:, :4] * 2)), batch_size=batch_size)


def make_trainer(strategy: Strategy | str, **settings: Any) -> Trainer:
    """A silent Trainer on one CPU; nothing is written unless a test asks for it."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(strategy=strategy, **{**quiet, **settings})


def galore(**settings: Any) -> GaLoreStrategy:
    """The strategy under test with small settings."""
    return GaLoreStrategy(**{**SETTINGS, **settings})


def fit(model: LightningModule, strategy: Strategy | str | None = None, **settings: Any) -> Trainer:
    """Fit ``model`` and return its Trainer; by default under :func:`galore`."""
    seed_everything(1, verbose=False)
    ckpt_path: Path | None = settings.pop("ckpt_path", None)
    trainer = make_trainer(galore() if strategy is None else strategy, **settings)
    trainer.fit(model, loader(), loader(2), ckpt_path=ckpt_path)
    return trainer


def plain_loop(
    model: Tiny,
    *,
    data: Iterable[list[Tensor]],
    accumulate: int = 1,
    clip: Callable[[Iterable[nn.Parameter]], Any] | None = None,
    autocast: torch.dtype | None = None,
    **settings: Any,
) -> GaLoreOptimizer:
    """What the Trainer must equal: a loop that anyone would write over a ``GaLoreOptimizer``."""
    optimizer = GaLoreOptimizer(model.make(model), model, **{**SETTINGS, **settings})
    for i, batch in enumerate(data):
        with torch.autocast("cpu", autocast) if autocast else nullcontext():
            loss = model.loss(batch)
        (loss / accumulate).backward()
        if (i + 1) % BATCHES % accumulate == 0 or (i + 1) % BATCHES == 0:
            if clip is not None:
                clip(param for group in optimizer.param_groups for param in group["params"])
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def the_optimizer(trainer: Trainer) -> GaLoreOptimizer:
    """The only optimizer of a run."""
    (optimizer,) = trainer.optimizers
    assert isinstance(optimizer, GaLoreOptimizer)
    return optimizer


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same_weights(model: nn.Module, other: nn.Module | Mapping[str, Tensor]) -> None:
    """Bit for bit, and of the same dtype."""
    expected = snapshot(other) if isinstance(other, nn.Module) else other
    actual = snapshot(model)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), f"{name}: {(value - expected[name]).abs().max()}"


def assert_same_state(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
    """Every tensor and number of two optimizers' state and groups, with types."""
    assert_same_tree(first.state_dict(), second.state_dict())


def assert_same_tree(one: Any, two: Any, path: str = "") -> None:
    """Nested dicts and lists of tensors and numbers, bit for bit and type by type."""
    assert type(one) is type(two), path
    if isinstance(one, dict):
        assert one.keys() == two.keys(), path
        for key, value in one.items():
            assert_same_tree(value, two[key], f"{path}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), path
        for i, (value, other) in enumerate(zip(one, two, strict=True)):
            assert_same_tree(value, other, f"{path}/{i}")
    elif isinstance(one, Tensor):
        assert one.dtype == two.dtype, path
        assert torch.equal(one, two), path
    else:
        assert one == two, path


def assert_clean(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Groups list real parameters only, no state belongs to anything else, and nothing hangs on the model."""
    real = set(model.parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            assert real.issuperset(group["params"])
        assert real.issuperset(optimizer.state)
    for param in real:
        assert not param._backward_hooks
        assert not param._post_accumulate_grad_hooks
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks


@contextmanager
def expect_warning(match: str) -> Iterator[None]:
    """Demand a warning; unlike ``pytest.warns``, leave the filters for all others as they are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=match)
        yield
    assert any(re.match(match, str(warning.message)) for warning in caught), match


class DictLogger(DummyLogger):
    """Keeps what was logged in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        self.metrics.append((step or 0, dict(metrics)))
