# SPDX-License-Identifier: Apache-2.0
"""A training step rehearsed on tensors without data, by the optimizer that would run it, and its bytes at the peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_galore import memory, storage
from lightning_galore.config import GaLoreConfig, Rank
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.planner.fakes import Job, fake_batch, fake_copy, fake_mode, loss_in, quietly
from lightning_galore.planner.tracker import MemoryTracker, Moment
from lightning_galore.planner.watching import Watcher
from lightning_galore.subspace import TuckerProjection
from lightning_galore.target_table import Target


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
    job: Job, recipe: Recipe, *, checkpointing: bool = False, shares: Mapping[str, float] | None = None
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
        projection = targets[largest].projection
        rank: Rank = projection.ranks if isinstance(projection, TuckerProjection) else projection.rank
        side = recipe.config.proj_type if projection.side == "modes" else projection.side
        config = recipe.config.with_settings(
            mode="step", target_modules=["largest"], ignore_modules=(), rank_pattern=(), stagger=False,
            rank=rank, proj_type=side,
            fused_backward=False, compress_activations=False,
        )  # fmt: skip
        batch = torch.empty(1, dtype=largest.dtype)
        one = Job(name="largest", module=_alone(largest), batch=batch, step=_multiplied)
        return _Rehearsal(one, replace(recipe, config=config), checkpointing=False).run().workspace


def _alone(weight: Tensor) -> nn.Module:
    """A module with one weight of such a shape: a matrix is that of a linear layer, which alone has int8 weights."""
    layer: nn.Module = nn.Module()
    if weight.ndim == 2:
        m, n = weight.shape
        layer = nn.Linear(n, m, bias=False, device="meta", dtype=weight.dtype)
    else:
        layer.weight = nn.Parameter(torch.empty_like(weight, device="meta"))
    return nn.ModuleDict({"largest": layer})


def _multiplied(module: nn.Module, batch: Tensor) -> Tensor:
    return (module.get_submodule("largest").get_parameter("weight") * batch).sum()


class _Rehearsal:
    def __init__(
        self, job: Job, recipe: Recipe, *, checkpointing: bool, shares: Mapping[str, float] | None = None
    ) -> None:
        self._job, self._recipe = job, recipe
        self._mode = fake_mode()
        self._module = fake_copy(job.module, self._mode, job.dtypes[0]).train()
        self._tracker = MemoryTracker(answers=True, shares=shares)
        if checkpointing:
            enable_checkpointing(self._module)
        with self._mode:
            if recipe.prepare is not None:
                recipe.prepare(self._module)
        # Outside: bitsandbytes makes its tables of codes here, which must be real.
        self._base = recipe.make_base([p for p in self._module.parameters() if p.requires_grad])
        self._watcher = Watcher(self._tracker, self._module)
        self._watcher.enter()
        self._optimizer = self._wrap()
        self._watcher.leave(self._optimizer)

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
        self._watcher.name_weights()
        galore = isinstance(self._optimizer, GaLoreOptimizer)
        peaks: dict[str, Moment] = {}
        wheres: dict[str, str] = {}
        workspace = activations = 0
        for step in ("first", "ordinary", "refresh") if galore else ("first", "ordinary"):
            self._force(step)
            alive = self._step()
            peaks[step], wheres[step] = tracker.peak, self._watcher.where(tracker.peak)
            workspace, activations = max(workspace, tracker.most["workspace"]), max(activations, alive)
            self._watcher.completed.clear()
        worst = max(peaks, key=lambda step: (peaks[step].total, step == "ordinary"))
        self._watcher.remove()
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
        tracker, optimizer, alive = self._tracker, self._optimizer, 0
        with self._mode, tracker:
            tracker.restart()
            for place in range(self._job.micro_batches):
                last = place == self._job.micro_batches - 1
                with optimizer.accumulate() if not last and isinstance(optimizer, GaLoreOptimizer) else nullcontext():
                    alive = self._backward(first=place == 0)
            tracker.phase, tracker.module = "optimizer", ""
            optimizer.step()
            self._watcher.name_states()
            if self._job.loop == "plain":
                optimizer.zero_grad()
        return alive

    def _backward(self, *, first: bool) -> int:
        tracker = self._tracker
        tracker.phase, tracker.module = "forward", ""
        batch = fake_batch(self._job.batch, self._mode)
        tracker.hold(_tensors(batch), "activations")
        with self._job.autocast():
            loss = loss_in(self._job.step(self._module, batch))
        self._watcher.name_stand_ins()
        alive = tracker.live["activations"]
        if first and self._job.loop == "lightning":
            self._optimizer.zero_grad()
        tracker.phase = "backward"
        loss.backward()
        return alive


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
