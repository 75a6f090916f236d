# SPDX-License-Identifier: Apache-2.0
"""The same weights as two independent implementations: the published galore-torch, and the plain reference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import galore_torch
import pytest
import torch
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from tests.helpers import PLAIN, TinyTransformer, max_difference, train
from tests.reference import galore_reference as reference

STEPS = 60
PROJ_TYPES = ["std", "reverse_std", "left", "right", "full"]
GALORE: dict[str, Any] = {"rank": 4, "update_proj_gap": 10, "scale": 0.5}
# With its bases from LAPACK and their signs as they come, at the steps at which galore-torch finds them.
EXACT: dict[str, Any] = {"subspace": "svd", "fix_signs": False, **PLAIN}
LR = 2e-3


def split_groups(model: TinyTransformer, **keys: Any) -> list[dict[str, Any]]:
    """Projected and dense weights in groups of their own, in galore-torch's way."""
    projected = model.matrices()
    ids = {id(weight) for weight in projected}
    dense = [param for param in model.parameters() if id(param) not in ids]
    return [{"params": dense}, {"params": projected, **keys}]


def peer(model: TinyTransformer, proj_type: str, *, eps: float = 1e-30, decay: float = 0.0) -> torch.optim.Optimizer:
    groups = split_groups(model, proj_type=proj_type, **GALORE)
    options: dict[str, Any] = {"lr": LR, "eps": eps, "weight_decay": decay, "no_deprecation_warning": True}
    return galore_torch.GaLoreAdamW(groups, **options)


def plain_peer(model: nn.Module, *, eps: float, decay: float = 0.0) -> torch.optim.Optimizer:
    """galore-torch's AdamW over groups without a rank: an ordinary optimizer with its order of eps and decay."""
    options: dict[str, Any] = {"lr": LR, "eps": eps, "weight_decay": decay, "no_deprecation_warning": True}
    return galore_torch.GaLoreAdamW(model.parameters(), **options)


def adamw(params: Iterable[Any], **options: Any) -> torch.optim.AdamW:
    # galore-torch adds eps before it corrects the bias, torch after: without eps both are the same formula.
    return torch.optim.AdamW(params, **{"lr": LR, "eps": 1e-30, "weight_decay": 0.0, **options})


def models(dtype: torch.dtype = torch.float32) -> tuple[TinyTransformer, TinyTransformer]:
    return TinyTransformer(dtype=dtype), TinyTransformer(dtype=dtype)


def difference_after_training(
    one: nn.Module, optimizer: torch.optim.Optimizer, other: nn.Module, other_optimizer: torch.optim.Optimizer
) -> float:
    start = [param.detach().clone() for param in one.parameters()]
    train(one, optimizer, range(STEPS))
    train(other, other_optimizer, range(STEPS))
    assert all(not torch.equal(param, before) for param, before in zip(one.parameters(), start, strict=True))
    return max_difference(one.parameters(), other.parameters())


