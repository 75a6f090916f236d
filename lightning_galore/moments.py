# SPDX-License-Identifier: Apache-2.0
"""What becomes of the wrapped optimizer's state when a weight's basis changes: its moments refer to the old one.

Shapes: a low-rank tensor ``low`` is ``(r, n)``, ``(m, r)`` or ``(r, r)``; primes mark what holds after the refresh.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, TypeAlias, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_galore import base_rules, base_state
from lightning_galore.base_rules import StateKind, StateRule
from lightning_galore.change import Change

State: TypeAlias = Mapping[str, Any]
# A first moment before and after, scaled so that its square is comparable with the second moment beside it.
_Mean: TypeAlias = tuple[Tensor, Tensor]


class Moments(ABC):
    """A way to carry the wrapped optimizer's state over a refresh. Holds nothing."""

    @abstractmethod
    def carry(self, base: Optimizer, state: State, group: State, change: Change) -> State:
        """The state that stands for ``state`` in the new coordinates.

        Args:
            base: The wrapped optimizer.
            state: What it keeps for one weight, without our keys. Left as it is, but for paged buffers: see
                :func:`~lightning_galore.base_state.write`.
            group: The weight's param group, whose betas hold.
            change: From the old coordinates to the new ones.

        Returns:
            The whole new state, which shares what does not change: ``state`` itself if nothing does. Empty if ``base``
            shall begin anew, because an optimizer takes an empty state for the sign of a first step.

        Raises:
            ValueError: If the rank changes and the state holds something of which is not known what it is.
        """


class Keep(Moments):
    """Moments stay as they are, as in the paper (arXiv 2403.03507); when the rank changes they are cut or extended.

    A further coordinate begins with a first moment of 0 and the mean of its row's or column's second moments. With 0 in
    both, Adam's first step there would be ``(1 - beta1) / sqrt(1 - beta2)``, about 3, times too large.
    """

    #: Kinds that move although the rank stays.
    moves: ClassVar[frozenset[StateKind]] = frozenset()

    @override
    def carry(self, base: Optimizer, state: State, group: State, change: Change) -> State:
        if not state or not (self.moves or change.changes_rank):
            return state
        known = _known(base, state, change)
        rules = {key: rule for key, rule in known if change.changes_rank or self._concerns(rule, state)}
        new: dict[str, Tensor] = {}
        for key in sorted(rules, key=lambda key: _ORDER.get(rules[key].kind, 1)):
            rule = rules[key]
            if rule.kind == "rows":
                new |= self._factored(state, key, rule.beside, change)
                continue
            mean = _mean(base, state, group, new, rule)
            new[key] = self._moved(base_state.read(state, key), rule.kind, change, mean)
            if rule.kind == "maximum" and rule.beside in new:
                new[key] = torch.maximum(new[key], new[rule.beside])
        carried = dict(state)
        for key, value in new.items():
            carried |= base_state.write(base, state, key, value)
        return carried

    def _concerns(self, rule: StateRule, state: State) -> bool:
        """Whether an entry moves although the rank stays."""
        return rule.kind in self.moves

    def _moved(self, low: Tensor, kind: StateKind, change: Change, mean: _Mean | None = None) -> Tensor:
        """One entry in the new coordinates."""
        return change.resize(low, fill=0.0 if kind == "first" else "mean")

    @final
    def _factored(self, state: State, key: str, beside: str, change: Change) -> dict[str, Tensor]:
        """Adafactor's averages over rows and columns: the matrix that they stand for is moved and averaged again."""
        rows, columns = base_state.read(state, key), base_state.read(state, beside)
        mean = rows.mean().clamp(min=torch.finfo(rows.dtype).tiny)
        second = self._moved((rows / mean).reshape(-1, 1) @ columns.reshape(1, -1), "second", change)
        matrix = rows.ndim > 1  # torch's; those of Transformers are vectors
        return {key: second.mean(-1, keepdim=matrix), beside: second.mean(-2, keepdim=matrix)}


