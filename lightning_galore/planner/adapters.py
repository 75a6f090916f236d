# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters, for the comparison: LoRA on the same weights that would be projected."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from lightning_galore.config import GaLoreConfig
from lightning_galore.targets import select_targets


class AdaptedLinear(nn.Module):
    """``y = base(x) + B A x`` with a frozen ``base`` (LoRA, arXiv 2106.09685), without dropout.

    Args:
        base: The layer; its parameters are frozen by whoever adapts it.
        rank: Rows of ``A (r, n)``, columns of ``B (m, r)``.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.up = nn.Parameter(base.weight.new_empty(base.out_features, rank))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """The layer's output and the adapter's."""
        low = nn.functional.linear(x, self.down)
        return self.base(x) + nn.functional.linear(low, self.up)


def adapt(module: nn.Module, config: GaLoreConfig) -> None:
    """Freeze a module and adapt those of its ``nn.Linear`` layers whose weights ``config`` would project.

    Args:
        module: Changed in place.
        config: Names the weights and the rank.

    Raises:
        ValueError: If it has adapters already, or none of its layers can have one.
    """
    if any("lora_" in name for name, _ in module.named_parameters()):
        raise ValueError("the model has LoRA's factors already, beside which no others are planned.")
    targets, _ = select_targets(module, [{"params": list(module.parameters())}], config)
    ranks = {param: target.projection.rank for param, target in targets.items()}
    adapted = [layer for layer in module.modules() if isinstance(layer, nn.Linear) and layer.weight in ranks]
    if not adapted:
        raise ValueError("none of the weights that would be projected is that of an nn.Linear, which LoRA adapts.")
    module.requires_grad_(False)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.weight in ranks:
                setattr(parent, name, AdaptedLinear(child, ranks[child.weight]))
