# SPDX-License-Identifier: Apache-2.0
"""A run that is resumed equals the run that was not stopped, bit by bit; what does not fit is refused with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.optim import lr_scheduler

from .modules import (
    BATCHES,
    RANK,
    Make,
    Tiny,
    adamw,
    assert_same_state,
    assert_same_weights,
    fit,
    galore,
    the_optimizer,
)

NAME = "{epoch}"
FIRST, LAST = "epoch=0.ckpt", "epoch=1.ckpt"


def scheduled(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 2 * BATCHES)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def with_adamw(model: Tiny) -> Any:
    return scheduled(adamw(model))


def with_amsgrad(model: Tiny) -> Any:
    return scheduled(torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True, foreach=True))


def with_sgd(model: Tiny) -> Any:
    return scheduled(torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1))


def with_adafactor(model: Tiny) -> Any:
    return scheduled(torch.optim.Adafactor(model.parameters(), lr=1e-2))


def with_8bit(model: Tiny) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    return scheduled(bnb.optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=16))


class Wide(Tiny):
    """Wide enough for several quantisation blocks in the low-rank state."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.body = nn.Sequential(nn.Linear(8, 256), nn.Tanh(), nn.Linear(256, 12), nn.LayerNorm(12))


def run(
    model: Tiny, folder: Path, *, strategy: Strategy | str, precision: Any = "32-true", resume: Path | None = None
) -> Trainer:
    saver = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename=NAME)
    return fit(
        model,
        strategy,
        max_epochs=2,
        precision=precision,
        callbacks=[saver],
        enable_checkpointing=True,
        ckpt_path=resume,
        # Other settings would be another run: Lightning warns when the folder of a checkpoint moves.
    )


