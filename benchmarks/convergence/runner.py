# SPDX-License-Identifier: Apache-2.0
"""One run: a model trained by one variant at one learning rate and seed, with what it gave and what it cost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.convergence import variants
from benchmarks.convergence.data import Text, windows
from benchmarks.convergence.model import SIZES, UNIFORM_LOSS, ModelSize, build_model, matrices, next_byte_loss
from benchmarks.convergence.variants import Task, Variant
from lightning_galore import GaLoreOptimizer
from lightning_galore.storage import nbytes

_VALIDATION_SEED = 20_240  # the same windows for every run
_JUDGED_AT = (0.125, 0.25, 0.5, 0.75, 1.0)  # shares of the run after which it is validated
_TRAIN_POINTS = 40  # of the curve of the training loss

#: Called before clipping with the number of steps done and the full gradient of each matrix.
Watch = Callable[[int, dict[str, Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all variants share.

    Args:
        size: Shape of the model.
        rank: Of the low-rank variants.
        steps: Optimizer steps.
        batch: Windows of text a step.
        length: Bytes to predict in each.
        warmup: Share of the steps in which learning rates rise linearly.
        final: Share of the learning rate at the end of the cosine.
        clip: Global norm to which gradients are clipped.
        validation_batches: Batches over which the validation loss is taken.
    """

    size: ModelSize = SIZES["small"]
    rank: int = SIZES["small"].rank
    steps: int = 400
    batch: int = 8
    length: int = 128
    warmup: float = 0.1
    final: float = 0.1
    clip: float = 1.0
    validation_batches: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.rank < self.size.hidden:
            raise ValueError(f"rank={self.rank} must be in [1, {self.size.hidden}), below the model's hidden size.")
        for name in ("steps", "batch", "length", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def lr_factor(self, step: int) -> float:
        """Share of the learning rate at ``step`` (0 is the first): linear rise, then a cosine."""
        rise = round(self.warmup * self.steps)
        if step < rise:
            return (step + 1) / rise
        done = (step - rise) / max(1, self.steps - rise)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One run, before it has begun."""

    experiment: Experiment
    variant: Variant
    lr: float
    seed: int
    text_sha256: str

    def key(self) -> str:
        """What identifies the run: a hash of all that it depends on but the code. A variant's name is not in it."""
        parts = {
            "experiment": dataclasses.asdict(self.experiment),
            "kind": self.variant.kind,
            "settings": dict(self.variant.settings),
            **self.variant.optional,
            "lr": self.lr,
            "seed": self.seed,
            "text": self.text_sha256,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def config(self) -> dict[str, Any] | None:
        """Every setting of this package's optimizer as the run has it, in JSON's types; None for other packages."""
        config = variants.config_of(self.variant, rank=self.experiment.rank, seed=self.seed)
        held: dict[str, Any] | None = json.loads(json.dumps(dataclasses.asdict(config))) if config else None
        return held


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave.

    Args:
        loss: Validation loss at the end, nats a byte; None if the run diverged to NaN.
        diverged: Whether it ended above the loss of a model that knows nothing.
        curve: ``(steps done, validation loss)``.
        train_curve: ``(steps done, mean training loss since the last point)``.
        refreshes: Of a weight's basis, mean over the matrices; None where the optimizer counts none.
        state_bytes: Of optimizer state that the matrices hold at the end.
        matrix_bytes: Of the matrices themselves.
        optimizer_seconds: CPU time of all optimizer steps.
        train_seconds: CPU time of training, validation left out.
    """

    loss: float | None
    diverged: bool
    curve: list[tuple[int, float]]
    train_curve: list[tuple[int, float]]
    refreshes: float | None
    state_bytes: int
    matrix_bytes: int
    optimizer_seconds: float
    train_seconds: float


def train(spec: Spec, text: Text, *, watch: Watch | None = None) -> Result:
    """Do one run.

    Args:
        spec: Which.
        text: The text of ``spec.text_sha256``.
        watch: Sees the gradients of the matrices at every step.
    """
    plan = spec.experiment
    model = build_model(plan.size, length=plan.length, seed=spec.seed)
    model = model.bfloat16() if spec.variant.bf16 else model
    weights = matrices(model)
    optimizers = variants.build(spec.variant, Task(model=model, rank=plan.rank, lr=spec.lr, seed=spec.seed))
    judged = _validation(text, plan)
    points = {max(1, round(share * plan.steps)) for share in _JUDGED_AT}
    run = _Training(model, optimizers, plan, weights, watch)
    curve: list[tuple[int, float]] = []
    batches = windows(text.train, batch=plan.batch, length=plan.length, seed=spec.seed)
    for step, window in enumerate(islice(batches, plan.steps)):
        if not run.step(step, window):
            break
        if step + 1 in points:
            curve.append((step + 1, validation_loss(model, judged)))
    loss = curve[-1][1] if curve and curve[-1][0] == plan.steps else math.nan
    return Result(
        loss=loss if math.isfinite(loss) else None,
        diverged=not loss < UNIFORM_LOSS,
        curve=[(step, value) for step, value in curve if math.isfinite(value)],
        train_curve=run.curve,
        refreshes=variants.refreshes(optimizers, weights.values()),
        state_bytes=variants.held_bytes(optimizers, weights.values()),
        matrix_bytes=nbytes(weights),
        optimizer_seconds=run.optimizer_seconds,
        train_seconds=run.seconds,
    )


class _Training:
    """The loop's body, which takes the times."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        plan: Experiment,
        weights: Mapping[str, nn.Parameter],
        watch: Watch | None,
    ) -> None:
        self._model, self._optimizers, self._plan = model, optimizers, plan
        self._weights, self._watch = weights, watch
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self._losses: list[float] = []
        self._every = max(1, plan.steps // _TRAIN_POINTS)
        self.curve: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.optimizer_seconds = 0.0

    def step(self, step: int, window: Tensor) -> bool:
        """Train on one batch; False if its loss is not finite."""
        start = time.process_time()
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * self._plan.lr_factor(step)
        loss = next_byte_loss(self._model, window)
        loss.backward()
        if self._watch is not None:
            self._watch(step, {name: weight.grad for name, weight in self._weights.items() if weight.grad is not None})
        self._clip()
        before = time.process_time()
        for optimizer in self._optimizers:
            optimizer.step()
        self.optimizer_seconds += time.process_time() - before
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        self._losses.append(loss.item())
        self.seconds += time.process_time() - start
        if (step + 1) % self._every == 0 and math.isfinite(sum(self._losses)):
            self.curve.append((step + 1, sum(self._losses) / len(self._losses)))
            self._losses.clear()
        return math.isfinite(loss.item())

    def _clip(self) -> None:
        """By the global norm, or what each optimizer knows of it."""
        waiting = [one for one in self._optimizers if isinstance(one, GaLoreOptimizer) and one.config.mode == "project"]
        with ExitStack() as stack:
            for optimizer in waiting:
                stack.enter_context(optimizer.exposed())
            shown = [p for one in self._optimizers for group in one.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(shown if waiting else self._model.parameters(), self._plan.clip)


def _validation(text: Text, plan: Experiment) -> list[Tensor]:
    batches = windows(text.validation, batch=plan.batch, length=plan.length, seed=_VALIDATION_SEED)
    return list(islice(batches, plan.validation_batches))


@torch.no_grad()
def validation_loss(model: nn.Module, batches: list[Tensor]) -> float:
    """Mean loss over ``batches`` of equal size, in nats a byte."""
    return sum(next_byte_loss(model, window).item() for window in batches) / len(batches)


def save_gradients(spec: Spec, text: Text, *, steps: set[int]) -> dict[str, Tensor]:
    """Train as ``spec`` says and keep the gradients of the matrices, before clipping.

    Args:
        spec: The run.
        text: Its text.
        steps: After how many optimizer steps.

    Returns:
        ``"step 100: model.layers.0.mlp.up_proj.weight"`` and the like to gradients ``(m, n)``.
    """
    kept: dict[str, Tensor] = {}

    def watch(step: int, gradients: dict[str, Tensor]) -> None:
        if step in steps:
            kept.update({f"step {step}: {name}": grad.clone() for name, grad in gradients.items()})

    train(spec, text, watch=watch)
    return kept
