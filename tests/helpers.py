# SPDX-License-Identifier: Apache-2.0
"""Assertions and tiny models that several test modules share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lightning_galore import GaLoreOptimizer
from lightning_galore.state_keys import BASIS

VOCABULARY = 24
#: GaLore as published: every weight refreshes at 0, gap, 2 gap, ..., and moments stay as they are.
PLAIN: dict[str, Any] = {"stagger": False, "moments": "keep"}


def assert_orthonormal(basis: Tensor, *, atol: float | None = None) -> None:
    """The columns are orthonormal, to a few rounding errors of the dtype that they are kept in."""
    tolerance = atol or 50 * torch.finfo(basis.dtype).eps
    gram = basis.double().mT @ basis.double()
    error = float((gram - torch.eye(gram.shape[0], dtype=torch.float64)).abs().max())
    assert error <= tolerance, f"columns are not orthonormal: error {error:.1e} > {tolerance:.1e}"


def assert_same_subspace(one: Tensor, other: Tensor, *, atol: float = 1e-5) -> None:
    """Both orthonormal bases span the same subspace, whatever the signs and the order of their vectors."""
    left, right = one.double(), other.double()
    error = float((left @ left.mT - right @ right.mT).abs().max())
    assert error <= atol, f"the subspaces differ by {error:.1e} > {atol:.1e}"


def assert_state_whole(state: dict[str, object]) -> None:
    """Every tensor owns just the memory that it shows: no view keeps a larger factor alive."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            assert value.is_contiguous(), f"{key} is not contiguous"
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), f"{key} is a view"


def max_difference(one: Iterable[Tensor], other: Iterable[Tensor]) -> float:
    """Largest absolute difference over pairs of tensors."""
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(one, other, strict=True))


def same_bits(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether all pairs of tensors are equal, dtypes included."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def decaying_matrix(rows: int, columns: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A gradient-like matrix: singular values fall as ``1 / i`` above a floor of noise."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, width, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, width, dtype=torch.float64, generator=generator)).Q
    values = 1.0 / torch.arange(1, width + 1, dtype=torch.float64) + 1e-3
    return ((left * values) @ right.mT).to(dtype)


def captured_energy(matrix: Tensor, basis: Tensor) -> Tensor:
    """Share of the squared Frobenius norm of ``(d, n)`` that an orthonormal basis ``(d, r)`` keeps."""
    work = matrix.to(basis.dtype)
    return (basis.mT @ work).square().sum() / work.square().sum()


class TinyBlock(nn.Module):
    """A pre-norm transformer block. The key has no bias: its gradient would be zero but for rounding errors."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.value, self.output = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, k, v = (layer(normed).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + self.output(mixed)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class TinyTransformer(nn.Module):
    """A real language model in small: its projected weights are square (16x16), tall (40x16) and wide (16x40)."""

    def __init__(self, *, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(VOCABULARY, 16)
            self.blocks = nn.ModuleList(TinyBlock(16, 40) for _ in range(layers))
            self.norm = nn.LayerNorm(16)
            self.lm_head = nn.Linear(16, VOCABULARY)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))

    def matrices(self) -> list[nn.Parameter]:
        """The weights that ``all-linear`` projects."""
        linear = (module for module in self.blocks.modules() if isinstance(module, nn.Linear))
        return [module.weight for module in linear]


def language_loss(model: nn.Module, step: int) -> Tensor:
    """Next-token loss of one small batch that depends on nothing but ``step``."""
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(VOCABULARY, (4, 9), generator=generator).to(next(model.parameters()).device)
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Iterable[int],
    *,
    before_step: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """Train on :func:`language_loss` and return the losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = language_loss(model, step)
        loss.backward()
        before_step(step)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class Matrices(nn.Module):
    """Bias-free layers of given shapes, for tests that hand out gradients themselves."""

    def __init__(self, *shapes: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False, dtype=dtype) for m, n in shapes)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))

    def give_gradients(self, step: int, *, scale: float = 1.0) -> None:
        """Gradients that depend on nothing but ``step``."""
        generator = torch.Generator().manual_seed(step)
        for weight in self.parameters():
            weight.grad = (scale * torch.randn(weight.shape, generator=generator)).to(weight.dtype)


def quadratic_loss(weights: Iterable[Tensor]) -> Tensor:
    """Half the mean squared distance from one: a loss that every optimizer must decrease."""
    return sum(((weight.float() - 1.0) ** 2).sum() for weight in weights) / 2  # type: ignore[return-value]


def assert_trains_every_parameter(make: Callable[[Iterable[Tensor]], torch.optim.Optimizer]) -> None:
    """A transformer under low-rank training with ``make``'s optimizer: the loss falls, and everything moves."""
    model = TinyTransformer()
    optimizer = GaLoreOptimizer(make(model.parameters()), model, rank=4, update_proj_gap=10, scale=1.0)
    start = [param.detach().clone() for param in model.parameters()]
    losses = train(model, optimizer, [0] * 30)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(param, old) for param, old in zip(model.parameters(), start, strict=True))


def assert_proxies_pass_for_parameters(
    model: Matrices,
    make: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    give_gradients: Callable[[int], object],
) -> None:
    """The wrapped optimizer does to a proxy what it does to a low-rank parameter that it knows all along."""
    optimizer = GaLoreOptimizer(make(model.parameters()), model, rank=48, update_proj_gap=1000, scale=1.0, **PLAIN)
    weights = list(model.parameters())
    expected = [weight.detach().clone() for weight in weights]
    low = [nn.Parameter(w.new_zeros(optimizer.targets[w].projection.low_shape)) for w in weights]
    other = make(low)
    for step in range(10):
        give_gradients(step)
        optimizer.step()
        held = [(optimizer.targets[w].projection, (optimizer.state[w][BASIS],)) for w in weights]
        for param, weight, (projection, bases) in zip(low, weights, held, strict=True):
            assert weight.grad is not None
            param.grad = projection.project(weight.grad, bases)
            param.data.zero_()
        other.step()
        for param, weight, (projection, bases) in zip(low, expected, held, strict=True):
            projection.add_back_(weight, param.detach(), bases, alpha=1.0)
    assert same_bits(weights, expected)
