# SPDX-License-Identifier: Apache-2.0
"""One weight's low-rank gradient on its way from backward to the step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_galore import dtensors, storage
from lightning_galore.coordinates import Coordinates
from lightning_galore.refresh import Refresh
from lightning_galore.subspace import Projection
from lightning_galore.target_table import Target


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
        grad: The low-rank gradient, of ``coordinates.projection.low_shape``.
        target: The weight's name and geometry, whose rank is the upper bound of an adaptive one.
        coordinates: What the gradient was projected with.
        refresh: What happened if a refresh was due.
        energy: Share of the gradient's energy that the bases hold, 0-D, where somebody wants to know.
        full: The gradient itself ``(m, n)``, for a lift that needs it.
        accumulator: Holds the gradient while it waits; None for the gradient itself.
    """

    def __init__(
        self,
        grad: Tensor,
        *,
        target: Target,
        coordinates: Coordinates,
        refresh: Refresh | None,
        energy: Tensor | None = None,
        full: Tensor | None = None,
        accumulator: Accumulator | None = None,
    ) -> None:
        self.target, self.coordinates = target, coordinates
        self.refresh, self.energy, self.full = refresh, energy, full
        self._grad: Tensor | None = grad  # until there is a proxy
        self._proxy: nn.Parameter | None = None
        self._dtype = grad.dtype
        self._accumulator = accumulator

    @property
    def projection(self) -> Projection:
        """The weight's geometry with the rank of the bases."""
        return self.coordinates.projection

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
            self._hold(self.coordinates.like(self._accumulator.take(self._dtype)))

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
        self.add_low_(self.coordinates.project(grad))

    def add_low_(self, more: Tensor) -> None:
        """Accumulate one more low-rank gradient, of the same bases."""
        if self._accumulator is not None and self._accumulator.is_full:
            self._accumulator.add(dtensors.local(more))
        else:
            self.grad.add_(more)

    def wait(self) -> None:
        """Hold as little as possible until the next backward or the step: no decoded basis, the gradient as kept."""
        self.coordinates.let_go()
        if self._accumulator is not None and not self._accumulator.is_full:
            self._accumulator.put(dtensors.local(self.grad))
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
