# SPDX-License-Identifier: Apache-2.0
"""What modes "project" and "layerwise" can honour of the Trainer's options, and what to do about the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_galore.config import GaLoreConfig, Rank
from lightning_galore.optimizer import GaLoreOptimizer
from lightning_galore.target_table import TargetTable


def check_backward_mode(
    config: GaLoreConfig, trainer: Trainer, module: LightningModule | None, optimizers: Sequence[Optimizer]
) -> None:
    """Refuse at setup, naming the remedy, what cannot be right when gradients are consumed in backward.

    Raises:
        MisconfigurationException: If an option of the Trainer or a hook of the module cannot be honoured.
    """
    mode = config.mode
    for optimizer in optimizers:
        if isinstance(optimizer, GaLoreOptimizer) and optimizer.config.mode != mode:
            raise MisconfigurationException(
                f"configure_optimizers returned a GaLoreOptimizer with mode={optimizer.config.mode!r}, and the "
                f"strategy has mode={mode!r}. Set the same mode on both, or return the optimizer that it wraps."
            )
    if mode == "step":
        return
    params = [id(param) for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]]
    if len(params) != len(set(params)):
        raise MisconfigurationException(
            f"mode={mode!r}: a parameter belongs to several optimizers, and the first would consume its gradient. "
            'Give each parameter to one optimizer, or use mode="step".'
        )
    if mode == "layerwise":
        _check_layerwise(trainer, module, config)
    else:
        _check_project(trainer, module, config)
    for hook in ("on_after_backward", "on_before_optimizer_step"):
        if module is not None and is_overridden(hook, module):
            rank_zero_warn(
                f"mode={mode!r}: in {hook} the full gradients (`param.grad`) are gone. "
                "The optimizer's grad_norm() has their norm, and only its zero_grad() drops what is kept of them."
            )


def _check_layerwise(trainer: Trainer, module: LightningModule | None, config: GaLoreConfig) -> None:
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            f'mode="layerwise" moves weights in backward and cannot undo a step that the GradScaler of '
            f'precision={trainer.precision!r} wants to skip. Use precision="bf16-mixed" or mode="project".'
        )
    if trainer.gradient_clip_val:
        if trainer.gradient_clip_algorithm != GradClipAlgorithmType.VALUE:
            raise MisconfigurationException(
                f'gradient_clip_val={trainer.gradient_clip_val} by norm: mode="layerwise" has moved the weights before '
                'the global norm is known. Use mode="project", or gradient_clip_algorithm="value".'
            )
        if config.fused_backward:
            raise MisconfigurationException(
                'gradient_clip_algorithm="value" with fused_backward=True: full gradients, whose entries would be '
                "clipped, are not computed. Set fused_backward=False, or clip by clip_weight_norm."
            )
        if _accumulates(trainer):
            raise MisconfigurationException(
                'gradient_clip_algorithm="value" with gradient accumulation: mode="layerwise" keeps only low-rank sums '
                'of gradients, whose entries cannot be clipped. Use mode="step", or accumulate_grad_batches=1.'
            )
    if module is not None and is_overridden("configure_gradient_clipping", module):
        raise MisconfigurationException(
            'mode="layerwise" never holds all gradients, so configure_gradient_clipping has nothing to act on. '
            'Use mode="project".'
        )


def _check_project(trainer: Trainer, module: LightningModule | None, config: GaLoreConfig) -> None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if config.clip_weight_norm is not None and (scaler is not None or trainer.gradient_clip_val):
        raise MisconfigurationException(
            f'clip_weight_norm={config.clip_weight_norm} with a GradScaler or gradient_clip_val: mode="project" knows '
            'the norm of each gradient only before either has scaled it. Use one of them, or mode="step".'
        )
    if module is not None and is_overridden("configure_gradient_clipping", module):
        rank_zero_warn(
            'mode="project": in configure_gradient_clipping call self.clip_gradients, or clip the parameters in the '
            "optimizer's param_groups; self.parameters() have no gradients."
        )
    if not trainer.gradient_clip_val:
        return
    if trainer.gradient_clip_algorithm == GradClipAlgorithmType.VALUE:
        raise MisconfigurationException(
            f'gradient_clip_val={trainer.gradient_clip_val} by value: mode="project" has only low-rank gradients, '
            'whose entries are others. Use gradient_clip_algorithm="norm", or mode="step" or "layerwise".'
        )
    if _accumulates(trainer) or config.fused_backward:
        why = "accumulates gradients in low rank" if _accumulates(trainer) else "with fused_backward has no full ones"
        rank_zero_info(
            f'GaLore: mode="project" {why}, so clipping uses the norm of what is kept of them, which is smaller than '
            'the full norm. mode="step" clips by the full norm.'
        )


def _accumulates(trainer: Trainer) -> bool:
    scheduled = [cb for cb in trainer.callbacks if isinstance(cb, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    return trainer.accumulate_grad_batches > 1 or any(max(cb.scheduling.values()) > 1 for cb in scheduled)


def warn_of_small_weights(table: TargetTable, rank: Rank) -> None:
    """Say which selected weights a lower rank would project too."""
    # A single row or column has no smaller rank, so there is nothing to advise.
    stay = [row for row in table.rows if "nothing would be saved" in row.reason]
    small = [row.name for row in stay if min(row.shape[0], math.prod(row.shape[1:])) > 1]
    if small:
        rank_zero_warn(
            f"rank={rank}: {len(small)} selected weights are no larger than the rank and stay full-rank "
            f"({', '.join(small[:4])}{', ...' if len(small) > 4 else ''}). Lower the rank to project them too."
        )


def refuse_many_devices(devices: Sequence[torch.device], num_nodes: int, world_size: int) -> NoReturn:
    """Say that ``base="single_device"`` means one device, before the run starts on one of them as if it were all.

    Raises:
        MisconfigurationException: Always.
    """
    raise MisconfigurationException(
        f"base='single_device' runs on one device; the Trainer has devices={len(devices)}, num_nodes={num_nodes} and "
        f"{world_size} launched process(es). Set devices=1 and num_nodes=1, or leave base out."
    )
