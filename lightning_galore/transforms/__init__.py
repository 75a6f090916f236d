# SPDX-License-Identifier: Apache-2.0
"""What is done to a gradient before the wrapped optimizer sees it: one file a kind, one line here."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_galore import base_probe
from lightning_galore.config import GaLoreConfig
from lightning_galore.moments import second_moment
from lightning_galore.transforms.base import Transform
from lightning_galore.transforms.natural import Natural
from lightning_galore.transforms.restarts import Restarts
from lightning_galore.transforms.spam import Spam
from lightning_galore.transforms.stable_spam import StableSpam

#: "none" has no entry.
TRANSFORMS: dict[str, type[Transform]] = {"spam": Spam, "stable-spam": StableSpam, "natural": Natural}


def transform_of(config: GaLoreConfig) -> Transform | None:
    """The transform that ``config`` names, with the settings that concern it; None for ``"none"``."""
    kind = TRANSFORMS.get(config.transform)
    return None if kind is None else kind.build(config)


def check_transform(base: Optimizer, params: Iterable[Tensor], config: GaLoreConfig) -> None:
    """Refuse a transform or restarts that ``base`` cannot serve.

    Args:
        base: The wrapped optimizer.
        params: The projected weights.
        config: Names them.

    Raises:
        ValueError: With the optimizer's name and what to use instead.
    """
    if config.reset_warmup and any(group.get("lr") is None for group in base.param_groups):
        raise ValueError(
            f"reset_warmup={config.reset_warmup} with lr=None in a param group of {type(base).__name__}: there is no "
            "learning rate to warm up. Set lr, or reset_warmup=0."
        )
    kind = TRANSFORMS.get(config.transform)
    if kind is None or not kind.needs_second:
        return
    groups = {param: group for group in base.param_groups for param in group["params"]}
    for param in params:
        start = torch.zeros(base_probe.SMALL, dtype=param.dtype, device=param.device)
        _, state = base_probe.stepped(base, groups[param], start)
        if second_moment(base, state) is None:
            raise ValueError(
                f"transform={config.transform!r} with base={type(base).__name__}: it measures gradients by the "
                "optimizer's second moment, one value an entry, and this one keeps none. Use Adam, AdamW or RMSprop, "
                "or transform='stable-spam', which keeps its own statistics."
            )
        return


__all__ = ["TRANSFORMS", "Restarts", "Transform", "check_transform", "transform_of"]
