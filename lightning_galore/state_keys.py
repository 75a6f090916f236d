# SPDX-License-Identifier: Apache-2.0
"""What is kept for a projected weight, under which keys, and how it is checked and loaded.

The keys stand beside the wrapped optimizer's own in ``optimizer.state[param]``. Tensors and python numbers only:
anything else would not load with ``weights_only=True``, and torch casts a counter that is a tensor to the parameter's
dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_galore import dtensors, storage
from lightning_galore.bases import UNIT, DrawnBases, StoredBases, source_of
from lightning_galore.schedule import RefreshRecord
from lightning_galore.subspace import SIDE_CODES, Projection

PREFIX = "galore_"
BASIS = "galore_basis"  # (d, r), or codes for it; the left one for side "full"; or the number that all are drawn from
BASIS_RIGHT = "galore_basis_right"  # (n, r), or codes; only for side "full"
# A tensor has a basis for each mode that is projected: those two, whatever mode they are of, then galore_basis_2, ...
_BASES = (BASIS, BASIS_RIGHT, *(f"{BASIS}_{place}" for place in range(2, 64)))  # torch has no more dimensions
ABSMAX = "_absmax"  # appended to either: the scales of codes
SOURCE = "galore_source"  # what draws bases from a number: the kind of device, and whether they are orthonormal
RANK = "galore_rank"  # width of the bases, of which codes do not tell
SIDE = "galore_side"  # a number of SIDE_CODES
LAYOUT = "galore_layout"  # of a tensor: its Tucker ranks, or the order of the columns that it was folded into
STEP = "galore_step"  # updates of this weight done so far
REFRESHED_AT = "galore_refreshed_at"  # step of the last refresh, -1 while the basis is a stand-in
REFRESHES = "galore_refreshes"
FAILURES = "galore_failures"  # refreshes that were due and found no basis
OVERLAP = "galore_overlap"  # of the last two bases, -1.0 before the second refresh
START, PHASE = "galore_start", "galore_phase"  # where the weight stands among staggered ones
GAP = "galore_gap"  # as adapted so far, 0 for the weight's update_proj_gap
KEPT_BY = "galore_schedule"  # which schedule has noted the gap, the worth, ...
DUE_AT = "galore_due_at"  # step of the next refresh where it is decided already
WORTH = "galore_worth"  # what a fresh basis is worth, by the schedule's measure
COSINES = "galore_cosines"  # of the last first vectors
LIFT = "galore_lift_"  # before the name of what a lift keeps
TRANSFORM = "galore_transform_"  # before the name of what a transform remembers
ENERGY = "galore_energy"  # captured by the last basis of the gradient that it was found from
# What a schedule knows of a weight, field by field.
RECORD = {
    "refreshed_at": REFRESHED_AT,
    "num_refreshes": REFRESHES,
    "overlap": OVERLAP,
    "kept_by": KEPT_BY,
    "current_gap": GAP,
    "due_at": DUE_AT,
    "worth": WORTH,
    "cosines": COSINES,
}


@functools.cache  # asked of every key of every weight at every step, and there are few keys
def is_ours(key: str) -> bool:
    """Whether a key of a parameter's state belongs to the subspace, not to the wrapped optimizer."""
    return isinstance(key, str) and key.startswith(PREFIX)


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A parameter's state in two: the wrapped optimizer's entries, and the subspace's."""
    own: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    for key, value in state.items():
        (ours if is_ours(key) else own)[key] = value
    return own, ours


