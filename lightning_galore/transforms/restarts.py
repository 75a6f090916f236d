# SPDX-License-Identifier: Apache-2.0
"""Momentum reset: the wrapped optimizer begins anew every so many steps, and its learning rate is warmed up again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from lightning_galore.change import Change
from lightning_galore.moments import Reset, State

#: In each param group: optimizer steps taken. Saved with it.
STEPS = "galore_restart_steps"
#: In each parameter's state: how many restarts it knows of.
SEEN = "galore_restarts"


class Restarts:
    """The wrapped optimizer's state begins anew at optimizer steps ``gap``, ``2 gap``, ... of all parameters.

    arXiv 2501.06842 (momentum reset) and 2502.17055 (MoRet). A parameter that takes no part in that step does so at its
    next one. Steps are counted in the param groups, which are saved.

    Args:
        gap: ``reset_gap``; 0 for never.
        warmup: ``reset_warmup``.
    """

    def __init__(self, gap: int, warmup: int) -> None:
        self.gap, self.warmup = gap, warmup

    def window(self, groups: Sequence[Mapping[str, Any]]) -> int:
        """How many restarts there have been, that of this step included."""
        return _taken(groups) // self.gap if self.gap else 0

    def begin(self, base: Optimizer, state: State, group: State, own: State) -> State | None:
        """What ``base`` shall find in place of ``own``, where a restart is due; None where it is not.

        An empty state mostly, of which an optimizer makes a new one in this very step.

        Args:
            base: The wrapped optimizer.
            state: The parameter's whole state.
            group: Its param group.
            own: ``base``'s part of it, in the coordinates of this step.
        """
        window = self.window(base.param_groups)
        if not own or state.get(SEEN, window) == window:
            return None
        return Reset().carry(base, own, group, Change(left=None, right=None))

    def note(self, state: MutableMapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """The parameter has taken this step."""
        if self.gap:
            state[SEEN] = self.window(groups)

    def count(self, groups: Sequence[dict[str, Any]]) -> None:
        """All have taken this step."""
        if self.gap:
            taken = _taken(groups) + 1  # a group that has come later does not know it yet
            for group in groups:
                group[STEPS] = taken

    def factor(self, groups: Sequence[Mapping[str, Any]]) -> float:
        """Factor on the learning rate of this step: half a cosine from 0 to 1 over the first ``warmup`` of a window."""
        if not self.gap or not self.warmup:
            return 1.0
        # Counted from one: a step with a factor of 0 would throw its gradient away.
        place = min(_taken(groups) % self.gap + 1, self.warmup)
        return (1 - math.cos(math.pi * place / self.warmup)) / 2

    @contextmanager
    def warmed(self, groups: Sequence[dict[str, Any]]) -> Iterator[None]:
        """Let the groups show the learning rate of this step; the user's own is put back."""
        factor = self.factor(groups)
        if factor == 1.0:
            yield
            return
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate * factor
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate


def _taken(groups: Sequence[Mapping[str, Any]]) -> int:
    return max((int(group.get(STEPS, 0)) for group in groups), default=0)
