# SPDX-License-Identifier: Apache-2.0
"""Several devices: what one of them holds, by arithmetic from what a single one would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_galore import storage
from lightning_galore.config import Mode

Sharding = Literal["ddp", "fsdp2"]

#: Two buckets of low-rank gradients, one that travels while the next one fills (distributed.py).
LOW_RANK_BUCKETS = 2 * 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Devices:
    """How a model is trained on several devices.

    Args:
        count: How many.
        strategy: ``ddp``: each holds the whole model. ``fsdp2``: weights, gradients and moments are divided.
        bases_sharded: Under ``fsdp2``, whether bases are divided too.
    """

    count: int = 1
    strategy: Sharding = "ddp"
    bases_sharded: bool = False

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"devices={self.count} must be at least 1.")
        if self.strategy not in ("ddp", "fsdp2"):
            raise ValueError(f"strategy={self.strategy!r} is not known to the planner; choose 'ddp' or 'fsdp2'.")

    @property
    def shares(self) -> dict[str, float]:
        """What part of a category one device holds, where it is not all of it."""
        if self.strategy != "fsdp2" or self.count == 1:
            return {}
        divided = ["weights", "gradients", "moments"]
        return dict.fromkeys(divided + (["bases"] if self.bases_sharded else []), 1 / self.count)


def on_each(
    held: Mapping[str, int], devices: Devices, *, mode: Mode, gradients: int, largest_layer: int
) -> dict[str, int]:
    """Bytes on each device, from the bytes of a single one at the same moment (docs/distributed.md).

    Args:
        held: By category.
        devices: How many, and what they divide.
        mode: When gradients are projected.
        gradients: Bytes of all gradients that travel at once: those of the buckets of mode ``step``.
        largest_layer: Bytes of the weights that FSDP2 gathers at once.

    Returns:
        The categories, and ``communication``: buckets, or the gathered layer.
    """
    each: dict[str, int] = dict(held)
    each["communication"] = 0
    if devices.count == 1:
        return each
    if devices.strategy == "ddp":
        # torch's DDP copies gradients into buckets as large as all of them, unless they are views of the buckets.
        each["communication"] = gradients if mode == "step" else LOW_RANK_BUCKETS
        return each
    for category in devices.shares:
        each[category] = -(-each[category] // devices.count)
    each["communication"] = largest_layer
    return each


def largest_layer_bytes(module: nn.Module) -> int:
    """Bytes of what FSDP2 gathers at once: the largest of the repeated blocks, or what lies outside of them.

    Args:
        module: Whose blocks are the members of its ``nn.ModuleList`` and ``nn.Sequential`` that hold parameters.
    """
    blocks = [
        block
        for parent in module.modules()
        if isinstance(parent, (nn.ModuleList, nn.Sequential))
        for block in parent.children()
    ]
    inside = {id(param) for block in blocks for param in block.parameters()}
    outside = sum(storage.nbytes(param) for param in module.parameters() if id(param) not in inside)
    return max([outside, *(storage.nbytes(list(block.parameters())) for block in blocks)])
