# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of sharded runs: a folder with a part of each process (``torch.distributed.checkpoint``), or one file.

The folder is laid out as by Lightning's ``ModelParallelStrategy``: ``state_dict`` and ``optimizer_0``, ... by the names
of parameters, and a file with the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.load import _load_distributed_checkpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_galore import dtensors, saved_state, sharded_state, state_keys
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.sharding import Sharding
from lightning_galore.target_table import Target
from lightning_galore.targets import clean_name

PREFIX = "optimizer_"


def replace_folder(new: Path, path: Path) -> None:
    """Give a folder that is whole its name. At no moment is there a part of one under that name."""
    old = _aside(path)
    if path.is_symlink():
        path.unlink()
    if path.exists():
        _remove(old)  # of a process that was killed here
        path.rename(old)
    new.rename(path)
    _remove(old)


def put_back(path: Path) -> None:
    """Undo what :meth:`replace_folder` had done when its process was killed before the new one had its name."""
    if not path.exists() and _aside(path).exists():
        _aside(path).rename(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def named_state_dict(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict by the names of parameters, with the parts that this process holds."""
    names = _names(optimizer, module)
    held = optimizer.state_dict()
    return {
        "state": {names[index]: value for index, value in held["state"].items()},
        "param_groups": [
            {**group, "params": [names[index] for index in group["params"]]} for group in held["param_groups"]
        ],
    }


def whole_state_dict(optimizer: Optimizer, *, keep: bool) -> dict[str, Any]:
    """An optimizer's state dict as one process would write it; collective, one tensor at a time.

    Args:
        optimizer: Its states are parts.
        keep: Whether this process wants it. Others only send theirs.
    """
    held = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for index, own in held["state"].items():
        entries: dict[str, Any] = {}
        for key, value in own.items():
            whole = dtensors.whole(value).cpu() if isinstance(value, Tensor) else value
            entries |= {key: whole} if keep else {}
        state |= {index: entries} if keep else {}
    return {**held, "state": state} if keep else {}


def read_named_state(path: Path, place: int, optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimizer's state dict from a folder that any number of processes has written, each of these its part.

    Every tensor is made as it was saved (its dtype, and the shape of an adaptive rank) and divided as this run has it.

    Args:
        path: The folder.
        place: Of the optimizer, among several.
        optimizer: Says how the parts lie; it is not changed.
        module: Gives the names.

    Raises:
        ValueError: If the folder holds no such optimizer.
    """
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(path)
    metadata = reader.read_metadata()
    prefix = f"{PREFIX}{place}."
    saved = {key: value for key, value in metadata.state_dict_metadata.items() if key.startswith(prefix)}
    if not saved:
        raise ValueError(
            f"{path} holds no state of optimizer {place}: it was saved with weights only, or by another number of "
            "optimizers. Load its weights only (Module.load_from_checkpoint) and start a new run."
        )
    paths = {key: tuple(metadata.planner_data[key])[1:] for key in saved}
    params = dict(zip(_names(optimizer, module), _params(optimizer), strict=True))
    targets = optimizer.targets if isinstance(optimizer, GaLoreOptimizer) else {}
    flat: dict[str, Any] = {}
    for key, entry in saved.items():
        flat[key] = 0
        if isinstance(entry, TensorStorageMetadata):
            param = params.get(str(paths[key][1])) if paths[key][0] == "state" else None
            flat[key] = _empty(entry, str(paths[key][-1]), param, targets)
    load(flat, storage_reader=reader)
    nested: dict[str, Any] = {"state": {}, "param_groups": []}
    for key, value in flat.items():
        _put(nested, paths[key], value)
    return nested


def check(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict that does not fit, before anything is loaded.

    Raises:
        ValueError: With what was saved, what is wanted and what to do.
    """
    groups, config = optimizer.param_groups, getattr(optimizer, "config", None)
    targets = optimizer.targets if isinstance(optimizer, GaLoreOptimizer) else {}
    saved_state.check_loadable(state_dict, groups, targets, adaptive=config is not None and config.adaptive_rank)


def load_state_dict(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Load a state dict, of one process or of several, into an optimizer over sharded parameters."""
    if isinstance(optimizer, GaLoreOptimizer):  # which does so itself
        optimizer.load_state_dict(dict(state_dict))
        return
    groups = optimizer.param_groups
    optimizer.load_state_dict(sharded_state.placed_state_dict(state_dict, groups, {}, divide_bases=False))


def consolidated(path: Path) -> dict[str, Any]:
    """A folder's checkpoint as one process would have written it; it must fit into memory.

    Args:
        path: The folder.
    """
    checkpoint = _load_distributed_checkpoint(path)
    states: list[dict[str, Any]] = []
    while f"{PREFIX}{len(states)}" in checkpoint:
        states.append(checkpoint.pop(f"{PREFIX}{len(states)}"))
    return {**checkpoint, "optimizer_states": states}


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _names(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Names of an optimizer's parameters, in its order."""
    names: dict[Tensor, str] = {param: clean_name(name) for name, param in module.named_parameters()}
    return [names[param] for param in _params(optimizer)]


def _empty(entry: Any, key: str, param: Tensor | None, targets: Mapping[Tensor, Target]) -> Tensor:
    """Memory for an entry of a state, divided as this run divides it."""
    shape, dtype = tuple(entry.size), entry.properties.dtype
    if param is None or not dtensors.is_sharded(param) or not shape:
        return torch.empty(shape, dtype=dtype, device=None if param is None else param.device)
    target = targets.get(param)
    sharding = Sharding.of(param) if target is not None else None
    if state_keys.is_ours(key):  # bases: read whole, and divided when they are loaded
        return torch.empty(shape, dtype=dtype, device=param.device)
    placements = None
    if shape == tuple(param.shape):
        placements = tuple(param.placements)
    elif target is not None and sharding is not None and len(shape) == 2:
        dim = sharding.low_dim(target.projection.side)
        if dim is None or shape[dim] == target.projection.low_shape[dim]:
            placements = sharding.shards.placements(dim)
    return dtensors.empty(shape, dtype, param, placements)


def _put(nested: Any, path: tuple[Any, ...], value: Any) -> None:
    """Write ``value`` where ``path`` of keys and positions leads, making what is not there."""
    for key, following in zip(path[:-1], path[1:], strict=True):
        fresh: Any = [] if isinstance(following, int) else {}
        if isinstance(nested, list):
            nested.extend([None] * (key + 1 - len(nested)))
            nested[key] = fresh if nested[key] is None else nested[key]
            nested = nested[key]
        else:
            nested = nested.setdefault(key, fresh)
    if isinstance(nested, list):
        nested.extend([None] * (path[-1] + 1 - len(nested)))
    nested[path[-1]] = value
