# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, and train the same weights as the strategy does."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from examples import fabric, plain_loop
from lightning_galore import GaLoreOptimizer, GaLoreStrategy

FOLDER = Path(__file__).parents[2] / "examples"
needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="Transformers' Trainer needs accelerate")


def distance(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of two models' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return plain_loop.train()


class InTrainer(LightningModule):
    """The same model, data and optimizer for Lightning's Trainer."""

    def __init__(self) -> None:
        super().__init__()
        for name, child in plain_loop.make_model().named_children():
            self.add_module(name, child)  # under the same names, from which each weight's random numbers come

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return plain_loop.loss_of(nn.Sequential(*self.children()), batch)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=plain_loop.STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.py"))])
@pytest.mark.filterwarnings("ignore")
def test_the_script_runs_and_resumes_bit_by_bit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "transformers_trainer":
        pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert "the resumed run has the same weights, bit by bit: True" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_the_plain_loop_is_the_strategy(plain: nn.Module, tmp_path: Path) -> None:
    module = InTrainer()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        strategy=GaLoreStrategy(rank=8, update_proj_gap=5, scale=1.0),
        accumulate_grad_batches=plain_loop.ACCUMULATE,
        gradient_clip_val=1.0,
        default_root_dir=tmp_path,
        **quiet,  # type: ignore[arg-type]
    )
    trainer.fit(module, torch.utils.data.DataLoader(plain_loop.make_batches(), batch_size=None))  # type: ignore[arg-type]
    assert trainer.global_step == plain_loop.STEPS
    assert distance(module, plain) == 0.0
    assert distance(module, plain_loop.make_model()) > 0.05  # they did move


@pytest.mark.parametrize("mode", ["step", "project"])
def test_fabric_is_the_plain_loop(mode: str, plain: nn.Module) -> None:
    # Accumulated low-rank gradients are clipped by the norm of what is kept of them: close, not equal.
    tolerance = 0.0 if mode == "step" else 0.02
    assert distance(fabric.train(mode=mode), plain) <= tolerance
    assert distance(fabric.train(mode=mode), plain_loop.train(mode=mode)) == 0.0


@pytest.mark.parametrize(
    ("precision", "tolerance", "mode"),
    [("64-true", 1e-4, "project"), ("bf16-mixed", 0.03, "step"), ("bf16-true", 0.03, "project")],
)
def test_fabric_in_other_precisions(precision: Any, tolerance: float, mode: str, tmp_path: Path) -> None:
    whole = fabric.train(precision=precision, mode=mode)
    assert distance(whole, plain_loop.train(mode=mode)) < tolerance
    fabric.train(precision=precision, mode=mode, stop_at=fabric.STEPS // 2, save=tmp_path / "half.ckpt")
    assert distance(whole, fabric.train(precision=precision, mode=mode, resume=tmp_path / "half.ckpt")) == 0.0


def test_fabrics_optimizer_is_the_one_that_was_wrapped() -> None:
    """Groups that come later, the subspaces' state and `isinstance` pass through Fabric's wrapper."""
    one = fabric.Fabric(accelerator="cpu", devices=1)
    model = plain_loop.make_model()
    base = torch.optim.AdamW(model[:4].parameters(), lr=1e-2)
    _, optimizer = one.setup(model, GaLoreOptimizer(base, model, rank=8))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert isinstance(optimizer, GaLoreOptimizer)
    optimizer.add_param_group({"params": list(model[4].parameters())})
    assert {target.name for target in optimizer.targets.values()} == {"0.weight", "2.weight", "4.weight"}
    assert "4.weight" in str(optimizer.targets_table())
    plain_loop.loss_of(model, plain_loop.make_batches()[0]).backward()
    optimizer.step()
    assert optimizer.state[model[4].weight]["exp_avg"].shape == (8, 64)
    optimizer.zero_grad()
    assert model[4].weight.grad is None


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
class TestTransformers:
    """Under the Trainer of Transformers."""

    def test_it_is_the_plain_loop(self, tmp_path: Path) -> None:
        from examples import transformers_trainer as example

        theirs = example.train(tmp_path, train_sampling_strategy="sequential")
        model = example.make_model()
        base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
        optimizer = GaLoreOptimizer(base, model, rank=8, update_proj_gap=5, scale=1.0)
        schedule = example.get_cosine_schedule_with_warmup(optimizer, 2, example.STEPS)
        rows = example.Sentences()
        for step in range(example.STEPS):
            for part in range(example.ACCUMULATE):
                first = (step * example.ACCUMULATE + part) * example.BATCH
                tokens = torch.stack([rows[i]["input_ids"] for i in range(first, first + example.BATCH)])
                (model(input_ids=tokens, labels=tokens).loss / example.ACCUMULATE).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert distance(theirs, model) < 1e-5
        assert distance(theirs, example.make_model()) > 0.05

    @pytest.mark.slow
    def test_bf16_trains_and_resumes_bit_by_bit(self, tmp_path: Path) -> None:
        from examples import transformers_trainer as example

        whole = example.train(tmp_path, bf16=True)
        assert 0 < distance(whole, example.train(tmp_path / "fp32")) < 0.1
        assert distance(whole, example.train(tmp_path, bf16=True, resume=True)) == 0.0

    def test_project_mode_without_clipping(self, tmp_path: Path) -> None:
        """Their clipping sees the gradients that exist, which in this mode are not those of projected weights."""
        from examples import transformers_trainer as example

        settings: dict[str, Any] = {"max_grad_norm": 0.0, "accumulate": 1, "train_sampling_strategy": "sequential"}
        whole = example.train(tmp_path, mode="project", **settings)
        assert distance(whole, example.train(tmp_path / "step", **settings)) < 1e-5
        assert distance(whole, example.train(tmp_path, mode="project", resume=True, **settings)) == 0.0

    def test_their_checkpoint_holds_tensors_and_numbers_only(self, tmp_path: Path) -> None:
        from examples import transformers_trainer as example

        example.train(tmp_path)
        state = torch.load(tmp_path / f"checkpoint-{example.STEPS}" / "optimizer.pt", weights_only=True)
        assert any("galore_basis" in one for one in state["state"].values()), next(iter(state["state"].values())).keys()
