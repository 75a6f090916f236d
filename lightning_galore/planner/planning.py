# SPDX-License-Identifier: Apache-2.0
"""``plan``: what a training run would hold, for several ways to train, side by side."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from lightning_galore.config import GaLoreConfig, Mode
from lightning_galore.planner.candidates import CANDIDATES, Candidate
from lightning_galore.planner.fakes import Job, Loop, training_loss
from lightning_galore.planner.rehearsal import Recipe, Rehearsed, footprint_of, refresh_workspace, rehearse
from lightning_galore.planner.sharing import Devices, Sharding, largest_layer_bytes, on_each
from lightning_galore.planner.sources import Head, named_job

#: Mistakes that make a candidate unavailable, without an end to the others.
UNAVAILABLE = (ValueError, ImportError, NotImplementedError)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The worst moment of a training step, on each device.

    Args:
        total: Bytes.
        by_category: The same by category; ``workspace`` is what the optimizer needs for a moment, ``communication`` what
            several devices add.
        where: What runs at that moment.
        step: ``first``, ``ordinary`` or ``refresh``: the step that it is in.
        activations: Bytes that the forward pass leaves for backward.
        checkpointing: Whether activations are recomputed.
    """

    total: int
    by_category: Mapping[str, int]
    where: str
    step: str
    activations: int
    checkpointing: bool


@dataclass(frozen=True, kw_only=True)
class Column:
    """One way to train, in bytes on each device.

    Args:
        name: The candidate's name.
        label: Its heading.
        mode: When gradients are projected and weights move.
        weights: Parameters and buffers.
        gradients: Alive after backward.
        moments: State of the optimizer.
        bases: Of projected weights.
        refresh_workspace: Temporaries of the largest single refresh.
        peaks: Without and with activation checkpointing, where known.
        missing: Why there is no more than this.
    """

    name: str
    label: str
    mode: Mode
    weights: int = 0
    gradients: int = 0
    moments: int = 0
    bases: int = 0
    refresh_workspace: int = 0
    peaks: tuple[Peak, ...] = ()
    missing: str = ""

    @property
    def least(self) -> Peak | None:
        """The lower of the peaks."""
        return min(self.peaks, key=lambda peak: peak.total, default=None)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What :func:`plan` has found; ``print(plan)`` shows it as a table.

    Args:
        model: Its name.
        parameters: How many numbers are trained.
        rank: Of the low-rank columns.
        batch: What a batch is, in words.
        precision: Of weights and operations.
        devices: How many, and what they divide.
        columns: The ways to train.
        budget: Bytes on each device, if there is a limit.
        fits: What fits into it.
    """

    model: str
    parameters: int
    rank: int | float
    batch: str
    precision: str
    devices: Devices
    columns: tuple[Column, ...]
    budget: int | None = None
    fits: tuple[Any, ...] = field(default=())

    def column(self, name: str) -> Column:
        """The column of a candidate."""
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"{name!r} was not planned; there are {', '.join(column.name for column in self.columns)}.")

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers and words, for JSON. Bytes."""
        return asdict(self)

    @override
    def __str__(self) -> str:
        from lightning_galore.planner.table import as_text

        return as_text(self)


