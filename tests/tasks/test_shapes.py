# SPDX-License-Identifier: Apache-2.0
"""The recipe of convolutions: Tucker bases, matrices and full rank are one flag apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_galore.cli import GaLoreCLI
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.tasks.shapes import SHAPES, draw

RECIPE = Path(__file__).parents[2] / "recipes" / "conv.yaml"
QUIET = [
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


def run(*arguments: str) -> GaLoreCLI:
    cli = GaLoreCLI(args=["-c", str(RECIPE), *QUIET, "--model.channels=8", *arguments], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli


@pytest.mark.parametrize("method", ["tensor-galore", "null"])
@pytest.mark.parametrize("mode", ["step", "layerwise"])
def test_recipe_trains_one_step(method: str, mode: str) -> None:
    given = [f"--trainer.strategy.method={method}", f"--trainer.strategy.mode={mode}", "--trainer.strategy.rank=4"]
    cli = run("--trainer.fast_dev_run=true", *given)
    optimizer = cli.trainer.optimizers[0]
    assert isinstance(optimizer, GaLoreOptimizer)
    taken = {target.name: param.ndim for param, target in optimizer.targets.items()}
    assert taken == {"net.0.weight": 4, "net.4.weight": 4, "net.8.weight": 4}
    assert "val/accuracy" in cli.trainer.callback_metrics


def test_full_rank_is_one_flag() -> None:
    assert (
        type(run("--trainer.fast_dev_run=true", "--trainer.strategy=auto").trainer.optimizers[0]) is torch.optim.AdamW
    )


def test_pictures_show_each_shape() -> None:
    pictures, kinds = draw(400, noise=0.0, seed=3)
    again = draw(400, noise=0.0, seed=3)
    assert torch.equal(pictures, again[0])
    assert set(kinds.tolist()) == set(range(len(SHAPES)))
    assert set(pictures.unique().tolist()) == {0.0, 1.0}
    ink = torch.stack([pictures[kinds == kind].mean() for kind in range(len(SHAPES))])
    assert (ink > 0.03).all()
    border = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]])
    assert border.mean() < 0.02  # shapes lie within


def test_recipe_starts_with_its_command() -> None:
    assert "-c recipes/conv.yaml" in RECIPE.read_text()
