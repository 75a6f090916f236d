# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder of Transformers' Trainer, read as one dictionary in Lightning's layout."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_galore.untrusted import ConversionError, load

_OPTIMIZER, _SCHEDULER, _STATE = "optimizer.pt", "scheduler.pt", "trainer_state.json"
_WEIGHTS, _INDEX, _PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
_WANTED = f"A checkpoint folder of Transformers' Trainer holds {_WEIGHTS} and {_OPTIMIZER}."


def optimizer_file(folder: Path) -> Path:
    """Where the folder's optimizer state is.

    Raises:
        ConversionError: If it holds none, or one that is divided.
    """
    if (folder / _OPTIMIZER).is_file():
        return folder / _OPTIMIZER
    runs = sorted(folder.glob("checkpoint-*"))
    if runs:
        raise ConversionError(f"source={folder} is the folder of a run; give one of its checkpoints, as {runs[-1]}.")
    if any(folder.glob("rank*-optimizer.pt")) or any(folder.glob("optimizer_*")) or any(folder.glob("global_step*")):
        raise ConversionError(
            f"source={folder} holds an optimizer state in parts (FSDP or DeepSpeed), which GaLore of Transformers does "
            "not support. Load the model's weights only and start a new optimizer."
        )
    raise ConversionError(f"source={folder} is a folder without {_OPTIMIZER}. {_WANTED} Or give a single file.")


def read_folder(folder: Path, *, prefix: str) -> dict[str, Any]:
    """Weights, optimizer state, scheduler and progress of the folder, as Lightning keeps them in one checkpoint.

    ``training_args.bin``, a pickle, is not read.

    Args:
        folder: Holds what :func:`optimizer_file` finds.
        prefix: Put before the name of each weight: ``"model."`` for a LightningModule that keeps the network there.

    Raises:
        ConversionError: If something is missing or damaged; the message names the file.
    """
    weights = {f"{prefix}{name}": tensor for name, tensor in _weights(folder).items()}
    progress = _progress(folder)
    scheduler = load(folder / _SCHEDULER) if (folder / _SCHEDULER).is_file() else None
    return {
        "state_dict": weights,
        "optimizer_states": [load(optimizer_file(folder))],
        "lr_schedulers": [] if scheduler is None else [scheduler],
        "global_step": progress["global_step"],
        "epoch": int(progress["epoch"]),
        "loops": {"fit_loop": _fit_loop(progress["global_step"], int(progress["epoch"]))},
        # The oldest Lightning that reads this layout without changing it.
        "pytorch-lightning_version": "2.5.0",
    }


def _weights(folder: Path) -> dict[str, Any]:
    if (folder / _WEIGHTS).is_file():
        return _safetensors(folder / _WEIGHTS)
    if (folder / _INDEX).is_file():
        names = sorted(set(_json(folder / _INDEX).get("weight_map", {}).values()))
        # Names only: an index that anybody made may not lead out of the folder.
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ConversionError(f"{folder / _INDEX} does not list files of its folder: it is damaged.")
        return {name: tensor for file in names for name, tensor in _safetensors(folder / file).items()}
    if (folder / _PICKLED).is_file():
        loaded = load(folder / _PICKLED)
        if isinstance(loaded, dict):
            return loaded
    raise ConversionError(f"source={folder} holds no weights. {_WANTED}")


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = import_module("safetensors.torch").load_file(path)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path.name} is read with safetensors, which is not installed. "
            'Install it with: pip install "lightning-galore[recipes]"',
            name=error.name,
        ) from error
    except Exception as error:  # of a type of its own in its compiled part
        raise ConversionError(f"{path} cannot be read ({error}).") from error
    return loaded


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON ({error}).") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path} holds a {type(found).__name__} where a dictionary is expected.")
    return found


def _progress(folder: Path) -> dict[str, Any]:
    state = _json(folder / _STATE) if (folder / _STATE).is_file() else {}
    steps, epoch = state.get("global_step", 0), state.get("epoch", 0)
    if type(steps) is not int or type(epoch) not in (int, float) or steps < 0 or epoch < 0:
        raise ConversionError(f"{folder / _STATE} has global_step={steps!r} and epoch={epoch!r}: it is damaged.")
    return {"global_step": steps, "epoch": epoch}


def _fit_loop(steps: int, epochs: int) -> dict[str, Any]:
    """How far a run is, as Lightning's fit loop keeps it: optimizer steps and whole epochs."""
    done = {"total": {"ready": steps, "completed": steps}, "current": {"ready": 0, "completed": 0}}
    zeroed = {name: {**counts, "started": counts["ready"]} for name, counts in done.items()}
    of_epochs = {"ready": epochs, "started": epochs, "processed": epochs, "completed": epochs}
    return {
        "epoch_progress": {"total": of_epochs, "current": of_epochs},
        "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": done, "zero_grad": zeroed}},
    }