def assert_resume_is_exact(
    make: Make, folder: Path, *, precision: str = "32-true", model: type[Tiny] = Tiny, **settings: Any
) -> None:
    straight, resumed = model(make), model(make)
    for param in resumed.parameters():
        nn.init.zeros_(param)
    whole = run(straight, folder, strategy=galore(**settings), precision=precision)
    rest = run(resumed, folder, strategy=galore(**settings), precision=precision, resume=folder / FIRST)
    assert rest.global_step == whole.global_step == 2 * BATCHES
    assert resumed.losses == straight.losses[BATCHES:]
    assert resumed.lrs == straight.lrs[BATCHES:]
    assert_same_weights(resumed, straight)
    assert_same_state(the_optimizer(rest), the_optimizer(whole))
    state = the_optimizer(rest).state[resumed.body[0].weight]
    assert type(state["galore_step"]) is int
    assert state["galore_step"] == 2 * BATCHES
    assert state["galore_refreshes"] == -(-2 * BATCHES // the_optimizer(rest).config.update_proj_gap)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [with_adamw, with_amsgrad, with_sgd, with_adafactor], ids=lambda make: make.__name__)
def test_resume_is_exact(make: Make, precision: str, tmp_path: Path) -> None:
    assert_resume_is_exact(make, tmp_path, precision=precision)


@pytest.mark.parametrize("storage", ["param", "fp32"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resume_is_exact_with_8bit_states(precision: str, storage: str, tmp_path: Path) -> None:
    assert_resume_is_exact(with_8bit, tmp_path, precision=precision, model=Wide, basis_storage=storage)
    state = torch.load(tmp_path / LAST, weights_only=True)["optimizer_states"][0]["state"][0]
    # bitsandbytes tucks its own tensors away in a dictionary, from which it restores them by itself.
    codes = state["__bnb_optimizer_quant_state__"]["state1"]
    assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, (256, RANK))
    stored = torch.float32 if storage == "fp32" or precision == "32-true" else torch.bfloat16
    assert state["galore_basis"].dtype == stored


# Refreshes at 0, 4, 8 lie around the resume at 6; with gap 6 one falls on it; with 5 and 7 it is early and late.
@pytest.mark.parametrize("gap", [1, 5, 6, 7])
@pytest.mark.parametrize("subspace", ["randomized", "svd", "gaussian", "random_orthonormal"])
def test_resume_is_exact_for_each_subspace_and_gap(subspace: str, gap: int, tmp_path: Path) -> None:
    assert_resume_is_exact(with_adamw, tmp_path, subspace=subspace, update_proj_gap=gap)


@pytest.mark.parametrize("proj_type", ["reverse_std", "left", "right", "full"])
def test_resume_is_exact_for_each_side(proj_type: str, tmp_path: Path) -> None:
    assert_resume_is_exact(with_adamw, tmp_path, proj_type=proj_type)


@pytest.mark.parametrize("storage", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_resume_keeps_the_dtype_of_the_basis(storage: str, precision: str, tmp_path: Path) -> None:
    # No refresh after the resume, which would write the basis anew.
    settings = {"basis_storage": storage, "update_proj_gap": 100}
    assert_resume_is_exact(with_adamw, tmp_path, precision=precision, **settings)
    state = torch.load(tmp_path / LAST, weights_only=True)["optimizer_states"][0]["state"]
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[storage]
    assert state[0]["galore_basis"].dtype == wanted


def test_resume_with_accumulation_and_clipping_is_exact(tmp_path: Path) -> None:
    models = Tiny(with_adamw), Tiny(with_adamw)
    trainers = []
    for model, resume in zip(models, (None, tmp_path / FIRST), strict=True):
        saver = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename=NAME)
        settings: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "callbacks": [saver]}
        trainers.append(fit(model, max_epochs=2, enable_checkpointing=True, ckpt_path=resume, **settings))
    assert_same_weights(*models)
    assert_same_state(*map(the_optimizer, trainers))


def test_a_checkpoint_holds_tensors_and_numbers_only(tmp_path: Path) -> None:
    run(Tiny(with_adamw), tmp_path, strategy=galore())
    saved = torch.load(tmp_path / FIRST, weights_only=True)
    (state,) = saved["optimizer_states"]
    first = state["state"][0]
    assert {type(value) for value in first.values()} == {Tensor, int, float, tuple}
    assert all(type(number) is float for number in first["galore_cosines"])
    assert first["galore_basis"].untyped_storage().nbytes() == 8 * RANK * 4
    # Hyper-parameters of the strategy are not smuggled into the groups.
    assert not any(key.startswith("galore") or key == "rank" for group in state["param_groups"] for key in group)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of a GaLore run and one of a full-rank run."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("galore", "full")}
    run(Tiny(with_adamw), folders["galore"], strategy=galore())
    run(Tiny(with_adamw), folders["full"], strategy="auto")
    return {kind: folder / FIRST for kind, folder in folders.items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2}, r"rank=3.*this run has rank=2.*Set rank=3"),
        ({"rank": 5}, r"rank=3.*this run has rank=5.*Set rank=3"),
        ({"proj_type": "reverse_std"}, r"body\.0\.weight has rank=3, side=right.*side=left.*proj_type"),
        ({"proj_type": "full"}, r"side=right.*side=full"),
        ({"ignore_modules": ["body.2"]}, r"was projected with rank 3 in the checkpoint and is not now"),
        ({"target_modules": [r"body", "head"]}, r"no subspace for head\.weight: its optimizer state is full-rank"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    settings: dict[str, Any], message: str, checkpoints: dict[str, Path]
) -> None:
    model = Tiny(with_adamw)
    path = checkpoints["galore"]
    with pytest.raises(ValueError, match=message):
        run(model, path.parent, strategy=galore(**settings), resume=path)


def test_a_checkpoint_of_a_full_rank_run_is_refused(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["full"]
    with pytest.raises(ValueError, match=r"no subspace for body\.0\.weight.*full-rank.*load_from_checkpoint"):
        run(Tiny(with_adamw), path.parent, strategy=galore(), resume=path)


def test_a_galore_checkpoint_does_not_resume_silently_without_galore(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["galore"]
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(Tiny(with_adamw), path.parent, strategy="auto", resume=path)


@pytest.mark.parametrize("settings", [{"update_proj_gap": 2}, {"scale": 0.5}, {"subspace": "svd"}, {"seed": 4}])
def test_settings_that_do_not_shape_the_state_may_change(
    settings: dict[str, Any], checkpoints: dict[str, Path]
) -> None:
    path = checkpoints["galore"]
    trainer = run(Tiny(with_adamw), path.parent, strategy=galore(**settings), resume=path)
    assert trainer.global_step == 2 * BATCHES


@pytest.mark.parametrize("kind", ["galore", "full"])
def test_weights_of_any_run_may_be_loaded(kind: str, checkpoints: dict[str, Path]) -> None:
    saved = torch.load(checkpoints[kind], weights_only=True)["state_dict"]
    model = Tiny(with_adamw)
    model.load_state_dict(saved)
    assert fit(model, galore(rank=2)).global_step == BATCHES