class RotateFirst(Keep):
    """First moments get their new coordinates, exactly where the basis spans the same; second ones stay.

    But no coordinate shall step farther than the one that stepped farthest before, in units of the root of its second
    moment (or than that root): where it would, the second moment is raised. Without that, a coordinate that had no
    gradient before, and gets a first moment from others, could take a step without bound. Where an optimizer subtracts
    the square of the mean from a second moment (centered RMSprop), the difference stays.
    """

    moves: ClassVar[frozenset[StateKind]] = frozenset({"first", "centered", "second", "magnitude", "maximum"})

    @override
    def _concerns(self, rule: StateRule, state: State) -> bool:
        # Second moments without a first one beside them have no bound to keep.
        return rule.kind in self.moves and (rule.kind in ("first", "centered") or rule.beside in state)

    @override
    def _moved(self, low: Tensor, kind: StateKind, change: Change, mean: _Mean | None = None) -> Tensor:
        if kind == "first":
            return change.rotate(low)
        if kind == "centered":
            return _about_mean(low, mean, lambda spread: change.resize(spread.clamp(min=0), fill="mean"))
        kept = super()._moved(low, kind, change, mean)
        if mean is None or kind not in ("second", "magnitude"):
            return kept
        before, after = (one.abs() if kind == "magnitude" else one.square() for one in mean)
        farthest = torch.where(low > 0, before / low, torch.zeros_like(before)).amax().clamp(min=1)
        # A little less, so that rounding raises nothing where the coordinates stay.
        return torch.maximum(kept, (after / farthest * (1 - 1e-5)).to(kept.dtype))


class Rotate(RotateFirst):
    """First and second moments get their new coordinates, the second by the statistical rule of LDAdam.

    arXiv 2410.16103: ``v' / bc2 = |(C o C)(v / bc2 - m^2 / bc1^2) + m'^2 / bc1^2|``, ``bc`` the corrections of the bias
    and ``C`` the change: gradients of different coordinates are taken for uncorrelated but for their means.
    """

    moves: ClassVar[frozenset[StateKind]] = RotateFirst.moves | {"step_size", "rows"}

    @override
    def _concerns(self, rule: StateRule, state: State) -> bool:
        return rule.kind in self.moves

    @override
    def _moved(self, low: Tensor, kind: StateKind, change: Change, mean: _Mean | None = None) -> Tensor:
        if kind == "first":
            return change.rotate(low)
        if kind == "step_size":
            return change.average(low)
        return _about_mean(low, mean, change.rotate_squares, root=kind == "magnitude")


class Reset(Moments):
    """Moments and step counts begin anew, and with them the correction of the bias."""

    @override
    def carry(self, base: Optimizer, state: State, group: State, change: Change) -> State:
        if "sum" in state and "initial_accumulator_value" in group:  # Adagrad of older torch begins in its constructor
            total = torch.full_like(change.resize(state["sum"], fill=0.0), group["initial_accumulator_value"])
            return {**state, "step": torch.zeros_like(state["step"]), "sum": total}
        if change.changes_rank or not any(map(base_state.is_paged, state.values())):
            return {}
        zeroed = {**state, "step": 0}  # paged memory is never freed, so what there is must serve again
        for key in {"state1", "state2"} & state.keys():
            zeroed |= base_state.write(base, state, key, torch.zeros_like(base_state.read(state, key)))
        return zeroed


MOMENTS: dict[str, type[Moments]] = {"keep": Keep, "rotate": Rotate, "rotate_first": RotateFirst, "reset": Reset}
# First moments come first, for the others refer to them; the maximum of second ones last.
_ORDER = {"first": 0, "maximum": 2}


def first_moment(base: Optimizer, state: State, group: State) -> Tensor | None:
    """Average of the last gradients in low-rank coordinates, bias-corrected; None if ``base`` keeps none (yet)."""
    known = _first(base, state)
    if known is None:
        return None
    key, rule = known
    return _plain(base_state.read(state, key)) / base_state.weight_sum(state, group, decay=rule.decay, sums=rule.sums)


def copied_first_moment(base: Optimizer, state: State) -> Tensor | None:
    """The same as it is kept, its bias not corrected, in memory of its own; None if ``base`` keeps none (yet)."""
    known = _first(base, state)
    return None if known is None else _plain(base_state.read(state, known[0])).clone()


