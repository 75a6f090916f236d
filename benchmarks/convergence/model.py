# SPDX-License-Identifier: Apache-2.0
"""The model: a byte-level LLaMA from transformers, small enough to train many times on one core."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

_HEADS = ("lm_head", "classifier")
VOCABULARY = 256  # bytes
UNIFORM_LOSS = math.log(VOCABULARY)  # nats a byte of a model that knows nothing: more than this is divergence


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The shape of the model. ``heads`` divides ``hidden``; the MLP is ``hidden x intermediate``."""

    hidden: int
    layers: int
    heads: int
    intermediate: int

    @property
    def rank(self) -> int:
        """The rank at which methods are compared unless the user says otherwise: a quarter of the hidden size."""
        return self.hidden // 4


SIZES = {
    "small": ModelSize(hidden=128, layers=3, heads=4, intermediate=344),  # 0.66 million weights
    "large": ModelSize(hidden=256, layers=4, heads=4, intermediate=688),  # 3.3 million weights
}


def build_model(size: ModelSize, *, length: int, seed: int) -> nn.Module:
    """A LLaMA with random weights.

    Args:
        size: Its shape.
        length: Longest sequence, in bytes.
        seed: Draws the weights. The global random state is left as it was.
    """
    from transformers import LlamaConfig, LlamaForCausalLM  # takes seconds, so not before it is needed

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        max_position_embeddings=length,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
        bos_token_id=None,  # every byte is text
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(config).float()
    return model


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that a variant trains: every linear layer but those of a head, by name."""
    return {
        f"{name}.weight": cast("nn.Parameter", module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.partition(".")[0] not in _HEADS
    }


def next_byte_loss(model: Any, window: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats.

    Args:
        model: What :func:`build_model` returned.
        window: Bytes ``(batch, length + 1)``, dtype int64. Each but the last predicts the one after it.
    """
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())
