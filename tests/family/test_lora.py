# SPDX-License-Identifier: Apache-2.0
"""GaLore on the factors of LoRA: low-rank gradients of low-rank matrices, by hand and with peft where it is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.state_keys import BASIS
from tests.family.tensors import MODES
from tests.helpers import TinyTransformer, language_loss, max_difference, train
from tests.reference.galore_reference import Adam, GaLore

FACTORS = {"target_modules": ["lora_A", "lora_B"]}


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained detour, laid out and named as peft does (arXiv 2106.09685)."""

    def __init__(self, base_layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        like: dict[str, Any] = {"bias": False, "dtype": base_layer.weight.dtype}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, **like)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, **like)})
        nn.init.zeros_(self.lora_B["default"].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def with_lora(rank: int = 8) -> TinyTransformer:
    torch.manual_seed(0)
    model = TinyTransformer(dtype=torch.float64).requires_grad_(False)
    for name in ("query", "value", "up", "down"):
        setattr(model.blocks[0], name, LoRALinear(getattr(model.blocks[0], name), rank))
    return model


def trained_params(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


@pytest.mark.parametrize("mode", MODES)
def test_both_factors_train_as_by_the_formulas(mode: Any) -> None:
    """B begins at zero, so that A has no gradient at the first step: it begins with unit vectors, and tries again."""
    model = with_lora()
    params = trained_params(model)
    optimizer = GaLoreOptimizer(
        torch.optim.AdamW(params, lr=0.01, weight_decay=0.0),
        model,
        **FACTORS,
        rank=2,
        method="galore",
        fix_signs=False,
        update_proj_gap=5,
        scale=1.0,
        mode=mode,
    )
    assert len(optimizer.targets) == 8 == len(params)
    expected = {param: param.detach().clone() for param in params if "lora_B" in optimizer.targets[param].name}
    plain = {param: GaLore(rule=Adam(lr=0.01), rank=2, gap=5, scale=1.0) for param in expected}
    start, losses = [param.detach().clone() for param in params], []
    for step in range(24):
        grads = dict(zip(params, torch.autograd.grad(language_loss(model, 0), params), strict=True))
        for param, weight in expected.items():
            plain[param].apply_(weight, grads[param])
        losses += train(model, optimizer, [0])
        assert step or all(torch.equal(p, old) for p, old in zip(params, start, strict=True) if p not in expected)
    assert max_difference(expected, expected.values()) < 1e-9
    assert all(not torch.equal(param, old) for param, old in zip(params, start, strict=True))
    assert losses[-1] < 0.9 * losses[0]
    failures = {
        optimizer.targets[p].name: s.num_failures for p, s in zip(optimizer.targets, optimizer.subspaces(), strict=True)
    }
    assert {count for name, count in failures.items() if "lora_A" in name} == {1}
    assert {count for name, count in failures.items() if "lora_B" in name} == {0}


def test_state_is_smaller_than_that_of_lora_alone() -> None:
    sizes = {}
    for rank in (None, 2):
        model = with_lora()
        base = torch.optim.AdamW(trained_params(model), lr=0.01)
        optimizer: Any = base if rank is None else GaLoreOptimizer(base, model, **FACTORS, rank=rank)
        train(model, optimizer, range(3))
        sizes[rank] = sum(state["exp_avg"].numel() for state in base.state.values())
    assert sizes[2] == sizes[None] // 4


def test_frozen_weights_are_neither_projected_nor_moved() -> None:
    model = with_lora()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    # All parameters, frozen ones too, as a careless configure_optimizers gives them.
    optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model, **FACTORS, rank=2)
    train(model, optimizer, range(4))
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, start[name])}
    assert moved == {name for name in start if "lora_" in name}
    assert {target.name for target in optimizer.targets.values()} == moved


@pytest.mark.parametrize("mode", MODES)
def test_with_peft(mode: Any) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = TinyTransformer()
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value", "up", "down"])
    adapted = peft.get_peft_model(model, config)
    optimizer = GaLoreOptimizer(
        torch.optim.AdamW(trained_params(adapted), lr=0.02), adapted, **FACTORS, rank=2, mode=mode, update_proj_gap=5
    )
    names = {target.name for target in optimizer.targets.values()}
    assert len(names) == 8
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in names)
    frozen = {n: p.detach().clone() for n, p in adapted.named_parameters() if not p.requires_grad}
    losses = train(adapted, optimizer, [0] * 30)
    assert losses[-1] < 0.95 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in adapted.named_parameters() if n in frozen)
    assert {optimizer.state[weight][BASIS].shape[1] for weight in optimizer.targets} == {2}
