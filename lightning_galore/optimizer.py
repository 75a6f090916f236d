# SPDX-License-Identifier: Apache-2.0
"""The one loop: swap in low-rank proxies, step the user's optimizer, lift what it wrote onto the weights."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_galore import base_rules, linalg, state_keys, storage
from lightning_galore.config import GaLoreConfig
from lightning_galore.lift import LIFTS
from lightning_galore.proxies import Shown, Swap, swapped_in
from lightning_galore.schedule import SCHEDULES
from lightning_galore.state_keys import WeightState
from lightning_galore.subspace import SUBSPACES, Projection, seeded_generator
from lightning_galore.targets import NoTargetsError, Target, TargetTable, select_targets


class GaLoreOptimizer(Optimizer):
    """Low-rank training with any torch optimizer: wraps ``base``, and shares its groups, state and defaults.

    ``param_groups`` list the real parameters, so LR schedulers, clipping, GradScaler and callbacks work as before, and
    ``isinstance(optimizer, type(base))`` holds. Inside :meth:`step` each projected weight is replaced by a low-rank
    proxy (a zero tensor whose ``grad`` is the projected gradient), ``base.step()`` runs once over all, and what it
    wrote into a proxy is lifted onto the weight. So fused, foreach and 8-bit kernels are used as they are
    (arXiv 2403.03507, algorithm 2).

    Args:
        base: The user's optimizer over ``model``'s parameters, fresh or about to load a checkpoint.
        model: Gives module names and classes to ``target_modules``. Without it only param groups with a ``rank`` key
            are projected, as in galore-torch.
        config: The settings; or name them one by one.
        **settings: Arguments of :class:`~lightning_galore.config.GaLoreConfig`, on top of ``config``.

    Raises:
        ValueError: If ``base`` cannot be wrapped, a setting is out of range, or no weight would be projected.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        >>> optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, rank=2)
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[model[0].weight]["exp_avg"].shape
        torch.Size([16, 2])
    """

    # The GradScaler asks this before it lets a fused optimizer unscale by itself. It would hand the scale to this
    # object, and base would never see it: so it has to unscale as for any other optimizer.
    _step_supports_amp_scaling = False

    def __init__(
        self, base: Optimizer, model: nn.Module | None = None, config: GaLoreConfig | None = None, **settings: Any
    ) -> None:
        config = config.with_settings(**settings) if config else GaLoreConfig(**settings)
        if isinstance(base, GaLoreOptimizer):
            raise ValueError(
                f"base={type(base).__name__} is a GaLoreOptimizer already; use it as it is, or wrap its .base."
            )
        base_rules.check_base(base)
        targets, table = select_targets(model, base.param_groups, config)
        if any(state_keys.BASIS in state for state in base.state.values()):  # base was wrapped before
            state_keys.check_loadable(base.state_dict(), base.param_groups, targets)
        self._attach(base, config, targets, table, model)
        for param, target in targets.items():
            if not any(map(state_keys.is_ours, base.state.get(param, ()))):
                base_rules.shrink_eager_state(base, param, target.projection.low_shape)

    def _attach(
        self,
        base: Optimizer,
        config: GaLoreConfig,
        targets: dict[Tensor, Target],
        table: TargetTable,
        model: nn.Module | None = None,
    ) -> None:
        # Imitate the wrapped class, as LightningOptimizer does, so that isinstance checks in user code hold.
        # No super().__init__(): groups, state, defaults and hooks are those of the wrapped optimizer (see __getattr__).
        self.__class__ = type(f"GaLore{type(base).__name__}", (type(self), type(base)), {"__doc__": type(self).__doc__})
        self.base = base
        self.config = config
        self.targets = targets
        self._table = table
        self._model = weakref.ref(model) if model is not None else None
        self._subspace = SUBSPACES[config.subspace]()
        self._schedule = SCHEDULES[config.schedule]()
        self._lift = LIFTS[config.lift]()
        self._patch_step_function()

    # -- what the wrapped optimizer owns -------------------------------------------------------------------------------

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer, under the name by which Lightning's LearningRateMonitor unwraps one."""
        return self.base

    @property  # type: ignore[explicit-override]  # of the setter, which cannot be decorated so
    @override
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups, with the real parameters. Never cached: torch rebinds the list on load."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups
        self._select_again()

    @property
    @override
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The wrapped optimizer's state by real parameter; that of a projected weight is low-rank, plus its basis."""
        return cast("dict[Tensor, Any]", self.base.state)

    @property
    @override
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.base.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "base" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return getattr(self.base, name)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer (a callback unfreezes layers) and choose its targets."""
        self.base.add_param_group(param_group)
        self._select_again()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the real parameters."""
        self.base.zero_grad(set_to_none)

    @override
    def __repr__(self) -> str:
        return f"GaLore({len(self.targets)} projected weights, {self.base!r})"

    @override
    def __reduce__(self) -> tuple[Callable[..., GaLoreOptimizer], tuple[Any, ...]]:
        # The class is made on the fly, so pickle and deepcopy go through the one that it was made from.
        return _rebuild, (type(self).__bases__[0], self.base, self.config, self.targets, self._table)

    def _select_again(self) -> None:
        """Choose targets among parameters that came later. What is projected already has low-rank state: it stays."""
        model = self._model() if self._model else None
        for group in self.param_groups:
            base_rules.check_decay(self.base, group)
        try:
            targets, table = select_targets(model, self.param_groups, self.config)
        except NoTargetsError:  # a copy has no model to ask, and no group names a rank
            return
        for param, target in targets.items():
            if param not in self.targets:
                base_rules.shrink_eager_state(self.base, param, target.projection.low_shape)
                self.targets[param] = target
        # Called through a LightningOptimizer, self is that one, which keeps attributes of its own.
        vars(getattr(self, "_optimizer", self))["_table"] = table

    # -- the step ------------------------------------------------------------------------------------------------------

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Update every parameter that has a gradient: the projected weights in low rank, the others as ``base`` does.

        Args:
            closure: Evaluates the model, runs backward and returns the loss; called once, with gradients enabled.
            **kwargs: Handed to ``base.step``.

        Returns:
            What the closure returned, else what ``base.step`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        swaps = [
            self._project(param, group)
            for group in self.param_groups
            for param in group["params"]
            if param in self.targets and param.grad is not None
        ]
        output = None
        for shown in self._batches(swaps):
            with swapped_in(self.base, self.targets, shown, dense_lr_factor=self.config.dense_lr_factor):
                output = self.base.step(closure=None, **kwargs)
        for swap in swaps:
            self._lift_onto_weight(swap)
        return loss if closure is not None else output

    def _project(self, param: Tensor, group: dict[str, Any]) -> Swap:
        """Refresh the basis if it is due, project the gradient and with it a coupled weight decay."""
        target = self.targets[param]
        state = WeightState(self.state[param], target.projection)
        grad = cast("Tensor", param.grad)
        if grad.is_sparse:
            raise ValueError(
                f"{target.name} has a sparse gradient, which cannot be projected; add it to ignore_modules."
            )
        gap = group.get("update_proj_gap") or self.config.update_proj_gap
        if self._schedule.due(state.step, state.record(gap)):
            self._refresh(param, grad, target, state)
        bases = state.bases
        low_grad = target.projection.project(grad, bases)
        decay = group.get("weight_decay") or 0.0
        if decay and base_rules.decay_kind(self.base, group) != "decoupled":
            # base adds weight_decay times the proxy, which is zero. It would negate the gradient before adding.
            sign = -1.0 if group.get("maximize") else 1.0
            low_grad.add_(target.projection.project(param, bases), alpha=sign * decay)
        proxy = nn.Parameter(torch.zeros_like(low_grad))
        proxy.grad = low_grad
        return Swap(param, proxy, target, group)

    def _refresh(self, param: Tensor, grad: Tensor, target: Target, state: WeightState) -> None:
        """Find a new basis from the gradient; where there is none, keep the old one, or begin with unit vectors."""
        generator = seeded_generator(grad.device, seed=self.config.seed, name=target.name, refresh=state.num_refreshes)
        found = self._subspace.find(grad, target.projection, generator=generator, fix_signs=self.config.fix_signs)
        if found is None:
            state.count_failure()
            if state.has_bases:
                return
            found = tuple(linalg.identity_basis(d, r, like=grad) for d, r in target.projection.basis_shapes)
            state.set_bases(self._store(found, param), refreshed=False)
            return
        bases = self._store(found, param)
        overlap = -1.0
        if state.refreshed_at >= 0 and self._subspace.orthonormal:
            pairs = zip(state.bases, bases, strict=True)
            overlap = float(sum(linalg.overlap(old, new) for old, new in pairs)) / len(bases)
        state.set_bases(bases, refreshed=True, overlap=overlap)

    def _store(self, bases: Sequence[Tensor], param: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            storage.write(basis, storage=self.config.basis_storage, param_dtype=param.dtype) for basis in bases
        )

    def _batches(self, swaps: list[Swap]) -> Iterator[Shown]:
        """The calls of ``base.step``: one for all, but one a weight where the step is relative to the weight's size."""
        if not base_rules.reads_rms(self.base):
            yield Shown(swaps=swaps, overrides={})
            return
        for swap in swaps:
            # Adafactor steps by max(eps2, RMS(W)) and a zero proxy has RMS 0: so let eps2 be what the weight gives.
            eps1, eps2 = swap.group["eps"]
            rms = float(swap.param.norm(2)) / swap.param.numel() ** 0.5
            yield Shown(swaps=[swap], overrides={"eps": (eps1, max(eps2, rms))}, dense=False)
        yield Shown(swaps=[], overrides={})

    def _lift_onto_weight(self, swap: Swap) -> None:
        projection = swap.target.projection
        state = WeightState(self.state[swap.param], projection)
        decay = swap.group.get("weight_decay") or 0.0
        if decay and base_rules.decay_kind(self.base, swap.group) == "decoupled":
            # A zero proxy cannot decay, so base's own decay of it does nothing. Not before base's step: Adafactor's is
            # relative to the weight before its decay, and where base raises no weight has changed.
            swap.param.mul_(1 - swap.group["lr"] * decay)
        scale = swap.group.get("scale") or self.config.scale
        factor = base_rules.lift_factor(swap.group, projection.shape, projection.low_shape)
        self._lift.apply_(swap.param, swap.proxy.detach(), projection, state.bases, scale=scale * factor)
        state.count_step()

    # -- state and reports ---------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state dict: tensors and numbers only, so it loads with ``weights_only=True``."""
        return self.base.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # torch.distributed.checkpoint passes it by keyword
        """Load a state dict whole or not at all, with every tensor in the dtype in which it was saved.

        Args:
            state_dict: What :meth:`state_dict` returned, of the same rank, sides and targets.

        Raises:
            ValueError: If it is of another rank or side, full-rank, or of another package; nothing has changed then.
        """
        state_keys.check_loadable(state_dict, self.param_groups, self.targets)
        self.base.load_state_dict(state_dict)
        state_keys.restore_dtypes(state_dict, self.param_groups, self.state)

    def targets_table(self) -> TargetTable:
        """Every parameter: its shape, side, rank, bytes of low-rank state, or why it is not projected.

        Bytes are those held, and before the first step those that ``base`` and the basis will take.
        """
        groups = {param: i for i, group in enumerate(self.param_groups) for param in group["params"]}
        known: dict[tuple[Any, ...], int] = {}
        held: dict[Target, int] = {}
        for param, target in self.targets.items():
            low_shape = target.projection.low_shape
            state = self.state.get(param) or {}
            own = {key: value for key, value in state.items() if not state_keys.is_ours(key)}
            key = (groups[param], low_shape, param.dtype, param.device)
            if not own and key not in known:
                known[key] = base_rules.probe_state(self.base, self.param_groups[groups[param]], low_shape, param)
            held[target] = (storage.nbytes(own) if own else known[key]) + self._basis_bytes(target.projection, param)
        rows = [
            dataclasses.replace(row, state_bytes=held.get(row.target)) if row.target else row
            for row in self._table.rows
        ]
        return TargetTable(tuple(rows))

    def _basis_bytes(self, projection: Projection, param: Tensor) -> int:
        itemsize = storage.storage_dtype(self.config.basis_storage, param.dtype).itemsize
        return sum(d * r for d, r in projection.basis_shapes) * itemsize


def _rebuild(
    own: type[GaLoreOptimizer],
    base: Optimizer,
    config: GaLoreConfig,
    targets: dict[Tensor, Target],
    table: TargetTable,
) -> GaLoreOptimizer:
    optimizer = object.__new__(own)
    optimizer._attach(base, config, targets, table)
    return optimizer
