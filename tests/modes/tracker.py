# SPDX-License-Identifier: Apache-2.0
"""What operations do: bytes that they allocate and still hold, their names, their multiplications. Also on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts every distinct storage that comes out of an operation inside, from then until it is freed.

    What goes into an operation before it came out of one was there before, and is not counted. Work space inside a
    kernel is not seen.

    Example:
        >>> with LiveBytes() as tracker:
        ...     one = torch.zeros(4)
        ...     view, two = one[:2], one + 1
        ...     del two
        >>> tracker.current, tracker.peak
        (16, 32)
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = self.largest = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for value in tree_leaves((args, dict(kwargs or {}))):
            self._meet(value, counted=False)
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            self._meet(value, counted=True)
        return output

    def _meet(self, value: Any, *, counted: bool) -> None:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = self._known[key] = storage.nbytes() if counted else 0
        self.current += size
        self.peak = max(self.peak, self.current)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.current -= self._known.pop(key)


class Operators(TorchDispatchMode):
    """Notes the operators that run inside, and the multiplications of their matrix products.

    Example:
        >>> with Operators() as seen:
        ...     _ = torch.zeros(2, 3) @ torch.zeros(3, 4)
        >>> seen.multiplications
        24
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.multiplications = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func)
        self.names.append(name)
        if name.startswith(("aten.mm.", "mkldnn._linear_pointwise.")):
            # (a, k) times (k, b), or (b, k) for the latter.
            self.multiplications += args[0].numel() * args[1].numel() // args[0].shape[1]
        elif name.startswith(("aten.addmm.", "aten.addmm_.")):
            self.multiplications += args[1].numel() * args[2].shape[1]
        return func(*args, **(kwargs or {}))
