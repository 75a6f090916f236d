# SPDX-License-Identifier: Apache-2.0
"""What a recipe trains, for the planner: shapes only, no weights and no data."""

from __future__ import annotations

from dataclasses import fields, replace
from pkgutil import resolve_name
from typing import Any

import torch
from lightning import LightningModule

from lightning_galore.config import GaLoreConfig
from lightning_galore.planner import Job, named_job, training_loss
from lightning_galore.planner.command import PlanOptions
from lightning_galore.tasks.causal_lm import CausalLMModule
from lightning_galore.tasks.causal_models import published_name
from lightning_galore.tasks.glue import GlueModule
from lightning_galore.tasks.glue_tasks import get_task


def strategy_settings(strategy: Any) -> GaLoreConfig:
    """The settings of a recipe's strategy; the defaults where it is none of ours.

    Args:
        strategy: A name, a parsed class with its ``init_args``, or None.
    """
    given = getattr(strategy, "init_args", None)
    known = {field.name for field in fields(GaLoreConfig) if field.init}
    named = {name: value for name, value in given.items() if name in known} if given is not None else {}
    return GaLoreConfig(**named)


def precision_named(precision: Any) -> str:
    """A precision of the Trainer by its whole name."""
    short = {"None": "32-true", "64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    return short.get(str(precision), str(precision))


def named_model_job(recipe: Any, options: PlanOptions) -> Job | None:
    """What a recipe of ours trains, from the parsed arguments alone; None if the module is another's.

    Args:
        recipe: The parsed recipe.
        options: What the user says instead.
    """
    cls = resolve_name(recipe.model.class_path.rpartition(".")[0] + ":" + recipe.model.class_path.rpartition(".")[2])
    data = recipe.data.init_args if recipe.get("data") else None
    precision = precision_named(recipe.trainer.precision)
    for known, job in ((GlueModule, glue_job), (CausalLMModule, causal_lm_job)):
        if isinstance(cls, type) and issubclass(cls, known):
            made = job(recipe.model.init_args, data, options, precision=precision)
            # What is accumulated is held from the second backward pass on; more of them hold no more.
            return replace(made, micro_batches=min(2, recipe.trainer.accumulate_grad_batches))
    return None


def glue_job(model: Any, data: Any, options: PlanOptions, *, precision: str) -> Job:
    """The network of a GLUE recipe from its configuration alone, and a full batch of the longest rows.

    Args:
        model: The parsed arguments of :class:`GlueModule`.
        data: Those of its data module, or None.
        options: What the user says instead.
        precision: The Trainer's.
    """
    task = get_task(model.task)
    return named_job(
        model.model,
        batch_size=options.batch_size or getattr(data, "batch_size", None) or 1,
        sequence_length=options.sequence_length or getattr(data, "max_length", None) or 512,
        precision=options.precision or precision,
        head="sequence-classification",
        download=options.download,
        num_labels=task.num_labels,
        problem_type="regression" if task.is_regression else "single_label_classification",
    )


def causal_lm_job(model: Any, data: Any, options: PlanOptions, *, precision: str) -> Job:
    """The network of a language-model recipe from its configuration alone, and a batch of full rows.

    Args:
        model: The parsed arguments of :class:`CausalLMModule`.
        data: Those of its data module, or None.
        options: What the user says instead.
        precision: The Trainer's.
    """
    rows = getattr(data, "block_size", None) or getattr(data, "max_length", None)  # blocks, or instructions
    vocabulary = {} if model.vocab_size is None else {"vocab_size": model.vocab_size}
    return named_job(
        published_name(model.model) or model.model,
        batch_size=options.batch_size or getattr(data, "batch_size", None) or 1,
        sequence_length=options.sequence_length or rows or 512,
        precision=options.precision or precision,
        head="causal-lm",
        download=options.download,
        **{**(model.config or {}), **vocabulary},
    )


def module_job(model: LightningModule, options: PlanOptions, *, precision: str) -> Job:
    """Another module of a recipe: its network is made on the meta device, its batch is ``example_input_array``.

    Args:
        model: The recipe's module.
        options: What the user says instead.
        precision: The Trainer's.

    Raises:
        ValueError: If a batch size is given, which says nothing about this module's batch.
    """
    name = type(model).__name__
    for option, value in (("batch_size", options.batch_size), ("sequence_length", options.sequence_length)):
        if value is not None:
            raise ValueError(f"{option}={value} cannot be given for {name}, whose batch is its own.")
    with torch.device("meta"):
        model.configure_model()
    batch = model.example_input_array
    step = training_loss if batch is None else _forward_sum
    return Job(name=name, module=model, batch=batch, step=step, precision=options.precision or precision)


def _forward_sum(module: torch.nn.Module, batch: Any) -> torch.Tensor:
    """An example is what ``forward`` takes, not what ``training_step`` takes."""
    if isinstance(batch, dict):
        output = module(**batch)
    else:
        output = module(*batch) if isinstance(batch, tuple) else module(batch)
    tensors = [value for value in torch.utils._pytree.tree_leaves(output) if isinstance(value, torch.Tensor)]
    return torch.stack([value.float().sum() for value in tensors if value.requires_grad]).sum()
