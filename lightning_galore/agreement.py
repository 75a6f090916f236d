# SPDX-License-Identifier: Apache-2.0
"""One process finds a basis and all take it: the same gradient gives other bits under another number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_galore import storage
from lightning_galore.bases import DrawnBases, StoredBases
from lightning_galore.change import change_between
from lightning_galore.distributed import Team
from lightning_galore.refresh import REPORTED, Due, Refresh, Refresher
from lightning_galore.target_table import Target

# How a basis is kept, as a number in the header.
_KINDS = ("int4", "int8", "fp32", "bf16", "fp16", "fp64", "seed")
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_MOST_BASES = 8  # of one weight: a tensor has one for each mode
_FIXED = 9 + _MOST_BASES  # numbers in the header before the spectrum


class Agreement:
    """Refreshes of weights whose gradients are the same on all processes, or parts of the same, each by one of them.

    Where each holds a part, the owner of a refresh gathers the gradient: no process holds more than one whole matrix.

    Args:
        team: The processes.
        refresher: Finds bases.
    """

    def __init__(self, team: Team, refresher: Refresher) -> None:
        self._team, self._refresher = team, refresher
        self._owners: dict[Target, int] = {}
        self._mine: dict[Target, Refresh] = {}
        self._turn = 0

    def divide(self, due: Sequence[Due]) -> None:
        """Divide refreshes that come next among the processes by their cost, and do this one's share now.

        Not where a budget caps the ranks: there each refresh must know what the one before has taken.
        """
        if self._refresher.budget is not None or len(due) < 2:
            return
        costs = [math.prod(one.target.projection.shape) * float(one.target.projection.rank) for one in due]
        owners = self._team.divide(costs)
        self._owners = {one.target: owner for one, owner in zip(due, owners, strict=True)}
        for together in _rounds(due, owners):
            self._work(together)  # whose variables are gone before the next round gathers

    def _work(self, together: Sequence[Due]) -> None:
        """Refresh weights of which each process owns at most one."""
        # All take part in gathering before any begins to work, so that they work at the same time.
        for one in [self._gathered(one, self._owners[one.target]) for one in together]:
            if self._owners[one.target] == self._team.rank:
                self._mine[one.target] = self._refresher.refresh(one)

    def refresh(self, one: Due) -> Refresh:
        """What the weight's owner finds; every process calls this for the same weights in the same order."""
        owner = self._owners.pop(one.target, None)
        mine = self._mine.pop(one.target, None)
        if owner is None:
            owner, self._turn = self._turn % self._team.size, self._turn + 1
            one = self._gathered(one, owner)
        else:
            one = replace(one, state=one.state.gathered())
        if owner == self._team.rank:
            refresh = mine or self._refresher.refresh(one)
            self._team.share(_header(refresh, one.grad.device), owner=owner)
            for tensor in _tensors(refresh.bases):
                self._team.share(tensor, owner=owner)
            return refresh
        header = self._team.share(_header(None, one.grad.device), owner=owner).tolist()
        bases = self._allocated(header, one)
        for tensor in _tensors(bases):
            self._team.share(tensor, owner=owner)
        return self._received(header, bases, one)

    def agree(self, number: Tensor) -> Tensor:
        """A 0-D tensor as the first process has it: schedules decide by it, and must do so alike."""
        return self._team.share(number.clone(), owner=0)

    def _gathered(self, one: Due, owner: int) -> Due:
        """The same with whole bases everywhere, and the whole gradient on the owner; all processes call it."""
        if one.sharding is None:
            return one
        grad = one.sharding.gathered(one.grad, self._team, owner=owner)
        return replace(one, grad=grad, state=one.state.gathered())

    def forget(self) -> None:
        """No refresh waits any more."""
        self._owners.clear()
        self._mine.clear()

    def _allocated(self, header: Sequence[float], one: Due) -> StoredBases | None:
        rank = int(header[2])
        if not rank:
            return None
        shapes, orthonormal = one.target.projection.with_rank(rank).basis_shapes, self._refresher.subspace.orthonormal
        if _KINDS[int(header[9])] == "seed":  # which is all that there is to hand over
            number = (int(header[7]) << 32) + int(header[8])
            return DrawnBases(number=number, shapes=shapes, device=one.grad.device, orthonormal=orthonormal)
        parts = tuple(
            storage.allocate(shape, storage=_KINDS[int(kind)], device=one.grad.device)
            for shape, kind in zip(shapes, header[9:_FIXED], strict=False)
        )
        return StoredBases(parts=parts, orthonormal=orthonormal)

    def _received(self, header: Sequence[float], bases: StoredBases | None, one: Due) -> Refresh:
        found, finite, _, overlap, cosine, changes, count = header[:7]
        change = None
        if bases is not None:
            self._refresher.note_rank(one.target, bases.rank)
        if bases is not None and changes:
            old, new = one.state.bases.read(one.grad.dtype), bases.read(one.grad.dtype)
            change = change_between(old, new, one.target.projection)
        return Refresh(
            bases=bases,
            found=bool(found),
            finite=bool(finite),
            change=change,
            overlap=overlap,
            cosine=cosine,
            spectrum=tuple(header[_FIXED : _FIXED + int(count)]),
        )


def _rounds(due: Sequence[Due], owners: Sequence[int]) -> Iterator[list[Due]]:
    """All of ``due``, so that no owner has two in one round."""
    queues: dict[int, list[Due]] = {}
    for one, owner in zip(due, owners, strict=True):
        queues.setdefault(owner, []).append(one)
    for turn in range(max(map(len, queues.values()))):
        yield [queue[turn] for queue in queues.values() if turn < len(queue)]


def _header(refresh: Refresh | None, device: torch.device) -> Tensor:
    """What is no tensor of a refresh, as numbers; zeros without one."""
    header = torch.zeros(_FIXED + REPORTED, dtype=torch.float64)
    if refresh is not None:
        kinds, number = [_kind(part) for part in refresh.bases.parts] if refresh.bases else [], 0
        if isinstance(refresh.bases, DrawnBases):
            kinds, number = [_KINDS.index("seed")], refresh.bases.number
        rank = refresh.bases.rank if refresh.bases else 0
        fixed = [refresh.found, refresh.finite, rank, refresh.overlap, refresh.cosine, refresh.change is not None]
        halves = [number >> 32, number & 0xFFFFFFFF]  # fp64 holds 53 bits only
        kinds += [0] * (_MOST_BASES - len(kinds))
        numbers = [*fixed, len(refresh.spectrum), *halves, *kinds, *refresh.spectrum]
        header[: len(numbers)] = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    return header.to(device)


def _kind(part: storage.Stored) -> int:
    if part.is_coded:
        return _KINDS.index("int8" if part.codes.dtype == torch.int8 else "int4")
    return _KINDS.index(_DTYPES[part.codes.dtype])


def _tensors(bases: StoredBases | None) -> list[Tensor]:
    parts = bases.parts if bases is not None else ()
    return [tensor for part in parts for tensor in (part.codes, part.absmax) if tensor is not None]
