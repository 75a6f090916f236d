# SPDX-License-Identifier: Apache-2.0
"""One projected weight of which each process holds a part: what a step computes locally, and what has to travel.

A weight ``(m, n)`` is sharded along ``dim`` 0 (rows, FSDP2's default) or 1 (columns). Its side is *aligned* where the
projected dimension is the other one (right with rows, left with columns): then the parts of the low-rank gradient are
the low-rank gradients of the parts, and an ordinary step sends nothing. Otherwise products of parts are summed: the
low-rank gradient is reduce-scattered along its long dimension, and the update gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_galore import dtensors
from lightning_galore.bases import DrawnBases, StoredBases
from lightning_galore.config import ProjType
from lightning_galore.distributed import Team
from lightning_galore.shards import Shards
from lightning_galore.subspace import Projection, Side, resolve_side

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Shard


@dataclass(frozen=True)
class Sharding:
    """How one weight is divided.

    Args:
        shards: Among whom.
        shape: ``(m, n)`` of the whole.
        dim: 0 for rows, 1 for columns; None if each process holds all of it.
    """

    shards: Shards
    shape: tuple[int, int]
    dim: int | None

    @classmethod
    def of(cls, weight: Tensor, *, name: str = "a weight") -> Sharding | None:
        """How ``weight`` is divided, or None for a plain tensor.

        Args:
            weight: A matrix.
            name: For the message.

        Raises:
            ValueError: If it is divided along two dimensions of the mesh.
        """
        if not dtensors.is_sharded(weight):
            return None
        if weight.ndim != 2:
            raise ValueError(
                f"{name} of shape {tuple(weight.shape)} is sharded (FSDP2), and weights of order {weight.ndim} are "
                "projected whole only. Name it in ignore_modules, or use GaLoreDDPStrategy, where weights are whole."
            )
        dims = {axis: one.dim for axis, one in enumerate(weight.placements) if one.is_shard()}  # type: ignore[attr-defined]
        others = [one for one in weight.placements if not (one.is_shard() or one.is_replicate())]
        if len(dims) > 1 or others:
            raise ValueError(
                f"{name} of shape {tuple(weight.shape)} is sharded as {weight.placements} on a mesh of shape "
                f"{tuple(weight.device_mesh.shape)}: low-rank training supports weights that are divided along one "
                "dimension of the mesh (FSDP2, also hybrid with replicas), not FSDP2 together with tensor parallelism. "
                "Set tensor_parallel_size=1, or name it in ignore_modules."
            )
        axis, dim = next(iter(dims.items()), (None, None))
        return cls(Shards(weight.device_mesh, axis), (weight.shape[0], weight.shape[1]), dim)

    def crosses(self, side: Side) -> bool:
        """Whether the projected dimension is the divided one, so that products of parts have to be summed."""
        return self.dim is not None and (side == "full" or self.dim == (0 if side == "left" else 1))

    def low_dim(self, side: Side) -> int | None:
        """Along which dimension low-rank gradients and moments are divided: the one that is not projected."""
        return None if self.dim is None or side == "full" else (0 if side == "right" else 1)

    def low_part_shape(self, projection: Projection, *, index: int | None = None) -> tuple[int, int]:
        """Shape of a process's part of a low-rank gradient; of this one's without ``index``."""
        shape, dim = list(projection.low_shape), self.low_dim(projection.side)
        if dim is not None:
            first, last = self.shards.extent(shape[dim], index)
            shape[dim] = last - first
        return shape[0], shape[1]

    def divided_low(self, part: Tensor, projection: Projection) -> Tensor:
        """Parts of a low-rank gradient as one."""
        placements = self.shards.placements(self.low_dim(projection.side))
        return dtensors.joined(part, self.shards.mesh, placements, projection.low_shape)

    def project(
        self,
        matrix: Tensor,  # (m, n), divided as the weight
        projection: Projection,
        bases: tuple[Tensor, ...],  # as own_bases gives them
    ) -> Tensor:
        """Coordinates of ``matrix`` of ``projection.low_shape``, divided along the long dimension.

        Where the side :meth:`crosses`, ``l r (w - 1) / w`` elements travel (reduce-scatter); otherwise nothing.
        """
        from torch.distributed.tensor import Partial, Replicate

        part = projection.project(dtensors.local(matrix), bases)
        if not self.crosses(projection.side):
            return self.divided_low(part, projection)
        summed = tuple(Partial() if axis == self.shards.axis else Replicate() for axis in range(self.shards.mesh.ndim))
        whole = dtensors.joined(part, self.shards.mesh, summed, projection.low_shape)
        divided = whole.redistribute(placements=self.shards.placements(self.low_dim(projection.side)))
        # The part may be a view of a padded buffer, and torch's fused optimizers walk through memory as it lies.
        return self.divided_low(dtensors.local(divided), projection)

    def spread(
        self,
        low: Tensor,  # low_shape, divided along the long dimension
        projection: Projection,
    ) -> Tensor:
        """What of a low-rank update this process needs for its part of the weight: its part, or all (gathered)."""
        return dtensors.whole(low) if self.crosses(projection.side) else dtensors.local(low)

    def own_bases(self, bases: tuple[Tensor, ...], side: Side) -> tuple[Tensor, ...]:
        """What of the bases this process needs: rows of the one that acts on the divided dimension, all of another."""
        return tuple(self._own(basis, acts_on) for basis, acts_on in zip(bases, _acts_on(side), strict=True))

    def _own(self, basis: Tensor, acts_on: int) -> Tensor:
        if acts_on != self.dim:
            return dtensors.whole(basis)
        if dtensors.is_sharded(basis):
            return dtensors.local(basis)
        first, last = self.shards.extent(basis.shape[0])
        return basis[first:last]

    def gathers(self, bases: StoredBases, side: Side) -> bool:
        """Whether :meth:`own_bases` has to gather one."""
        if isinstance(bases, DrawnBases):
            return False
        pairs = zip(bases.parts, _acts_on(side), strict=True)
        return any(acts_on != self.dim and dtensors.is_sharded(part.codes) for part, acts_on in pairs)

    def at_rest(self, bases: StoredBases, side: Side, *, divide: bool) -> StoredBases:
        """Bases as they are kept between steps.

        Each process keeps the rows that act on its rows or columns of the weight. Of a basis that acts on the dimension
        that is not divided it needs all at each step, and keeps all, unless ``divide`` says to gather it then.

        Args:
            bases: All of them, plain.
            side: Which sides they project.
            divide: ``basis_placement="shard"``.
        """
        if isinstance(bases, DrawnBases):  # a number, which all keep
            return bases
        parts = []
        for part, acts_on in zip(bases.parts, _acts_on(side), strict=True):
            if not part.is_coded and self.dim is not None and (divide or acts_on == self.dim):
                first, last = self.shards.extent(part.shape[0])
                rows = part.codes[first:last].clone()  # not a view, which would keep all of them
                placements = self.shards.placements(0)
                part = replace(part, codes=dtensors.joined(rows, self.shards.mesh, placements, part.shape))
            parts.append(part)
        return replace(bases, parts=tuple(parts))

    def basis_part_shapes(
        self, projection: Projection, *, divide: bool, index: int | None = None
    ) -> tuple[tuple[int, int], ...]:
        """Shapes of what a process keeps of the bases, as :meth:`at_rest` divides them; this one without ``index``."""
        shapes = []
        for (rows, rank), acts_on in zip(projection.basis_shapes, _acts_on(projection.side), strict=True):
            first, last = self.shards.extent(rows, index) if divide or acts_on == self.dim else (0, rows)
            shapes.append((last - first, rank))
        return tuple(shapes)

    def gathered(
        self,
        matrix: Tensor,  # (m, n), divided as the weight
        team: Team,
        *,
        owner: int,
    ) -> Tensor:
        """The whole matrix, on ``owner`` only: elsewhere it is this process's part still.

        Collective among the processes with the parts of ``owner``'s weight; they send ``m n (w - 1) / w`` elements.
        """
        part = dtensors.local(matrix)
        if self.dim is None:
            return part
        group = self.shards.group
        destination = team.global_rank(owner)
        if destination not in dist.get_process_group_ranks(group):  # replicas have parts of their own
            return part
        oriented = part if self.dim == 0 else part.mT
        chunk = math.ceil(self.shape[self.dim] / self.shards.size)
        padded = oriented.new_zeros(chunk, oriented.shape[1])
        padded[: oriented.shape[0]] = oriented
        mine = team.rank == owner
        pieces = [torch.empty_like(padded) for _ in range(self.shards.size)] if mine else None
        team.sent += 0 if mine else padded.nbytes
        dist.gather(padded, pieces, group=group, dst=destination)
        if pieces is None:
            return part
        joined = torch.cat(pieces)[: self.shape[self.dim]]
        return joined if self.dim == 0 else joined.mT


def _acts_on(side: Side) -> tuple[int, ...]:
    """For each basis the dimension of the weight that it projects."""
    return {"left": (0,), "right": (1,), "full": (0, 1)}[side]


def common_shards(weights: Mapping[str, Tensor]) -> Shards | None:
    """Among whom the weights are divided; None if they are plain tensors.

    Args:
        weights: By name.

    Raises:
        ValueError: If some are divided and others are not, or on another mesh.
    """
    kinds: dict[Shards | None, str] = {}
    for name, weight in weights.items():
        sharding = Sharding.of(weight, name=name)
        kinds.setdefault(sharding.shards if sharding is not None else None, name)
    if len(kinds) > 1:
        said = "; ".join(f"{name}: {_said(shards)}" for shards, name in kinds.items())
        raise ValueError(
            f"The projected weights are not all sharded alike ({said}). Shard them on one mesh, or name those of the "
            "one kind in ignore_modules."
        )
    return next(iter(kinds), None)


def _said(shards: Shards | None) -> str:
    return "not sharded" if shards is None else f"mesh {tuple(shards.mesh.shape)}, divided along axis {shards.axis}"


def shard_placement(shards: int, proj_type: ProjType = "std") -> Callable[[torch.nn.Parameter], Shard | None]:
    """Where to cut each matrix so that an ordinary low-rank step sends nothing: for ``fully_shard``.

    A matrix that is projected on the left (wide, with ``std``) is cut along its columns, where they can be divided
    evenly, as FSDP2 demands; all others along their rows, as ever.

    Args:
        shards: Number of processes that share a weight.
        proj_type: As in :class:`~lightning_galore.config.GaLoreConfig`.

    Example:
        >>> place = shard_placement(8)
        >>> place(torch.nn.Parameter(torch.zeros(16, 64)))
        Shard(dim=1)
        >>> place(torch.nn.Parameter(torch.zeros(64, 16))) is None
        True
    """
    from torch.distributed.tensor import Shard

    def place(param: torch.nn.Parameter) -> Shard | None:
        if param.ndim != 2 or param.shape[1] % shards:
            return None
        side = resolve_side(proj_type, (param.shape[0], param.shape[1]))
        return Shard(1) if side == "left" else None

    return place
