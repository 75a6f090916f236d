# SPDX-License-Identifier: Apache-2.0
"""The recipe of manual optimization: two optimizers, in every mode and without the strategy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from lightning_galore.cli import GaLoreCLI
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.tasks.gan import CENTRES, RADIUS, RingGan, ring
from tests.helpers import same_bits

RECIPE = Path(__file__).parents[2] / "recipes" / "gan.yaml"
QUIET = [
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture(autouse=True)
def _writes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> GaLoreCLI:
    cli = GaLoreCLI(args=["-c", str(RECIPE), *QUIET, *arguments], run=False)
    cli.trainer.fit(cli.model, cli.datamodule)
    return cli


@pytest.mark.parametrize("mode", ["step", "project", "layerwise"])
def test_recipe_trains_one_step(mode: str) -> None:
    cli = run("--trainer.fast_dev_run=true", f"--trainer.strategy.mode={mode}")
    for optimizer in cli.trainer.optimizers:
        assert isinstance(optimizer, GaLoreOptimizer)
        assert [target.name.split(".")[1:] for target in optimizer.targets.values()] == [
            ["2", "weight"],
            ["4", "weight"],
        ]
    assert cli.trainer.global_step == 2
    assert {"train/critic", "train/generator", "points/near", "points/centres"} <= set(cli.trainer.callback_metrics)


def test_recipe_shows_layerwise_mode() -> None:
    text = RECIPE.read_text()
    assert "-c recipes/gan.yaml" in text
    assert yaml.safe_load(text)["trainer"]["strategy"]["init_args"]["mode"] == "layerwise"


def test_all_modes_end_with_the_same_weights() -> None:
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=12", "--trainer.strategy.update_proj_gap=5"]
    weights = [
        [param.detach() for param in run(*short, f"--trainer.strategy.mode={mode}").model.parameters()]
        for mode in ("step", "project", "layerwise")
    ]
    assert same_bits(weights[0], weights[1])
    assert same_bits(weights[0], weights[2])


def test_module_needs_no_strategy_of_ours() -> None:
    cli = run("--trainer.strategy=auto", "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    assert type(cli.trainer.optimizers[0]) is torch.optim.Adam


def test_points_lie_on_the_ring() -> None:
    points = ring(4000, seed=1)
    assert torch.equal(points, ring(4000, seed=1))
    assert float(points.norm(dim=1).mean()) == pytest.approx(RADIUS, rel=0.01)
    angles = torch.atan2(points[:, 1], points[:, 0]) / (2 * torch.pi) * CENTRES
    assert set(angles.round().remainder(CENTRES).tolist()) == set(range(CENTRES))
    assert RingGan(hidden=8)(5).shape == (5, 2)
