# SPDX-License-Identifier: Apache-2.0
"""What a command says at its end, and what it leaves out of what other packages say."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_galore.cli import main
from lightning_galore.cli.noise import without_weights_bar

QUIET = [
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
SHORT = ["--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1"]
NOT_WRITTEN = "lightning-galore: the predictions were not written: no callback writes them. Add one of your own to "


class Logging(BoringModel):
    """Logs its loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        self.log("train/loss", output["loss"])
        return output


class Silent(BoringModel):
    """Its predict_step does what there is to do."""

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        return None


class Writer(BasePredictionWriter):
    """Writes into the folder of the Trainer."""

    def __init__(self) -> None:
        super().__init__("epoch")

    def write_on_epoch_end(
        self, trainer: Any, pl_module: Any, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        torch.save(predictions, Path(trainer.default_root_dir) / "predictions.pt")


def ours(capsys: pytest.CaptureFixture[str], command: str, *options: str) -> list[str]:
    """What a command that ends well says under its own name."""
    assert main([command, *QUIET, *options]) == 0
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-galore: ")]


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_fit_says_where_checkpoint_and_log_are(
    logger: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if logger == "TensorBoardLogger":
        pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    model = [f"--model={__name__}.Logging", *SHORT, f"--trainer.logger={logger}", "--trainer.logger.save_dir=."]
    (said,) = ours(capsys, "fit", *model)
    log = Path("lightning_logs") / "version_0"
    checkpoint = log / "checkpoints" / "epoch=0-step=2.ckpt"
    assert checkpoint.is_file()
    expected = f"last checkpoint {checkpoint}; log {log}: `lightning-galore report {log}` draws it"
    assert said == f"lightning-galore: {expected}"
    if logger == "CSVLogger":
        pytest.importorskip("matplotlib")
        assert main(["report", str(log)]) == 0
        judged = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=train/loss"]
        (said,) = ours(capsys, "fit", *model, *judged, "--trainer.callbacks.save_last=true")
        assert "lightning-galore: best checkpoint lightning_logs" in said
        assert "; last checkpoint lightning_logs/version_1/checkpoints/last.ckpt; log " in said


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.fast_dev_run=true"],
        [*SHORT, "--trainer.logger=false", "--trainer.enable_checkpointing=false"],
    ],
    ids=["fast_dev_run", "nothing written"],
)
def test_fit_says_nothing_where_nothing_is_kept(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    into = f"--trainer.default_root_dir={tmp_path}"
    assert ours(capsys, "fit", f"--model={__name__}.Logging", into, *options) == []


@pytest.mark.filterwarnings("ignore:predict returned None:UserWarning")
def test_predictions_that_nobody_writes_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false", "--trainer.limit_predict_batches=2"]
    (said,) = ours(capsys, "predict", f"--model={__name__}.Logging", *options)
    assert said.startswith(NOT_WRITTEN)
    assert "trainer.callbacks" in said
    assert "lightning.pytorch.callbacks.BasePredictionWriter" in said
    writer = f"--trainer.callbacks+={__name__}.Writer"
    assert ours(capsys, "predict", f"--model={__name__}.Logging", *options, writer) == []
    assert len(torch.load(tmp_path / "predictions.pt")) == 2
    assert ours(capsys, "predict", f"--model={__name__}.Silent", *options) == []


def test_what_lightning_says_of_its_own_pytree_is_left_out(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["fit", f"--model={__name__}.Warns", f"--trainer.default_root_dir={tmp_path}", *QUIET, *SHORT]) == 0
    said = [str(one.message) for one in caught]
    assert "a word of the user's module" in said
    assert not [text for text in said if "LeafSpec" in text]


class Warns(Logging):
    """Warns as Lightning's pytree does under torch 2.13, and of something else."""

    def on_train_start(self) -> None:
        warnings.warn("`isinstance(treespec, LeafSpec)` is deprecated, use ...", FutureWarning, stacklevel=1)
        warnings.warn("a word of the user's module", FutureWarning, stacklevel=1)


def test_transformers_bar_is_off_and_the_hubs_is_not() -> None:
    pytest.importorskip("transformers")
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    with without_weights_bar():
        assert not logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == before[1]
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before
