# SPDX-License-Identifier: Apache-2.0
"""One run: a model trained by one variant at one learning rate and seed, with what it gave and what it cost."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.convergence import build, variants
from benchmarks.convergence.build import Task
from benchmarks.convergence.variants import Variant
from lightning_galore import GaLoreOptimizer
from lightning_galore.storage import nbytes

_TRAIN_POINTS = 40  # of the curve of the training loss

#: Called before clipping with the number of steps done and the full gradient of each matrix.
Watch = Callable[[int, dict[str, Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """What all runs of a sweep share, whatever they learn.

    Args:
        rank: Of the low-rank variants.
        steps: Optimizer steps.
        warmup: Share of the steps in which learning rates rise linearly.
        final: Share of the learning rate at the end of the cosine.
        clip: Global norm to which gradients are clipped.
    """

    rank: int
    steps: int
    warmup: float = 0.1
    final: float = 0.1
    clip: float = 1.0
    #: Shares of the run after which it is validated. No field: the results do not hang on it.
    judged_at: ClassVar[tuple[float, ...]] = (0.125, 0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1.")

    @property
    def common(self) -> dict[str, Any]:
        """Settings of this package that every variant has unless it says otherwise."""
        return {"rank": self.rank}

    @property
    def title(self) -> str:
        """What was trained, for the head of the table."""
        raise NotImplementedError

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

    experiment: Schedule
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
        config = variants.config_of(self.variant, seed=self.seed, **self.experiment.common)
        held: dict[str, Any] | None = json.loads(json.dumps(dataclasses.asdict(config))) if config else None
        return held


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave.

    Args:
        loss: Validation loss at the end, nats a byte; None if the run diverged to NaN.
        diverged: Whether it ended above the loss that :class:`Trial` calls ``ignorant``.
        curve: ``(steps done, validation loss)``.
        train_curve: ``(steps done, mean training loss since the last point)``.
        refreshes: Of a weight's basis, mean over the matrices; None where the optimizer counts none.
        state_bytes: Of optimizer state that the matrices hold at the end.
        matrix_bytes: Of the matrices themselves.
        optimizer_seconds: CPU time of all optimizer steps.
        train_seconds: CPU time of training, validation left out.
        score: Share of right answers at the end, where there are answers.
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
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model that is about to be trained, and how.

    Args:
        model: The model, in training mode.
        weights: The matrices that the variant trains, by name.
        dense_lr: Learning rate of the other weights.
        loss_of: Mean loss of the model on a batch.
        batches: At least as many as there are steps.
        judge: Validation loss, and the share of right answers or None.
        ignorant: Above this loss, that of a model that knows nothing or worse, a run has diverged.
    """

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    dense_lr: float
    loss_of: Callable[[nn.Module, Any], Tensor]
    batches: Iterable[Any]
    judge: Callable[[], tuple[float, float | None]]
    ignorant: float


def carry_through(spec: Spec, trial: Trial, *, watch: Watch | None = None) -> Result:
    """Train ``trial`` as ``spec`` says, and validate on the way.

    Args:
        spec: The run.
        trial: Its model and data.
        watch: Sees the gradients of the matrices at every step.
    """
    plan = spec.experiment
    task = Task(
        model=trial.model,
        matrices=list(trial.weights.values()),
        lr=spec.lr,
        seed=spec.seed,
        dense_lr=trial.dense_lr,
        common=plan.common,
    )
    optimizers = build.build(spec.variant, task)
    points = {max(1, round(share * plan.steps)) for share in plan.judged_at}
    run = _Training(trial, optimizers, plan, watch)
    curve: list[tuple[int, float]] = []
    score = None
    for step, batch in enumerate(islice(trial.batches, plan.steps)):
        if not run.step(step, batch):
            break
        if step + 1 in points:
            loss, score = trial.judge()
            curve.append((step + 1, loss))
    loss = curve[-1][1] if curve and curve[-1][0] == plan.steps else math.nan
    return Result(
        loss=loss if math.isfinite(loss) else None,
        diverged=not loss < trial.ignorant,
        curve=[(step, value) for step, value in curve if math.isfinite(value)],
        train_curve=run.curve,
        refreshes=build.refreshes(optimizers, task.matrices),
        state_bytes=build.held_bytes(optimizers, task.matrices),
        matrix_bytes=nbytes(trial.weights),
        optimizer_seconds=run.optimizer_seconds,
        train_seconds=run.seconds,
        score=score,
    )


class _Training:
    """The loop's body, which takes the times."""

    def __init__(self, trial: Trial, optimizers: Sequence[Optimizer], plan: Schedule, watch: Watch | None) -> None:
        self._trial, self._optimizers, self._plan, self._watch = trial, optimizers, plan, watch
        self._rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self._losses: list[float] = []
        self._every = max(1, plan.steps // _TRAIN_POINTS)
        self.curve: list[tuple[int, float]] = []
        self.seconds = 0.0
        self.optimizer_seconds = 0.0

    def step(self, step: int, batch: Any) -> bool:
        """Train on one batch; False if its loss is not finite."""
        start = time.process_time()
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr * self._plan.lr_factor(step)
        loss = self._trial.loss_of(self._trial.model, batch)
        loss.backward()
        if self._watch is not None:
            weights = self._trial.weights.items()
            self._watch(step, {name: weight.grad for name, weight in weights if weight.grad is not None})
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
            nn.utils.clip_grad_norm_(shown if waiting else self._trial.model.parameters(), self._plan.clip)
