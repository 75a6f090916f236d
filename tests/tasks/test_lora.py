# SPDX-License-Identifier: Apache-2.0
"""The recipe that trains LoRA's factors with GaLore."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_galore.cli import GaLoreCLI
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.tasks import GlueModule
from tests.tasks.tiny import build_tiny_model, write_pairs

RECIPE = Path(__file__).parents[2] / "recipes" / "lora.yaml"
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
def test_recipe_trains_the_factors_and_the_head(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    local = [f"--model.model={build_tiny_model(tmp_path)}", f"--data.data_dir={write_pairs(tmp_path, 'mrpc', rows=16)}"]
    size = ["--data.max_length=16", "--data.batch_size=8", "--model.lora_rank=12", f"--trainer.strategy.mode={mode}"]
    cli = GaLoreCLI(args=["-c", str(RECIPE), *local, *size, *QUIET, "--trainer.fast_dev_run=2"], run=False)
    cli.model.configure_model()
    start = {name: param.detach().clone() for name, param in cli.model.named_parameters()}
    cli.trainer.fit(cli.model, cli.datamodule)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, GaLoreOptimizer)
    taken = {target.name for target in optimizer.targets.values()}
    assert len(taken) == 24  # two factors of six weights in each of two layers
    assert all(".lora_A." in name or ".lora_B." in name for name in taken)
    assert {target.projection.rank for target in optimizer.targets.values()} == {8}
    moved = {name for name, param in cli.model.named_parameters() if not torch.equal(param, start[name])}
    assert taken <= moved
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in moved)


def test_without_peft_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    module = GlueModule(task="mrpc", model=build_tiny_model(tmp_path), lora_rank=4)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-galore\[lora\]"'):
        module.configure_model()


def test_recipe_starts_with_its_command() -> None:
    assert "-c recipes/lora.yaml" in RECIPE.read_text()
