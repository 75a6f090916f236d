# SPDX-License-Identifier: Apache-2.0
"""Tensors of which each process holds a part (``DTensor``): whether one is, this process's part of it, the whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def is_sharded(value: object) -> TypeGuard[DTensor]:
    """Whether ``value`` is a DTensor, as FSDP2 and tensor parallelism make them."""
    # Where nobody has imported the module there is none, and it takes most of a second to import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, which shares memory with ``tensor``; a plain tensor is its own."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():  # the part itself, not a node of a graph
        return tensor.to_local()


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all parts; collective, but for a plain one, which it is already."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


def joined(
    part: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int] | None = None
) -> DTensor:
    """A DTensor made of what each process holds. Nothing travels.

    Args:
        part: This process's.
        mesh: The processes.
        placements: What the parts are of the whole, for each dimension of the mesh.
        shape: Of the whole, where parts may differ in size; None where it follows from one.
    """
    from torch.distributed.tensor import DTensor

    sizes: dict[str, Any] = {}
    if shape is not None:
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        sizes = {"shape": torch.Size(shape), "stride": tuple(strides)}
    return DTensor.from_local(part.contiguous(), mesh, tuple(placements), run_check=False, **sizes)


def divided(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement] | None) -> DTensor:
    """A DTensor of a tensor that every process has whole: each keeps its part. Nothing travels.

    Args:
        tensor: The same everywhere.
        mesh: The processes.
        placements: How it is divided; None if it is not.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    wanted = placements if placements is not None else [Replicate()] * mesh.ndim
    return distribute_tensor(tensor, mesh, wanted, src_data_rank=None)


def empty(shape: Sequence[int], dtype: torch.dtype, like: DTensor, placements: Sequence[Placement] | None) -> DTensor:
    """Memory for a DTensor on the processes and device of ``like``.

    Args:
        shape: Of the whole.
        dtype: Of its entries.
        like: Another one.
        placements: How it is divided; None if it is not.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor import empty as make

    mesh = like.device_mesh
    wanted = placements if placements is not None else [Replicate()] * mesh.ndim
    return make(*shape, dtype=dtype, device_mesh=mesh, placements=wanted)
