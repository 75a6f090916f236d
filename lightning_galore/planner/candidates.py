# SPDX-License-Identifier: Apache-2.0
"""What is planned side by side. A new candidate is one line of ``CANDIDATES``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from lightning_galore.config import GaLoreConfig, Method, Mode
from lightning_galore.named_optimizers import named_optimizer
from lightning_galore.planner.adapters import adapt
from lightning_galore.planner.rehearsal import Recipe

Fused = Literal["no", "whole", "low-rank"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to train.

    Args:
        name: As users call it.
        label: As the table heads it.
        kind: Ordinary training, adapters, or low-rank gradients.
        base: The optimizer, a name that ``named_optimizer`` knows.
        mode: When gradients are projected and weights move; ``step`` for what is not wrapped.
        method: The preset, for low-rank gradients.
        rank: Its only rank; None for the user's.
        fused: Whether linear layers make low-rank gradients themselves, and keep their inputs whole or low-rank.
        trades: What it costs against ordinary training, in words.
        usual: Whether it is planned where no candidates are named.
    """

    name: str
    label: str
    kind: Literal["full", "lora", "galore"]
    base: str
    mode: Mode = "step"
    method: Method | None = None
    rank: int | None = None
    fused: Fused = "no"
    trades: str = ""
    usual: bool = True

    def recipe(self, config: GaLoreConfig, base: str | None = None) -> Recipe:
        """How it trains, under the user's settings.

        Args:
            config: The settings that the candidate leaves open.
            base: Another optimizer than its own.
        """
        make = partial(_build, base or self.base)
        if self.kind == "full":
            return Recipe(make_base=make)
        if self.kind == "lora":
            return Recipe(make_base=make, prepare=partial(adapt, config=config))
        return Recipe(make_base=make, config=self.settings(config))

    def settings(self, config: GaLoreConfig) -> GaLoreConfig:
        """The settings with the candidate's own."""
        # A preset of few bits has columns of its own, and so have fused layers.
        own = None if config.method in _8BIT_METHODS else config.method
        settings = config.with_settings(
            mode=self.mode,
            method=self.method or own,
            fused_backward=self.fused != "no",
            compress_activations=self.fused == "low-rank",
        )
        return settings if self.rank is None else settings.with_settings(rank=self.rank)


def _build(name: str, params: list[nn.Parameter]) -> Optimizer:
    return named_optimizer(name, lr=1e-3)(params)


_8BIT_METHODS = ("galore-8bit", "q-galore")
_LAYERWISE = "weights move in backward: no clipping by the global norm, no GradScaler"
_8BIT = "moments in 8 bits"
_FUSED = "the norm of the full gradients is not known to clipping"

#: The name that stands for every candidate.
ALL = "all"
#: The name of what a recipe itself does.
OWN = "recipe"

#: In the order in which they depart from ordinary training.
CANDIDATES: tuple[Candidate, ...] = (
    Candidate(name="adamw", label="AdamW", kind="full", base="adamwfused"),
    Candidate(name="adamw-8bit", label="8-bit AdamW", kind="full", base="adamw8bit", trades=_8BIT),
    Candidate(
        name="galore-step", label="GaLore step", kind="galore", base="adamwfused", trades="gradients of rank {rank}"
    ),
    Candidate(
        name="galore-project",
        label="GaLore project",
        kind="galore",
        base="adamwfused",
        mode="project",
        trades="gradients of rank {rank}; no clipping by value",
    ),
    Candidate(
        name="galore-layerwise",
        label="GaLore layerwise",
        kind="galore",
        base="adamwfused",
        mode="layerwise",
        trades=f"gradients of rank {{rank}}; {_LAYERWISE}",
    ),
    Candidate(
        name="galore-fused",
        label="GaLore fused",
        kind="galore",
        base="adamwfused",
        mode="project",
        fused="whole",
        usual=False,
        trades=f"gradients of rank {{rank}}; {_FUSED}",
    ),
    Candidate(
        name="galore-compressed",
        label="GaLore fused, compressed",
        kind="galore",
        base="adamwfused",
        mode="project",
        fused="low-rank",
        usual=False,
        trades=f"gradients of rank {{rank}}, of wide weights too on the right: another subspace; {_FUSED}",
    ),
    Candidate(
        name="galore-8bit",
        label="8-bit GaLore layerwise",
        kind="galore",
        base="adamw8bit",
        mode="layerwise",
        method="galore-8bit",
        trades=f"gradients of rank {{rank}}; {_8BIT}; {_LAYERWISE}",
    ),
    Candidate(
        name="q-galore",
        label="Q-GaLore layerwise",
        kind="galore",
        base="adamw8bit",
        mode="layerwise",
        method="q-galore",
        trades=f"gradients of rank {{rank}}; {_8BIT}, bases in 4, weights in 8; {_LAYERWISE}",
    ),
    Candidate(
        name="apollo",
        label="APOLLO layerwise",
        kind="galore",
        base="adamwfused",
        mode="layerwise",
        method="apollo",
        usual=False,
        trades=f"full gradients, scaled by what a random subspace of rank {{rank}} says; {_LAYERWISE}",
    ),
    Candidate(
        name="apollo-mini",
        label="APOLLO-Mini layerwise",
        kind="galore",
        base="adamwfused",
        mode="layerwise",
        method="apollo-mini",
        rank=1,
        usual=False,
        trades=f"full gradients, scaled by what one random direction says; {_LAYERWISE}",
    ),
    Candidate(
        name="lora",
        label="LoRA",
        kind="lora",
        base="adamwfused",
        trades="only adapters of rank {rank} are trained; the weights stay as they are",
    ),
)


def choose(names: Collection[str] | None, own: Candidate | None = None) -> Sequence[Candidate]:
    """The candidates of some names.

    Args:
        names: As users say them; ``"all"`` among them is every candidate, None the usual ones.
        own: One more to choose from, which comes first.

    Raises:
        ValueError: If a name is not known.
    """
    every = CANDIDATES if own is None else (own, *CANDIDATES)
    if names is None:
        return [candidate for candidate in every if candidate.usual]
    known = {candidate.name: candidate for candidate in every}
    asked = [names] if isinstance(names, str) else list(names)
    for name in asked:
        if name not in (*known, ALL):
            why = "is known of recipes of our language models and GLUE tasks only" if name == OWN else "is not known"
            raise ValueError(f"candidates={name!r} {why}; choose among {', '.join(known)}, or {ALL!r}.")
    return every if ALL in asked else [known[name] for name in asked]
