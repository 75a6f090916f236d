# SPDX-License-Identifier: Apache-2.0
"""Showing low-rank proxies to the wrapped optimizer in place of weights, for the length of one step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_galore import base_rules, linalg, state_keys
from lightning_galore.low_grad import LowGrad


@dataclass(frozen=True, kw_only=True)
class Swap:
    """One parameter in the middle of a step that ``base`` takes on a proxy.

    Args:
        param: The parameter.
        proxy: Zeros, onto which ``base`` writes its update; its ``grad`` is what ``base`` sees.
        group: Its param group.
        low_grad: What the proxy is of, for a projected weight; None for another one, whose proxy has its shape.
        carried: ``base``'s own state of it in new coordinates, or begun anew; None where it is what it was.
        remembered: What the transform keeps of it after this step.
        plain: The low-rank gradient without its transform, for a lift that compares it with the full one.
    """

    param: Tensor
    proxy: Tensor
    group: dict[str, Any]
    low_grad: LowGrad | None = None
    carried: Mapping[str, Any] | None = None
    remembered: Mapping[str, Tensor] = field(default_factory=dict)
    plain: Tensor | None = None

    @property
    def skips(self) -> bool:
        """Whether the parameter sits this step out."""
        return self.low_grad is not None and self.low_grad.skips


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What one call of ``base.step`` gets to see.

    Args:
        swaps: The parameters that are stepped on a proxy.
        dense: The parameters that are stepped as they are.
        skipped: Projected weights that sit this step out.
        overrides: Settings of all groups for this call only.
    """

    swaps: Sequence[Swap] = ()
    dense: Collection[Tensor] = ()
    skipped: Collection[Tensor] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)


def calls_of(
    base: Optimizer, swaps: Sequence[Swap], dense: Collection[Tensor], skipped: Collection[Tensor]
) -> Iterator[Shown]:
    """The calls of ``base.step`` that a step takes: one for all, but one a weight where it is relative to the weight.

    Args:
        base: The wrapped optimizer.
        swaps: The parameters with a proxy.
        dense: The parameters that are stepped as they are.
        skipped: Projected weights that sit this step out.
    """
    if not base_rules.reads_rms(base):
        yield Shown(swaps=swaps, dense=dense, skipped=skipped)
        return
    for swap in swaps:
        # Adafactor steps by max(eps2, RMS(W)) and a zero proxy has RMS 0: so let eps2 be what the weight gives.
        eps1, eps2 = swap.group["eps"]
        rms = float(linalg.norm(swap.param)) / swap.param.numel() ** 0.5
        yield Shown(swaps=[swap], overrides={"eps": (eps1, max(eps2, rms))})
    yield Shown(dense=dense)


@contextmanager
def renewed(base: Optimizer, states: Mapping[Tensor, Mapping[str, Any]]) -> Iterator[None]:
    """Let ``base`` find other states of some parameters, which are stepped as they are; our keys stay.

    Args:
        base: The wrapped optimizer.
        states: Its own part of their states; where it raises, they get back what they had.
    """
    before = {param: base.state[param] for param in states}
    for param, own in states.items():
        base.state[param] = dict(own)
    try:
        yield
    except BaseException:
        base.state.update(before)
        raise
    for param, state in before.items():
        base.state[param].update({key: value for key, value in state.items() if state_keys.is_ours(key)})


@contextmanager
def swapped_in(base: Optimizer, shown: Shown, *, dense_lr_factor: float) -> Iterator[None]:
    """Let ``base`` see proxies in place of weights, and state without our keys; put all back whatever happens.

    Args:
        base: The wrapped optimizer.
        shown: What it sees inside.
        dense_lr_factor: Factor on the learning rate of the weights that are not projected.
    """
    groups = base.param_groups
    saved = [dict(group) for group in groups]
    kept = {swap.param: base.state.pop(swap.param, {}) for swap in shown.swaps}
    hooks = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
    stepped = False
    for swap in shown.swaps:
        # An optimizer takes an empty state for the sign of a first step, so only its own keys may be there.
        own = {key: value for key, value in kept[swap.param].items() if not state_keys.is_ours(key)}
        own = own if swap.carried is None else dict(swap.carried)
        if own:
            base.state[swap.proxy] = own
    try:
        # The user's step hooks run once around the whole step, on real parameters: through the wrapper.
        base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        base.param_groups = groups + _put_proxies(groups, shown, dense_lr_factor)
        yield
        stepped = True
    finally:
        base.param_groups = groups
        base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = hooks
        for group, before in zip(groups, saved, strict=True):
            group.update({key: before[key] for key in ("params", *shown.overrides)})
        for swap in shown.swaps:
            before, after = kept[swap.param], base.state.pop(swap.proxy, {})
            if not stepped and swap.carried is not None:
                after = before  # the basis stays the old one, so its coordinates must
            ours = {key: value for key, value in before.items() if state_keys.is_ours(key)}
            base.state[swap.param] = {**after, **ours}


def _put_proxies(groups: Sequence[dict[str, Any]], shown: Shown, dense_lr_factor: float) -> list[dict[str, Any]]:
    """Write proxies into the groups; return extra groups of dense weights when their learning rate is another one."""
    proxies: dict[Tensor, Tensor] = {swap.param: swap.proxy for swap in shown.swaps}
    # Any optimizer skips what has no gradient.
    proxies.update((param, nn.Parameter(param.new_empty(0))) for param in shown.skipped)
    dense = set(shown.dense)
    apart = []
    for group in groups:
        params = group["params"]
        # What has no gradient is skipped by any optimizer: it stays, because bitsandbytes finds settings by position.
        idle = {param for param in params if param.grad is None}
        plain = [param for param in params if param in dense]
        if dense_lr_factor != 1.0:
            apart.append({**group, "params": plain, "lr": group["lr"] * dense_lr_factor})
            plain = []
        visible = idle.union(proxies, plain)
        group.update(shown.overrides, params=[proxies.get(param, param) for param in params if param in visible])
    return apart
