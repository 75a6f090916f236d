# SPDX-License-Identifier: Apache-2.0
"""``plan``: what a training run would hold, for several ways to train, side by side."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_galore.config import GaLoreConfig
from lightning_galore.planner.candidates import Candidate, choose
from lightning_galore.planner.columns import column_of
from lightning_galore.planner.fakes import Job, Loop, Step, training_loss
from lightning_galore.planner.results import Plan
from lightning_galore.planner.search import Question, what_fits
from lightning_galore.planner.sharing import Devices, Sharding
from lightning_galore.planner.sources import Head, named_job


def plan(
    model: nn.Module | str | Job,
    config: GaLoreConfig | None = None,
    *,
    batch: Any = None,
    step: Step = training_loss,
    batch_size: int | None = None,
    sequence_length: int = 512,
    precision: str | None = None,
    checkpointing: bool | None = None,
    candidates: Collection[str] | None = None,
    own: Candidate | None = None,
    base: str | None = None,
    devices: int = 1,
    strategy: Sharding = "ddp",
    bases_sharded: bool = False,
    budget: int | str | None = None,
    head: Head = "auto",
    loop: Loop = "lightning",
    download: bool = False,
    **settings: Any,
) -> Plan:
    """Bytes that training would hold at its worst moment, for several ways to train, with nothing allocated.

    The training step runs as it would, forward, backward and the optimizer, on tensors without data
    (``torch._subclasses.fake_tensor``), and each is counted from its birth to its end. What no operation returns is not
    seen: a CUDA context, work space inside a kernel, what the allocator keeps and cannot use.

    Args:
        model: An ``nn.Module`` on any device (best on "meta"), or a name: see :func:`named_job`.
        config: The settings of low-rank training; or name them one by one.
        batch: For a module: one batch, as its ``training_step`` or ``forward`` takes it. Without, only what is held
            between steps is planned.
        step: For a module: the loss of a batch.
        batch_size: For a name: sequences a batch; 1 if it is not given, and then ``budget`` may choose it.
        sequence_length: For a name: tokens a sequence.
        precision: As the Trainer's: ``"bf16-true"`` (the default of a name), ``"32-true"``, ``"bf16-mixed"``, ...; a
            module stays as it is by default.
        checkpointing: Recompute activations; None plans both, where the model can.
        candidates: Names of ``CANDIDATES``, or ``"all"``; the usual ones by default.
        own: One more way to train, put first: what a recipe says, for instance.
        base: Another optimizer for all, by name (``named_optimizer``).
        devices: How many; what follows is for each of them.
        strategy: ``"ddp"`` or ``"fsdp2"``.
        bases_sharded: Under ``"fsdp2"``, whether bases are divided too.
        budget: Bytes on each device, or as ``"24GB"`` (10^9) or ``"24GiB"`` (2^30): look for what fits.
        head: For a name: what is trained on top.
        loop: When gradients are cleared: ``"lightning"``, between forward and backward, or ``"plain"``, after the step.
        download: For a name: fetch its ``config.json`` from the Hugging Face hub.
        **settings: Arguments of :class:`~lightning_galore.config.GaLoreConfig`, on top of ``config``.

    Example:
        >>> net = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
        >>> found = plan(net, rank=8, batch=net[0].weight.new_zeros(4, 256), candidates=["adamw", "galore-step"])
        >>> [column.moments // 1000 for column in found.columns]
        [2103, 71]
    """
    config = config.with_settings(**settings) if config else GaLoreConfig(**settings)
    rank_named = config.names_setting("rank") or config.rank != GaLoreConfig().rank  # the user's, or the method's
    tokens = {"sequence_length": sequence_length, "head": head, "download": download}
    question = Question(
        job_of=partial(_job, model, batch, step, precision, loop, tokens),
        config=config,
        devices=Devices(count=devices, strategy=strategy, bases_sharded=bases_sharded),
        budget=None if budget is None else bytes_of(budget),
        base=base,
        rank_free=not rank_named,
        checkpointing=checkpointing,
        batch_size=batch_size or 1,
        batch_free=isinstance(model, str) and batch_size is None,
    )
    return _answer(question, choose(candidates, own))


def _job(
    model: nn.Module | str | Job,
    batch: Any,
    step: Step,
    precision: str | None,
    loop: Loop,
    tokens: Mapping[str, Any],
    size: int,
) -> Job:
    """What is trained with ``size`` sequences a batch, where that is left to us."""
    if isinstance(model, Job):
        return model
    if isinstance(model, nn.Module):
        name = type(model).__name__
        return Job(name=name, module=model, batch=batch, step=step, precision=precision, loop=loop)
    return replace(named_job(model, batch_size=size, precision=precision or "bf16-true", **tokens), loop=loop)


def _answer(question: Question, chosen: Sequence[Candidate]) -> Plan:
    job, config, devices = question.job_of(question.batch_size), question.config, question.devices
    job.autocast()  # an unknown precision is no matter of one column
    columns = tuple(
        column_of(job, candidate, config, question.checkpointing, devices, base=question.base) for candidate in chosen
    )
    return Plan(
        model=job.name,
        parameters=sum(param.numel() for param in job.module.parameters()),
        rank=config.width,
        batch=_batch_in_words(job),
        precision=job.precision or "as the module is",
        devices=devices,
        columns=columns,
        budget=question.budget,
        fits=() if question.budget is None else what_fits(question, question.budget, chosen, columns),
    )


def _batch_in_words(job: Job) -> str:
    if job.batch is None:
        return "no batch"
    ids = job.batch.get("input_ids") if isinstance(job.batch, Mapping) else None
    if isinstance(ids, Tensor) and ids.ndim == 2:
        return f"{ids.shape[0]} x {ids.shape[1]} tokens"
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(job.batch) if isinstance(leaf, Tensor)]
    return "a batch of " + ", ".join("x".join(map(str, shape)) or "one number" for shape in shapes[:4])


def bytes_of(text: int | str) -> int:
    """A number of bytes from a number, or from text with a unit.

    Example:
        >>> bytes_of("24GB"), bytes_of("24GiB")
        (24000000000, 25769803776)
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]i?B|B)?\s*", str(text))
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"budget={text!r} is no number of bytes; write 24GB (24 * 10^9) or 24GiB (24 * 2^30).")
    unit = match[2] or "B"
    power = "BkMGT".index(unit[0])
    return round(float(match[1]) * (1024 if "i" in unit else 1000) ** power)
