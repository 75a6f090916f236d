# SPDX-License-Identifier: Apache-2.0
"""Causal language models: the published sizes with random weights, or any of Transformers with its own."""

from typing import Any

import torch
from torch import nn

from lightning_galore.planner.sources import BUILT_IN
from lightning_galore.tasks.extras import require

#: The sizes of the GaLore paper by the names that recipes call them; their shapes are the planner's.
PUBLISHED: dict[str, str] = {name.removeprefix("llama-"): name for name in BUILT_IN if name.startswith("llama-")}


def published_name(model: str) -> str | None:
    """The planner's name of a published size, and None for any other model.

    Example:
        >>> published_name("60m"), published_name("llama-7b"), published_name("gpt2")
        ('llama-60m', 'llama-7b', None)
    """
    return PUBLISHED.get(model.lower().removeprefix("llama-"))


def causal_config(model: str, settings: dict[str, Any]) -> Any:
    """The configuration of a model.

    Args:
        model: A published size, a folder or a name on the hub.
        settings: Changes to it.

    Raises:
        OSError: If a folder or a name on the hub cannot be had.
    """
    transformers = require("transformers")
    if published := published_name(model):
        cls, shapes, _ = BUILT_IN[published]
        return getattr(transformers, cls)(**{**shapes, **settings})
    try:
        return transformers.AutoConfig.from_pretrained(model, **settings)
    except OSError as error:
        raise OSError(
            f"model={model!r} cannot be loaded: {str(error).splitlines()[0]} Give a folder, or one of "
            f"{', '.join(PUBLISHED)} to begin with random weights."
        ) from error


def causal_network(model: str, settings: dict[str, Any], *, from_scratch: bool) -> nn.Module:
    """A causal language model in the default dtype, on the default device.

    Args:
        model: A published size, a folder or a name on the hub.
        settings: Changes to its configuration.
        from_scratch: Draw the weights instead of loading them. There are none to load for a published size.
    """
    auto = require("transformers").AutoModelForCausalLM
    config = causal_config(model, settings)
    config.use_cache = False  # generation's; in training it only takes memory
    dtype = torch.get_default_dtype()
    if from_scratch or published_name(model):
        net: nn.Module = auto.from_config(config, dtype=dtype)
    else:
        net = auto.from_pretrained(model, config=config, dtype=dtype)
    return net
