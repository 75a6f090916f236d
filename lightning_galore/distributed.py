# SPDX-License-Identifier: Apache-2.0
"""Several processes that train one model: what they average, in which order, and how they agree on a basis."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

#: Bytes that travel together. Low-rank gradients are small, so buckets are smaller than DDP's 25 MB.
BUCKET_BYTES = 4 * 2**20
_PIECE = 2**22  # bytes of a fingerprint's temporaries are 24 times as many


class Team:
    """The processes that hold the same weights and see different data.

    Args:
        group: Their process group; None for all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        #: Bytes that this process has handed to collectives so far.
        self.sent = 0

    def start_average(self, flat: Tensor) -> Callable[[], object]:
        """Begin to average a tensor over the processes, in place; the result waits for it."""
        self.sent += flat.nbytes
        flat.div_(self.size)  # before the sum, which in half precision could overflow
        work = dist.all_reduce(flat, group=self.group, async_op=True)
        assert work is not None
        return work.wait

    def start_total(self, counts: Tensor) -> Callable[[], object]:
        """Begin to sum a tensor over the processes, in place; the result waits for it."""
        self.sent += counts.nbytes
        work = dist.all_reduce(counts, group=self.group, async_op=True)
        assert work is not None
        return work.wait

    def share(self, tensor: Tensor, *, owner: int) -> Tensor:
        """What ``owner`` holds, written into ``tensor`` everywhere else."""
        if self.rank == owner:
            self.sent += tensor.nbytes
        dist.broadcast(tensor, group=self.group, group_src=owner)
        return tensor

    def global_rank(self, rank: int) -> int:
        """Number of a process of the team among all processes."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def divide(self, costs: Sequence[float]) -> list[int]:
        """An owner for each piece of work, the dearest first to whoever has least: the same on every process."""
        loads, owners = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owners[index] = loads.index(min(loads))
            loads[owners[index]] += costs[index]
        return owners

    def differing(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors whose bits are not the same on all processes.

        Args:
            tensors: The same names on every process.
        """
        sums = torch.tensor([_fingerprint(tensor) for tensor in tensors.values()], dtype=torch.int64)
        device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
        low, high = sums.to(device, copy=True), sums.to(device, copy=True)
        dist.all_reduce(low, op=dist.ReduceOp.MIN, group=self.group)
        dist.all_reduce(high, op=dist.ReduceOp.MAX, group=self.group)
        return [name for name, same in zip(tensors, (low == high).all(1).tolist(), strict=True) if not same]


def _fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Two sums over the bits: of them, and of them by place."""
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for piece in tensor.detach().flatten().contiguous().view(torch.uint8).split(_PIECE):
        bits = piece.long()
        places = torch.arange(1, bits.numel() + 1, device=bits.device) % 65_521
        total += torch.stack([bits.sum(), (bits * places).sum()])
    first, second = total.tolist()
    return first, second


@dataclass
class _Bucket:
    keys: list[Tensor] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    nbytes: int = 0
    flats: list[tuple[list[Tensor], Tensor, Callable[[], object]]] = field(default_factory=list)
    # How many processes have a tensor of their own for each key.
    had: Tensor | None = None
    wait_for_had: Callable[[], object] = bool


class OrderedAverage:
    """Averages one tensor for each of many parameters over the processes, in an order that is fixed in advance.

    Autograd may finish gradients in another order on another process, and some not at all. So a tensor waits until all
    before it have come; what never comes is filled with zeros at the end, and counts only if another process had it.
    Whole buckets travel while backward goes on.

    Args:
        team: The processes.
        order: All parameters, the same on every process.
        done: Told of each parameter whose tensor has been averaged, in place.
        bucket_bytes: When a bucket is sent.
    """

    def __init__(
        self,
        team: Team,
        order: Iterable[Tensor],
        *,
        done: Callable[[Tensor], None],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self._team, self._done, self._limit = team, done, bucket_bytes
        self._order = list(order)
        self._next = 0
        self._ready: dict[Tensor, Tensor] = {}  # those that wait for one before them: what has travelled is let go
        self._come: set[Tensor] = set()
        self._filled: set[Tensor] = set()
        self._absent: list[Tensor] = []
        self._bucket = _Bucket()
        self._flying: deque[_Bucket] = deque()

    def has(self, param: Tensor) -> bool:
        """Whether the parameter's tensor has come."""
        return param in self._come

    def put(self, param: Tensor, tensor: Tensor) -> None:
        """Hand over a parameter's tensor, which is written when its average is there."""
        self._come.add(param)
        self._ready[param] = tensor
        while self._next < len(self._order) and self._order[self._next] in self._ready:
            key = self._order[self._next]
            ready = self._ready.pop(key)
            self._bucket.keys.append(key)
            self._bucket.tensors.append(ready)
            self._bucket.nbytes += ready.nbytes
            self._next += 1
            if self._bucket.nbytes >= self._limit:
                self._send()

    def finish(self, fill: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Average the rest.

        Args:
            fill: Gives zeros for a parameter whose tensor has not come.

        Returns:
            The parameters that no process had a tensor for.
        """
        for param in self._order:
            if param not in self._come:
                self._filled.add(param)
                self.put(param, fill(param))
        self._send()
        while self._flying:
            self._land()
        return self._absent

    def drop(self) -> None:
        """Wait for what travels, and forget it."""
        while self._flying:
            bucket = self._flying.popleft()
            for wait in (*(wait for _, _, wait in bucket.flats), bucket.wait_for_had):
                wait()

    def _send(self) -> None:
        bucket, self._bucket = self._bucket, _Bucket()
        kinds: dict[tuple[Any, ...], list[Tensor]] = {}
        for tensor in bucket.tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for tensors in kinds.values():
            flat = _flatten_dense_tensors(tensors)
            bucket.flats.append((tensors, flat, self._team.start_average(flat)))
        if bucket.keys:
            own = [key not in self._filled for key in bucket.keys]
            bucket.had = torch.tensor(own, dtype=torch.int32, device=bucket.tensors[0].device)
            bucket.wait_for_had = self._team.start_total(bucket.had)
        self._flying.append(bucket)
        while len(self._flying) > 1:  # one travels while the next is filled
            self._land()

    def _land(self) -> None:
        bucket = self._flying.popleft()
        for tensors, flat, wait in bucket.flats:
            wait()
            for tensor, mean in zip(tensors, _unflatten_dense_tensors(flat, tensors), strict=True):
                tensor.copy_(mean)
        bucket.wait_for_had()
        # A look at the counts waits for the device, so only where something was filled. All processes are told of the
        # same parameters, and at the same point: what they do then may be collective too.
        had = None
        if bucket.had is not None and not self._filled.isdisjoint(bucket.keys):
            had = bucket.had.tolist()
        bucket.tensors.clear()
        bucket.flats.clear()
        for i, param in enumerate(bucket.keys):
            if had is None or had[i]:
                self._done(param)
            else:
                self._absent.append(param)
