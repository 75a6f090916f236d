# SPDX-License-Identifier: Apache-2.0
"""``GaLoreStrategy`` in the YAML of a LightningCLI."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_galore import GaLoreSingleDeviceStrategy

from .modules import RANK, Tiny, adamw, assert_same_weights, loader, the_optimizer

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class CliTiny(Tiny):
    """Settings that YAML can hold, and loaders of its own."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lambda model: adamw(model, lr))

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return loader(2)


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog"])


def run(folder: Path, strategy: Any, *arguments: str) -> LightningCLI:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"seed_everything": 3, "trainer": {**QUIET, "strategy": strategy}}))
    settings: dict[str, Any] = {"save_config_callback": None, "auto_configure_optimizers": False}
    return LightningCLI(CliTiny, args=["fit", "--config", str(path), *arguments], **settings)


def class_path(name: str = "GaLoreStrategy", **init_args: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_galore.{name}", "init_args": init_args}


@pytest.mark.parametrize("name", ["GaLoreStrategy", "GaLoreSingleDeviceStrategy"])
def test_class_path_with_settings(name: str, tmp_path: Path) -> None:
    cli = run(tmp_path, class_path(name, rank=RANK, update_proj_gap=4, scale=1.0, proj_type="left"))
    assert type(cli.trainer.strategy) is GaLoreSingleDeviceStrategy
    optimizer = the_optimizer(cli.trainer)
    config = optimizer.config
    assert (config.rank, config.update_proj_gap, config.scale, config.proj_type) == (RANK, 4, 1.0, "left")
    assert optimizer.state[cli.model.body[0].weight]["exp_avg"].shape == (RANK, 8)


def test_the_same_command_twice_gives_the_same_bits(tmp_path: Path) -> None:
    first, second = (run(tmp_path, class_path(rank=RANK, update_proj_gap=2)) for _ in range(2))
    assert_same_weights(first.model, second.model)


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    cli = run(tmp_path, class_path(rank=RANK, scale=2.0), "--trainer.strategy.rank", "4")
    assert the_optimizer(cli.trainer).config.rank == 4
    assert the_optimizer(cli.trainer).config.scale == 2.0
    assert {target.projection.rank for target in the_optimizer(cli.trainer).targets.values()} == {4}


def test_class_name_on_the_command_line(tmp_path: Path) -> None:
    flags = ("--trainer.strategy", "lightning_galore.GaLoreStrategy", "--trainer.strategy.rank", "5")
    cli = run(tmp_path, "auto", *flags)
    assert the_optimizer(cli.trainer).config.rank == 5


def test_registered_name(tmp_path: Path) -> None:
    # Its rank of 128 is larger than these weights, so fit must say that nothing would be projected.
    with pytest.raises(ValueError, match="rank=128.*leaves no weight to project"):
        run(tmp_path, "galore")


@pytest.mark.parametrize(
    ("target_modules", "projected"),
    [
        ("all-linear", {"body.0.weight", "body.2.weight"}),
        (r"body\.\d", {"body.0.weight", "body.2.weight"}),
        ("body.2", {"body.2.weight"}),
        (["body.0"], {"body.0.weight"}),
        (["body.0", r"he.d"], {"body.0.weight", "head.weight"}),
        (["class:torch.nn.Linear"], {"body.0.weight", "body.2.weight", "head.weight"}),
    ],
)
def test_target_modules_as_a_string_and_as_a_list(target_modules: Any, projected: set[str], tmp_path: Path) -> None:
    cli = run(tmp_path, class_path(rank=RANK, target_modules=target_modules))
    assert {target.name for target in the_optimizer(cli.trainer).targets.values()} == projected


def test_ignore_modules_as_a_string_and_as_a_list(tmp_path: Path) -> None:
    for ignore in ("body.0", ["body.0"]):
        cli = run(tmp_path, class_path(rank=RANK, ignore_modules=ignore))
        assert {target.name for target in the_optimizer(cli.trainer).targets.values()} == {"body.2.weight"}


def test_a_target_list_on_the_command_line(tmp_path: Path) -> None:
    cli = run(tmp_path, class_path(rank=RANK), '--trainer.strategy.target_modules=["body.0", "head"]')
    names = {target.name for target in the_optimizer(cli.trainer).targets.values()}
    assert names == {"body.0.weight", "head.weight"}


@pytest.mark.parametrize(
    ("init_args", "words"),
    [
        ({"proj_type": "middle"}, ["proj_type", "middle", "reverse_std"]),
        ({"subspace": "pca"}, ["subspace", "pca", "randomized"]),
        ({"rank": "wide"}, ["rank", "wide"]),
        ({"rank": 0}, ["rank=0 must be at least 1"]),
        ({"rnak": 4}, ["rnak"]),
    ],
)
def test_a_bad_setting_is_a_clean_error(
    init_args: dict[str, Any], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Either the parser exits with a message, or the configuration raises its own.
    with pytest.raises((SystemExit, ValueError)) as caught:
        run(tmp_path, class_path(**init_args))
    message = capsys.readouterr().err + str(caught.value)
    for word in words:
        assert word in message


def test_dict_kwargs_reach_the_lightning_strategy(tmp_path: Path) -> None:
    cli = run(tmp_path, {**class_path(rank=RANK), "dict_kwargs": {"device": "cpu"}})
    assert cli.trainer.strategy.root_device == torch.device("cpu")


def test_print_config_states_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(tmp_path, class_path(rank=RANK), "--print_config")
    assert not caught.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    init_args = printed["trainer"]["strategy"]["init_args"]
    assert init_args["rank"] == RANK
    assert init_args["subspace"] == "auto"
    assert init_args["target_modules"] == "all-linear"
    # What was printed is a configuration that can be run.
    cli = run(tmp_path, printed["trainer"]["strategy"])
    assert the_optimizer(cli.trainer).config.rank == RANK


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        LightningCLI(CliTiny, args=["fit", "--trainer.strategy.help", "lightning_galore.GaLoreStrategy"])
    text = capsys.readouterr().out
    assert "Optimizer steps between two refreshes" in text
    assert "--trainer.strategy.target_modules" in text or "target_modules" in text
