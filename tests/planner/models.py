# SPDX-License-Identifier: Apache-2.0
"""Small real models, and real training steps of them under an independent tracker."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_galore import GaLoreConfig, GaLoreOptimizer
from lightning_galore.planner import CANDIDATES, Job, Recipe, training_loss
from lightning_galore.storage import nbytes
from tests.modes.tracker import LiveBytes

#: First step, one without refreshes, and one that refreshes all weights.
STEPS = ("first", "ordinary", "refresh")
SETTINGS: dict[str, Any] = {"rank": 8, "stagger": False, "schedule": "fixed", "update_proj_gap": 2}


def tiny_llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
        use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)  # type: ignore[no-any-return]


def tiny_encoder(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=130,
    )  # fmt: skip
    torch.manual_seed(0)
    return RobertaForSequenceClassification(config).to(dtype)  # type: ignore[no-any-return]


def tokens(kind: str, rows: int, length: int) -> dict[str, Tensor]:
    batch = {"input_ids": torch.randint(5, 200, (rows, length))}
    if kind == "llama":
        return {**batch, "labels": torch.randint(0, 200, (rows, length))}
    mask = torch.ones(rows, length, dtype=torch.long)
    return {**batch, "labels": torch.randint(0, 2, (rows,)), "attention_mask": mask}


def job(kind: str, rows: int, length: int, dtype: torch.dtype = torch.float32) -> Job:
    module = {"llama": tiny_llama, "encoder": tiny_encoder}[kind](dtype)
    return Job(name=kind, module=module, batch=tokens(kind, rows, length), step=training_loss)


def recipe(name: str, base: str | None = None, **settings: Any) -> Recipe:
    (candidate,) = (candidate for candidate in CANDIDATES if candidate.name == name)
    return candidate.recipe(GaLoreConfig(**{**SETTINGS, **settings}), base)


def trained(job: Job, recipe: Recipe, *, checkpointing: bool = False, steps: int = len(STEPS)) -> tuple[list[int], Any]:
    """Peaks of real steps, and the optimizer after them."""
    module = copy.deepcopy(job.module).train()
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if recipe.prepare is not None:
        recipe.prepare(module)
    params = [param for param in module.parameters() if param.requires_grad]
    optimizer: Any = recipe.make_base(params)
    if recipe.config is not None:
        optimizer = GaLoreOptimizer(optimizer, module, recipe.config)
    before = nbytes([*module.parameters(), *module.buffers()]) + nbytes(job.batch)
    peaks, tracker = [], LiveBytes()
    for _ in range(steps):
        tracker.peak = tracker.current
        with tracker:
            loss = module(**job.batch).loss
            if job.loop == "lightning":
                optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
            if job.loop == "plain":
                optimizer.zero_grad()
        peaks.append(before + tracker.peak)
    return peaks, optimizer


def plainly(job: Job) -> Job:
    return replace(job, loop="plain")
