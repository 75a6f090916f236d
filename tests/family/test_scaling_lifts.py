# SPDX-License-Identifier: Apache-2.0
"""The lifts of APOLLO and Fira by themselves: what they do to a weight, what they wait for, what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer, linalg
from lightning_galore.lift import LIFTS, Update
from lightning_galore.subspace import Projection
from tests.helpers import Matrices, same_bits

from .one_weight import SHAPES, one_weight, steps

KINDS = ["channel_scale", "tensor_scale", "scaled_residual"]
SIDES: list[Any] = ["left", "right"]
LR = 0.1


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    drawn = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.to(device, dtype)


def parts(
    shape: tuple[int, int], side: Any, rank: int, *, dtype: torch.dtype = torch.float64, **changed: Any
) -> Update:
    """An update of some basis, whose low-rank gradient is that of its full one."""
    projection = Projection(shape=shape, side=side, rank=rank)
    bases = tuple(linalg.orthonormalize(random(*one, seed=7)) for one in projection.basis_shapes)
    grad = random(*shape, seed=1)
    low = projection.project(grad, bases)
    made = {"low_update": -LR * random(*low.shape, seed=2), "low_grad": low, "grad": grad}
    tensors = {name: value.to(dtype) for name, value in made.items()}
    return Update(**{"projection": projection, "bases": bases, **tensors, "lr": LR, **changed})


def moved(kind: str, update: Update, *, start: Tensor | None = None, **factors: float) -> Tensor:
    """What the lift adds to a weight of zeros, or makes of ``start``."""
    weight = torch.zeros(update.projection.shape, dtype=torch.float64) if start is None else start.clone()
    LIFTS[kind]().apply_(weight, replace(update, **factors))
    return weight


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank", [1, 4])
def test_apollo_scales_the_full_gradient(shape: tuple[int, int], side: Any, rank: int) -> None:
    """Every channel moves against its own full gradient, whatever the rank (PO-4 scales the projected one)."""
    made = parts(shape, side, rank)
    grad = made.grad
    by_channel, whole = moved("channel_scale", made), moved("tensor_scale", parts(shape, side, rank))
    ratios = by_channel / grad
    per_channel = ratios if side == "left" else ratios.T
    torch.testing.assert_close(per_channel, per_channel[:1].expand_as(per_channel))
    assert bool((per_channel < 0).all())
    assert float(per_channel[0].max() - per_channel[0].min()) > 1e-3
    torch.testing.assert_close(whole / grad, (whole / grad)[:1, :1].expand(shape))


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", SIDES)
def test_the_residual_has_no_part_in_the_subspace(side: Any, shape: tuple[int, int], scale: float) -> None:
    """Whatever ``scale`` is: FI-1's holds ``1 - scale`` of it."""
    update = parts(shape, side, 3)
    projection, bases = update.projection, update.bases
    change = moved("scaled_residual", update, scale=scale)
    torch.testing.assert_close(projection.project(change, bases), scale * update.low_update, rtol=0, atol=1e-14)
    residual = change.clone()
    update.add_back_(residual, update.low_update, alpha=-scale)
    assert float(projection.project(residual, bases).abs().max()) < 1e-14
    assert float(residual.norm()) > 0.1  # PO-3: there is one, at a rank below min(m, n)
    # And it does not depend on scale.
    torch.testing.assert_close(residual, moved("scaled_residual", parts(shape, side, 3), scale=1e-30))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_and_update_stay_as_they_are(kind: str, dtype: torch.dtype) -> None:
    """GL-8: nobody uses the gradient as memory."""
    update = parts((9, 12), "left", 3, dtype=dtype, shrink=0.9)
    seen = [update.grad, update.low_grad, update.low_update, *update.bases]
    before = [one.clone() for one in seen]
    LIFTS[kind]().apply_(torch.zeros(9, 12, dtype=dtype), update)
    assert same_bits(seen, before)


@pytest.mark.parametrize("kind", KINDS)
def test_maximizing_goes_along_the_gradient(kind: str) -> None:
    shape = (9, 12)
    down = moved(kind, parts(shape, "left", 3))
    update = parts(shape, "left", 3, ascends=True)
    update.low_update.neg_()  # as the wrapped optimizer does
    torch.testing.assert_close(moved(kind, update), -down)


