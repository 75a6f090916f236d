# SPDX-License-Identifier: Apache-2.0
"""One weight's low-rank gradient on its way from backward to the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_galore import storage
from lightning_galore.bases import StoredBases
from lightning_galore.refresh import Refresh
from lightning_galore.subspace import Projection
from lightning_galore.targets import Target


class Accumulator:
    """A tensor that waits in another form than it is used in.

    Args:
        kept: ``accumulator_storage``, but ``param``.
        draw: Gives a generator for each rounding, on the gradient's device.
    """

    def __init__(self, kept: str, draw: Callable[[], torch.Generator]) -> None:
        self._kept, self._draw = kept, draw
        self._stored: storage.Stored | None = None

    @property
    def is_full(self) -> bool:
        """Whether something waits."""
        return self._stored is not None

    @property
    def nbytes(self) -> int:
        """Bytes of what waits."""
        return storage.nbytes(self.tensors)

    @property
    def tensors(self) -> list[Tensor]:
        """What waits."""
        parts = (self._stored.codes, self._stored.absmax) if self._stored is not None else ()
        return [part for part in parts if part is not None]

    def put(self, value: Tensor) -> None:
        """Let ``value`` wait, in place of what did."""
        codec = storage.CODECS.get(self._kept)
        if codec is None:
            self._stored = storage.write(value, storage=self._kept, param_dtype=value.dtype)
            return
        # At random, so that many small gradients are not rounded away one by one.
        codes, absmax = codec.encode_stochastically(value, self._draw())
        self._stored = storage.Stored(codes=codes, absmax=absmax, shape=tuple(value.shape))

    def add(self, value: Tensor) -> None:
        """Add to what waits, in fp32 at least."""
        assert self._stored is not None
        wide = torch.promote_types(value.dtype, torch.float32)
        self.put(self._stored.read(wide).to(wide) + value)

    def take(self, dtype: torch.dtype) -> Tensor:
        """What waited, which does not any more."""
        assert self._stored is not None
        value, self._stored = self._stored.read(dtype), None
        return value.to(dtype)


class LowGrad:
    """A weight's projected gradient, waiting for a step. Dropping it drops its refresh: a skipped step loses nothing.

    Args:
        grad: The low-rank gradient, of ``projection.low_shape``.
        target: The weight's name and geometry, whose rank is the upper bound of an adaptive one.
        projection: Its geometry with the rank of the bases.
        stored: What the gradient was projected with, as it is kept.
        bases: The same, read.
        refresh: What happened if a refresh was due.
        energy: Share of the gradient's energy that the bases hold, 0-D, where somebody wants to know.
        accumulator: Holds the gradient while it waits; None for the gradient itself.
    """

    def __init__(
        self,
        grad: Tensor,
        *,
        target: Target,
        projection: Projection,
        stored: StoredBases,
        bases: tuple[Tensor, ...],
        refresh: Refresh | None,
        energy: Tensor | None = None,
        accumulator: Accumulator | None = None,
    ) -> None:
        self.target, self.projection, self.stored = target, projection, stored
        self.refresh, self.energy = refresh, energy
        self._grad: Tensor | None = grad  # until there is a proxy
        self._proxy: nn.Parameter | None = None
        self._dtype = grad.dtype
        self._accumulator = accumulator
        self._bases: tuple[Tensor, ...] | None = bases

    @property
    def bases(self) -> tuple[Tensor, ...]:
        """The bases, decoded once until :meth:`wait`."""
        if self._bases is None:
            self._bases = self.stored.read(self._dtype)
        return self._bases

    @property
    def proxy(self) -> nn.Parameter:
        """Zeros of the low-rank shape, made when they are first asked for; ``grad`` is the low-rank gradient."""
        self._fetch()
        if self._proxy is None:
            self._proxy = nn.Parameter(torch.zeros_like(self.grad))
            self._proxy.grad, self._grad = self._grad, None
        return self._proxy

    @property
    def grad(self) -> Tensor:
        """The low-rank gradient, of ``projection.low_shape``."""
        self._fetch()
        grad = self._grad if self._proxy is None else self._proxy.grad
        assert grad is not None
        return grad

    @property
    def nbytes(self) -> int:
        """Bytes of the gradient as it waits."""
        return storage.nbytes(self.held)

    @property
    def held(self) -> list[Tensor]:
        """The tensors of the gradient as it waits."""
        coded = self._accumulator.tensors if self._accumulator is not None else []
        plain = self._grad if self._proxy is None else self._proxy.grad
        return coded if plain is None else [*coded, plain]

    def _fetch(self) -> None:
        if self._accumulator is not None and self._accumulator.is_full:
            self._hold(self._accumulator.take(self._dtype))

    def _hold(self, grad: Tensor | None) -> None:
        if self._proxy is None:
            self._grad = grad
        else:
            self._proxy.grad = grad

    @property
    def skips(self) -> bool:
        """Whether the weight sits this step out: its gradient is not finite, and a basis was to come from it."""
        return self.refresh is not None and not self.refresh.finite

    def add_(self, grad: Tensor) -> None:
        """Accumulate one more full gradient ``(m, n)``: exact, because projecting is linear and the bases stay."""
        more = self.projection.project(grad, self.bases)
        if self._accumulator is not None and self._accumulator.is_full:
            self._accumulator.add(more)
        else:
            self.grad.add_(more)

    def wait(self) -> None:
        """Hold as little as possible until the next backward or the step: no decoded basis, the gradient as kept."""
        self._bases = None
        if self._accumulator is not None and not self._accumulator.is_full:
            self._accumulator.put(self.grad)
            self._hold(None)


def clip_(grad: Tensor | None, max_norm: float | None, *, norm_sq: Tensor | None = None) -> None:
    """Scale one parameter's gradient down to ``max_norm``, in place; nothing to do without either.

    Args:
        grad: A gradient, full or low-rank.
        max_norm: ``clip_weight_norm``.
        norm_sq: Squared norm of the full gradient, where ``grad`` is only its projection.
    """
    if grad is None or max_norm is None:
        return
    norm = torch.linalg.vector_norm(grad) if norm_sq is None else norm_sq.sqrt()
    grad.mul_((max_norm / norm.clamp(min=max_norm)).to(grad.dtype))
