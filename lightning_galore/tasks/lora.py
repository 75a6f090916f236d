# SPDX-License-Identifier: Apache-2.0
"""LoRA by peft, as a baseline or to be trained with low-rank gradients itself."""

from typing import Literal, cast

from torch import nn

from lightning_galore.tasks.extras import require


def with_lora(net: nn.Module, rank: int, *, task_type: Literal["SEQ_CLS", "CAUSAL_LM"]) -> nn.Module:
    """Freeze a network of Transformers and put trained factors beside its linear layers; ``lora_alpha`` is the rank.

    Args:
        net: The network; its layers are replaced in place.
        rank: Of the factors. 0 leaves the network as it is.
        task_type: What it is trained for, in peft's words: a classification head stays trained.
    """
    if not rank:
        return net
    peft = require("peft", extra="lora")
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type=task_type)
    return cast("nn.Module", peft.get_peft_model(net, lora))
