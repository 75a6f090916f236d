# SPDX-License-Identifier: Apache-2.0
"""Norms of the gradients of one optimizer step, most of which are gone when somebody asks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_galore.linalg import norm_sq
from lightning_galore.low_grad import LowGrad
from lightning_galore.shards import Shards


class GradNorms:
    """Squared norms of what the hooks have consumed in this window.

    Where each process holds a part of every weight, these are its shares, which are added up when somebody asks.
    """

    def __init__(self) -> None:
        #: Who holds the other parts; None where each process holds whole weights.
        self.shards: Shards | None = None
        self._full: dict[Tensor, Tensor] = {}
        self._clamped: dict[Tensor, Tensor] = {}
        self._exact: dict[Tensor, bool] = {}

    def clear(self) -> None:
        """Begin a new window."""
        self._full.clear()
        self._clamped.clear()
        self._exact.clear()

    def note(self, param: Tensor, grad: Tensor, *, exact: bool) -> None:
        """A full gradient, before anything has become of it.

        Args:
            param: Its parameter.
            grad: The gradient.
            exact: Whether it is all that the step will see, but for what has come before.
        """
        # After a second gradient in one window the cross term of the two is gone, and with it the norm of their sum.
        self._exact[param] = exact and param not in self._full
        self._full[param] = self._share(grad)

    def note_clamped(self, param: Tensor, grad: Tensor) -> None:
        """The gradient of :meth:`note`, with its entries clamped."""
        self._clamped[param] = self._share(grad)

    def settle(self, param: Tensor, grad: Tensor | None, *, exact: bool) -> None:
        """What counts for a parameter, in place of what was noted: another gradient, full (``exact``) or low-rank."""
        self._exact[param] = exact
        if grad is not None:
            self._full[param] = self._share(grad)

    def is_exact(self, param: Tensor) -> bool:
        """Whether the norm of the parameter's full gradient is known."""
        return self._exact.get(param, False)

    def of(self, param: Tensor, low_grad: LowGrad) -> Tensor:
        """Squared norm of a weight's gradient (clamped, if it was): the full one where known, else the low-rank one."""
        if self.is_exact(param):
            share = self._clamped.get(param, self._full[param])
        else:
            share = self._share(low_grad.grad if param.grad is None else param.grad)
        return self._added(share)

    def residual_sq(self, waiting: Mapping[Tensor, LowGrad]) -> Tensor | None:
        """Squared norms of what projecting left out of waiting gradients, ``|G|^2 - |R|^2``, ``(k,)``; None for none.

        Exact for one backward a window. A weight that got several gradients counts with its low-rank norm only.
        """
        shares = [
            self._full[param] - self._share(low_grad.grad)
            for param, low_grad in waiting.items()
            if self._exact.get(param)
        ]
        return self._added(torch.stack(shares)).clamp(min=0) if shares else None

    def total(self, grads: Iterable[Tensor], moved: Iterable[Tensor], residual: Tensor | None) -> Tensor:
        """Norm of several gradients together, 0-D.

        Args:
            grads: Those that are there.
            moved: Parameters whose gradients are not.
            residual: What :meth:`residual_sq` gave, if it shall count.
        """
        shares: list[Tensor] = [*map(self._share, grads), *(self._full[param] for param in moved)]
        if not shares:
            return torch.zeros(())
        total = self._added(torch.stack(shares).sum())  # one device, as the optimizer's state
        return (total if residual is None else total + residual.sum()).sqrt()

    def carrier(self, norm: Tensor) -> Tensor:
        """A 0-D tensor as clipping and scaling may see it among gradients of these parameters."""
        return norm if self.shards is None else self.shards.replicated(norm)

    def _share(self, grad: Tensor) -> Tensor:
        return norm_sq(grad) if self.shards is None else self.shards.share_sq(grad)

    def _added(self, shares: Tensor) -> Tensor:
        return shares if self.shards is None else self.shards.total(shares)
