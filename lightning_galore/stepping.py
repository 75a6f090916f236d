# SPDX-License-Identifier: Apache-2.0
"""One step of the wrapped optimizer on proxies, and what becomes of it: written onto the weights, counted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_galore import base_rules, dtensors, state_keys
from lightning_galore.config import GaLoreConfig
from lightning_galore.lift import Rounding, Update
from lightning_galore.low_grad import LowGrad, clip_
from lightning_galore.moments import State, second_moment
from lightning_galore.projector import Projector
from lightning_galore.proxies import Shown, Swap, calls_of, renewed, swapped_in
from lightning_galore.transforms import Restarts, transform_of


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
        self._transform = transform_of(config)
        assert config.reset_gap is not None
        assert config.reset_warmup is not None
        self.restarts = Restarts(config.reset_gap, config.reset_warmup)

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
        more = self._projector.left_over(param)
        if more is not None:  # only now: what is left over was clipped when it was a gradient
            low_grad.grad.add_(low_grad.coordinates.project(more))
        carried, turned = self._projector.turn(param, low_grad, group)
        begun = self._begun(param, group, carried)
        if begun is not None:
            carried, turned = begun, None  # nothing is left of the first moment
        plain: Tensor | None = None
        remembered: Mapping[str, Tensor] = {}
        if self._transform is not None and not low_grad.skips:
            plain = low_grad.grad.clone() if self._projector.lift.needs_grad else None
            remembered = self._transformed(param, low_grad.grad, self._entries(param, low_grad), carried)
        penalty = self._penalty(group)
        if penalty:
            share = low_grad.coordinates.project(low_grad.projection.unfold(param.detach()))
            for grad in (low_grad.grad, plain):
                if grad is not None:
                    grad.add_(share, alpha=penalty)
        # Not of all weights until they have stepped; in mode "layerwise" this one steps next.
        late = low_grad.coordinates.gathers and self._config.mode != "layerwise"
        if late or not self._projector.lift.needs_bases:
            low_grad.coordinates.let_go()
        return Swap(
            param=param,
            proxy=low_grad.proxy,
            group=group,
            low_grad=low_grad,
            carried=carried,
            turned=turned,
            penalty=penalty,
            remembered=remembered,
            plain=plain,
        )

    def _begun(self, param: Tensor, group: Mapping[str, Any], carried: Mapping[str, Any] | None) -> State | None:
        """``base``'s own state where it begins anew in this step; None where it does not."""
        if not self.restarts.gap:
            return None
        state = self._base.state.get(param) or {}
        own = state_keys.split(state)[0] if carried is None else carried
        return self.restarts.begin(self._base, state, group, own)

    def _entries(self, param: Tensor, low_grad: LowGrad) -> Mapping[str, Tensor]:
        """What the transform remembers of a projected weight, in the coordinates of this step."""
        assert self._transform is not None
        entries, refresh = state_keys.transform_entries(self._base.state.get(param) or {}), low_grad.refresh
        if not entries or refresh is None or refresh.bases is None:
            return entries
        orthonormal = self._projector.refresher.subspace.orthonormal
        return self._transform.carried(entries, refresh.change if orthonormal else None)

    def _transformed(
        self, param: Tensor, grad: Tensor, entries: Mapping[str, Tensor], carried: Mapping[str, Any] | None
    ) -> Mapping[str, Tensor]:
        """Change ``grad`` in place; return what is to be remembered once the step is taken."""
        assert self._transform is not None
        own = (self._base.state.get(param) or {}) if carried is None else carried
        second = second_moment(self._base, own) if self._transform.needs_second else None
        return self._transform.apply_(grad, entries, second=second)

    def step(
        self, swaps: list[Swap], dense: Mapping[Tensor, tuple[int, int]], *, few: bool = False, **kwargs: Any
    ) -> Any:
        """Step ``base`` on the proxies of ``swaps`` and on the ``dense`` parameters, and write onto the weights.

        Args:
            swaps: The projected weights.
            dense: The other parameters, each with its group and its position there.
            few: Whether these are a few among many: then nothing else is looked at.
            **kwargs: Handed to ``base.step``.
        """
        if not self.restarts.warmup:
            return self._step(swaps, dense, few=few, **kwargs)
        with self.restarts.warmed(self._base.param_groups):
            return self._step(swaps, dense, few=few, **kwargs)

    def _step(self, swaps: list[Swap], dense: Mapping[Tensor, tuple[int, int]], *, few: bool, **kwargs: Any) -> Any:
        begun, remembered = self._prepared(dense)
        rounded = {p: place for p, place in dense.items() if p.grad is not None and self._rounding.concerns(p)}
        output = None
        moving, skipped = [s for s in swaps if not s.skips], [s for s in swaps if s.skips]
        groups = self._base.param_groups
        moving += [self._dense_swap(p, groups[group], begun.pop(p, None)) for p, (group, _) in rounded.items()]
        plain = {param: groups[group] for param, (group, _) in dense.items() if param not in rounded}
        whole = Shown(swaps=moving, dense=plain, skipped=[swap.param for swap in skipped], few=few)
        with renewed(self._base, begun) if begun else nullcontext():
            for shown in calls_of(self._base, whole):
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
        for param in dense:
            if param.grad is not None:
                self._remember(param, remembered.get(param, {}))
        return output

    def _prepared(
        self, dense: Mapping[Tensor, tuple[int, int]]
    ) -> tuple[dict[Tensor, State], dict[Tensor, Mapping[str, Tensor]]]:
        """Clip and transform gradients of parameters that are not projected, in place.

        Returns:
            The states of those where ``base`` begins anew in this step, and what the transform will remember.
        """
        begun: dict[Tensor, State] = {}
        remembered: dict[Tensor, Mapping[str, Tensor]] = {}
        for param, (index, _) in dense.items():
            clip_(param.grad, self._config.clip_weight_norm)
            if param.grad is None:
                continue
            new = self._begun(param, self._base.param_groups[index], None)
            if new is not None:
                begun[param] = new
            if self._transform is None or self._transform.projected_only:
                continue
            if param.grad.is_sparse:
                raise ValueError(
                    f"transform={self._config.transform!r}: a parameter of shape {tuple(param.shape)} has a sparse "
                    "gradient, of which it would take what is not there for zero. Make it dense "
                    "(nn.Embedding(sparse=False)), or set transform='none'."
                )
            entries = state_keys.transform_entries(self._base.state.get(param) or {})
            remembered[param] = self._transformed(param, param.grad, entries, new)
        return begun, remembered

    def _remember(self, param: Tensor, entries: Mapping[str, Tensor]) -> None:
        """The parameter has taken its step: keep what the transform remembers of it."""
        if self._transform is not None or self.restarts.gap:
            state = self._base.state[param]
            state_keys.keep_transform_entries(state, entries)
            self.restarts.note(state, self._base.param_groups)

    def _dense_swap(self, param: Tensor, group: dict[str, Any], begun: State | None) -> Swap:
        """A proxy of the parameter's own shape, so that what ``base`` adds to it can be rounded at random."""
        proxy, penalty = nn.Parameter(torch.zeros_like(param)), self._penalty(group)
        assert param.grad is not None
        proxy.grad = param.grad.add(param, alpha=penalty) if penalty else param.grad
        return Swap(param=param, proxy=proxy, group=group, carried=begun)

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
        shape_factor = base_rules.lift_factor(group, projection.shape, projection.low_shape)
        self._remember(swap.param, swap.remembered)
        coordinates, lift = low_grad.coordinates, self._projector.lift
        seen, full = low_grad.grad if swap.plain is None else swap.plain, low_grad.full
        if full is not None and swap.penalty:  # of one weight at a time
            full = full.add(projection.unfold(swap.param.detach()), alpha=swap.penalty)
        # Where processes hold parts of the weight, each lifts its own.
        update = Update(
            projection=projection,
            bases=coordinates.bases if lift.needs_bases else (),
            low_update=coordinates.spread(swap.proxy.detach()),
            low_grad=coordinates.spread(seen) if lift.needs_grad else seen,
            grad=None if full is None else dtensors.local(full),
            scale=(group.get("scale") or self._config.factor) * shape_factor,
            shrink=self._shrink(group, 1.0),
            lr=1.0 if group.get("lr") is None else group["lr"],
            shape_factor=shape_factor,
            turned=swap.turned,
            ascends=bool(group.get("maximize")),
            entries=state.lift_entries if lift.needs_grad else {},
        )
        with self._rounding.opened(dtensors.local(swap.param), name=low_grad.target.name, step=step) as weight:
            unfolded = projection.unfold(weight)
            lift.apply_(unfolded, update)
            projection.fold_back(weight, unfolded)
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
        weight, update = dtensors.local(swap.param), dtensors.local(swap.proxy.detach())
        shrink, name = self._shrink(swap.group, factor), "dense/{}/{}".format(*place)
        self._rounding.add_(weight, update, alpha=factor, shrink=shrink, name=name, step=step)
