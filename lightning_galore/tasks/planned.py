# SPDX-License-Identifier: Apache-2.0
"""What a recipe trains, for the planner: shapes only, no weights and no data."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import StrategyRegistry

from lightning_galore.config import GaLoreConfig
from lightning_galore.named_optimizers import ALIASES
from lightning_galore.planner import Candidate, Job, named_job, training_loss
from lightning_galore.planner.candidates import OWN, Fused
from lightning_galore.planner.command import PlanOptions, Read
from lightning_galore.strategies import GaLoreStrategy
from lightning_galore.tasks.causal_lm import CausalLMModule
from lightning_galore.tasks.causal_models import published_name
from lightning_galore.tasks.glue import GlueModule
from lightning_galore.tasks.glue_tasks import get_task
from lightning_galore.tasks.lora import with_lora


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


def read_ours(recipe: Any, options: PlanOptions) -> Read | None:
    """What a recipe of ours trains and how, from the parsed arguments alone; None if the module is another's.

    Args:
        recipe: The parsed recipe.
        options: What the user says instead.
    """
    cls, model = _class_of(recipe.model), recipe.model.init_args
    data = recipe.data.init_args if recipe.get("data") else None
    precision = precision_named(recipe.trainer.precision)
    config = strategy_settings(recipe.trainer.strategy)
    for known, make_job in ((GlueModule, glue_job), (CausalLMModule, causal_lm_job)):
        if isinstance(cls, type) and issubclass(cls, known):
            job = make_job(model, data, options, precision=precision)
            return Read(
                # What is accumulated is held from the second backward pass on; more of them hold no more.
                job=replace(job, micro_batches=min(2, recipe.trainer.accumulate_grad_batches)),
                config=config,
                own=own_way(recipe, config),
                checkpointing=True if model.get("checkpointing") else None,
            )
    return None


def own_way(recipe: Any, config: GaLoreConfig) -> Candidate:
    """How a recipe of ours trains: its optimizer under its strategy.

    Args:
        recipe: The parsed recipe.
        config: The settings of its strategy.
    """
    make = partial(Candidate, name=OWN, label="this recipe", base=_optimizer_of(recipe.model.init_args.optimizer))
    if not _projects(recipe.trainer.strategy):
        return make(kind="full")
    fused: Fused = ("low-rank" if config.compress_activations else "whole") if config.fused_backward else "no"
    return make(kind="galore", mode=config.mode, method=config.method, fused=fused)


def _optimizer_of(named: Any) -> str:
    """The name of a recipe's optimizer, which it gives as such or as a class with its settings."""
    name = named if isinstance(named, str) else str(named.class_path)
    plain = ALIASES.get(name.lower().replace("_", ""), name.lower())
    return "adamwforeach" if plain in ("adamw", "torch.optim.adamw") else name  # as torch steps on a GPU


def _projects(strategy: Any) -> bool:
    if isinstance(strategy, str):
        cls = StrategyRegistry[strategy]["strategy"] if strategy in StrategyRegistry else None
    else:
        cls = None if strategy is None else _class_of(strategy)
    return isinstance(cls, type) and issubclass(cls, GaLoreStrategy)


def _class_of(named: Any) -> Any:
    package, _, name = named.class_path.rpartition(".")
    return resolve_name(f"{package}:{name}")


def glue_job(model: Any, data: Any, options: PlanOptions, *, precision: str) -> Job:
    """The network of a GLUE recipe from its configuration alone, and a full batch of the longest rows.

    Args:
        model: The parsed arguments of :class:`GlueModule`.
        data: Those of its data module, or None.
        options: What the user says instead.
        precision: The Trainer's.
    """
    task = get_task(model.task)
    job = named_job(
        model.model,
        batch_size=options.batch_size or getattr(data, "batch_size", None) or 1,
        sequence_length=options.sequence_length or getattr(data, "max_length", None) or 512,
        precision=options.precision or precision,
        head="sequence-classification",
        download=options.download,
        num_labels=task.num_labels,
        problem_type="regression" if task.is_regression else "single_label_classification",
    )
    return replace(job, module=with_lora(job.module, model.lora_rank, task_type="SEQ_CLS"))


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
    job = named_job(
        published_name(model.model) or model.model,
        batch_size=options.batch_size or getattr(data, "batch_size", None) or 1,
        sequence_length=options.sequence_length or rows or 512,
        precision=options.precision or precision,
        head="causal-lm",
        download=options.download,
        **{**(model.config or {}), **vocabulary},
    )
    return replace(job, module=with_lora(job.module, model.lora_rank, task_type="CAUSAL_LM"))


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
