# SPDX-License-Identifier: Apache-2.0
"""The processes that hold the parts of the same weights (FSDP2): how many, which part is whose, sums over all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from lightning_galore import dtensors
from lightning_galore.distributed import Team
from lightning_galore.linalg import norm_sq

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Shards:
    """The processes that hold the parts of the same weights.

    Args:
        mesh: All processes.
        axis: The dimension of the mesh along which weights are divided; None if all hold all.
    """

    mesh: DeviceMesh
    axis: int | None

    @property
    def size(self) -> int:
        """How many parts there are."""
        return 1 if self.axis is None else self.mesh.size(self.axis)

    @property
    def index(self) -> int:
        """Which part is this process's."""
        return 0 if self.axis is None else self.mesh.get_local_rank(self.axis)

    @property
    def group(self) -> dist.ProcessGroup:
        """Those with the other parts."""
        assert self.axis is not None
        return self.mesh.get_group(self.axis)

    def team(self) -> Team:
        """Those that must agree on a basis: all of the mesh.

        Raises:
            ValueError: If they are neither one dimension of a mesh nor all processes.
        """
        if self.mesh.ndim == 1:
            return Team(self.mesh.get_group())
        if self.mesh.size() != dist.get_world_size():
            raise ValueError(
                f"The weights are sharded on a mesh of {self.mesh.size()} of {dist.get_world_size()} processes in "
                f"{self.mesh.ndim} dimensions, which low-rank training does not support. Use a mesh of one dimension, "
                "or of all processes."
            )
        return Team()

    def extent(self, size: int, index: int | None = None) -> tuple[int, int]:
        """First and last (excluded) index of a part of a dimension, as ``torch.chunk`` divides it.

        Args:
            size: Of the dimension.
            index: Which part; None for this process's. None is larger than the first.
        """
        chunk, index = math.ceil(size / self.size), self.index if index is None else index
        return min(size, chunk * index), min(size, chunk * (index + 1))

    def placements(self, dim: int | None) -> tuple[Placement, ...]:
        """Those of a tensor that is divided along ``dim`` as the weights are; None for one that all hold."""
        from torch.distributed.tensor import Replicate, Shard

        return tuple(Replicate() if dim is None or axis != self.axis else Shard(dim) for axis in range(self.mesh.ndim))

    def replicated(self, tensor: Tensor) -> Tensor:
        """A tensor that all hold alike, as a DTensor. Nothing travels."""
        return dtensors.joined(tensor, self.mesh, self.placements(None))

    def share_sq(self, tensor: Tensor) -> Tensor:
        """This process's share of a squared norm, 0-D: the shares of all parts add up to it."""
        share = norm_sq(dtensors.local(tensor))
        divided = dtensors.is_sharded(tensor) and self.axis is not None and tensor.placements[self.axis].is_shard()
        return share if divided else share / self.size

    def total(self, shares: Tensor) -> Tensor:
        """Sum of what each part gives, on all processes; collective."""
        if self.axis is not None:
            shares = shares.clone()
            dist.all_reduce(shares, group=self.group)
        return shares
