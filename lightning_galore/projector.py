# SPDX-License-Identifier: Apache-2.0
"""From a gradient to a low-rank gradient: refresh the basis when it is due, project, commit nothing before the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_galore import base_rules, linalg, memory
from lightning_galore.agreement import Agreement
from lightning_galore.bases import source_of
from lightning_galore.config import GaLoreConfig
from lightning_galore.coordinates import Coordinates
from lightning_galore.distributed import Team
from lightning_galore.lift import LIFTS, Turned
from lightning_galore.low_grad import Accumulator, LowGrad
from lightning_galore.moments import MOMENTS, copied_first_moment, taken_over
from lightning_galore.rank import Extent, StateBudget
from lightning_galore.refresh import Due, Refresh, Refresher, RefreshEvent
from lightning_galore.schedule import Observation
from lightning_galore.sharding import Sharding
from lightning_galore.state_keys import WeightState
from lightning_galore.subspace import seeded_generator
from lightning_galore.target_table import Target
from lightning_galore.turns import Turns


class Projector:
    """Prepares low-rank gradients and commits what their step decided.

    Args:
        base: The wrapped optimizer, which holds the state.
        config: Names the choice on each axis.
        targets: The projected weights; :meth:`arrange` looks at them again.
    """

    def __init__(self, base: Optimizer, config: GaLoreConfig, targets: Mapping[Tensor, Target]) -> None:
        self.config = config
        self.refresher = Refresher(base, config, self._ranks)
        #: Whose basis is refreshed when.
        self.turns = Turns(config, targets, self.state_of, cost=self.refresher.subspace.relative_cost)
        #: Where several processes train one model; None for one.
        self.agreement: Agreement | None = None
        #: Whether to measure the captured energy at every step.
        self.watching = False
        self.lift = LIFTS[config.lift].build(config)
        self._moments = MOMENTS[config.moments]()
        self._base, self._targets = base, targets
        #: The energy at the last step that measured it; not part of the state.
        self.energies: dict[Target, Tensor] = {}
        #: Told of every refresh.
        self.listeners: list[Callable[[RefreshEvent], None]] = []
        self._shardings: dict[Tensor, Sharding | None] = {}
        self._standing_in: dict[Tensor, Refresh] = {}
        self._budgeted: set[Tensor] = set()

    def arrange(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Give weights that came later their turns, and divide the budget among all.

        Args:
            groups: The param groups, for the gap of each weight.
        """
        self.turns.arrange(groups)
        if self.config.state_budget is not None and self._targets.keys() != self._budgeted:
            self._divide_budget(self.config.state_budget)

    def _divide_budget(self, limit: int) -> None:
        ceilings = {target: target.projection.rank for target in self._targets.values()}
        floors = {target: min(self.config.min_rank, rank) for target, rank in ceilings.items()}
        least, most = (memory.bytes_at(self._base, self._targets, self.config, r) for r in (floors, ceilings))
        extents = {
            target: Extent(low=floors[target], high=ceilings[target], low_bytes=least[target], high_bytes=most[target])
            for target in ceilings
        }
        # Weights that come later may not fit any more: a run that goes well is not ended for that.
        self.refresher.budget = StateBudget(limit, extents, strict=not self._budgeted)
        self._budgeted = set(self._targets)

    def forget(self) -> None:
        """No refresh waits for its step any more."""
        self.refresher.forget()
        if self.agreement is not None:
            self.agreement.forget()

    def join(self, team: Team) -> None:
        """Refresh together with other processes from now on.

        Raises:
            ValueError: If they would draw different bases from the same number.
        """
        if self.config.basis_storage == "seed":
            self._check_same_source(team)
        self.agreement = Agreement(team, self.refresher)

    def _check_same_source(self, team: Team) -> None:
        orthonormal = self.refresher.subspace.orthonormal
        if orthonormal and team.size > 1:
            raise ValueError(
                f"basis_storage='seed' with subspace={self.config.subspace!r} on {team.size} processes: each would "
                "make its bases orthonormal by itself, and the bits of that depend on its number of threads. Use "
                "subspace='gaussian', or basis_storage='param'."
            )
        devices = sorted({param.device for param in self._targets}, key=str)
        sources = {
            str(place): torch.tensor(source_of(device, orthonormal=orthonormal), device=device)
            for place, device in enumerate(devices)
        }
        if sources and team.differing(sources):
            raise ValueError(
                "basis_storage='seed' on processes with different kinds of devices, which draw different bases from "
                "the same number. Use devices of one kind, or basis_storage='param'."
            )

    def divide(self, due: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> None:
        """Say which weights :meth:`prepare` will refresh next, so that processes share the work.

        Args:
            due: Weights with a gradient, and their param groups.
        """
        if self.agreement is None or self.lift.leaves_over:  # what is left over would be in memory for all of them
            return
        ones = [self._due_one(param, param.grad, group) for param, group in due if param.grad is not None]
        self.agreement.divide(ones)

    def _due_one(self, param: Tensor, grad: Tensor, group: Mapping[str, Any]) -> Due:
        target, state = self._targets[param], self.state_of(param)
        grad = state.projection.unfold(grad)
        return Due(grad=grad, target=target, state=state, group=group, sharding=self.sharding_of(param))

    def sharding_of(self, param: Tensor) -> Sharding | None:
        """How a projected weight is divided among processes; None where each holds it whole."""
        if param not in self._shardings:
            self._shardings[param] = Sharding.of(param, name=self._targets[param].name)
        return self._shardings[param]

    def state_of(self, param: Tensor) -> WeightState:
        """The state of a projected weight, to read; before its first step it is empty."""
        return self._read(self._base.state.get(param) or {}, self._targets[param], param.device)

    def _read(self, state: dict[str, Any], target: Target, device: torch.device) -> WeightState:
        orthonormal = self.refresher.subspace.orthonormal
        return WeightState(state, target.projection, orthonormal=orthonormal, device=device)

    def waits(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the weight's next step wants the whole window's gradient: for a basis, its energy, or the lift."""
        return self.lift.needs_grad or self.turns.due(param, group) or self.turns.measures(param, group)

    def prepare(self, param: Tensor, group: Mapping[str, Any], *, due: bool) -> LowGrad:
        """Project ``param.grad`` ``(m, n)``, with a new basis if one is due. Changes nothing but what it returns."""
        target, state = self._targets[param], self.state_of(param)
        assert param.grad is not None
        projection = state.projection
        grad = projection.unfold(param.grad)
        refresh, sharding, more = None, self.sharding_of(param), self.left_over(param)
        if due:
            # Of one weight at a time.
            seen = grad if more is None else grad + more
            one = self._due_one(param, seen, group)
            refresh = self.agreement.refresh(one) if self.agreement is not None else self.refresher.refresh(one)
            del seen, one
        elif not state.has_bases:
            refresh = self.refresher.stand_in(grad, target, state)
        if refresh is not None and refresh.bases is not None and sharding is not None:
            divide = self.config.basis_placement == "shard"
            refresh = replace(refresh, bases=sharding.at_rest(refresh.bases, target.projection.side, divide=divide))
        stored = refresh.bases if refresh and refresh.bases else state.bases_of(projection)
        coordinates = Coordinates(projection.with_rank(stored.rank), stored, sharding, dtype=grad.dtype)
        low = coordinates.project(grad)
        decides = bool(refresh and refresh.found) or self.turns.measures(param, group)
        energy = (linalg.norm(low) / linalg.norm(grad)).square() if decides or self.watching else None
        if energy is not None and decides and self.agreement is not None:
            energy = self.agreement.agree(energy)
        return LowGrad(
            low,
            target=target,
            coordinates=coordinates,
            refresh=refresh,
            energy=energy,
            full=grad if self.lift.needs_grad else None,
            accumulator=self._accumulator(grad, target, state.step),
        )

    def is_fused(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the weight's next step wants no more than low-rank coordinates, of bases that are known before it."""
        # Under a budget the rank of unit vectors depends on those of weights that backward reaches first.
        known = self.state_of(param).has_bases or self.refresher.budget is None
        return known and not self.waits(param, group)

    def coordinates(self, param: Tensor) -> Coordinates:
        """What the weight is projected with until its next refresh."""
        refresh, state = self._stand_in(param), self.state_of(param)
        if refresh is not None and refresh.bases is not None:
            stored, projection = refresh.bases, state.projection.with_rank(refresh.bases.rank)
        else:
            projection = state.projection
            stored = state.bases_of(projection)
        return Coordinates(projection, stored, None, dtype=param.dtype)

    def prepare_low(self, param: Tensor, low: Tensor) -> LowGrad:
        """A low-rank gradient of which nobody has seen the full one."""
        target = self._targets[param]
        return LowGrad(
            low,
            target=target,
            coordinates=self.coordinates(param),
            refresh=self._stand_in(param),
            accumulator=self._accumulator(low, target, self.state_of(param).step),
        )

    def _stand_in(self, param: Tensor) -> Refresh | None:
        """Unit vectors of a weight without bases, the same ones until it has some; None afterwards."""
        state = self.state_of(param)
        if state.has_bases:
            self._standing_in.pop(param, None)
        elif param not in self._standing_in:
            like = torch.empty((), dtype=param.dtype, device=param.device)
            self._standing_in[param] = self.refresher.stand_in(like, self._targets[param], state)
        return self._standing_in.get(param)

    def left_over(self, param: Tensor) -> Tensor | None:
        """What earlier steps have left for the next gradient ``(m, n)``; it is no part of that gradient's norm."""
        return self.lift.left_over(self.state_of(param).lift_entries) if self.lift.leaves_over else None

    def _accumulator(self, grad: Tensor, target: Target, step: int) -> Accumulator | None:
        kept, seed = self.config.accumulator_storage, self.config.seed
        if kept == "param" or self.config.mode == "step":
            return None
        draws = count()
        name = f"{target.name}/accumulator/{step}"
        return Accumulator(kept, lambda: seeded_generator(grad.device, seed=seed, name=name, draw=next(draws)))

    def carried(self, param: Tensor, low_grad: LowGrad, group: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The wrapped optimizer's own state of a weight in its new coordinates; None where they have not changed."""
        refresh, sharding = low_grad.refresh, self.sharding_of(param)
        own = self.state_of(param).own if refresh is not None else None
        if refresh is None or not own:
            return None
        if refresh.change is not None:
            change = refresh.change if sharding is None else refresh.change.mapped(sharding.shards.replicated)
            return self._moments.carry(self._base, own, group, change)
        if low_grad.projection == low_grad.target.projection:
            return None
        # Made in the optimizer's constructor (Adagrad), for the most that the rank may be.
        shape = low_grad.target.projection.low_shape
        return base_rules.resized_constants(own, shape, low_grad.projection.low_shape)

    def turn(
        self, param: Tensor, low_grad: LowGrad, group: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any] | None, Turned | None]:
        """:meth:`carried`, and what that did to the first moment, where the lift follows it."""
        state = self.state_of(param)
        follows = self.lift.follows_moment and low_grad.refresh is not None and low_grad.refresh.change is not None
        before = copied_first_moment(self._base, state.own) if follows else None
        carried = self.carried(param, low_grad, group)
        after = copied_first_moment(self._base, carried) if before is not None and carried else None
        if before is None or after is None:  # moments that begin anew are forgotten, not left over
            return carried, None
        share = taken_over(self._base, state.own, group)
        return carried, Turned(old=state.bases, before=before, after=after, share=share)

    def commit(self, param: Tensor, low_grad: LowGrad, group: Mapping[str, Any]) -> None:
        """Write into the state what the weight's step has shown: it is taken now."""
        state = self._read(self._base.state[param], low_grad.target, param.device)
        refresh = low_grad.refresh
        if refresh is None and low_grad.energy is None:  # an ordinary step shows nothing
            state.count_step()
            return
        turns = self.turns
        before = turns.record_of(param, group)
        found = refresh is not None and refresh.found
        energy = -1.0
        if low_grad.energy is not None and (found or turns.schedule.measures(state.step, before)):
            energy = float(low_grad.energy)
        seen = Observation(refreshed=found, energy=energy if math.isfinite(energy) else -1.0)
        if refresh is not None:
            seen = replace(seen, overlap=refresh.overlap, cosine=refresh.cosine)
            state.keep_bases(refresh.bases, found=found, failed=refresh.due and not found, energy=seen.energy)
            self.refresher.forget(low_grad.target)
        if low_grad.energy is not None:
            self.energies[low_grad.target] = low_grad.energy
        after = turns.schedule.note(state.step, before, seen)
        if refresh is not None or after != before:
            state.keep_record(after, staggered=turns.staggers)
        if refresh is not None and refresh.due:
            event = _event(low_grad, refresh, state.step, turns.schedule.gap_of(after), seen)
            for listener in self.listeners:
                listener(event)
        if not low_grad.skips:
            state.count_step()

    def _ranks(self) -> dict[Target, int]:
        states = {target: self.state_of(param) for param, target in self._targets.items()}
        return {target: state.projection.rank for target, state in states.items() if state.has_bases}


def _event(low_grad: LowGrad, refresh: Refresh, step: int, gap: int, seen: Observation) -> RefreshEvent:
    return RefreshEvent(
        step=step,
        name=low_grad.target.name,
        shape=low_grad.projection.shape,
        side=low_grad.projection.side,
        rank=low_grad.projection.rank,
        gap=gap,
        overlap=seen.overlap if seen.overlap >= 0 else None,
        energy=seen.energy if seen.energy >= 0 else None,
        found=refresh.found,
        spectrum=refresh.spectrum,
    )
