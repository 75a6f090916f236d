# SPDX-License-Identifier: Apache-2.0
"""Will it fit? Bytes of a training run before it runs: one step rehearsed on tensors without data."""

from lightning_galore.planner.candidates import CANDIDATES, Candidate, choose
from lightning_galore.planner.fakes import Job, training_loss
from lightning_galore.planner.planning import bytes_of, plan
from lightning_galore.planner.rehearsal import Recipe, Rehearsed, rehearse
from lightning_galore.planner.results import Column, Fit, Peak, Plan
from lightning_galore.planner.sharing import Devices
from lightning_galore.planner.sources import BUILT_IN, named_job
from lightning_galore.planner.tracker import CATEGORIES, MemoryTracker, Moment

__all__ = [
    "BUILT_IN",
    "CANDIDATES",
    "CATEGORIES",
    "Candidate",
    "Column",
    "Devices",
    "Fit",
    "Job",
    "MemoryTracker",
    "Moment",
    "Peak",
    "Plan",
    "Recipe",
    "Rehearsed",
    "bytes_of",
    "choose",
    "named_job",
    "plan",
    "rehearse",
    "training_loss",
]
