# SPDX-License-Identifier: Apache-2.0
"""One step of the wrapped optimizer on proxies, and what becomes of it: written onto the weights, counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_galore import base_rules, dtensors, state_keys
from lightning_galore.config import GaLoreConfig
from lightning_galore.lift import Rounding, Update
from lightning_galore.low_grad import LowGrad, clip_
from lightning_galore.projector import Projector
from lightning_galore.proxies import Swap, calls_of, swapped_in


class Stepper:
    """Steps parameters: the projected ones in low rank, the others as ``base`` does.

    Args:
        base: The wrapped optimizer.
        config: Names the lift, and how weights are rounded.
        projector: Commits what a step decided.
    """

    def __init__(self, base: Optimizer, config: GaLoreConfig, projector: Projector) -> None:
        self._base, self._config, self._projector = base, config, projector
        self._rounding = Rounding(stochastic=bool(config.stochastic_round), seed=config.seed)

    def swap(self, param: Tensor, group: dict[str, Any], low_grad: LowGrad, *, norm_sq: Tensor | None) -> Swap:
        """Make a weight's low-rank gradient what ``base`` shall see: clipped, and with a coupled decay in it.

        Args:
            param: The weight.
            group: Its param group.
            low_grad: Its low-rank gradient.
            norm_sq: Squared norm of its gradient, where ``clip_weight_norm`` wants it.
        """
        if norm_sq is not None:
            for grad in (low_grad.grad, low_grad.full):
                clip_(grad, self._config.clip_weight_norm, norm_sq=norm_sq)
        penalty = self._penalty(group)
        if penalty:
            low_grad.grad.add_(low_grad.coordinates.project(param.detach()), alpha=penalty)
            if low_grad.full is not None:
                low_grad.full = low_grad.full.add(low_grad.projection.unfold(param.detach()), alpha=penalty)
        carried = self._projector.carried(param, low_grad, group)
        if low_grad.coordinates.gathers:  # not of all weights until they have stepped
            low_grad.coordinates.let_go()
        return Swap(param=param, proxy=low_grad.proxy, group=group, low_grad=low_grad, carried=carried)

    def step(self, swaps: list[Swap], dense: Mapping[Tensor, tuple[int, int]], **kwargs: Any) -> Any:
        """Step ``base`` on the proxies of ``swaps`` and on the ``dense`` parameters, and write onto the weights.

        Args:
            swaps: The projected weights.
            dense: The other parameters, each with its group and its position there.
            **kwargs: Handed to ``base.step``.
        """
        for param in dense:
            clip_(param.grad, self._config.clip_weight_norm)
        rounded = {p: place for p, place in dense.items() if p.grad is not None and self._rounding.concerns(p)}
        output = None
        moving, skipped = [s for s in swaps if not s.skips], [s for s in swaps if s.skips]
        moving += [self._dense_swap(param, self._base.param_groups[group]) for param, (group, _) in rounded.items()]
        plain = [param for param in dense if param not in rounded]
        for shown in calls_of(self._base, moving, plain, [swap.param for swap in skipped]):
            with swapped_in(self._base, shown, dense_lr_factor=self._config.dense_lr_factor):
                output = self._base.step(closure=None, **kwargs)
            for swap in shown.swaps:
                # Only now: where base raises, the weight, its basis and its moments stay as they were.
                if swap.low_grad is not None:
                    self._write_low(swap, swap.low_grad)
                else:
                    self._write_dense(swap, rounded[swap.param])
        for swap in skipped:
            assert swap.low_grad is not None
            self._projector.commit(swap.param, swap.low_grad, swap.group)
        return output

    def _dense_swap(self, param: Tensor, group: dict[str, Any]) -> Swap:
        """A proxy of the parameter's own shape, so that what ``base`` adds to it can be rounded at random."""
        proxy, penalty = nn.Parameter(torch.zeros_like(param)), self._penalty(group)
        assert param.grad is not None
        proxy.grad = param.grad.add(param, alpha=penalty) if penalty else param.grad
        return Swap(param=param, proxy=proxy, group=group)

    def _penalty(self, group: Mapping[str, Any]) -> float:
        """Factor on the weight in its gradient, where ``base`` couples its decay: a proxy is zero and cannot say so."""
        decay = group.get("weight_decay") or 0.0
        if not decay or base_rules.decay_kind(self._base, group) == "decoupled":
            return 0.0
        return -decay if group.get("maximize") else decay  # base would negate the gradient before it adds

    def _shrink(self, group: Mapping[str, Any], lr_factor: float) -> float:
        """Factor on the weight of a decoupled decay: base's own decay of a zero proxy does nothing.

        Not before base's step: Adafactor's is relative to the weight before its decay.
        """
        decay = group.get("weight_decay") or 0.0
        if not decay or base_rules.decay_kind(self._base, group) != "decoupled":
            return 1.0
        return float(1 - group["lr"] * lr_factor * decay)

    def _write_low(self, swap: Swap, low_grad: LowGrad) -> None:
        group, projection = swap.group, low_grad.projection
        state = self._projector.state_of(swap.param)
        step = state.step
        self._projector.commit(swap.param, low_grad, group)
        scale = group.get("scale") or self._config.scale
        scale *= base_rules.lift_factor(group, projection.shape, projection.low_shape)
        coordinates, lift = low_grad.coordinates, self._projector.lift
        # Where processes hold parts of the weight, each lifts its own.
        update = Update(
            low_update=coordinates.spread(swap.proxy.detach()),
            low_grad=coordinates.spread(low_grad.grad) if lift.needs_grad else low_grad.grad,
            grad=None if low_grad.full is None else dtensors.local(low_grad.full),
            lr=group["lr"],
            ascends=bool(group.get("maximize")),
            entries=state.lift_entries if lift.needs_grad else {},
        )
        rounded = self._rounding.opened(dtensors.local(swap.param), name=low_grad.target.name, step=step)
        with rounded as wide, projection.opened(wide) as weight:
            lift.apply_(weight, update, projection, coordinates.bases, scale=scale, shrink=self._shrink(group, 1.0))
        if update.entries:
            self._projector.state_of(swap.param).keep_lift_entries(update.entries)
        coordinates.let_go()
        low_grad.full = None

    def _write_dense(self, swap: Swap, place: tuple[int, int]) -> None:
        state = self._base.state[swap.param]
        step = state.get(state_keys.STEP, 0)
        state[state_keys.STEP] = step + 1
        factor = self._config.dense_lr_factor
        # The place stands for a name: a parameter need not be one of a model that has names.
        with self._rounding.opened(dtensors.local(swap.param), name="dense/{}/{}".format(*place), step=step) as weight:
            weight.mul_(self._shrink(swap.group, factor)).add_(dtensors.local(swap.proxy.detach()), alpha=factor)
