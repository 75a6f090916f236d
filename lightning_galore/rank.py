# SPDX-License-Identifier: Apache-2.0
"""How wide a basis shall be: rules that look at a gradient's singular values, and the budget that caps them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from itertools import accumulate
from typing import Generic, TypeVar

from typing_extensions import override

from lightning_galore.config import GaLoreConfig

Key = TypeVar("Key", bound=Hashable)


class RankRule(ABC):
    """Chooses the rank of one weight at a refresh.

    Args:
        config: Thresholds.
    """

    def __init__(self, config: GaLoreConfig) -> None:
        self.config = config

    @abstractmethod
    def choose(self, spectrum: list[float], energy: float, shape: tuple[int, int]) -> int:
        """The rank that the gradient asks for, before any bound.

        Args:
            spectrum: Its largest singular values in descending order, as many as the finder knows.
            energy: Its squared Frobenius norm.
            shape: ``(m, n)``.
        """


class EnergyRank(RankRule):
    """The smallest rank that holds ``rank_energy`` of the gradient's energy (as in AdaRankGrad, arXiv 2410.17881)."""

    @override
    def choose(self, spectrum: list[float], energy: float, shape: tuple[int, int]) -> int:
        held = accumulate(value**2 for value in spectrum)
        enough = self.config.rank_energy * energy
        return 1 + sum(1 for sofar in held if sofar < enough)


class NoiseEdgeRank(RankRule):
    """As many directions as stand out of noise.

    The singular values of an ``m x n`` matrix of independent noise with variance ``s^2`` end at
    ``s * (sqrt(m) + sqrt(n))``, the edge of the Marchenko-Pastur law. Directions are tested one after the other from
    the largest on; the variance is estimated from what the tested one and those before it leave over (the sequential
    test of Kritchman and Nadler, IEEE Trans. Signal Process. 57(10), 2009, without their confidence term).
    """

    @override
    def choose(self, spectrum: list[float], energy: float, shape: tuple[int, int]) -> int:
        m, n = shape
        taken = accumulate(value**2 for value in spectrum[: min(m, n) - 1])
        for rank, (value, above) in enumerate(zip(spectrum, taken, strict=False)):
            variance = max(0.0, energy - above) / ((m - rank - 1) * (n - rank - 1))
            if value <= math.sqrt(variance) * (math.sqrt(m) + math.sqrt(n)):
                return max(1, rank)
        return len(spectrum)


RANK_RULES: dict[str, type[RankRule]] = {"energy": EnergyRank, "noise_edge": NoiseEdgeRank}


class StateBudget(Generic[Key]):
    """Caps ranks so that all weights' low-rank state fits into a number of bytes, at every step.

    Each weight owns a share in proportion to what it would take at its full rank. What a weight leaves of its share
    others may take; what has not chosen yet, keeps its share.

    Args:
        limit: Bytes.
        bytes_per_rank: Bytes of basis and moments of each weight for one unit of rank.
        bounds: Least and largest rank of each weight.

    Raises:
        ValueError: If not even the least ranks fit.
    """

    def __init__(self, limit: int, bytes_per_rank: Mapping[Key, float], bounds: Mapping[Key, tuple[int, int]]) -> None:
        self._bytes = dict(bytes_per_rank)
        least = sum(self._bytes[key] * low for key, (low, _) in bounds.items())
        if least > limit:
            raise ValueError(
                f"state_budget={limit} bytes is less than the least ranks of all projected weights take "
                f"({math.ceil(least)} bytes); raise it, lower min_rank, or project fewer weights with ignore_modules."
            )
        more = {key: self._bytes[key] * (high - low) for key, (low, high) in bounds.items()}
        free = (limit - least) / max(sum(more.values()), 1.0)
        self._shares = {key: self._bytes[key] * low + free * more[key] for key, (low, _) in bounds.items()}

    def cap(self, weight: Key, ranks: Mapping[Key, int]) -> int:
        """Largest rank that ``weight`` may take now; never less than its least one.

        Args:
            weight: Whose rank is chosen.
            ranks: The ranks of the weights that have chosen.
        """
        slack = sum(self._shares[key] - self._bytes[key] * rank for key, rank in ranks.items() if key != weight)
        return int((self._shares[weight] + slack) / self._bytes[weight] + 1e-9)
