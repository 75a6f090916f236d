# SPDX-License-Identifier: Apache-2.0
"""Telling a tracker what is what while a model trains: gradients, states, and which module runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_galore import state_keys
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.planner.tracker import Category, MemoryTracker, Moment


class Watcher:
    """Hooks on a model that name its tensors to a tracker.

    Args:
        tracker: Counts.
        module: What is trained.
    """

    def __init__(self, tracker: MemoryTracker, module: nn.Module) -> None:
        self._tracker = tracker
        self._module = module
        self._names: dict[Tensor, str] = {param: name for name, param in module.named_parameters()}
        self._optimizers: Sequence[Optimizer] = ()
        self._handles: list[RemovableHandle] = []
        #: Names of the parameters whose gradients are complete, in that order.
        self.completed: list[str] = []

    def enter(self) -> None:
        """Hooks that must come before those of an optimizer: they say that its work begins."""
        tracker = self._tracker

        def name_module(name: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any) -> None:
                tracker.module = name

            return note

        for name, module in self._module.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(name_module(name)))

        def complete(param: Tensor) -> None:
            if param.grad is not None:
                tracker.hold(param.grad, "gradients")
            self.completed.append(self._names.get(param, ""))
            tracker.order = len(self.completed)
            tracker.phase = "optimizer"

        self._hook(complete)

    def leave(self, *optimizers: Optimizer) -> None:
        """Hooks that must come after those of the optimizers: what they have kept gets its name.

        Args:
            *optimizers: Of the module's parameters.
        """
        self._optimizers = optimizers
        tracker = self._tracker

        def done(param: Tensor) -> None:
            self.name_states(param)
            tracker.phase = "backward"
            for optimizer in optimizers:
                waiting = optimizer.hooks.waiting.get(param) if isinstance(optimizer, GaLoreOptimizer) else None
                if waiting is not None:
                    tracker.hold(waiting.held, "gradients")

        self._hook(done)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def name_weights(self) -> None:
        """Count parameters and buffers as weights."""
        self._tracker.hold([*self._module.parameters(), *self._module.buffers()], "weights")

    def name_states(self, *params: Tensor) -> None:
        """Count what the optimizers keep, of ``params`` or of all, as moments and bases."""
        for optimizer in self._optimizers:
            for param in params or self._names:
                for key, value in optimizer.state.get(param, {}).items():
                    category: Category = "bases" if str(key).startswith(state_keys.BASIS) else "moments"
                    self._tracker.hold(value, category)

    def name_stand_ins(self) -> None:
        """Count bases that a forward pass has made, for weights without any, as such."""
        for optimizer in self._optimizers:
            for bases in optimizer.fused.bases if isinstance(optimizer, GaLoreOptimizer) else ():
                self._tracker.hold([(part.codes, part.absmax) for part in bases.parts], "bases")

    def where(self, moment: Moment) -> str:
        """What ran at a moment, in words."""
        if moment.phase == "forward":
            return f"forward, {moment.module}" if moment.module else "forward"
        done = moment.order
        if moment.phase == "backward":
            following = self.completed[done] if done < len(self.completed) else "the end"
            return f"backward, before {following}"
        if done < len(self.completed):
            return f"backward, at {self.completed[done - 1]}"
        return "optimizer step"

    def _hook(self, hook: Callable[[Tensor], None]) -> None:
        for param in self._names:
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(hook))
