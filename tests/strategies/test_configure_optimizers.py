# SPDX-License-Identifier: Apache-2.0
"""Every legal return value of ``configure_optimizers``: rates, names and counts are those of the unwrapped run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.optim import SGD, AdamW, lr_scheduler

from lightning_galore import GaLoreOptimizer

from .modules import (
    PROJECTED,
    RANK,
    DictLogger,
    Make,
    Tiny,
    adamw,
    expect_warning,
    fit,
    galore,
    loader,
    make_trainer,
    snapshot,
    the_optimizer,
)


def single(model: Tiny) -> Any:
    return adamw(model)


def as_list(model: Tiny) -> Any:
    return [adamw(model)]


def tuple_of_lists(model: Tiny) -> Any:
    optimizer = adamw(model)
    return [optimizer], [lr_scheduler.ExponentialLR(optimizer, 0.5)]


def tuple_of_dicts(model: Tiny) -> Any:
    optimizer = adamw(model)
    return [optimizer], [{"scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]


def dict_with_scheduler(model: Tiny) -> Any:
    optimizer = adamw(model)
    return {"optimizer": optimizer, "lr_scheduler": lr_scheduler.StepLR(optimizer, 1, 0.5)}


def dict_with_step_interval(model: Tiny) -> Any:
    optimizer = adamw(model)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2, "name": "mine"},
    }


def sequential(model: Tiny) -> Any:
    optimizer = adamw(model)
    parts: list[lr_scheduler.LRScheduler] = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
        lr_scheduler.ExponentialLR(optimizer, 0.8),
    ]
    scheduler = lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def on_plateau(model: Tiny) -> Any:
    optimizer = adamw(model)
    # No loss is ever good enough, so the rate falls in every epoch, whatever the optimizer does.
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9, threshold_mode="abs")
    return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "loss"}


def one_cycle(model: Tiny) -> Any:
    optimizer = adamw(model)
    steps = int(model.trainer.estimated_stepping_batches)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


FORMS: list[Make] = [
    single,
    as_list,
    tuple_of_lists,
    tuple_of_dicts,
    dict_with_scheduler,
    dict_with_step_interval,
    sequential,
    on_plateau,
    one_cycle,
]
SCHEDULED = FORMS[2:]


@dataclass
class Diary:
    """What must not change when the strategy is GaLore's."""

    lrs: list[list[float]]
    steps: list[int]
    names: list[str]
    logged: list[tuple[int, dict[str, float]]]
    betas: list[Any]


