# SPDX-License-Identifier: Apache-2.0
"""Live bytes by category while tensors come and go, real ones or fake ones, and the moment when there are most."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from typing_extensions import override

Category = Literal["weights", "gradients", "moments", "bases", "activations", "workspace"]
CATEGORIES: tuple[Category, ...] = ("weights", "gradients", "moments", "bases", "activations", "workspace")
Phase = Literal["forward", "backward", "optimizer"]

_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
#: What a tensor without data answers where a program looks at a number: 1, which is finite, not zero, and true.
_ANSWERS: dict[Any, Any] = {_aten.equal.default: False, _aten.is_nonzero.default: True}


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes at one moment.

    Args:
        total: All that count.
        by_category: All, by category.
        phase: What ran.
        order: How many gradients were complete then.
        module: The module whose forward ran last.
    """

    total: int = 0
    by_category: Mapping[str, int]
    phase: Phase = "forward"
    order: int = 0
    module: str = ""


NOTHING = Moment(by_category=dict.fromkeys(CATEGORIES, 0))


class MemoryTracker(TorchDispatchMode):
    """Counts each distinct storage that comes out of an operation inside, from then until it is freed, by category.

    Not torch.distributed's MemTracker: that one tells parameters, gradients and optimizer states apart by module hooks
    and by the call of ``step``, and knows neither bases nor weights that move in backward. What a kernel allocates
    inside is not seen, and neither is what an allocator keeps or a context takes.

    Args:
        answers: Answer questions about the values of fake tensors, which have none: each number is 1.
        shares: What part of a category counts, where several devices divide it: which moment is the worst may change
            with that. All of it, where nothing is said.
    """

    def __init__(self, *, answers: bool = False, shares: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self._answers = answers
        self._shares: dict[str, float] = dict(shares or {})
        self._held: dict[int, tuple[int, Category]] = {}
        self._foreign: set[int] = set()
        self.live: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self.total = 0
        self.peak = NOTHING
        self.most: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self.phase: Phase = "forward"
        self.order = 0
        self.module = ""

    def restart(self) -> None:
        """Look for the peak anew, from what is alive now."""
        self.order, self.peak, self.most = 0, NOTHING, dict(self.live)
        self._look()

    def hold(self, value: Any, category: Category) -> None:
        """Count the tensors in ``value`` under ``category`` from now on, whatever they counted as before.

        Args:
            value: A tensor, or any nesting of mappings and sequences of them.
            category: Where they belong.
        """
        for storage in _storages(value):
            self._foreign.discard(storage._cdata)
            self._meet(storage, category)
            size, before = self._held[storage._cdata]
            self._held[storage._cdata] = size, category
            self.live[before] -= size
            self.live[category] += size
        self._look()

    @override
    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is _DEVICE:  # asked of fakes for every operation, and gives no tensor
            return func(*args)
        if self._answers:
            if func is _aten._local_scalar_dense.default:
                return _one(args[0])
            if func in _ANSWERS:
                return _ANSWERS[func]
        for value in tree_leaves((args, kwargs)):
            # What was there before and nobody has named is not ours to count.
            for storage in _storages(value):
                if storage._cdata not in self._held and storage._cdata not in self._foreign:
                    self._foreign.add(storage._cdata)
                    weakref.finalize(storage, self._foreign.discard, storage._cdata)
        output = func(*args, **kwargs)
        category: Category = "workspace" if self.phase == "optimizer" else "activations"
        for value in tree_leaves(output):
            for storage in _storages(value):
                self._meet(storage, category)
        self._look()
        return output

    def _meet(self, storage: torch.UntypedStorage, category: Category) -> None:
        key = storage._cdata
        if key in self._held or key in self._foreign:
            return
        size = storage.nbytes()
        self._held[key] = size, category
        self.live[category] += size
        self.total += size
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        size, category = self._held.pop(key)
        self.live[category] -= size
        self.total -= size

    def _look(self) -> None:
        counted = self.total
        if self._shares:
            counted = round(sum(size * self._shares.get(category, 1.0) for category, size in self.live.items()))
        if counted > self.peak.total:
            self.peak = Moment(
                total=counted,
                by_category=dict(self.live),
                phase=self.phase,
                order=self.order,
                module=self.module,
            )
        for category, size in self.live.items():
            if size > self.most[category]:
                self.most[category] = size


def _one(value: Tensor) -> int | float | bool:
    if value.dtype == torch.bool:
        return True
    return 1.0 if value.dtype.is_floating_point else 1


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            for name in value.__tensor_flatten__()[0]:
                yield from _storages(getattr(value, name))
        elif value.layout == torch.strided:
            yield value.untyped_storage()
    elif isinstance(value, (Mapping, list, tuple, set)):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _storages(one)