def plan(
    model: nn.Module | str | Job,
    config: GaLoreConfig | None = None,
    *,
    batch: Any = None,
    step: Callable[[nn.Module, Any], Tensor] = training_loss,
    batch_size: int | None = None,
    sequence_length: int = 512,
    precision: str | None = None,
    checkpointing: bool | None = None,
    candidates: Collection[str] | None = None,
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
        candidates: Names of ``CANDIDATES``; all by default.
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
        >>> found = plan(net, rank=8, batch=torch.zeros(4, 256), candidates=["adamw", "galore-step"])
        >>> [column.moments // 1000 for column in found.columns]
        [2103, 104]
    """
    from lightning_galore.planner.search import what_fits

    config = config.with_settings(**settings) if config else GaLoreConfig(**settings)
    where = Devices(count=devices, strategy=strategy, bases_sharded=bases_sharded)
    chosen = _chosen(candidates)

    def job_of(size: int) -> Job:
        if isinstance(model, Job):
            return model
        if isinstance(model, nn.Module):
            name = type(model).__name__
            return Job(name=name, module=model, batch=batch, step=step, precision=precision, loop=loop)
        named = precision or "bf16-true"
        made = named_job(
            model, batch_size=size, sequence_length=sequence_length, precision=named, head=head, download=download
        )
        return replace(made, loop=loop)

    job = job_of(batch_size or 1)
    job.autocast()  # an unknown precision is no matter of one column
    columns = tuple(column_of(job, c, config, checkpointing, where, base=base) for c in chosen)
    limit = None if budget is None else bytes_of(budget)
    fits: tuple[Any, ...] = ()
    if limit is not None:
        free = isinstance(model, str) and batch_size is None
        fits = what_fits(
            job_of, columns, chosen, config, limit, where,
            rank_free="rank" not in settings and config.rank == GaLoreConfig().rank,
            recompute=ways_to_recompute(job, checkpointing), batch_size=batch_size or 1, batch_free=free, base=base,
        )  # fmt: skip
    return Plan(
        model=job.name,
        parameters=sum(param.numel() for param in job.module.parameters()),
        rank=config.rank,
        batch=_batch_in_words(job),
        precision=job.precision or "as the module is",
        devices=where,
        columns=columns,
        budget=limit,
        fits=fits,
    )


def column_of(
    job: Job,
    candidate: Candidate,
    config: GaLoreConfig,
    checkpointing: bool | None,
    devices: Devices,
    *,
    base: str | None = None,
) -> Column:
    """One way to train; what it cannot do is said in ``missing``.

    Args:
        job: What is trained.
        candidate: How.
        config: The user's settings.
        checkpointing: Recompute activations; None for both.
        devices: How many, and what they divide.
        base: Another optimizer than the candidate's.
    """
    column = Column(name=candidate.name, label=candidate.label, mode=candidate.mode)
    try:
        recipe = candidate.recipe(config, base)
        held = footprint_of(job, recipe)
        largest = largest_layer_bytes(job.module)
        column = replace(column, refresh_workspace=refresh_workspace(job, recipe))
        column = replace(column, **_held_on_each(asdict(held), devices, candidate.mode, largest))
        if job.batch is None:
            return replace(column, missing="activations and the peak are not known without a batch")
        peaks = list(_peaks(job, recipe, candidate, checkpointing, devices, largest))
    except UNAVAILABLE as error:
        return replace(column, missing=str(error))
    return replace(column, peaks=tuple(peaks))


def _peaks(
    job: Job, recipe: Recipe, candidate: Candidate, checkpointing: bool | None, devices: Devices, largest: int
) -> Iterator[Peak]:
    for recomputed in ways_to_recompute(job, checkpointing):
        yield peak_of(job, recipe, candidate.mode, recomputed, devices, largest)


def ways_to_recompute(job: Job, checkpointing: bool | None) -> tuple[bool, ...]:
    """Without and with recomputed activations, as far as the user has not said and the model can."""
    able = any(getattr(part, "supports_gradient_checkpointing", False) for part in job.module.modules())
    both = (False, True) if able else (False,)
    return both if checkpointing is None else (checkpointing,)


def peak_of(job: Job, recipe: Recipe, mode: Mode, checkpointing: bool, devices: Devices, largest: int) -> Peak:
    """The worst moment of one way to train, on each device."""
    found: Rehearsed = rehearse(job, recipe, checkpointing=checkpointing, shares=devices.shares)
    each = on_each(
        found.peak.by_category,
        devices,
        mode=mode,
        gradients=found.footprint.gradients,
        largest_layer=largest,
    )
    return Peak(
        total=sum(each.values()),
        by_category=each,
        where=found.where,
        step=found.step,
        activations=found.activations,
        checkpointing=checkpointing,
    )


def _held_on_each(held: Mapping[str, int], devices: Devices, mode: Mode, largest: int) -> dict[str, int]:
    each = on_each(held, devices, mode=mode, gradients=held["gradients"], largest_layer=largest)  # type: ignore[arg-type]
    return {name: each[name] for name in ("weights", "gradients", "moments", "bases")}


def _chosen(names: Collection[str] | None) -> Sequence[Candidate]:
    known = {candidate.name: candidate for candidate in CANDIDATES}
    for name in names or ():
        if name not in known:
            raise ValueError(f"candidates={name!r} is not known; choose among {', '.join(known)}.")
    return CANDIDATES if names is None else [known[name] for name in names]


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
