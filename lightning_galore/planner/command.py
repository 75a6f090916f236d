# SPDX-License-Identifier: Apache-2.0
"""``lightning-galore plan``: its options, and what it prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

from lightning_galore.config import GaLoreConfig, Rank
from lightning_galore.config.presets import OPEN
from lightning_galore.planner.candidates import Candidate
from lightning_galore.planner.fakes import Job, Loop
from lightning_galore.planner.planning import plan
from lightning_galore.planner.results import Plan
from lightning_galore.planner.sharing import Sharding
from lightning_galore.planner.sources import Head, missing_file
from lightning_galore.planner.table import console_for, show, unit_of, waiting


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a recipe says of a run.

    Args:
        job: What is trained.
        config: The settings of its strategy.
        own: How it trains, where that can be told.
        checkpointing: Whether it recomputes activations; None where that is left open.
    """

    job: Job
    config: GaLoreConfig
    own: Candidate | None = None
    checkpointing: bool | None = None


ReadRecipe: TypeAlias = Callable[[str, "PlanOptions"], Read]


class PlanOptions:
    """Will it fit? Memory of a training run before it runs, for several ways to train, with nothing allocated.

    Args:
        source: A recipe (``recipe.yaml`` or, as the other commands take it, ``-c recipe.yaml``), a model by a short
            name (``llama-7b``, ``llama-1b``, ``roberta-base``, ...), a Transformers ``config.json`` or its folder, a
            model type (``gpt2``), or a hub name whose ``config.json`` is cached.
        rank: Of the low-rank ways, an integer or a fraction of the short side. By default that of the recipe, else
            128. With ``budget``, a rank that is not given is chosen.
        batch_size: Sequences a batch on each device. By default the recipe's, else 1. With ``budget``, one that is not
            given is chosen.
        sequence_length: Tokens a sequence. By default the recipe's, else 512.
        precision: As the Trainer's: ``bf16-true``, ``32-true``, ``bf16-mixed``, ... By default the recipe's, else
            ``bf16-true``.
        checkpointing: Recompute activations in backward. By default as the recipe says, or both are shown.
        candidates: Which ways to train, by name: ``recipe`` (as the recipe itself does), ``adamw``, ``adamw-8bit``,
            ``galore-step``, ``galore-project``, ``galore-layerwise``, ``galore-8bit``, ``q-galore``, ``lora``: these by
            default. Besides ``galore-fused``, ``galore-compressed``, ``apollo``, ``apollo-mini``; ``all`` for all.
        optimizer: Another optimizer for all of them, by name (``adamw``: as torch steps on a CPU; ``adamw_foreach``: on
            a GPU).
        proj_type: Which side is projected.
        target_modules: Which weights are projected.
        devices: How many; all figures are for each of them.
        strategy: ``ddp`` (each holds all) or ``fsdp2`` (weights, gradients and moments are divided).
        bases_sharded: Under ``fsdp2``, divide the bases too.
        budget: Look for what fits into this on each device: ``24GB`` (24 * 10^9) or ``24GiB`` (24 * 2^30).
        head: What a model by name is trained with: ``causal-lm``, ``masked-lm`` or ``sequence-classification``.
        loop: When gradients are cleared: between forward and backward as ``lightning`` does, or right after the step as
            in a ``plain`` loop of your own.
        download: Fetch a ``config.json`` from the Hugging Face hub: that file, no weights and no code.
        json: Print JSON (bytes) instead of a table.
        picture: Write stacked bars into this PNG file too.
    """

    def __init__(
        self,
        source: str,
        rank: Rank | Literal["auto"] = "auto",  # a union with None loses its order in jsonargparse: 64 became 64.0
        batch_size: int | None = None,
        sequence_length: int | None = None,
        precision: str | None = None,
        checkpointing: bool | None = None,
        candidates: str | list[str] | None = None,
        optimizer: str | None = None,
        proj_type: str | None = None,
        target_modules: str | list[str] | None = None,
        devices: int = 1,
        strategy: Sharding = "ddp",
        bases_sharded: bool = False,
        budget: str | None = None,
        head: Head = "auto",
        loop: Loop = "lightning",
        download: bool = False,
        json: bool = False,
        picture: str | None = None,
    ) -> None:
        given = dict(locals())
        for name in ("batch_size", "sequence_length", "devices"):
            if given[name] is not None and given[name] < 1:
                raise ValueError(f"{name}={given[name]} must be at least 1.")
        self.source, self.batch_size, self.sequence_length = source, batch_size, sequence_length
        self.precision, self.head, self.download, self.loop = precision, head, download, loop
        self.json, self.picture = json, picture
        named = {"rank": rank, "proj_type": proj_type, "target_modules": target_modules}
        self.settings: dict[str, Any] = {name: value for name, value in named.items() if value not in OPEN}
        self.choices: dict[str, Any] = {
            "checkpointing": checkpointing,
            "candidates": candidates,
            "base": optimizer,
            "devices": devices,
            "strategy": strategy,
            "bases_sharded": bases_sharded,
            "budget": budget,
        }


def run(options: PlanOptions, read_recipe: ReadRecipe) -> Plan:
    """Make the plan, print it, and write the picture if one was asked for.

    Args:
        options: From the command line.
        read_recipe: Knows recipes.
    """
    with waiting(f"rehearsing training steps of {options.source}"):
        found = _found(options, read_recipe)
    if options.picture is not None:
        write_picture(found, Path(options.picture))
    if options.json:
        sys.stdout.write(json.dumps(found.as_dict(), indent=1) + "\n")
    else:
        show(found, console_for(sys.stdout))
    if options.picture is not None:
        # Beside JSON nothing else may stand.
        (sys.stderr if options.json else sys.stdout).write(f"The peaks are drawn in {options.picture}\n")
    return found


def _found(options: PlanOptions, read_recipe: ReadRecipe) -> Plan:
    if options.source.endswith((".yaml", ".yml")):
        if not Path(options.source).expanduser().exists():
            raise FileNotFoundError(missing_file(options.source, "Give a recipe, a config.json or a model by name."))
        read = read_recipe(options.source, options)
        choices = dict(options.choices)
        if choices["checkpointing"] is None:
            choices["checkpointing"] = read.checkpointing
        job = replace(read.job, loop=options.loop)
        return plan(job, read.config, own=read.own, **choices, **options.settings)
    return plan(
        options.source,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length or 512,
        precision=options.precision,
        head=options.head,
        loop=options.loop,
        download=options.download,
        **options.choices,
        **options.settings,
    )


def write_picture(found: Plan, path: Path) -> None:
    """Draw the peaks of a plan as stacked bars into a PNG file, in the unit of its table.

    Raises:
        ValueError: If no peak is known.
    """
    bars_of: Sequence[tuple[str, Any]] = [
        (f"{column.label}{', recomputed' if peak.checkpointing else ''}", peak.by_category)
        for column in found.columns
        for peak in column.peaks
    ]
    if not bars_of:
        raise ValueError(f"picture={str(path)!r}: without a batch there is no peak to draw.")
    try:
        bars = import_module("lightning_galore.report.plan_bars")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--picture needs {error.name}, which is not installed: pip install lightning-galore[recipes]",
            name=error.name,
        ) from error
    title = f"{found.model}, {found.precision}, {found.batch}, rank {found.rank}"
    drawn = [bars.Bar(label=label, parts=parts) for label, parts in bars_of]
    unit = unit_of(found)
    bars.write_plan(path, drawn, title, unit=unit.size, unit_name=str(unit), budget=found.budget)