@pytest.fixture
def exact_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let galore-torch decompose fp64 gradients in fp64: as published it goes through fp32."""

    def get_orthogonal_matrix(self: GaLoreProjector, weights: Tensor, rank: int, type: str) -> Any:
        u, _, vh = torch.linalg.svd(weights, full_matrices=False)
        return {"right": vh[:rank], "left": u[:, :rank], "full": [u[:, :rank], vh[:rank]]}[type]

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", get_orthogonal_matrix)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_equals_galore_torch(proj_type: Any) -> None:
    ours, theirs = models()
    optimizer = GaLoreOptimizer(adamw(ours.parameters()), ours, proj_type=proj_type, **GALORE, **EXACT)
    assert set(optimizer.targets) == set(ours.matrices())
    assert {tuple(weight.shape) for weight in optimizer.targets} == {(16, 16), (40, 16), (16, 40)}
    assert difference_after_training(ours, optimizer, theirs, peer(theirs, proj_type)) <= 1e-5


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.usefixtures("exact_peer")
def test_equals_galore_torch_in_fp64(proj_type: Any) -> None:
    ours, theirs = models(torch.float64)
    optimizer = GaLoreOptimizer(adamw(ours.parameters()), ours, proj_type=proj_type, **GALORE, **EXACT)
    assert difference_after_training(ours, optimizer, theirs, peer(theirs, proj_type)) <= 1e-12


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_equals_galore_torch_with_its_own_group_keys(proj_type: Any) -> None:
    ours, theirs = models()
    groups = split_groups(ours, proj_type=proj_type, **GALORE)
    optimizer = GaLoreOptimizer(adamw(groups), **EXACT)
    assert set(optimizer.targets) == set(ours.matrices())
    assert difference_after_training(ours, optimizer, theirs, peer(theirs, proj_type)) <= 1e-5


def test_equals_galore_torch_around_its_own_adamw() -> None:
    ours, theirs = models()
    optimizer = GaLoreOptimizer(plain_peer(ours, eps=1e-6), ours, **GALORE, **EXACT)
    assert difference_after_training(ours, optimizer, theirs, peer(theirs, "std", eps=1e-6)) <= 1e-5


def test_eps_is_torchs_and_not_galore_torchs() -> None:
    """The one known difference at zero decay: with a large eps the place where it is added shows."""
    ours, theirs = models()
    optimizer = GaLoreOptimizer(adamw(ours.parameters(), eps=1e-3), ours, **GALORE, **EXACT)
    assert difference_after_training(ours, optimizer, theirs, peer(theirs, "std", eps=1e-3)) > 1e-3


@pytest.mark.usefixtures("exact_peer")
def test_decay_around_galore_torchs_own_adamw_is_in_its_order() -> None:
    """It decays after the update: the proxy, which is the update, by the same factor as the weight before it."""
    ours, theirs = models(torch.float64)
    optimizer = GaLoreOptimizer(plain_peer(ours, eps=1e-6, decay=0.5), ours, **GALORE, **EXACT)
    other = peer(theirs, "std", eps=1e-6, decay=0.5)
    assert difference_after_training(ours, optimizer, theirs, other) <= 1e-12


@pytest.mark.usefixtures("exact_peer")
def test_decay_around_torchs_adamw_differs_from_galore_torch_only_by_its_place() -> None:
    """PyTorch shrinks a weight before its update, galore-torch after it: ``lr * decay * update`` a step."""
    decay = 0.5
    ours, theirs = models(torch.float64)
    optimizer = GaLoreOptimizer(adamw(ours.parameters(), weight_decay=decay), ours, **GALORE, **EXACT)
    late = difference_after_training(ours, optimizer, theirs, peer(theirs, "std", decay=decay))
    assert 1e-2 * STEPS * LR * decay * LR < late <= 3 * STEPS * LR * decay * LR

    theirs = TinyTransformer(dtype=torch.float64)

    @torch.no_grad()
    def decay_before_the_update(step: int) -> None:
        for weight in theirs.parameters():
            weight.mul_(1 - LR * decay)

    train(theirs, peer(theirs, "std"), range(STEPS), before_step=decay_before_the_update)
    assert max_difference(ours.parameters(), theirs.parameters()) <= 1e-12


# -- the plain reference -----------------------------------------------------------------------------------------------


class Reference(torch.optim.Optimizer):
    """The formulas of ``tests/reference`` over a model: low-rank for its matrices, full-rank for the rest."""

    def __init__(self, model: TinyTransformer, rule: Any, **options: Any) -> None:
        super().__init__(model.parameters(), {})
        projected = {id(weight) for weight in model.matrices()}
        self.parts = {
            param: reference.GaLore(rule, rank=4 if id(param) in projected else None, gap=10, scale=0.5, **options)
            for param in model.parameters()
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param, part in self.parts.items():
            assert param.grad is not None
            part.apply_(param, param.grad)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_equals_the_plain_reference(proj_type: Any, decay: float) -> None:
    ours, plain = models(torch.float64)
    base = adamw(ours.parameters(), eps=1e-8, weight_decay=decay)
    optimizer = GaLoreOptimizer(base, ours, proj_type=proj_type, **GALORE, **EXACT)
    other = Reference(plain, reference.Adam(LR, eps=1e-8), proj_type=proj_type, decoupled=decay)
    assert difference_after_training(ours, optimizer, plain, other) <= 1e-12


@pytest.mark.parametrize("foreach", [True, False])
def test_adam_with_l2_penalty_equals_the_plain_reference(foreach: bool) -> None:
    ours, plain = models(torch.float64)
    base = torch.optim.Adam(ours.parameters(), lr=LR, weight_decay=0.1, foreach=foreach)
    optimizer = GaLoreOptimizer(base, ours, **GALORE, **EXACT)
    other = Reference(plain, reference.Adam(LR), coupled=0.1)
    # The key's gradient nearly vanishes at first, so Adam enlarges rounding errors there.
    assert difference_after_training(ours, optimizer, plain, other) <= 1e-11


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_equals_the_plain_reference(proj_type: Any, nesterov: bool) -> None:
    ours, plain = models(torch.float64)
    base = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    optimizer = GaLoreOptimizer(base, ours, proj_type=proj_type, **GALORE, **EXACT)
    other = Reference(plain, reference.Momentum(0.1, nesterov=nesterov), proj_type=proj_type, coupled=0.01)
    assert difference_after_training(ours, optimizer, plain, other) <= 1e-12


@pytest.mark.parametrize("gap", [7, 1000])
def test_full_rank_momentum_is_sgd_whatever_the_bases(gap: int) -> None:
    """SGD with momentum does not see a rotation (Adam does): at r = min(m, n) it is plain SGD, also over refreshes."""
    ours, plain = models(torch.float64)
    groups = split_groups(ours)
    groups[1]["rank"] = 16
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    optimizer = GaLoreOptimizer(base, update_proj_gap=gap, scale=1.0)
    other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    assert difference_after_training(ours, optimizer, plain, other) <= 1e-12


def test_fixed_signs_do_not_change_a_run_with_a_single_basis() -> None:
    fixed, free = models(torch.float64)
    optimizers = [
        GaLoreOptimizer(
            torch.optim.AdamW(model.parameters(), lr=LR),
            model,
            rank=4,
            update_proj_gap=100,
            subspace="svd",
            fix_signs=fix,
        )
        for model, fix in ((fixed, True), (free, False))
    ]
    assert difference_after_training(fixed, optimizers[0], free, optimizers[1]) <= 1e-12


def test_rounding_errors_do_not_grow_over_refreshes_when_signs_are_fixed() -> None:
    """Moments survive a refresh, so a vector whose sign flips on a rounding error would change the run."""
    one, other = models()
    with torch.no_grad():
        other.blocks[0].up.weight.add_(1e-7)  # type: ignore[operator,union-attr]
    pair = [
        GaLoreOptimizer(torch.optim.AdamW(model.parameters(), lr=LR), model, **GALORE, **PLAIN)
        for model in (one, other)
    ]
    assert difference_after_training(one, pair[0], other, pair[1]) <= 1e-4
