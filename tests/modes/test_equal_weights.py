# SPDX-License-Identifier: Apache-2.0
"""Modes "project" and "layerwise" end with the weights of mode "step": bit for bit where the sums are the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint

from tests.strategies.modules import Make, Tiny, adamw
from tests.strategies.test_resume import Wide

from .common import BACKWARD_MODES, assert_equal_runs, run

FP32 = 2e-6  # clipping by a norm that was added up in another order; measured 6e-8

Run = tuple[Tiny, Trainer]


@pytest.fixture(params=BACKWARD_MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def scheduled(model: Tiny) -> Any:
    optimizer = adamw(model)
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def coupled(model: Tiny) -> Any:
    return torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=0.1)


def fused(model: Tiny) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def foreach(model: Tiny) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, foreach=True)


def amsgrad_maximize(model: Tiny) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, amsgrad=True, maximize=True)


def sgd(model: Tiny) -> Any:
    return torch.optim.SGD(model.parameters(), lr=3e-2, momentum=0.9, weight_decay=0.1)


def adafactor(model: Tiny) -> Any:
    return torch.optim.Adafactor(model.parameters(), lr=1e-2)


def adagrad(model: Tiny) -> Any:
    return torch.optim.Adagrad(model.parameters(), lr=1e-2, weight_decay=0.01)


def muon(model: Tiny) -> Any:
    matrices = [param for param in model.parameters() if param.ndim == 2]
    return torch.optim.Muon(matrices, lr=1e-2)


def adamw_8bit(model: Tiny) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.optim.AdamW8bit(model.parameters(), lr=1e-2, weight_decay=0.1, min_8bit_size=16)


def trainable(model: Tiny) -> Any:
    return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)


class Checkpointed(Tiny):
    """Recomputes its body in backward, without reentering autograd."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.body, inputs, use_reentrant=False)  # type: ignore[assignment]
        return self.head(hidden)  # type: ignore[no-any-return]


class Tied(Tiny):
    """Two layers with one weight, and a head tied to an embedding, which therefore is not projected."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.body = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        self.body[4].weight = self.body[2].weight
        self.embedding = nn.Embedding(4, 12)
        self.head.weight = self.embedding.weight

    def loss(self, batch: list[Tensor]) -> Tensor:
        return super().loss(batch) + self.embedding(torch.arange(4)).square().mean()


class Branches(Tiny):
    """Leaves a projected weight without a gradient in some batches, and a whole batch out in others."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == 4:
            return None
        loss = super().training_step(batch, batch_idx)
        return (
            nn.functional.mse_loss(self.head(self.body[3](batch[0].repeat(1, 2)[:, :12])), batch[1])
            if (batch_idx % 3 == 1)
            else loss
        )


class FrozenAtFirst(Tiny):
    """Its first layer is in the optimizer from the start, but frozen until the second epoch; no callback."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.body[0].requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.body[0].requires_grad_(self.current_epoch > 0)


class Unfreeze(BaseFinetuning):
    """Adds the first layer to the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.body[0])  # type: ignore[arg-type]

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body[0], optimizer, lr=5e-3)  # type: ignore[arg-type]