def diary(make: Make, strategy: Strategy | str) -> tuple[Diary, Trainer, Tiny]:
    model, logger = Tiny(make), DictLogger()
    callbacks = [LearningRateMonitor(log_momentum=True)] if make in SCHEDULED else []
    trainer = fit(model, strategy, max_epochs=3, logger=logger, log_every_n_steps=1, callbacks=callbacks)
    names = sorted(callbacks[0].lrs) if callbacks else []
    logged = [(step, {k: v for k, v in row.items() if k.startswith("lr-")}) for step, row in logger.metrics]
    betas = [group["betas"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return Diary(model.lrs, model.steps, names, logged, betas), trainer, model


@pytest.mark.parametrize("make", FORMS, ids=lambda make: make.__name__)
def test_each_form_gives_the_lr_trace_and_counts_of_the_unwrapped_run(make: Make) -> None:
    plain, _, _ = diary(make, "auto")
    mine, trainer, model = diary(make, galore())
    assert mine == plain
    assert len(mine.steps) == 18
    if make in SCHEDULED:
        assert len({tuple(lrs) for lrs in mine.lrs}) > 1
        assert mine.names
        assert not any("GaLore" in name for name in mine.names)
    assert_low_rank_state(the_optimizer(trainer), model)


def assert_low_rank_state(optimizer: GaLoreOptimizer, model: Tiny) -> None:
    params = dict(model.named_parameters())
    shapes = {name: (16, RANK) if name == PROJECTED[0] else (RANK, 16) for name in PROJECTED}
    for name, param in params.items():
        state = optimizer.state[param]
        assert tuple(state["exp_avg"].shape) == shapes.get(name, tuple(param.shape)), name
        assert ("galore_basis" in state) == (name in PROJECTED)


def test_none_trains_nothing_and_passes_through() -> None:
    model = Tiny(lambda model: None)
    before = snapshot(model)
    with expect_warning(".*returned `None`, this fit will run with no optimizer"):
        trainer = fit(model)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    assert not any(isinstance(optimizer, GaLoreOptimizer) for optimizer in trainer.optimizers)
    assert trainer.strategy.targets_tables() == []


def test_one_step_moves_projected_weights_within_the_rank_and_the_others_in_full() -> None:
    model = Tiny(lambda model: SGD(model.parameters(), lr=1.0))
    before = snapshot(model)
    fit(model, max_steps=1)
    moved = {name: param.detach() - before[name] for name, param in model.named_parameters()}
    for name, change in moved.items():
        assert change.abs().max() > 0, name
    assert [int(torch.linalg.matrix_rank(moved[name], rtol=1e-4)) for name in PROJECTED] == [RANK, RANK]
    assert int(torch.linalg.matrix_rank(moved["head.weight"], rtol=1e-4)) == 4


def test_full_rank_projection_with_sgd_momentum_is_plain_sgd_momentum() -> None:
    def full(model: Tiny) -> SGD:
        # A rank in the group names these weights themselves, so the full rank is honoured there.
        weights = [model.get_parameter(name) for name in PROJECTED]
        matrices = [{"params": [weight], "rank": min(weight.shape)} for weight in weights]
        rest = [param for name, param in model.named_parameters() if name not in PROJECTED]
        return SGD([*matrices, {"params": rest, "rank": None}], lr=0.05, momentum=0.9)

    wrapped, plain = Tiny(full), Tiny(full)
    # The gap is longer than the run: moments of one basis mean nothing in the next.
    trainer = fit(wrapped, galore(subspace="svd", update_proj_gap=100), precision="64-true")
    fit(plain, "auto", precision="64-true")
    assert len(the_optimizer(trainer).targets) == 2
    for name, param in wrapped.named_parameters():
        torch.testing.assert_close(param, plain.get_parameter(name), rtol=0, atol=1e-12)


def test_schedulers_hold_the_users_optimizer_and_the_wrapper_shows_its_groups() -> None:
    made: list[AdamW] = []

    def make(model: Tiny) -> Any:
        made.append(adamw(model))
        return [made[0]], [lr_scheduler.ExponentialLR(made[0], 0.5)]

    trainer = fit(Tiny(make))
    optimizer = the_optimizer(trainer)
    assert optimizer.base is made[0]
    assert isinstance(optimizer, AdamW)
    assert trainer.lr_scheduler_configs[0].scheduler.optimizer is made[0]
    assert optimizer.param_groups is made[0].param_groups
    assert made[0].param_groups[0]["lr"] == 5e-3


def test_an_optimizer_that_is_already_wrapped_is_taken_as_it_is() -> None:
    trainer = fit(Tiny(lambda model: GaLoreOptimizer(adamw(model), model, rank=2)))
    optimizer = the_optimizer(trainer)
    assert not isinstance(optimizer.base, GaLoreOptimizer)
    assert {target.projection.rank for target in optimizer.targets.values()} == {2}


class Several(Tiny):
    """Manual optimization with three optimizers, of which the last has no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        vectors = nn.ParameterList(param for param in self.parameters() if param.ndim == 1)
        optimizers = [
            AdamW([self.body[0].weight], lr=1e-2),
            SGD([self.body[2].weight, self.head.weight], lr=1e-2, momentum=0.9),
            AdamW(vectors, lr=1e-3),
        ]
        return optimizers, [lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers[:2]]


def test_several_optimizers_of_which_one_has_no_matrix() -> None:
    model, plain = Several(), Several()
    before = snapshot(model)
    with expect_warning("One of the optimizers has no weight to project and stays as it is"):
        trainer = fit(model)
    other = fit(plain, "auto")
    assert (model.steps, model.lrs) == (plain.steps, plain.lrs)
    assert trainer.global_step == other.global_step == 18
    wrapped = [isinstance(optimizer, GaLoreOptimizer) for optimizer in trainer.optimizers]
    assert wrapped == [True, True, False]
    assert trainer.optimizers[0].state[model.body[0].weight]["exp_avg"].shape == (16, RANK)
    assert trainer.optimizers[1].state[model.body[2].weight]["momentum_buffer"].shape == (RANK, 16)
    assert [len(table.taken) for table in trainer.strategy.targets_tables()] == [1, 1]
    assert not any(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_scheduler_of_a_foreign_optimizer_is_refused_as_lightning_refuses_it() -> None:
    def make(model: Tiny) -> Any:
        return [adamw(model)], [lr_scheduler.ExponentialLR(adamw(model), 0.5)]

    with pytest.raises(Exception, match="Some schedulers are attached with an optimizer that wasn't returned"):
        make_trainer(galore()).fit(Tiny(make), loader(), loader())
