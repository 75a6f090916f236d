# SPDX-License-Identifier: Apache-2.0
"""The one loop: swap in low-rank proxies, step the user's optimizer, lift what it wrote onto the weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_galore import (
    admission,
    base_rules,
    foreign_shards,
    linalg,
    saved_state,
    sharded_state,
    state_keys,
    weights,
)
from lightning_galore.backward import GradientHooks
from lightning_galore.config import GaLoreConfig
from lightning_galore.coordinates import Coordinates
from lightning_galore.distributed import Team
from lightning_galore.fused import FusedLinears
from lightning_galore.low_grad import LowGrad
from lightning_galore.projector import Projector
from lightning_galore.proxies import Swap
from lightning_galore.stepping import Stepper
from lightning_galore.target_table import Target, TargetTable
from lightning_galore.targets import NoTargetsError, select_targets
from lightning_galore.watch import SubspaceControls
from lightning_galore.wrapper import OptimizerWrapper

Chosen: TypeAlias = tuple[dict[Tensor, Target], TargetTable]


class GaLoreOptimizer(SubspaceControls, OptimizerWrapper):
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

    def __init__(
        self, base: Optimizer, model: nn.Module | None = None, config: GaLoreConfig | None = None, **settings: Any
    ) -> None:
        config = config.with_settings(**settings) if config else GaLoreConfig(**settings)
        if isinstance(base, GaLoreOptimizer):
            raise ValueError(f"base={type(base).__name__} is wrapped already; use it as it is, or wrap its .base.")
        admission.check_params(base, model)
        targets, table = select_targets(model, base.param_groups, config)
        admission.check(base, targets, config)
        if config.weight_storage == "int8":
            weights.quantize(model, targets)
        elif model is not None:
            weights.dequantize(model, targets)  # of an earlier run
        admission.warn(base, config)
        self._attach(base, config, (targets, table), model)
        for param, target in targets.items():
            if not any(map(state_keys.is_ours, base.state.get(param, ()))):
                admission.shrink_state(base, param, target)

    def _attach(self, base: Optimizer, config: GaLoreConfig, chosen: Chosen, model: nn.Module | None = None) -> None:
        super().__init__(base)
        self.config = config
        self.targets, self._table = chosen
        self._model = weakref.ref(model) if model is not None else None
        self._projector = Projector(base, config, self.targets)
        self._stepper = Stepper(base, config, self._projector)
        self._places: dict[Tensor, tuple[int, int]] = {}  # group, and position in it
        self.hooks = GradientHooks(self, layerwise=config.mode == "layerwise")
        self.fused = FusedLinears(self.hooks)
        self._join_shards()
        self._know_params()
        self._projector.arrange(self.param_groups)

    def _join_shards(self) -> None:
        """Where each process holds a part of every weight, refresh together from the start."""
        shards = admission.shards_of(self.base, self.targets, self.config)
        if shards is None or self.hooks.norms.shards is not None:
            return
        self._projector.join(shards.team())
        self.hooks.norms.shards = shards
        self.hooks.defers = self.config.mode == "project"

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer (a callback unfreezes layers) and choose its targets."""
        self.base.add_param_group(param_group)
        self._groups_changed()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the real parameters, and the low-rank ones that wait for a step."""
        self.hooks.reset()  # before the groups are read: a hook of the Trainer may call this while they show proxies
        self._projector.forget()
        self._know_params()
        self.base.zero_grad(set_to_none)

    @override
    def __repr__(self) -> str:
        return f"GaLore({len(self.targets)} projected weights, {self.base!r})"

    @override
    def __reduce__(self) -> tuple[Callable[..., GaLoreOptimizer], tuple[Any, ...]]:
        # The class is made on the fly, so pickle and deepcopy go through the one that it was made from.
        return _rebuild, (type(self).__bases__[0], self.base, self.config, (self.targets, self._table))

    @override
    def _groups_changed(self) -> None:
        """Choose targets among parameters that came later. What is projected already has low-rank state: it stays."""
        model = self._model() if self._model else None
        for group in self.param_groups:
            base_rules.check_decay(self.base, group)
        try:
            targets, table = select_targets(model, self.param_groups, self.config)
        except NoTargetsError:  # a copy has no model to ask, and no group names a rank
            self._know_params()
            return
        admission.check_lift(self.config, targets, sharded=self.hooks.norms.shards is not None)
        if self.config.weight_storage == "int8" and model is not None:
            # Before they are hooked, and before anything of them is in use.
            weights.quantize(model, [param for param in targets if param not in self.targets])
        self._know_params()
        for param, target in targets.items():
            if param not in self.targets:
                admission.shrink_state(self.base, param, target)
                self.targets[param] = target
        self._join_shards()
        self._projector.arrange(self.param_groups)
        # Called through a LightningOptimizer, self is that one, which keeps attributes of its own.
        vars(getattr(self, "_optimizer", self))["_table"] = table

    def _know_params(self) -> None:
        """Note where each parameter stands, and hook those that have come or were unfrozen since."""
        # Changed in place, not assigned: self may be a LightningOptimizer here too.
        self._places.update(
            (param, (i, j)) for i, group in enumerate(self.param_groups) for j, param in enumerate(group["params"])
        )
        foreign_shards.check_groups(self.param_groups, self.targets)
        if self.config.mode != "step":
            self.hooks.install(list(self._places))
            self._fuse()

    def attach(self) -> None:
        """Put hooks on the parameters again, after :meth:`detach`."""
        self.hooks.attach([param for group in self.param_groups for param in group["params"]])
        self._fuse()

    def detach(self) -> None:
        """Take all hooks off parameters and layers, and forget what waits."""
        self.hooks.remove()
        self.fused.remove()

    def _fuse(self) -> None:
        model = self._model() if self._model is not None else None
        if self.config.fused_backward and model is not None:
            self.fused.install(model, [param for param, one in self.targets.items() if one.projection.side != "modes"])

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
        device = next((param.device for param in self._places), torch.device("cpu"))
        with linalg.without_autocast(device):
            output = self._step_all(**kwargs)
        return loss if closure is not None else output

    def _step_all(self, **kwargs: Any) -> Any:
        self.hooks.unexpose()
        self.hooks.settle()
        self._projector.divide((p, g) for g in self.param_groups for p in g["params"] if self._refreshes_now(p))
        swaps, dense = [], {}
        for group in self.param_groups:
            for param in group["params"]:
                if param not in self._places:  # it has come past add_param_group
                    self._know_params()
                if param not in self.targets:
                    dense[param] = self._places[param]
                elif param in self.hooks.waiting or param.grad is not None:
                    swaps.append(self._swap(param, group, self._take(param)))
        output = self._stepper.step(swaps, dense, **kwargs)
        self._stepper.restarts.count(self.param_groups)
        self.hooks.end_window()
        self._projector.forget()
        return output

    def _refreshes_now(self, param: Tensor) -> bool:
        return param in self.targets and param not in self.hooks.waiting and self.is_due(param)

    def _take(self, param: Tensor) -> LowGrad:
        """The weight's low-rank gradient: what waits from backward, and what its full gradient still holds."""
        low_grad = self.hooks.waiting.pop(param, None)
        if low_grad is None:
            return self.prepare(param, due=self.is_due(param))
        if param.grad is not None:
            low_grad.add_(param.grad)
        return low_grad

    def _swap(self, param: Tensor, group: dict[str, Any], low_grad: LowGrad) -> Swap:
        clips = self.config.clip_weight_norm is not None  # the norm is one more pass over the gradient
        norm_sq = self.hooks.norms.of(param, low_grad) if clips else None
        return self._stepper.swap(param, group, low_grad, norm_sq=norm_sq)

    # -- gradients that are consumed in backward -----------------------------------------------------------------------

    def is_target(self, param: Tensor) -> bool:
        """Whether ``param`` is projected."""
        return param in self.targets

    def is_due(self, param: Tensor) -> bool:
        """Whether the next step of a projected weight refreshes its basis."""
        return self._projector.turns.due(param, self._group_of(param))

    def waits(self, param: Tensor) -> bool:
        """Whether the next step of a projected weight wants the gradient of the whole window."""
        return self._projector.waits(param, self._group_of(param))

    def prepare(self, param: Tensor, *, due: bool) -> LowGrad:
        """Project ``param.grad``, with a new basis if one is due. Nothing is changed until :meth:`step` commits it."""
        return self._projector.prepare(param, self._group_of(param), due=due)

    def is_fused(self, param: Tensor) -> bool:
        """Whether the weight's next step wants only the low-rank coordinates of its gradient, of bases that it has."""
        return self._projector.is_fused(param, self._group_of(param))

    def coordinates(self, param: Tensor) -> Coordinates:
        """What a projected weight is projected with until its next refresh."""
        return self._projector.coordinates(param)

    def prepare_low(self, param: Tensor, low: Tensor) -> LowGrad:
        """A low-rank gradient that a layer has made itself, in the form in which it waits for a step."""
        return self._projector.prepare_low(param, low)

    @torch.no_grad()
    def move(self, param: Tensor, low_grad: LowGrad | None) -> None:
        """Update one parameter now, in backward.

        Args:
            param: The parameter.
            low_grad: Its projected gradient; None to step on ``param.grad`` as ``base`` does.
        """
        if low_grad is None:
            self._stepper.step([], {param: self._places[param]}, few=True)
        else:
            self._stepper.step([self._swap(param, self._group_of(param), low_grad)], {}, few=True)

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        return self.param_groups[self._places[param][0]]

    def accumulate(self) -> AbstractContextManager[None]:
        """Mark every backward of a step but the last, for gradient accumulation in a training loop of your own.

        Inside, ``mode="layerwise"`` moves no weight, and a weight whose refresh is due keeps its full gradient, so that
        its new basis comes from all micro-batches. Under Lightning's Trainer this is done for you.
        """
        return self.hooks.arming(False)

    @contextmanager
    def exposed(self) -> Iterator[None]:
        """Show waiting low-rank gradients in ``param_groups``, to a GradScaler and clipping in your own loop.

        In ``mode="project"``: ``with optimizer.exposed(): scaler.unscale_(optimizer)``, before ``scaler.step``.
        """
        self.hooks.expose(self.param_groups)
        try:
            yield
        finally:
            self.hooks.unexpose()

    def grad_norm(self) -> Tensor:
        """Norm of the full gradients of all parameters, 0-D; valid between backward and :meth:`step` in every mode.

        Exact, but for a weight of ``mode="project"`` or ``"layerwise"`` that accumulated several gradients: the cross
        terms of what projecting left out went with them, and its low-rank norm counts.
        """
        return self.hooks.grad_norm(self.param_groups)

    def join(self, team: Team) -> None:
        """Train together with other processes, which hold the same weights and see different data.

        Each basis is found by one of them. In mode "step" the gradients must come averaged, as DDP leaves them; in the
        other modes they are averaged here, in low rank, so the model must not be wrapped in DDP. Then every process
        must call :meth:`step`, :meth:`grad_norm` and :meth:`exposed` at the same points.

        Args:
            team: The processes.

        Raises:
            ValueError: If weights are sharded (FSDP2): then the optimizer knows the processes from them.
        """
        if self.hooks.norms.shards is not None:
            raise ValueError("join(): the weights are sharded (DTensors), and their processes work together already.")
        self._projector.join(team)
        if self.config.mode != "step":
            self.hooks.team = team

    # -- state ---------------------------------------------------------------------------------------------------------

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # torch.distributed.checkpoint passes it by keyword
        """Load a state dict whole or not at all, with every tensor in the dtype in which it was saved.

        Args:
            state_dict: What :meth:`state_dict` returned, of the same rank, sides and targets.

        Raises:
            ValueError: If it is of another rank or side, full-rank, or of another package; nothing has changed then.
        """
        saved_state.check_loadable(state_dict, self.param_groups, self.targets, adaptive=self.config.adaptive_rank)
        state_dict = sharded_state.placed_state_dict(
            state_dict, self.param_groups, self.targets, divide_bases=self.config.basis_placement == "shard"
        )
        self.hooks.reset()  # what waits is of another course
        self._projector.forget()
        self.base.load_state_dict(saved_state.stepped_only(state_dict))
        saved_state.restore_unstepped(state_dict, self.param_groups, self.state)
        saved_state.restore_dtypes(state_dict, self.param_groups, self.state)


def _rebuild(own: type[GaLoreOptimizer], base: Optimizer, config: GaLoreConfig, chosen: Chosen) -> GaLoreOptimizer:
    optimizer = object.__new__(own)
    optimizer._attach(base, config, chosen)
    return optimizer