@pytest.mark.parametrize("kind", KINDS)
def test_the_limiter_knows_no_learning_rate(kind: str) -> None:
    """Ten times the learning rate is ten times the step, limited or not."""
    for last in (0.0, 1e-3, 1e3):
        changes, norms = [], []
        for lr in (1e-2, 1e-1):
            entries = {"norm": torch.tensor(last, dtype=torch.float64)}
            update = parts((9, 12), "left", 3, lr=lr, entries=entries)
            update.low_update.mul_(lr / LR)
            changes.append(moved(kind, update) / lr)
            norms.append(entries["norm"])
        torch.testing.assert_close(*changes)
        torch.testing.assert_close(*norms)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_grow_by_a_hundredth_at_most(kind: str) -> None:
    scale = 1e-30 if kind == "scaled_residual" else 1.0  # which is limited in what lies outside the subspace only
    made = parts((9, 12), "right", 3)
    free = moved(kind, made, scale=scale)
    norm = made.entries["norm"]
    torch.testing.assert_close(norm, free.norm() / LR)
    limited = parts((9, 12), "right", 3, entries={"norm": norm / 2})
    torch.testing.assert_close(moved(kind, limited, scale=scale), free * 0.505)
    torch.testing.assert_close(limited.entries["norm"], norm * 0.505)
    unlimited = parts((9, 12), "right", 3, entries={"norm": norm / 1.005})
    assert torch.equal(moved(kind, unlimited, scale=scale), free)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["zero gradient", "zero learning rate", "not finite"])
def test_a_step_without_an_update_does_not_freeze_the_weight(kind: str, what: str) -> None:
    entries: dict[str, Tensor] = {}
    for last in (None, torch.tensor(2.0, dtype=torch.float64)):
        entries = {} if last is None else {"norm": last}
        lr: Any = {"zero learning rate": 0.0}.get(what, LR)
        update = parts((9, 12), "left", 3, lr=lr, entries=entries)
        factor = math.nan if what == "not finite" else 0.0
        update.low_update.mul_(factor)
        if what != "zero learning rate":
            update.low_grad.mul_(factor)
            update.grad.mul_(factor)
        change = moved(kind, update)
        assert not bool(torch.isfinite(change).all()) if what == "not finite" else not bool(change.any())
        assert float(entries["norm"]) == (0.0 if last is None else 2.0)
    entries = {"norm": torch.tensor(0.0, dtype=torch.float64)}
    assert torch.equal(moved(kind, parts((9, 12), "left", 3, entries=entries)), moved(kind, parts((9, 12), "left", 3)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["one channel", "all"])
def test_momentum_without_a_gradient_moves_nothing_out_of_bounds(kind: str, of: str) -> None:
    update = parts((9, 12), "left", 3)
    which = slice(0, 1) if of == "one channel" else slice(None)
    update.low_grad[:, which], update.grad[:, which] = 0.0, 0.0
    change = moved(kind, update)
    assert bool(torch.isfinite(change).all())
    if kind != "scaled_residual":
        assert not bool(change[:, which].any())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shrink", [1.0, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(kind: str, shrink: float, dtype: torch.dtype) -> None:
    """A decay of 1e-3 is below half a bf16 step: rounded by itself it would be lost."""
    update = parts((64, 48), "right", 4, dtype=dtype, shrink=shrink)
    assert update.grad is not None
    tensors = {"low_update": update.low_update, "low_grad": update.low_grad, "grad": update.grad}
    wide = replace(update, **{name: tensor.double() for name, tensor in tensors.items()}, entries={})
    start = random(64, 48, seed=5, dtype=dtype)
    exact = moved(kind, wide, start=start.double())
    got = start.clone()
    LIFTS[kind]().apply_(got, replace(update, bases=tuple(basis.float() for basis in update.bases)))
    assert got.dtype == dtype
    assert float((got == exact.to(dtype)).double().mean()) > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind: str) -> None:
    """On the meta device there are no numbers to wait for: a look at one raises."""
    projection = Projection(shape=(9, 12), side="left", rank=3)
    made: dict[str, Any] = {"device": "meta"}
    entries: dict[str, Tensor] = {}
    for _ in range(2):
        update = Update(
            projection=projection,
            bases=(torch.zeros(9, 3, **made),),
            low_update=torch.zeros(3, 12, **made),
            low_grad=torch.zeros(3, 12, **made),
            grad=torch.zeros(9, 12, **made),
            shrink=0.9,
            lr=torch.zeros((), **made),
            entries=entries,
        )
        LIFTS[kind]().apply_(torch.zeros(9, 12, **made), update)
    assert entries["norm"].shape == ()


