# SPDX-License-Identifier: Apache-2.0
"""Every way in which a command ends has its exit status, and a run that was stopped goes on from its checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_galore import GaLoreStrategy
from lightning_galore.cli import GaLoreCLI, main

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Failing(BoringModel):
    """Ends as ``how`` says, in the batch that begins step ``at``."""

    def __init__(self, how: str = "", at: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(32, 16)
        self.how, self.at = how, at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.how and self.global_step == self.at:
            ends: dict[str, Callable[[], object]] = {
                "value": lambda: _raise(ValueError("a bug of the user's module")),
                "memory": lambda: _raise(torch.OutOfMemoryError("out of memory")),
                "interrupt": lambda: signal.raise_signal(signal.SIGINT),
                "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
            }
            ends[self.how]()
        return super().training_step(batch, batch_idx)


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., list[str]]:
    """Arguments of a run that ends as it is told."""

    def make(**init_args: Any) -> list[str]:
        content = {
            "seed_everything": 1,
            "trainer": {
                **QUIET,
                "strategy": {"class_path": "GaLoreStrategy", "init_args": {"rank": 4}},
                "max_epochs": 2,
                "limit_train_batches": 4,
                "limit_val_batches": 0,
                "default_root_dir": str(tmp_path),
            },
            "model": {"class_path": f"{__name__}.Failing", "init_args": init_args},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return ["fit", "-c", str(path)]

    return make


def test_an_error_in_a_running_module_is_shown_whole(
    recipe: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(recipe(how="value")) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in training_step" in err
    assert "lightning-galore: the run failed" in err


def test_out_of_memory_names_the_plan(recipe: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(recipe(how="memory")) == 1
    assert "lightning-galore plan -c RECIPE.yaml --budget" in capsys.readouterr().err


def test_ctrl_c_says_how_to_go_on_and_one_can(
    recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Lightning disables it at each Ctrl-C, as the process is about to end: an earlier test may have left it so.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(recipe(how="interrupt", at=2)) == 130
        assert "interrupted: no checkpoint has been written yet." in capsys.readouterr().err
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert main(recipe(how="interrupt", at=6)) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    err = capsys.readouterr().err
    (saved,) = (tmp_path / "checkpoints").glob("*.ckpt")
    assert f"the same command with --ckpt_path {saved} goes on from the last checkpoint." in err
    assert main([*recipe(), "--ckpt_path", str(saved)]) == 0
    ends = sorted((tmp_path / "checkpoints").glob("*.ckpt"))
    resumed = torch.load(ends[-1], weights_only=True)
    for path in ends:
        path.unlink()
    assert main(recipe()) == 0
    whole = torch.load(next((tmp_path / "checkpoints").glob("*.ckpt")), weights_only=True)
    assert resumed["global_step"] == whole["global_step"] == 8
    assert set(resumed["state_dict"]) == set(whole["state_dict"])


def test_sigterm_is_no_success(recipe: Callable[..., list[str]]) -> None:
    assert main(recipe(how="terminate")) == 143


def test_a_checkpoint_of_another_model_is_a_mistake(
    recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(recipe()) == 0
    (saved,) = (tmp_path / "checkpoints").glob("*.ckpt")
    gan = str(Path(__file__).parents[2] / "recipes" / "gan.yaml")
    into = [
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
    ]
    capsys.readouterr()
    assert main(["fit", "-c", gan, *into, "--ckpt_path", str(saved)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    assert main(["fit", "-c", gan, *into, "--ckpt_path", str(tmp_path / "text.ckpt")]) == 2


def test_short_names_of_classes_and_of_the_strategy(tmp_path: Path) -> None:
    options = ["--trainer.strategy", "GaLoreStrategy", "--model", "RingGan", "--data", "RingDataModule"]
    monitors = ["--trainer.callbacks+=MemoryMonitor", "--trainer.callbacks+=SubspaceScheduler"]
    cli = GaLoreCLI(args=[*options, *monitors, "--trainer.accelerator=cpu", "--trainer.logger=false"], run=False)
    assert isinstance(cli.trainer.strategy, GaLoreStrategy)
    assert type(cli.model).__name__ == "RingGan"
    assert {"MemoryMonitor", "SubspaceScheduler"} <= {type(one).__name__ for one in cli.trainer.callbacks}  # type: ignore[attr-defined]


def test_what_print_config_prints_runs(
    recipe: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*recipe(), "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert main(["fit", "-c", str(printed)]) == 0
    assert main(["targets", "-c", str(printed)]) == 0  # and what a run has saved does for the other commands
    assert "layer.weight" in capsys.readouterr().out
