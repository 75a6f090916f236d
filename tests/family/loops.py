# SPDX-License-Identifier: Apache-2.0
"""What the tests of the family's methods share: gradients handed out, and a run beside its reference."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from tests.helpers import Matrices

#: Tall, wide and square.
SHAPES = [(12, 7), (7, 12), (9, 9)]
RANKS = [1, 3]


def gradient(step: int, shape: Sequence[int], *, spikes: bool = False) -> Tensor:
    """A gradient in fp64 that depends on nothing but ``step``: a common direction, noise, and now and then a spike."""
    generator = torch.Generator().manual_seed(7919 * step + 1)
    common = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    grad = 0.5 * common + torch.randn(*shape, dtype=torch.float64, generator=generator)
    if spikes and step % 7 == 5:
        grad.view(-1)[step % grad.numel()] *= 1e4
    return grad


def run(
    optimizer: GaLoreOptimizer, params: Sequence[nn.Parameter], steps: Sequence[int], *, spikes: bool = True
) -> None:
    """Step on :func:`gradient`, in whatever mode: through a backward."""
    for step in steps:
        optimizer.zero_grad()
        loss = sum((gradient(step, p.shape, spikes=spikes).to(p.dtype) * p).sum() for p in params)
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()


def make(
    settings: dict[str, Any],
    shapes: Sequence[tuple[int, int]] = ((12, 7), (7, 12)),
    *,
    base: Callable[[Any], torch.optim.Optimizer] | None = None,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
) -> tuple[Matrices, GaLoreOptimizer]:
    """Matrices and, with ``bias``, one vector that is not projected, under ``base`` (AdamW, without decay)."""
    model = Matrices(*shapes, dtype=dtype)
    if bias:
        model.bias = nn.Parameter(torch.linspace(-1, 1, 5, dtype=dtype))
    base = base or (lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0))
    return model, GaLoreOptimizer(base(model.parameters()), model, **settings)


def assert_resume_is_exact(
    settings: dict[str, Any], *, stop: int = 11, end: int = 30, spikes: bool = True, **how: Any
) -> None:
    """A run that is saved, loaded by torch's safe loader into fresh objects and gone on with, ends bit by bit alike."""
    model, optimizer = make(settings, **how)
    run(optimizer, list(model.parameters()), range(stop), spikes=spikes)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other, again = make(settings, **how)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    for one, two in ((model, optimizer), (other, again)):
        run(two, list(one.parameters()), range(stop, end), spikes=spikes)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert_same_state(dict(optimizer.state[a]), dict(again.state[b]))


def assert_same_state(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit, dtypes included."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[key].dtype, key
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def copied(params: Sequence[Tensor]) -> list[Tensor]:
    """Detached copies."""
    return [copy.deepcopy(param.detach()) for param in params]