def taken_over(base: Optimizer, state: State, group: State) -> float:
    """How much of the first moment the next one takes over, per share of the next gradient: ``beta1 / (1 - beta1)``."""
    known = _first(base, state)
    if known is None:
        return 0.0
    rule = known[1]
    # The first step of all shows with which share a gradient comes.
    begun = {**state, "step": 1} if "step" in state else state
    share = base_state.weight_sum(begun, {**group, "step": 1}, decay=rule.decay, sums=rule.sums)
    return base_state.rate_of(group, rule.decay) / share


def _first(base: Optimizer, state: State) -> tuple[str, StateRule] | None:
    for key, value in state.items():
        rule = base_rules.state_rule(base, key)
        if rule and rule.kind == "first" and rule.decay and isinstance(value, Tensor):
            return key, rule
    return None


def second_moment(base: Optimizer, state: State) -> Tensor | None:
    """Average of the squares of the last gradients, entry by entry, as it is kept: with the bias of its start.

    None if ``base`` keeps none (yet), or another one: factored, or a sum.
    """
    for key, value in state.items():
        rule = base_rules.state_rule(base, key)
        if rule and rule.kind in ("second", "centered") and rule.decay and isinstance(value, Tensor):
            return base_state.read(state, key)
    return None


def _known(base: Optimizer, state: State, change: Change) -> Iterator[tuple[str, StateRule]]:
    """The entries that refer to coordinates. What looks like another one is warned of, or refused."""
    for key, value in state.items():
        rule = base_rules.state_rule(base, key)
        if not isinstance(value, Tensor) or (rule and rule.kind in ("columns", "other")):
            continue
        if rule and (rule.kind == "rows" or change.fits(value)):
            plain = rule.kind == "centered" and rule.beside not in state
            yield key, replace(rule, kind="second") if plain else rule
        elif not rule and change.fits(value):
            if change.changes_rank:
                raise ValueError(
                    f"{type(base).__name__} keeps {key!r} of shape {tuple(value.shape)}: what becomes of it at another "
                    "rank is not known. Set moments='reset', or rank_rule='fixed'."
                )
            _warn_of_unknown(type(base).__name__, key)


@cache
def _warn_of_unknown(name: str, key: str) -> None:
    warnings.warn(
        f"{name} keeps {key!r} in low-rank coordinates, and what it is is not known: it stays when they change. "
        "Set moments='reset' if that is wrong.",
        stacklevel=2,
    )


def _mean(base: Optimizer, state: State, group: State, new: Mapping[str, Tensor], rule: StateRule) -> _Mean | None:
    """The first moment that the second one of ``rule`` is taken about, if any, times ``sqrt(bc2) / bc1``."""
    beside = base_rules.state_rule(base, rule.beside)
    if rule.beside not in new or beside is None or beside.kind != "first":
        return None
    corrections = [base_state.weight_sum(state, group, decay=decay) for decay in (rule.decay, beside.decay)]
    factor = math.sqrt(corrections[0]) / corrections[1]
    return _plain(base_state.read(state, rule.beside)) * factor, _plain(new[rule.beside]) * factor


def _about_mean(low: Tensor, mean: _Mean | None, move: Callable[[Tensor], Tensor], *, root: bool = False) -> Tensor:
    """``|move(low - mean^2) + mean'^2|`` in units of the largest entry, so that no square leaves the range of fp32."""
    old, new = mean or (low.new_zeros(()), low.new_zeros(()))
    unit = low.amax() if root else low.amax().sqrt()
    unit = torch.maximum(unit, torch.maximum(old.abs().amax(), new.abs().amax()))
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    low = (low / unit).square() if root else low / unit / unit  # root: low is that of a second moment
    moved = (move(low - (old / unit).square()) + (new / unit).square()).abs()
    return moved.sqrt() * unit if root else moved * unit * unit


def _plain(first: Tensor) -> Tensor:
    """The one first moment, or the fast one where AdEMAMix keeps two in one tensor."""
    return first[0] if first.ndim > 2 else first
