# SPDX-License-Identifier: Apache-2.0
"""One refresh of one weight: find a basis, choose its rank, compare it with the last one. Changes no state."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_galore import linalg
from lightning_galore.bases import UNIT, DrawnBases, StoredBases
from lightning_galore.change import Change, change_between
from lightning_galore.config import GaLoreConfig
from lightning_galore.moments import first_moment
from lightning_galore.rank import RANK_RULES, StateBudget
from lightning_galore.sharding import Sharding
from lightning_galore.state_keys import WeightState
from lightning_galore.subspace import SUBSPACES, Found, Known, RandomOrthonormal, Side, seeded_generator
from lightning_galore.target_table import Target

#: Singular values that a refresh reports, for the pictures of ``lightning-galore report``.
REPORTED = 16


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """What a refresh came to.

    Args:
        bases: The new bases, or None when the old ones stay.
        found: Whether ``bases`` come from the gradient; False also for the unit vectors that stand in at the start.
        due: Whether the schedule had asked for one; unit vectors also stand in before that.
        finite: Whether the gradient was finite. Where not, the weight skips its step.
        change: From the old coordinates to the new ones; None at the first basis.
        overlap: Of the old and the new bases, -1.0 when there is nothing to compare.
        cosine: Of their first vectors, without its sign; -1.0 likewise.
        spectrum: Largest singular values of the gradient, empty when the finder does not know them.
    """

    bases: StoredBases | None
    found: bool
    due: bool = True
    finite: bool = True
    change: Change | None = None
    overlap: float = -1.0
    cosine: float = -1.0
    spectrum: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class RefreshEvent:
    """A refresh that a step has committed, for whoever listens.

    Args:
        step: Updates of the weight before it.
        name: The parameter's name in the model.
        shape: ``(m, n)`` of the weight.
        side: Which side is projected.
        rank: Width of the basis now.
        gap: Steps to the next refresh, as adapted so far.
        overlap: Of the old and the new basis, None when there is nothing to compare.
        energy: Share of the gradient's energy that the basis holds, None when nothing was found.
        found: False when the gradient gave no basis, and the old one stays.
        spectrum: Largest singular values of the gradient, as far as known.
    """

    step: int
    name: str
    shape: tuple[int, int]
    side: Side
    rank: int
    gap: int
    overlap: float | None
    energy: float | None
    found: bool
    spectrum: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Due:
    """A weight whose basis is due, with what a refresh of it takes.

    Args:
        grad: Its gradient ``(m, n)``.
        target: Its name and geometry, whose rank is the upper bound of an adaptive one.
        state: Its state.
        group: Its param group.
        sharding: How weight and gradient are divided; None where each process holds them whole.
    """

    grad: Tensor
    target: Target
    state: WeightState
    group: Mapping[str, Any]
    sharding: Sharding | None = None


class Refresher:
    """Finds new bases.

    Args:
        base: The wrapped optimizer, whose first moment some finders follow.
        config: Names the subspace, the rank rule and the storage.
        ranks: Gives the ranks of all weights that have a basis.
    """

    def __init__(self, base: Optimizer, config: GaLoreConfig, ranks: Callable[[], Mapping[Target, int]]) -> None:
        self.config = config
        self.subspace = SUBSPACES[config.subspace].build(config)
        self.budget: StateBudget[Target] | None = None
        #: Seconds spent on refreshes so far. Finding a basis ends with a look at it, so a GPU's work is in them.
        self.seconds = 0.0
        self._rule = RANK_RULES[config.rank_rule](config) if config.rank_rule != "fixed" else None
        self._base, self._ranks = base, ranks
        self._chosen: dict[Target, int] = {}  # ranks of refreshes that wait for their step

    def refresh(self, one: Due) -> Refresh:
        """Find new bases; where the gradient gives none, keep the old ones, or begin with unit vectors."""
        grad, target, state, group = one.grad, one.target, one.state, one.group
        begin = time.perf_counter()
        seed, refreshes = self.config.seed, state.num_refreshes
        generator = seeded_generator(grad.device, seed=seed, name=target.name, draw=refreshes)
        known = self._known(grad, state, group)
        late = self.config.random_after is not None and state.step >= self.config.random_after
        subspace = RandomOrthonormal() if late else self.subspace  # GoLore, arXiv 2410.11289
        # Of a rank that only shrinks no more has to be found than there is; unit vectors that stand in do not count.
        shrinks = self._rule is not None and self._rule.shrinks and state.refreshed_at >= 0
        widest = state.projection if shrinks else target.projection
        found = subspace.find(grad, widest, generator=generator, known=known, fix_signs=self.config.fix_signs)
        if found is None:
            finite = bool(torch.isfinite(torch.linalg.vector_norm(grad, torch.inf)))
            refresh = Refresh(bases=self._unit(grad, target, state), found=False, finite=finite)
        else:
            bases = self._store(
                self._narrowed(found, grad, target, widest.rank).bases, grad, number=generator.initial_seed()
            )
            refresh = self._compared(bases, found.spectrum, grad, target, state)
        self.seconds += time.perf_counter() - begin
        return refresh

    def stand_in(self, grad: Tensor, target: Target, state: WeightState) -> Refresh:
        """Unit vectors, for a weight whose first refresh comes later."""
        return Refresh(bases=self._unit(grad, target, state), found=False, due=False)

    def note_rank(self, target: Target, rank: int) -> None:
        """Another process has chosen a rank for a refresh that waits for its step now."""
        if self._rule is not None:
            self._chosen[target] = rank

    def forget(self, target: Target | None = None) -> None:
        """The rank of a refresh stands in the state now, or was dropped; without ``target`` those of all."""
        if target is None:
            self._chosen.clear()
        else:
            self._chosen.pop(target, None)

    def _known(self, grad: Tensor, state: WeightState, group: Mapping[str, Any]) -> Known | None:
        # Unit vectors that stand in are no start for a finder.
        if not state.has_bases or state.refreshed_at < 0:
            return None
        momentum = first_moment(self._base, state.own, group) if self.subspace.uses_momentum else None
        return Known(bases=state.bases.read(grad.dtype), momentum=momentum)

    def _unit(self, grad: Tensor, target: Target, state: WeightState) -> StoredBases | None:
        if state.has_bases:
            return None
        rank = target.projection.rank
        if self._rule is not None:
            # An adaptive rank may be capped from the first step on.
            rank = self._chosen[target] = min(rank, self._cap(target))
        shapes = target.projection.with_rank(rank).basis_shapes
        return self._store([linalg.identity_basis(d, r, like=grad) for d, r in shapes], grad, number=UNIT)

    def _narrowed(self, found: Found, grad: Tensor, target: Target, widest: int) -> Found:
        """The first vectors only, as many as the rank rule asks for."""
        if self._rule is None or found.spectrum is None:
            return found
        # One transfer: the spectrum and the energy together.
        energy = linalg.norm_sq(grad)
        *spectrum, total = torch.cat([found.spectrum.to(energy.dtype), energy[None]]).tolist()
        wanted = self._rule.choose(spectrum, total, target.projection.shape)
        rank = min(max(wanted, self.config.min_rank), widest, self._cap(target))
        self._chosen[target] = rank
        return Found(bases=tuple(basis[:, :rank] for basis in found.bases), spectrum=found.spectrum)

    def _cap(self, target: Target) -> int:
        if self.budget is None:
            return target.projection.rank
        return self.budget.cap(target, {**self._ranks(), **self._chosen})

    def _compared(
        self, bases: StoredBases, values: Tensor | None, grad: Tensor, target: Target, state: WeightState
    ) -> Refresh:
        spectrum = () if values is None else tuple(values[:REPORTED].tolist())
        if not state.has_bases:
            return Refresh(bases=bases, found=True, spectrum=spectrum)
        # As they are read again, so that the moments follow what the next steps will project with.
        old, new = state.bases.read(grad.dtype), bases.read(grad.dtype)
        change = change_between(old, new, target.projection)
        overlap, cosine = -1.0, -1.0
        if state.refreshed_at >= 0 and self.subspace.orthonormal:
            turns = change.matrices
            # A basis that is kept in half precision is not quite orthonormal, so these could pass 1.
            overlap = min(1.0, sum(float(linalg.overlap_of(turn)) for turn in turns) / len(turns))
            cosine = min(1.0, sum(abs(float(turn[0, 0])) for turn in turns) / len(turns))
        return Refresh(bases=bases, found=True, change=change, overlap=overlap, cosine=cosine, spectrum=spectrum)

    def _store(self, bases: Sequence[Tensor], grad: Tensor, *, number: int) -> StoredBases:
        """Bases as they are kept.

        Args:
            bases: As they were found.
            grad: What they were found from.
            number: What random ones were drawn from.
        """
        if self.config.basis_storage == "seed":
            shapes = tuple((basis.shape[0], basis.shape[1]) for basis in bases)
            return DrawnBases(number=number, shapes=shapes, device=grad.device, orthonormal=self.subspace.orthonormal)
        return StoredBases.write(
            bases,
            kept=self.config.basis_storage,
            param_dtype=grad.dtype,
            orthonormal=self.subspace.orthonormal,
        )