class TwoOptimizers(Tiny):
    """Manual optimization; the second loss reaches the first optimizer's weights too, which must not notice."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.critic = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12), nn.Linear(12, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()  # type: ignore[misc]
        self.losses.append(float(self.loss(batch).detach()))
        for optimizer, loss in ((first, self.loss), (second, self.criticism)):
            optimizer.zero_grad()
            with self.trainer.strategy.layerwise_updates(optimizer):  # type: ignore[attr-defined]
                self.manual_backward(loss(batch))
            optimizer.step()

    def criticism(self, batch: list[Tensor]) -> Tensor:
        return self.critic(self(batch[0])).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        own = [param for name, param in self.named_parameters() if not name.startswith("critic")]
        return [torch.optim.AdamW(own, lr=1e-2), sgd(self.critic)]  # type: ignore[arg-type]


def both(mode: str, *args: Any, **kwargs: Any) -> tuple[Run, Run]:
    return run(mode, *args, **kwargs), run("step", *args, **kwargs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [adamw, sgd], ids=lambda make: make.__name__)
def test_precisions(mode: str, make: Make, precision: Any) -> None:
    assert_equal_runs(*both(mode, make, precision=precision))


@pytest.mark.parametrize(
    "make", [coupled, fused, foreach, amsgrad_maximize, adafactor, adagrad], ids=lambda m: m.__name__
)
def test_optimizers_and_both_kinds_of_weight_decay(mode: str, make: Make) -> None:
    assert_equal_runs(*both(mode, make))


def test_muon(mode: str) -> None:
    assert_equal_runs(*both(mode, muon))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_8bit_optimizer(mode: str, precision: Any) -> None:
    assert_equal_runs(*both(mode, adamw_8bit, model=Wide, precision=precision))


@pytest.mark.parametrize("model", [Tied, Checkpointed, Branches, FrozenAtFirst, TwoOptimizers])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
def test_models(mode: str, model: type[Tiny]) -> None:
    assert_equal_runs(*both(mode, model=model))


def test_layers_that_a_callback_unfreezes(mode: str) -> None:
    ours, reference = both(mode, trainable, callbacks=lambda: [Unfreeze()])
    assert_equal_runs(ours, reference)
    late = ours[1].optimizers[0].state[ours[0].body[0].weight]
    assert late["galore_step"] == 18
    assert "galore_basis" in late


# 24 steps: refreshed in each, on the edge of epochs, inside them, once.
@pytest.mark.parametrize("gap", [1, 6, 7, 1000])
@pytest.mark.parametrize(
    "settings", [{}, {"proj_type": "full"}, {"proj_type": "reverse_std", "subspace": "svd"}], ids=str
)
def test_gaps_and_sides(mode: str, gap: int, settings: dict[str, Any]) -> None:
    ours, reference = both(mode, settings={"update_proj_gap": gap, **settings})
    assert_equal_runs(ours, reference)
    (optimizer,) = ours[1].optimizers
    assert optimizer.state[ours[0].body[0].weight]["galore_refreshes"] == -(-24 // gap)


def test_dense_lr_factor(mode: str) -> None:
    assert_equal_runs(*both(mode, settings={"dense_lr_factor": 0.25}))


@pytest.mark.parametrize(
    "end", [{"max_steps": 21, "max_epochs": -1}, {"max_epochs": 5, "limit_train_batches": 5}], ids=str
)
def test_scheduler_per_step_and_the_end_of_a_run(mode: str, end: dict[str, Any]) -> None:
    assert_equal_runs(*both(mode, scheduled, **end))


def test_clip_by_value(mode: str) -> None:
    if mode == "project":
        with pytest.raises(MisconfigurationException, match="by value"):
            run(mode, sgd, gradient_clip_val=0.01, gradient_clip_algorithm="value")
        return
    clipped, reference = both(mode, sgd, gradient_clip_val=0.01, gradient_clip_algorithm="value")
    assert_equal_runs(clipped, reference)
    free = run(mode, sgd)
    assert not torch.equal(free[0].body[0].weight, clipped[0].body[0].weight)


@pytest.mark.parametrize(("precision", "tolerance"), [("32-true", FP32), ("bf16-mixed", FP32), ("bf16-true", 3e-2)])
@pytest.mark.parametrize("limit", [0.05, 100.0])
def test_clip_by_the_true_norm(limit: float, precision: Any, tolerance: float) -> None:
    """In bf16 mode "step" has the norms of torch, which rounds them to bf16; ours are of fp32."""
    clipped, reference = both("project", sgd, gradient_clip_val=limit, precision=precision)
    assert_equal_runs(clipped, reference, tolerance=tolerance)
    free = run("project", sgd, precision=precision)
    assert torch.equal(free[0].body[0].weight, clipped[0].body[0].weight) == (limit == 100.0)


def test_clip_weight_norm_and_clip_by_value_together() -> None:
    settings: dict[str, Any] = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}
    assert_equal_runs(*both("layerwise", sgd, settings={"clip_weight_norm": 0.05}, **settings))
