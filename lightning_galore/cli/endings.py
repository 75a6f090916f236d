# SPDX-License-Identifier: Apache-2.0
"""What is said at the end of a command that went well: where its results are, or that they are nowhere."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from lightning import Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_galore.cli.exits import PROG


def after(subcommand: str, trainer: Trainer) -> str:
    """A line for whoever ran a command of the Trainer; empty where there is nothing to say.

    Args:
        subcommand: ``fit``, ``validate``, ``test`` or ``predict``.
        trainer: Has run it.
    """
    if subcommand == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        return _where_it_is(trainer)
    if subcommand == "predict" and not _predictions_are_kept(trainer):
        return (
            "the predictions were not written: no callback writes them. Add one of your own to trainer.callbacks, a "
            "subclass of lightning.pytorch.callbacks.BasePredictionWriter."
        )
    return ""


def _predictions_are_kept(trainer: Trainer) -> bool:
    if any(isinstance(one, BasePredictionWriter) for one in trainer.callbacks):  # type: ignore[attr-defined]
        return True
    # A module whose predict_step returns nothing has done itself what there is to do.
    returned = trainer.predict_loop._predictions
    return any(returned) and all(one is None for loader in returned for one in loader)


def _where_it_is(trainer: Trainer) -> str:
    parts = [*_checkpoints(trainer)]
    for logger in trainer.loggers:
        if isinstance(logger, (CSVLogger, TensorBoardLogger)) and _can_be_drawn(Path(logger.log_dir)):
            folder = _short(logger.log_dir)
            parts.append(f"log {folder}: `{PROG} report {shlex.quote(folder)}` draws it")
    return "; ".join(parts)


def _checkpoints(trainer: Trainer) -> list[str]:
    callback = trainer.checkpoint_callback
    best, last = (getattr(callback, f"{which}_model_path", "") for which in ("best", "last"))
    # Without a monitor its best checkpoint is the last one that it kept.
    judged = getattr(callback, "monitor", None) is not None
    named = {"best checkpoint": best if judged else "", "last checkpoint": last or ("" if judged else best)}
    return [f"{name} {_short(path)}" for name, path in named.items() if path and Path(path).exists()]


def _can_be_drawn(folder: Path) -> bool:
    from lightning_galore.report.find import locate

    try:
        return locate(folder)[0].folder == folder
    except (OSError, ValueError):  # nothing was logged, or what was needs a package that is not there
        return False


def _short(path: str | Path) -> str:
    """A path as one would type it: from here, where it is below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative
