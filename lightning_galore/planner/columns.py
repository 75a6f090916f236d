# SPDX-License-Identifier: Apache-2.0
"""One way to train, in bytes on each device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lightning_galore.config import GaLoreConfig, Mode
from lightning_galore.planner.candidates import Candidate
from lightning_galore.planner.fakes import Job
from lightning_galore.planner.rehearsal import Recipe, Rehearsed, footprint_of, refresh_workspace, rehearse
from lightning_galore.planner.results import Column, Peak
from lightning_galore.planner.sharing import Devices, largest_layer_bytes, on_each

#: Mistakes that make a candidate unavailable, without an end to the others.
UNAVAILABLE = (ValueError, ImportError, NotImplementedError)


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
        sizes = {"weights": held.weights, "moments": held.states, "bases": held.bases, "gradients": held.gradients}
        each = on_each(sizes, devices, mode=candidate.mode, gradients=held.gradients, largest_layer=largest)
        column = replace(
            column,
            weights=each["weights"],
            gradients=each["gradients"],
            moments=each["moments"],
            bases=each["bases"],
        )
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
