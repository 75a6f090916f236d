# SPDX-License-Identifier: Apache-2.0
"""What is measured on: weight sets of known models, and gradients for them with a stated spectrum.

Shapes: weight and gradient ``(m, n)``, rank ``r``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SEED = 0
DECAY = 0.7  # singular values i^-0.7, i = 1, 2, ...
NOISE = 0.01  # of the energy, white: the batch noise that no basis should follow


@dataclass(frozen=True, kw_only=True)
class WeightSet:
    """Some matrices that are refreshed or stepped together.

    Args:
        name: As it stands in the tables.
        shapes: ``(m, n)`` of each matrix.
        rank: Rank that the method's users take for them.
    """

    name: str
    shapes: tuple[tuple[int, int], ...]
    rank: int


def single(m: int, n: int, *, rank: int) -> WeightSet:
    """One matrix."""
    return WeightSet(name=f"{m}x{n}, r={rank}", shapes=((m, n),), rank=rank)


def roberta_encoder(*, layers: int, rank: int) -> WeightSet:
    """The linear weights of ``layers`` of the 12 encoder layers of RoBERTa-base (h = 768, mlp 3072)."""
    layer = ((768, 768),) * 4 + ((3072, 768), (768, 3072))
    return WeightSet(name=f"RoBERTa-base, {layers} of 12 layers, r={rank}", shapes=layer * layers, rank=rank)


def llama_60m(*, rank: int) -> WeightSet:
    """The 56 linear weights of the 8 layers of LLaMA-60M (h = 512, mlp 1376), as in the GaLore paper."""
    layer = ((512, 512),) * 4 + ((1376, 512),) * 2 + ((512, 1376),)
    return WeightSet(name=f"LLaMA-60M, 56 matrices, r={rank}", shapes=layer * 8, rank=rank)


def llama_130m(*, layers: int, rank: int) -> WeightSet:
    """The linear weights of ``layers`` of the 12 layers of LLaMA-130M (h = 768, mlp 2048), as in the GaLore paper."""
    layer = ((768, 768),) * 4 + ((2048, 768),) * 2 + ((768, 2048),)
    return WeightSet(name=f"LLaMA-130M, {layers} of 12 layers, r={rank}", shapes=layer * layers, rank=rank)


def llama_1b(*, layers: int, rank: int) -> WeightSet:
    """The linear weights of ``layers`` of the 24 layers of LLaMA-1B (h = 2048, mlp 5461), as in the GaLore paper."""
    layer = ((2048, 2048),) * 4 + ((5461, 2048),) * 2 + ((2048, 5461),)
    return WeightSet(name=f"LLaMA-1B, {layers} of 24 layers, r={rank}", shapes=layer * layers, rank=rank)


def gradients(weights: WeightSet, *, device: torch.device) -> list[Tensor]:
    """A gradient for each matrix: singular values ``i^-DECAY`` with random singular vectors, plus white noise.

    Made on the CPU from ``SEED``, so every device gets the same numbers.
    """
    generator = torch.Generator().manual_seed(SEED)
    return [_power_law(shape, generator).to(device) for shape in weights.shapes]


def other_batch(grad: Tensor) -> Tensor:
    """The gradient as another batch might have given it: half of its energy is that of an independent one.

    So the best subspaces of the two overlap by about a half, as was seen between batches of real training; white noise
    instead would leave a dominant subspace where it is, and flatter whatever starts from it.
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    other = _power_law((grad.shape[0], grad.shape[1]), generator).to(grad.device)
    return (grad + other * (grad.norm() / other.norm())) / 2**0.5


def _power_law(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    m, n = shape
    width = min(m, n)
    left = torch.linalg.qr(torch.randn(m, width, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(n, width, generator=generator)).Q
    sigma = torch.arange(1, width + 1).float() ** -DECAY
    return (left * sigma) @ right.mT + _white(shape, NOISE * sigma.square().sum(), generator)


def _white(shape: tuple[int, ...], energy: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    return noise * (energy / noise.square().sum()).sqrt()


def load_gradients(path: Path, *, device: torch.device) -> dict[str, Tensor]:
    """Real gradients: the matrices of a file that ``torch.save`` wrote.

    Args:
        path: A dictionary from name to tensor.
        device: Where the matrices shall be.

    Raises:
        ValueError: If the file holds something else, or no matrix.
    """
    held = torch.load(path, weights_only=True, map_location="cpu")
    if not isinstance(held, Mapping) or not all(isinstance(value, Tensor) for value in held.values()):
        raise ValueError(f"gradients={path} must hold a dictionary from name to tensor; write it with torch.save.")
    matrices = {str(name): value.float().to(device) for name, value in held.items() if value.ndim == 2}
    if not matrices:
        raise ValueError(f"gradients={path} holds no matrix; only gradients of order 2 have a subspace.")
    return matrices