@pytest.mark.parametrize("kind", ["channel_scale", "tensor_scale"])
def test_scaling_makes_no_full_size_temporary(kind: str) -> None:
    update = parts((256, 128), "right", 2, dtype=torch.float32)
    weight = torch.zeros(256, 128)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        LIFTS[kind]().apply_(weight, update)
    assert all(event.self_cpu_memory_usage < 256 * 128 * 4 for event in profile.key_averages())


def test_a_learning_rate_for_the_shape_of_the_proxy_is_corrected_outside_the_subspace_too() -> None:
    one = moved("scaled_residual", parts((9, 12), "left", 3), scale=1e-30)
    other = moved("scaled_residual", parts((9, 12), "left", 3, shape_factor=2.0), scale=1e-30)
    torch.testing.assert_close(other, 2 * one)
    muon = getattr(torch.optim, "Muon", None)
    if muon is not None:
        weight, optimizer = one_weight((16, 4), lambda p: muon(p, lr=0.1), method="fira", rank=2, scale=1.0)
        before = weight.detach().clone()
        steps(weight, optimizer, [0])
        factor = math.sqrt(16 / 4) / math.sqrt(16 / 2)
        low = 0.1 * math.sqrt(16 / 2) * factor  # Muon's direction in the subspace has singular values of about one
        projected = (weight.detach() - before) @ optimizer.state[weight]["galore_basis"]
        assert float(torch.linalg.matrix_norm(projected, 2)) == pytest.approx(low, rel=0.3)


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "apollo", "mode": "project"}, r"lift='channel_scale' with mode='project': it needs the full grad"),
        ({"method": "apollo-mini", "mode": "project"}, r"lift='tensor_scale' with mode='project'.*mode='layerwise'"),
        ({"method": "fira", "mode": "project"}, r"lift='scaled_residual' with mode='project'"),
        (
            {"method": "apollo", "proj_type": "full"},
            r"lift='channel_scale' with proj_type='full': it compares channels",
        ),
        ({"method": "fira", "proj_type": "full"}, r"lift='scaled_residual' with proj_type='full'.*'tensor_scale'"),
        ({"method": "fira", "subspace": "gaussian"}, r"lift='scaled_residual' with subspace='gaussian': what a basis"),
        ({"method": "apollo", "schedule": "adaptive"}, r"schedule='adaptive' compares bases"),
    ],
)
def test_refused_combinations(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_weight((9, 12), rank=3, **settings)


def test_a_group_that_projects_both_sides_is_refused_too() -> None:
    model = Matrices((9, 12), (8, 8))
    first, second = model.parameters()
    groups = [{"params": [first]}, {"params": [second], "rank": 2, "proj_type": "full"}]
    with pytest.raises(ValueError, match=r"lift='channel_scale' with proj_type='full'"):
        GaLoreOptimizer(torch.optim.AdamW(groups), model, method="apollo", rank=2)
    optimizer = GaLoreOptimizer(torch.optim.AdamW(groups[:1]), model, method="apollo", rank=2)
    with pytest.raises(ValueError, match=r"lift='channel_scale' with proj_type='full'"):
        optimizer.add_param_group(groups[1])


def test_both_sides_by_one_ratio() -> None:
    weight, optimizer = one_weight((9, 12), method="apollo-mini", rank=2, proj_type="full")
    before = weight.detach().clone()
    steps(weight, optimizer, range(5))
    assert optimizer.state[weight]["exp_avg"].shape == (2, 2)
    assert not torch.equal(weight.detach(), before)


def test_a_vector_in_a_group_with_a_rank_stays_full_rank() -> None:
    """AP-6."""
    layer = nn.Linear(8, 12)
    base = torch.optim.AdamW([{"params": list(layer.parameters()), "rank": 2}], lr=0.1)
    optimizer = GaLoreOptimizer(base, layer, method="apollo")
    before = [param.detach().clone() for param in layer.parameters()]
    layer(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert [param in optimizer.targets for param in (layer.weight, layer.bias)] == [True, False]
    assert all(not torch.equal(old, param) for old, param in zip(before, layer.parameters(), strict=True))
