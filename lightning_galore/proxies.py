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
from lightning_galore.lift import Turned
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
        turned: What new coordinates did to the first moment, for a lift that wants to know.
        penalty: Factor on the weight that its full gradient still lacks, of a coupled decay.
        remembered: What the transform keeps of it after this step.
        plain: The low-rank gradient without its transform, for a lift that compares it with the full one.
    """

    param: Tensor
    proxy: Tensor
    group: dict[str, Any]
    low_grad: LowGrad | None = None
    carried: Mapping[str, Any] | None = None
    turned: Turned | None = None
    penalty: float = 0.0
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
        dense: The parameters that are stepped as they are, each with its param group.
        skipped: Projected weights that sit this step out.
        overrides: Settings of the groups for this call only.
        few: Whether these are a few among many: then nothing else is looked at, where ``base`` allows that.
    """

    swaps: Sequence[Swap] = ()
    dense: Mapping[Tensor, dict[str, Any]] = field(default_factory=dict)
    skipped: Collection[Tensor] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    few: bool = False


def calls_of(base: Optimizer, shown: Shown) -> Iterator[Shown]:
    """The calls of ``base.step`` that a step takes: one for all, but one a weight where it is relative to the weight.

    Args:
        base: The wrapped optimizer.
        shown: All that is stepped.
    """
    if not base_rules.reads_rms(base):
        yield shown
        return
    for swap in shown.swaps:
        # Adafactor steps by max(eps2, RMS(W)) and a zero proxy has RMS 0: so let eps2 be what the weight gives.
        eps1, eps2 = swap.group["eps"]
        rms = float(linalg.norm(swap.param)) / swap.param.numel() ** 0.5
        yield Shown(swaps=[swap], overrides={"eps": (eps1, max(eps2, rms))}, few=True)
    yield Shown(dense=shown.dense, few=shown.few)


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
    few = shown.few and _ignores_places(base)
    changed = _groups_of(shown) if few else groups
    saved = [dict(group) for group in changed]
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []  # base's entries of a weight's state, and ours
    hooks = base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks
    stepped = False
    for swap in shown.swaps:
        # An optimizer takes an empty state for the sign of a first step, so only its own keys may be there.
        own, ours = state_keys.split(base.state.pop(swap.param, {}))
        kept.append((own, ours))
        own = own if swap.carried is None else dict(swap.carried)
        if own:
            base.state[swap.proxy] = own
    try:
        # The user's step hooks run once around the whole step, on real parameters: through the wrapper.
        base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        base.param_groups = changed + _put_proxies(changed, shown, dense_lr_factor, few=few)
        yield
        stepped = True
    finally:
        base.param_groups = groups
        base._optimizer_step_pre_hooks, base._optimizer_step_post_hooks = hooks
        for group, before in zip(changed, saved, strict=True):
            group.update({key: before[key] for key in ("params", *shown.overrides)})
        for swap, (own, ours) in zip(shown.swaps, kept, strict=True):
            after = base.state.pop(swap.proxy, {})
            if not stepped and swap.carried is not None:
                after = own  # the basis stays the old one, so its coordinates must
            base.state[swap.param] = {**after, **ours}


def _ignores_places(base: Optimizer) -> bool:
    """Whether ``base`` steps a parameter alike wherever it stands, and whatever stands beside it.

    bitsandbytes finds settings that were overridden by the parameter's position. What nobody knows may do so too.
    """
    known = type(base).__module__.split(".")[0] in ("torch", "torchao", "bitsandbytes")
    manager = getattr(base, "mng", None)
    return known and (manager is None or bool(base.initialized and not manager.index2config))  # type: ignore[attr-defined]


def _groups_of(shown: Shown) -> list[dict[str, Any]]:
    groups = [swap.group for swap in shown.swaps] + list(shown.dense.values())
    return list({id(group): group for group in groups}.values())


def _put_proxies(
    groups: Sequence[dict[str, Any]], shown: Shown, dense_lr_factor: float, *, few: bool
) -> list[dict[str, Any]]:
    """Write proxies into the groups; return extra groups of dense weights when their learning rate is another one.

    Args:
        groups: To be written into.
        shown: What they shall show.
        dense_lr_factor: Factor on the learning rate of the weights that are not projected.
        few: Take the parameters from ``shown``, instead of looking for them in the groups.
    """
    proxies: dict[Tensor, Tensor] = {swap.param: swap.proxy for swap in shown.swaps}
    # Any optimizer skips what has no gradient.
    proxies.update((param, nn.Parameter(param.new_empty(0))) for param in shown.skipped)
    owners = [(swap.param, swap.group) for swap in shown.swaps] + list(shown.dense.items())
    apart = []
    for group in groups:
        visible: list[Tensor] = []
        plain: list[Tensor] = []
        for param in [param for param, owner in owners if owner is group] if few else group["params"]:
            proxy = proxies.get(param)
            if proxy is not None:
                visible.append(proxy)
            elif param.grad is None:
                # Skipped by any optimizer: it stays, so that what follows keeps its position.
                visible.append(param)
            elif param in shown.dense:
                (plain if dense_lr_factor != 1.0 else visible).append(param)
        if dense_lr_factor != 1.0:
            apart.append({**group, "params": plain, "lr": group["lr"] * dense_lr_factor})
        group.update(shown.overrides, params=visible)
    return apart
