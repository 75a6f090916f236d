# SPDX-License-Identifier: Apache-2.0
"""Low-rank training on several devices, each of which holds a part of every weight (FSDP2)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_galore import dtensors
from lightning_galore.config import ProjType
from lightning_galore.sharding import shard_placement
from lightning_galore.strategies import sharded_files
from lightning_galore.strategies.base import GaLoreStrategy
from lightning_galore.strategies.int8_weights import prepare_to_load
from lightning_galore.strategies.replicas import ReplicaCheck


class GaLoreModelParallelStrategy(ReplicaCheck, GaLoreStrategy, ModelParallelStrategy):
    """Low-rank training with weights, gradients and moments sharded by FSDP2 (``strategy="galore_fsdp2"``).

    A LightningModule without ``configure_model`` is sharded block by block, each matrix along the dimension that is not
    projected, so that an ordinary step of ours sends nothing. One that has it does so itself, with torch's
    ``fully_shard`` on ``self.device_mesh["data_parallel"]``; there
    :func:`~lightning_galore.sharding.shard_placement` gives the same placement. Takes the arguments of both parents;
    ``data_parallel_size`` and ``tensor_parallel_size`` are all devices and 1 unless one is said; then the other is what
    is left of them.
    """

    @override
    def setup_environment(self) -> None:
        sizes, devices = (self._data_parallel_size, self._tensor_parallel_size), self.num_nodes * self.num_processes
        self._data_parallel_size, self._tensor_parallel_size = mesh_sizes(*sizes, devices=devices)
        super().setup_environment()
        module = self.lightning_module
        if module is not None and not is_overridden("configure_model", module):
            # Where Lightning looks for it: the user's class stays as it is.
            module.configure_model = partial(self._shard, module)  # type: ignore[method-assign]

    def _shard(self, module: LightningModule) -> None:
        if any(map(dtensors.is_sharded, module.parameters())):  # by an earlier fit
            return
        mesh = self.device_mesh["data_parallel"]
        if self.device_mesh["tensor_parallel"].size() > 1:
            raise MisconfigurationException(
                "tensor_parallel_size > 1 needs a plan for each layer, which nobody but you can give: override "
                "configure_model, or leave it 1."
            )
        shard_module(module, mesh, self.config.proj_type)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        assert self.lightning_module is not None
        if self.device_mesh["data_parallel"].size() == 1:
            return
        trained = {param for opt in self.optimizers for group in opt.param_groups for param in group["params"]}
        plain = [
            name
            for name, param in self.lightning_module.named_parameters()
            if param in trained and not dtensors.is_sharded(param)
        ]
        if plain:
            raise MisconfigurationException(
                f"{', '.join(plain[:4])}{', ...' if len(plain) > 4 else ''}: not sharded, so nobody would average the "
                "gradients, and the devices would part. Call fully_shard on a module that holds them too."
            )

    @override
    def teardown(self) -> None:
        if self.lightning_module is not None:
            vars(self.lightning_module).pop("configure_model", None)
        super().teardown()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State by the names of parameters for a folder; whole, and on the first process only, for a file."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        assert self.model is not None
        if self._save_distributed_checkpoint:
            return sharded_files.named_state_dict(optimizer, self.model)
        return sharded_files.whole_state_dict(optimizer, keep=self.is_global_zero)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Write beside the folder of that name first, which is replaced when all processes have written."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(self.broadcast(filepath))
        new = path.with_name(f".{path.name}.part")
        if self.is_global_zero:
            shutil.rmtree(new, ignore_errors=True)
        self.barrier()
        super().save_checkpoint(checkpoint, new, storage_options)
        self.barrier()
        if self.is_global_zero:
            sharded_files.replace_folder(new, path)
        self.barrier()

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder or a file of any of our strategies, written by any number of processes."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        assert self.lightning_module is not None
        strict = self.lightning_module.strict_loading
        if self.is_global_zero:
            sharded_files.put_back(path)
        self.barrier()
        rest: dict[str, Any]
        if (path / _METADATA_FILENAME).is_file():
            states = [
                sharded_files.read_named_state(path, place, optimizer, self.model)
                for place, optimizer in enumerate(self.optimizers)
            ]
            self._check_states(states)
            rest = _load_checkpoint(path, {"state_dict": self.model}, strict=strict, weights_only=weights_only)
        else:  # each process reads what it needs of it
            rest = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
            states = rest.get("optimizer_states", [])
            self._check_states(states)
            checkpoint = prepare_to_load(rest, self.lightning_module, self.config)
            options = StateDictOptions(full_state_dict=True, strict=strict)
            set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)
        for optimizer, state in zip(self.optimizers, states, strict=False):
            sharded_files.load_state_dict(optimizer, state)
        return rest

    def _check_states(self, states: list[Any]) -> None:
        """Refuse what does not fit before the weights are loaded."""
        for optimizer, state in zip(self.optimizers, states, strict=False):
            sharded_files.check(optimizer, state)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing: :meth:`load_checkpoint` has done so."""


def mesh_sizes(data: int | Literal["auto"], tensor: int | Literal["auto"], *, devices: int) -> tuple[int, int]:
    """Data-parallel and tensor-parallel size: all devices and 1, or what one of them leaves of the devices.

    Lightning's own ``"auto"`` would use tensor parallelism within a node. Sizes that do not multiply to the devices are
    left for it to refuse.

    Example:
        >>> mesh_sizes("auto", "auto", devices=8), mesh_sizes("auto", 2, devices=8), mesh_sizes(2, "auto", devices=8)
        ((8, 1), (4, 2), (2, 4))
    """
    if tensor != "auto":
        return (max(1, devices // tensor) if data == "auto" else data), tensor
    return (devices, 1) if data == "auto" else (data, max(1, devices // data))


def shard_module(module: nn.Module, mesh: Any, proj_type: ProjType = "std") -> None:
    """Shard each child of a module, and within it each block of a list of blocks, by torch's ``fully_shard``.

    The children, not the module itself: a LightningModule's ``training_step`` calls those, and ``fully_shard`` acts
    when a module is called.

    Args:
        module: A LightningModule.
        mesh: The devices, in one dimension.
        proj_type: By which weights are projected.

    Raises:
        ValueError: If parameters are in no child, or in several.
    """
    from torch.distributed.fsdp import fully_shard

    place = shard_placement(mesh.size(), proj_type)
    seen: dict[nn.Parameter, str] = {}
    for name, param in module.named_parameters(recurse=False):
        raise ValueError(
            f"{name} of shape {tuple(param.shape)} is a parameter of the LightningModule itself, which is not called "
            "as a module. Put it into a module of its own, or override configure_model and shard the model there."
        )
    for name, child in module.named_children():
        for own, param in child.named_parameters():
            if seen.setdefault(param, name) != name:
                raise ValueError(
                    f"{name}.{own} is shared with {seen[param]}, and FSDP2 shards the two apart. Put both into one "
                    "module, or override configure_model and shard the model there."
                )
    for child in module.children():
        if any(True for _ in child.parameters()):
            for block in _blocks(child):
                fully_shard(block, mesh=mesh, shard_placement_fn=place)
            fully_shard(child, mesh=mesh, shard_placement_fn=place)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Elements of lists of modules, such as a transformer's layers, the inner ones first."""
    for child in module.children():
        yield from _blocks(child)
        # Single layers are too small to travel by themselves.
        is_block = any(True for _ in child.parameters()) and any(True for _ in child.children())
        if is_block and isinstance(module, (nn.ModuleList, nn.Sequential)):
            yield child
