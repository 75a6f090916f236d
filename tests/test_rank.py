# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random

import pytest
import torch

from lightning_galore.config import GaLoreConfig
from lightning_galore.rank import RANK_RULES, EnergyRank, Extent, NoiseEdgeRank, StateBudget
from tests.helpers import decaying_matrix


def spectrum_of(matrix: torch.Tensor, known: int) -> tuple[list[float], float]:
    values = torch.linalg.svdvals(matrix.double())
    return values[:known].tolist(), float(values.square().sum())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99, 1.0])
def test_energy_takes_the_smallest_rank_that_holds_enough(share: float) -> None:
    matrix = decaying_matrix(40, 24)
    spectrum, total = spectrum_of(matrix, 24)
    rank = EnergyRank(GaLoreConfig(rank=24, rank_energy=share)).choose(spectrum, total, (40, 24))
    held = [sum(value**2 for value in spectrum[:r]) / total for r in range(25)]
    assert held[min(rank, 24)] >= share - 1e-12
    assert held[rank - 1] < share


def test_energy_asks_for_more_than_is_known_where_that_is_not_enough() -> None:
    spectrum, total = spectrum_of(torch.eye(16), 4)
    assert EnergyRank(GaLoreConfig(rank=4, rank_energy=0.9)).choose(spectrum, total, (16, 16)) == 5


@pytest.mark.parametrize("signals", [0, 1, 3, 8])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (128, 128)])
@pytest.mark.parametrize("known", [24, 96])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_noise_edge_finds_the_planted_directions(
    signals: int, shape: tuple[int, int], known: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(signals)
    m, n = shape
    left = torch.linalg.qr(torch.randn(m, 8, dtype=torch.float64, generator=generator)).Q[:, :signals]
    right = torch.linalg.qr(torch.randn(n, 8, dtype=torch.float64, generator=generator)).Q[:, :signals]
    edge = m**0.5 + n**0.5
    # Twice the edge and more: what is planted at it cannot be told from noise by anybody.
    matrix = (left * torch.linspace(3 * edge, 2 * edge, signals, dtype=torch.float64)) @ right.mT
    matrix = scale * (matrix + torch.randn(m, n, dtype=torch.float64, generator=generator))
    rank = NoiseEdgeRank(GaLoreConfig(rank=24)).choose(*spectrum_of(matrix, known), shape)
    assert rank == max(1, signals)


def test_noise_edge_of_a_matrix_without_noise_is_its_rank() -> None:
    matrix = decaying_matrix(40, 24)[:, :5] @ torch.eye(5, 24)
    spectrum, total = spectrum_of(matrix, 12)
    assert NoiseEdgeRank(GaLoreConfig(rank=12)).choose(spectrum[:5], total, (40, 24)) == 5


def test_every_rule_can_be_named() -> None:
    assert {"fixed", *RANK_RULES} == {"fixed", "energy", "energy_shrink", "noise_edge"}


def extent(low: int, high: int, per_rank: float, fixed: float = 0.0) -> Extent:
    return Extent(low=low, high=high, low_bytes=fixed + per_rank * low, high_bytes=fixed + per_rank * high)


@pytest.mark.parametrize("seed", range(20))
def test_budget_holds_whatever_the_order_and_whatever_is_wanted(seed: int) -> None:
    dice = random.Random(seed)
    extents = {
        f"w{i}": extent(dice.randrange(1, 3), dice.randrange(8, 64), dice.randrange(10, 500), dice.randrange(0, 300))
        for i in range(6)
    }
    limit = int(0.4 * sum(one.high_bytes for one in extents.values()))
    budget = StateBudget(limit, extents)
    ranks: dict[str, int] = {}
    for _ in range(200):
        name = dice.choice(list(extents))
        one = extents[name]
        cap = budget.cap(name, ranks)
        assert one.low <= cap <= one.high
        ranks[name] = max(one.low, min(dice.randrange(1, 64), cap))
        assert sum(extents[key].bytes_at(rank) for key, rank in ranks.items()) <= limit


def test_budget_is_used_up_where_all_want_all() -> None:
    budget = StateBudget(10_000, dict.fromkeys("abcd", extent(1, 50, 100.0)))
    ranks: dict[str, int] = {}
    for name in "abcd":
        ranks[name] = min(50, budget.cap(name, ranks))
    assert sum(ranks.values()) == 100
    assert set(ranks.values()) == {25}


def test_what_one_weight_leaves_another_may_take() -> None:
    budget = StateBudget(10_000, dict.fromkeys("abcd", extent(1, 90, 100.0)))
    assert budget.cap("d", {"a": 5, "b": 5, "c": 5}) == 85
    assert budget.cap("d", {"a": 5}) == 45  # b and c keep their shares


def test_who_holds_too_much_already_leaves_the_others_their_least() -> None:
    """From a checkpoint without a budget, or where weights have come later."""
    budget = StateBudget(1_000, dict.fromkeys("ab", extent(2, 50, 100.0)))
    assert budget.cap("b", {"a": 50}) == 2
    assert budget.cap("a", {"a": 50, "b": 2}) == 8


def test_budget_that_not_even_the_least_ranks_fit_into_is_refused() -> None:
    with pytest.raises(ValueError, match=r"state_budget=100 bytes is less than the least ranks .* \(200 bytes\)"):
        StateBudget(100, {"a": extent(2, 4, 100.0)})
    assert StateBudget(100, {"a": extent(2, 4, 100.0)}, strict=False).cap("a", {}) == 2
