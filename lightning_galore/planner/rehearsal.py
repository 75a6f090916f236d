# SPDX-License-Identifier: Apache-2.0
"""A training step rehearsed on tensors without data, by the optimizer that would run it, and its bytes at the peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_galore import memory, state_keys, storage
from lightning_galore.config import GaLoreConfig
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.planner.fakes import Job, fake_batch, fake_copy, fake_mode, quietly
from lightning_galore.planner.tracker import Category, MemoryTracker, Moment
from lightning_galore.targets import Target


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What trains the module.

    Args:
        make_base: Makes the wrapped (or only) optimizer from parameters.
        config: How it is wrapped; None leaves it as it is.
        prepare: Changes the module first (adapters).
    """

    make_base: Callable[[list[nn.Parameter]], Optimizer]
    config: GaLoreConfig | None = None
    prepare: Callable[[nn.Module], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """What a rehearsal has shown.

    Args:
        footprint: Of the optimizer, once every parameter has taken a step.
        peak: The worst moment of all steps.
        where: The same moment in words.
        step: The step that it was in: ``first``, ``ordinary`` or ``refresh``.
        peaks: The worst moment of each step.
        activations: Bytes of activations when the forward pass ends.
        workspace: Most that the optimizer's temporaries and waiting work took at once.
    """

    footprint: memory.Footprint
    peak: Moment
    where: str
    step: str
    peaks: dict[str, Moment]
    activations: int
    workspace: int


def rehearse(
    job: Job, recipe: Recipe, *, checkpointing: bool = False, shares: Mapping[Category, float] | None = None
) -> Rehearsed:
    """Take the first steps of a training run on fakes: nothing of the model's size is allocated.

    Args:
        job: What is trained; its batch must be known.
        recipe: What trains it.
        checkpointing: Recompute activations in backward, where the module can.
        shares: What part of a category counts when the worst moment is looked for; see :class:`MemoryTracker`.

    Raises:
        ValueError: If the optimizer cannot be wrapped so, or the module cannot be checkpointed.
    """
    with quietly():
        return _Rehearsal(job, recipe, checkpointing=checkpointing, shares=shares).run()


def footprint_of(job: Job, recipe: Recipe) -> memory.Footprint:
    """Bytes of weights, bases, moments and gradients alone: the optimizer's own account, without a step.

    Args:
        job: What is trained.
        recipe: What trains it.
    """
    with quietly():
        return _Rehearsal(job, recipe, checkpointing=False).footprint()


def refresh_workspace(job: Job, recipe: Recipe) -> int:
    """Most bytes that the refresh of a single weight takes beside the gradient, the state and the weight itself.

    The largest projected weight is refreshed alone, twice: the second time its moments are carried over too.

    Args:
        job: What is trained; its batch does not matter.
        recipe: What trains it; without low-rank gradients there is no refresh.
    """
    if recipe.config is None:
        return 0
    with quietly():
        found = _Rehearsal(job, recipe, checkpointing=False)
        targets = found.targets
        largest = max(targets, key=lambda param: param.numel() * targets[param].projection.rank)
        m, n = largest.shape
        alone = nn.ModuleDict({"largest": nn.Linear(n, m, bias=False, device="meta", dtype=largest.dtype)})
        config = recipe.config.with_settings(
            mode="step", target_modules="all-linear", ignore_modules=(), rank=targets[largest].projection.rank,
            rank_pattern=(), stagger=False,
        )  # fmt: skip
        one = Job(name="largest", module=alone, batch=torch.empty(1, n, dtype=largest.dtype), step=_sum_of_largest)
        return _Rehearsal(one, replace(recipe, config=config), checkpointing=False).run().workspace


def _sum_of_largest(module: nn.Module, batch: Tensor) -> Tensor:
    return module.get_submodule("largest")(batch).sum()  # type: ignore[no-any-return]


class _Rehearsal:
    def __init__(
        self, job: Job, recipe: Recipe, *, checkpointing: bool, shares: Mapping[Category, float] | None = None
    ) -> None:
        self._job, self._recipe = job, recipe
        self._mode = fake_mode()
        self._module = fake_copy(job.module, self._mode, job.dtypes[0]).train()
        self._handles: list[RemovableHandle] = []
        self._tracker = MemoryTracker(answers=True, shares=shares)
        self._completed: list[str] = []
        if checkpointing:
            enable_checkpointing(self._module)
        with self._mode:
            if recipe.prepare is not None:
                recipe.prepare(self._module)
        # Outside: bitsandbytes makes its tables of codes here, which must be real.
        self._base = recipe.make_base([p for p in self._module.parameters() if p.requires_grad])
        self._names = {param: name for name, param in self._module.named_parameters()}
        self._enter_hooks()
        self._optimizer = self._wrap()
        self._leave_hooks()

    @property
    def targets(self) -> dict[Tensor, Target]:
        """The projected weights."""
        return self._optimizer.targets if isinstance(self._optimizer, GaLoreOptimizer) else {}

    def footprint(self) -> memory.Footprint:
        config = self._recipe.config or GaLoreConfig(mode="step")
        with self._mode, MemoryTracker(answers=True):
            held = memory.footprint(self._base, self.targets, config)
        frozen = sum(storage.nbytes(p) for p in self._module.parameters() if not p.requires_grad)
        buffers = storage.nbytes(list(self._module.buffers()))
        return replace(held, weights=held.weights + frozen + buffers)

    def run(self) -> Rehearsed:
        footprint = self.footprint()
        tracker = self._tracker
        tracker.hold(list(self._module.parameters()), "weights")
        tracker.hold(list(self._module.buffers()), "weights")
        galore = isinstance(self._optimizer, GaLoreOptimizer)
        peaks: dict[str, Moment] = {}
        wheres: dict[str, str] = {}
        workspace = activations = 0
        for step in ("first", "ordinary", "refresh") if galore else ("first", "ordinary"):
            self._force(step)
            alive = self._step()
            peaks[step], wheres[step] = tracker.peak, self._where(tracker.peak)
            workspace, activations = max(workspace, tracker.most["workspace"]), max(activations, alive)
            self._completed.clear()
        worst = max(peaks, key=lambda step: (peaks[step].total, step == "ordinary"))
        for handle in self._handles:
            handle.remove()
        return Rehearsed(
            footprint=footprint,
            peak=peaks[worst],
            where=wheres[worst],
            step=worst,
            peaks=peaks,
            activations=activations,
            workspace=workspace,
        )

    def _wrap(self) -> Optimizer:
        if self._recipe.config is None:
            return self._base
        with self._mode, MemoryTracker(answers=True):
            return GaLoreOptimizer(self._base, self._module, self._recipe.config)

    def _force(self, step: str) -> None:
        if isinstance(self._optimizer, GaLoreOptimizer) and step != "first":
            due = self._optimizer.refreshing_together() if step == "refresh" else ()
            self._optimizer.force_due(due)

    def _step(self) -> int:
        """One step; returns the bytes of activations at the end of its forward pass."""
        tracker, optimizer = self._tracker, self._optimizer
        with self._mode, tracker:
            tracker.phase, tracker.module = "forward", ""
            tracker.restart()
            batch = fake_batch(self._job.batch, self._mode)
            tracker.hold(_tensors(batch), "activations")
            with self._job.autocast():
                loss = self._job.step(self._module, batch)
            alive = tracker.live["activations"]
            tracker.phase = "backward"
            loss.backward()
            del loss, batch
            tracker.phase, tracker.module = "optimizer", ""
            optimizer.step()
            self._name_states()
            optimizer.zero_grad()
        return alive

    # -- telling what is what ------------------------------------------------------------------------------------------

    def _enter_hooks(self) -> None:
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
            self._completed.append(self._names.get(param, ""))
            tracker.order = len(self._completed)
            tracker.phase = "optimizer"

        for param in self._names:
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(complete))

    def _leave_hooks(self) -> None:
        """After the optimizer's own hooks, which were installed in between."""
        tracker = self._tracker

        def leave(param: Tensor) -> None:
            self._name_states(param)
            tracker.phase = "backward"
            optimizer = self._optimizer
            waiting = optimizer.hooks.waiting.get(param) if isinstance(optimizer, GaLoreOptimizer) else None
            if waiting is not None:
                tracker.hold(waiting.held, "gradients")

        for param in self._names:
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(leave))

    def _name_states(self, *params: Tensor) -> None:
        for param in params or self._names:
            for key, value in self._optimizer.state.get(param, {}).items():
                category: Category = "bases" if state_keys.is_ours(key) else "moments"
                self._tracker.hold(value, category)

    def _where(self, moment: Moment) -> str:
        if moment.phase == "forward":
            return f"forward, {moment.module}" if moment.module else "forward"
        done = moment.order
        if moment.phase == "backward":
            following = self._completed[done] if done < len(self._completed) else "the end"
            return f"backward, before {following}"
        if done < len(self._completed):
            return f"backward, at {self._completed[done - 1]}"
        return "optimizer step"


def enable_checkpointing(module: nn.Module) -> None:
    """Let Transformers models in a module recompute their activations in backward.

    Args:
        module: The model, or what holds it.

    Raises:
        ValueError: If there is none in it.
    """
    found = [part for part in module.modules() if getattr(part, "supports_gradient_checkpointing", False)]
    for part in found:
        part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    if not found:
        raise ValueError(
            f"checkpointing=True: {type(module).__name__} holds no Transformers model that could be told so. Wrap its "
            "layers in torch.utils.checkpoint yourself, and plan it with checkpointing=False."
        )


def _tensors(batch: Any) -> Any:
    return batch if isinstance(batch, (Tensor, dict, list, tuple)) else []

