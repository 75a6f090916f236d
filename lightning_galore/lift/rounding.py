# SPDX-License-Identifier: Apache-2.0
"""How a weight that is kept in few bits takes a change."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_galore import storage
from lightning_galore.config import GaLoreConfig
from lightning_galore.subspace import seeded_generator


def warn_of_idle_rounding(config: GaLoreConfig, params: Iterable[Tensor]) -> None:
    """Say that ``stochastic_round=True`` does nothing, where the user has asked for it and no weight is in few bits."""
    if not config.stochastic_round or not config.names_setting("stochastic_round"):
        return
    if not any(param.dtype == torch.bfloat16 or isinstance(param, storage.Int8Tensor) for param in params):
        warnings.warn(
            "stochastic_round=True rounds nothing: no weight is bf16 or int8. Set precision='bf16-true' or "
            "weight_storage='int8', or leave it out.",
            stacklevel=4,
        )


# Entries that are rounded at a time: 64 MB in fp32. A multiple of the four that one draw serves.
_PIECE = 2**24


class Rounding:
    """How a weight that is kept in few bits takes a change.

    A change smaller than half the distance to the next number that the weight can be is lost when it is rounded to the
    nearest, however often it comes. Rounded up or down at random it arrives in the mean (for int8 weights as in
    Q-GaLore, arXiv 2407.08296).

    Args:
        stochastic: ``stochastic_round``.
        seed: Of the random numbers. Each weight and step draws its own, so that a resumed run repeats them.
    """

    def __init__(self, *, stochastic: bool, seed: int) -> None:
        self.stochastic, self._seed = stochastic, seed

    def concerns(self, weight: Tensor) -> bool:
        """Whether a plain weight is rounded at random."""
        return self.stochastic and weight.dtype == torch.bfloat16 and not isinstance(weight, storage.Int8Tensor)

    @contextmanager
    def opened(self, weight: Tensor, *, name: str, step: int) -> Iterator[Tensor]:
        """The weight itself, or a copy in fp32 at least, which is rounded into the weight when the block is left.

        Args:
            weight: Changed in place.
            name: Of the weight.
            step: Its updates before this one.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if isinstance(weight, storage.Int8Tensor):
            wide = weight.dequantize(dtype)
            yield wide
            weight.update_(wide, self._generator(wide.device, name, step) if self.stochastic else None)
        elif self.concerns(weight):
            wide = weight.to(dtype)
            yield wide
            storage.round_stochastically_(weight, wide, self._generator(wide.device, name, step))
        else:
            yield weight

    def add_(self, weight: Tensor, update: Tensor, *, alpha: float, shrink: float, name: str, step: int) -> None:
        """``weight`` becomes ``shrink`` times itself and ``alpha`` times ``update``, rounded at random.

        Piece by piece: an output head is the largest tensor of a model, and a copy of it in fp32 would be the peak.

        Args:
            weight: bf16, changed in place.
            update: Of its shape.
            alpha: Factor on ``update``.
            shrink: Factor on ``weight``.
            name: Of the weight.
            step: Its updates before this one.
        """
        generator = self._generator(weight.device, name, step)
        for part, own in zip(_pieces(weight), _pieces(update), strict=True):
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            storage.round_stochastically_(part, wide.mul_(shrink).add_(own, alpha=alpha), generator)

    def _generator(self, device: torch.device, name: str, step: int) -> torch.Generator:
        return seeded_generator(device, seed=self._seed, name=f"{name}/rounding", draw=step)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Parts of it that share its memory, in the order of its entries; a tensor with gaps in one."""
    return tensor.detach().view(-1).split(_PIECE) if tensor.is_contiguous() else [tensor.detach()]
