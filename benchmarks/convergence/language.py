# SPDX-License-Identifier: Apache-2.0
"""A language model on a text: its experiment, one run of it, and the gradients that it sees."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from typing_extensions import override

from benchmarks.convergence.data import Text, windows
from benchmarks.convergence.model import SIZES, UNIFORM_LOSS, ModelSize, build_model, matrices, next_byte_loss
from benchmarks.convergence.runner import Result, Schedule, Spec, Trial, Watch, carry_through
from benchmarks.convergence.variants import DENSE_LR

_VALIDATION_SEED = 20_240  # the same windows for every run


@dataclass(frozen=True, kw_only=True)
class Experiment(Schedule):
    """A language model on a text.

    Args:
        size: Shape of the model.
        rank: Of the low-rank variants.
        steps: Optimizer steps.
        batch: Windows of text a step.
        length: Bytes to predict in each.
        validation_batches: Batches over which the validation loss is taken.
    """

    size: ModelSize = SIZES["small"]
    rank: int = SIZES["small"].rank
    steps: int = 400
    batch: int = 8
    length: int = 128
    validation_batches: int = 32

    @override
    def __post_init__(self) -> None:
        if not 1 <= self.rank < self.size.hidden:
            raise ValueError(f"rank={self.rank} must be in [1, {self.size.hidden}), below the model's hidden size.")
        for name in ("steps", "batch", "length", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    @property
    @override
    def title(self) -> str:
        return (
            f"Validation loss, nats a byte: LLaMA h={self.size.hidden}, {self.size.layers} layers, "
            f"rank {self.rank}, {self.steps} steps of {self.batch} x {self.length} bytes"
        )


def train(spec: Spec, text: Text, *, watch: Watch | None = None) -> Result:
    """Do one run.

    Args:
        spec: Which.
        text: The text of ``spec.text_sha256``.
        watch: Sees the gradients of the matrices at every step.
    """
    plan = spec.experiment
    if not isinstance(plan, Experiment):
        raise TypeError(f"experiment={plan} is not one of a language model.")
    model = build_model(plan.size, length=plan.length, seed=spec.seed)
    model = model.bfloat16() if spec.variant.bf16 else model
    judged = _validation(text, plan)
    trial = Trial(
        model=model,
        weights=matrices(model),
        dense_lr=DENSE_LR,
        loss_of=next_byte_loss,
        batches=windows(text.train, batch=plan.batch, length=plan.length, seed=spec.seed),
        judge=lambda: (validation_loss(model, judged), None),
        ignorant=UNIFORM_LOSS,
    )
    return carry_through(spec, trial, watch=watch)


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