def transform_entries(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a transform remembers of a parameter, projected or not, by its own names."""
    return {key.removeprefix(TRANSFORM): value for key, value in state.items() if str(key).startswith(TRANSFORM)}


def keep_transform_entries(state: dict[str, Any], entries: Mapping[str, Tensor]) -> None:
    """Write what a transform remembers, in place of all that one did."""
    for name in transform_entries(state).keys() - entries.keys():
        del state[TRANSFORM + name]
    state.update({TRANSFORM + name: value for name, value in entries.items()})


class WeightState:
    """Reads and writes the subspace's keys in one weight's state; holds nothing itself, and reading changes nothing.

    Args:
        state: ``optimizer.state[param]``.
        target: The weight's geometry as it was chosen, whose rank is the upper bound of an adaptive one.
        orthonormal: Whether bases are orthonormal when they are found.
        device: Where bases are drawn that are kept as a number; without it they cannot be read.
    """

    def __init__(
        self,
        state: dict[str, Any],
        target: Projection,
        *,
        orthonormal: bool = True,
        device: torch.device | None = None,
    ) -> None:
        self._state = state
        self._target = target
        self._orthonormal = orthonormal
        self._device = device

    @property
    def step(self) -> int:
        """Updates of this weight done so far."""
        return int(self._state.get(STEP, 0))

    @property
    def refreshed_at(self) -> int:
        """Step of the last refresh, -1 when none has succeeded."""
        return int(self._state.get(REFRESHED_AT, -1))

    @property
    def num_refreshes(self) -> int:
        """Refreshes that succeeded."""
        return int(self._state.get(REFRESHES, 0))

    @property
    def num_failures(self) -> int:
        """Refreshes that were due and found no basis."""
        return int(self._state.get(FAILURES, 0))

    @property
    def energy(self) -> float:
        """Share of the gradient's energy that the basis captured when it was found, -1.0 when not known."""
        return float(self._state.get(ENERGY, -1.0))

    @property
    def own(self) -> Mapping[str, Any]:
        """The wrapped optimizer's own entries."""
        return split(self._state)[0]

    @property
    def lift_entries(self) -> dict[str, Tensor]:
        """What the lift keeps, by its own names."""
        return {key.removeprefix(LIFT): value for key, value in self._state.items() if key.startswith(LIFT)}

    @property
    def transform_entries(self) -> dict[str, Tensor]:
        """What a transform remembers, by its own names."""
        return transform_entries(self._state)

    def keep_lift_entries(self, entries: Mapping[str, Tensor]) -> None:
        """Write what the lift keeps."""
        self._state.update({LIFT + name: value for name, value in entries.items()})

    @property
    def has_bases(self) -> bool:
        """Whether there is a basis at all, found or stand-in."""
        return BASIS in self._state

    @property
    def bases(self) -> StoredBases:
        """The bases as they are kept, of the shapes of :attr:`projection`."""
        return self.bases_of(self.projection)

    def bases_of(self, projection: Projection) -> StoredBases:
        """The same for who has read :attr:`projection` already."""
        shapes = projection.basis_shapes
        if isinstance(self._state[BASIS], int):
            return DrawnBases(
                number=self._state[BASIS], shapes=shapes, device=self._device, orthonormal=self._orthonormal
            )
        parts = (
            storage.Stored(codes=self._state[key], absmax=self._state.get(key + ABSMAX), shape=shape)
            for key, shape in zip(_BASES, shapes, strict=False)
        )
        return StoredBases(parts=tuple(parts), orthonormal=self._orthonormal)

    def gathered(self) -> WeightState:
        """The same, to read, with whole bases where each process keeps a part; collective there."""
        keys = [key for key in basis_keys(self._target) if dtensors.is_sharded(self._state.get(key))]
        if not keys:
            return self
        whole = {key: dtensors.whole(self._state[key]) for key in keys}
        return WeightState({**self._state, **whole}, self._target, orthonormal=self._orthonormal, device=self._device)

    @property
    def drawn_elsewhere(self) -> bool:
        """Whether bases are kept as a number of which other ones would be drawn here."""
        number = self._state.get(BASIS)
        if not isinstance(number, int) or number == UNIT or self._device is None:
            return False
        return bool(self._state.get(SOURCE) != source_of(self._device, orthonormal=self._orthonormal))

    @property
    def projection(self) -> Projection:
        """The weight's geometry now: under an adaptive rank the target's rank is only the upper bound."""
        if not self.has_bases:
            return self._target
        layout = self._state.get(LAYOUT)
        target = self._target if layout is None else self._target.in_layout(layout)
        return target.with_rank(saved_rank(self._state))

    def record(self, gap: int, *, place: tuple[int, int] | None = None) -> RefreshRecord:
        """What a schedule may know.

        Args:
            gap: The weight's ``update_proj_gap``.
            place: First step and phase of the weight among staggered ones, unless its state says so; None where
                weights are not staggered, whatever the state says.
        """
        saved = {field: self._state[key] for field, key in RECORD.items() if key in self._state}
        saved["cosines"] = tuple(saved.get("cosines", ()))
        start, phase = place or (0, 0)
        if place is not None:
            start, phase = self._state.get(START, start), self._state.get(PHASE, phase)
        return RefreshRecord(gap=gap, start=start, phase=phase, **saved)

    def keep_record(self, record: RefreshRecord, *, staggered: bool) -> None:
        """Write what the schedule knows now, and the weight's place if there is one."""
        self._state.update({key: getattr(record, field) for field, key in RECORD.items()})
        if staggered:
            self._state.update({START: record.start, PHASE: record.phase})

    def keep_bases(self, bases: StoredBases | None, *, found: bool, failed: bool, energy: float) -> None:
        """Write what a refresh came to.

        Args:
            bases: New bases, or None to keep the old ones.
            found: Whether they come from the gradient; otherwise they stand in until one gives better ones.
            failed: Whether a refresh was due and found none.
            energy: Share of the gradient's energy that the new bases hold.
        """
        if bases is not None:
            self.write_bases(bases)
            self._state[RANK] = bases.rank
        if self._target.layout:
            self._state.setdefault(LAYOUT, self._target.layout)
        self._state.update(
            {
                SIDE: SIDE_CODES[self._target.side],
                ENERGY: energy if found else self.energy,
                FAILURES: self.num_failures + failed,
            }
        )

    def write_bases(self, bases: StoredBases) -> None:
        """Write the tensors of bases, or the number that they are drawn from."""
        for key in [key for key in self._state if key.startswith(BASIS) or key == SOURCE]:
            del self._state[key]
        if isinstance(bases, DrawnBases):
            assert bases.device is not None
            source = source_of(bases.device, orthonormal=bases.orthonormal)
            self._state.update({BASIS: bases.number, SOURCE: source})
            return
        for key, part in zip(basis_keys(self._target), bases.parts, strict=True):
            self._state[key] = part.codes
            if part.absmax is not None:
                self._state[key + ABSMAX] = part.absmax

    def count_step(self) -> None:
        """One update more."""
        self._state[STEP] = self.step + 1


def basis_keys(projection: Projection) -> tuple[str, ...]:
    """Keys of the bases, in the order of ``projection.basis_shapes``."""
    return _BASES[: len(projection.basis_shapes)]


def saved_rank(saved: Mapping[str, Any]) -> int:
    """Width of the bases in a state; a converted one and those of older checkpoints are no codes and tell it."""
    return int(saved[RANK]) if RANK in saved else int(saved[BASIS].shape[1])
