# SPDX-License-Identifier: Apache-2.0
"""int8 weights in the Trainer: loading checkpoints with and without them, and what cannot work on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_galore import weights
from lightning_galore.config import GaLoreConfig
from lightning_galore.optimizer import GaLoreOptimizer


def prepare_to_load(checkpoint: Mapping[str, Any], module: LightningModule, config: GaLoreConfig) -> Mapping[str, Any]:
    """Make a checkpoint and a module fit each other, whichever of the two has int8 weights.

    Args:
        checkpoint: What is loaded next.
        module: Into what. Its weights become codes where this run keeps them so and the checkpoint has them.
        config: Says how this run keeps them.

    Returns:
        The checkpoint, with decoded weights where this run keeps them in floating point.
    """
    state = checkpoint["state_dict"]
    if config.weight_storage == "int8":
        weights.prepare_to_load(module, state)
        return checkpoint
    decode(module)
    if not weights.holds_codes(state):
        return checkpoint
    rank_zero_info("GaLore: the checkpoint's int8 weights are decoded, as weight_storage is not 'int8'.")
    return {**checkpoint, "state_dict": weights.plain_state_dict(state)}


def prepare_to_train(trainer: Trainer, module: LightningModule, config: GaLoreConfig) -> None:
    """Bring the weights that an earlier run left behind into the form of this run, before optimizers are made.

    Raises:
        MisconfigurationException: If a callback cannot work on int8 weights.
    """
    if config.weight_storage != "int8":
        decode(module)
        return
    averaging = getattr(callbacks, "WeightAveraging", ())  # Lightning 2.5 has none
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, averaging):
            raise MisconfigurationException(
                f"{type(callback).__name__} swaps its average with the weights for each validation, which "
                "weight_storage='int8' would round both ways. Set weight_storage='param' (method='q-galore' too), or "
                "average checkpoints after training (lightning-galore export)."
            )


def decode(module: LightningModule) -> None:
    """Keep a module's weights in floating point, and say so if that changes anything."""
    coded = weights.coded_weights(module)
    if coded:
        rank_zero_info(f"GaLore: {len(coded)} int8 weights of the module are decoded: weight_storage is not 'int8'.")
        weights.dequantize(module)


def check_optimizers(module: LightningModule, optimizers: Sequence[Optimizer], config: GaLoreConfig) -> None:
    """Keep weights in floating point that are trained, but not projected: their small updates would be rounded away.

    Raises:
        MisconfigurationException: If an optimizer was wrapped by the user, with another ``weight_storage``.
    """
    wrapped = [optimizer for optimizer in optimizers if isinstance(optimizer, GaLoreOptimizer)]
    for optimizer in wrapped:
        if optimizer.config.weight_storage != config.weight_storage:
            raise MisconfigurationException(
                "configure_optimizers returned a GaLoreOptimizer with "
                f"weight_storage={optimizer.config.weight_storage!r}, and the strategy has "
                f"weight_storage={config.weight_storage!r}, by which it loads checkpoints. Set the same on both, or "
                "return the optimizer that it wraps."
            )
    projected = {param for optimizer in wrapped for param in optimizer.targets}
    trained = {param for optimizer in optimizers for group in optimizer.param_groups for param in group["params"]}
    coded = weights.coded_weights(module).items()
    left = {name: param for name, param in coded if param in trained and param not in projected}
    if left:
        rank_zero_info(f"GaLore: int8 weights are decoded that this run does not project: {', '.join(left)}.")
        weights.dequantize(module, list(left.values()))
