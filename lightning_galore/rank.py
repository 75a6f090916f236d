# SPDX-License-Identifier: Apache-2.0
"""How wide a basis shall be: rules that look at a gradient's singular values, and the budget that caps them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Generic, TypeVar

from typing_extensions import override

from lightning_galore.config import GaLoreConfig

Key = TypeVar("Key", bound=Hashable)


class RankRule(ABC):
    """Chooses the rank of one weight at a refresh.

    Args:
        config: Thresholds.
    """

    #: Whether a rank is never more than the one before it.
    shrinks: ClassVar[bool] = False

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


class ShrinkingEnergyRank(EnergyRank):
    """The same, but never more than the weight's last basis had: ranks only fall, and refreshes get cheaper."""

    shrinks: ClassVar[bool] = True


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


RANK_RULES: dict[str, type[RankRule]] = {
    "energy": EnergyRank,
    "energy_shrink": ShrinkingEnergyRank,
    "noise_edge": NoiseEdgeRank,
}


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The ranks that one weight may have, and the bytes of its basis and moments at the least and the largest.

    In between bytes are taken to lie on a straight line. What they really are is never more: they grow in proportion to
    the rank, but for parts that do not grow at all, and for projecting both sides, where they grow with its square.
    (8-bit optimizers keep tensors of fewer than 4,096 entries in fp32: a weight may pass the line by that.)
    """

    low: int
    high: int
    low_bytes: float
    high_bytes: float

    def bytes_at(self, rank: int) -> float:
        """Bytes at ``rank``, or somewhat more than that."""
        if self.high == self.low:
            return self.low_bytes
        return self.low_bytes + (self.high_bytes - self.low_bytes) * (rank - self.low) / (self.high - self.low)

    def rank_within(self, held: float) -> int:
        """The largest rank that takes no more than ``held`` bytes; the least one if none does."""
        if self.high == self.low or held >= self.high_bytes:
            return self.high
        slope = (self.high_bytes - self.low_bytes) / (self.high - self.low)
        return max(self.low, self.low + math.floor((held - self.low_bytes) / slope + 1e-9))


class StateBudget(Generic[Key]):
    """Caps ranks so that all weights' low-rank state fits into a number of bytes, at every step.

    Each weight owns a share in proportion to what it would take at its full rank. What a weight leaves of its share
    others may take; what has not chosen yet, keeps its share.

    Args:
        limit: Bytes.
        extents: What each weight may take.
        strict: Whether to refuse a limit that not even the least ranks fit into. Otherwise all get their least.

    Raises:
        ValueError: If not even the least ranks fit.
    """

    def __init__(self, limit: int, extents: Mapping[Key, Extent], *, strict: bool = True) -> None:
        self._extents = dict(extents)
        least = sum(extent.bytes_at(extent.low) for extent in extents.values())
        if strict and least > limit:
            raise ValueError(
                f"state_budget={limit} bytes is less than the least ranks of all projected weights take "
                f"({math.ceil(least)} bytes); raise it, lower min_rank, or project fewer weights with ignore_modules."
            )
        more = {key: one.bytes_at(one.high) - one.bytes_at(one.low) for key, one in extents.items()}
        free = max(0.0, limit - least) / max(sum(more.values()), 1.0)
        self._shares = {key: one.bytes_at(one.low) + free * more[key] for key, one in extents.items()}

    def cap(self, weight: Key, ranks: Mapping[Key, int]) -> int:
        """Largest rank that ``weight`` may take now; never less than its least one.

        Args:
            weight: Whose rank is chosen.
            ranks: The ranks of the weights that have chosen.
        """
        others = {key: rank for key, rank in ranks.items() if key != weight}
        slack = sum(self._shares[key] - self._extents[key].bytes_at(rank) for key, rank in others.items())
        return self._extents[weight].rank_within(self._shares[weight] + slack)
