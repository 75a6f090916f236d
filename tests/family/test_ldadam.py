# SPDX-License-Identifier: Apache-2.0
"""LDAdam: the formulas of the paper, and the faults of its own code (LD-1 to LD-6)."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from lightning_galore import GaLoreOptimizer
from lightning_galore.moments import taken_over
from lightning_galore.state_keys import BASIS
from tests.family.common import LR, RANKS, SHAPES, STEPS, advance, backward, furthest, gradient, made, saved_and_loaded
from tests.helpers import Matrices, assert_orthonormal, same_bits
from tests.reference.ldadam_reference import LDAdam

BETAS = (0.908, 0.99)
ERROR = "galore_lift_error"
MODES: list[Any] = ["step", "layerwise"]


def adam(params: Any, *, decoupled: bool = True, decay: float = 0.0, lr: float = LR) -> torch.optim.Optimizer:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(params, lr=lr, betas=BETAS, weight_decay=decay)


def ldadam(*shapes: tuple[int, int], dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    return made(adam, *shapes, dtype=dtype, **{"method": "ldadam", "rank": 4, **settings})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize(
    "how",
    [{}, {"decoupled": 0.1}, {"coupled": 0.1}, {"clip": 20.0}, {"coupled": 0.1, "clip": 20.0, "scale": 0.5}],
    ids=str,
)
def test_it_is_the_papers_algorithm(how: dict[str, float], rank: int, mode: Any) -> None:
    decay = how.get("decoupled", how.get("coupled", 0.0))
    model, optimizer = made(
        lambda params: adam(params, decoupled="coupled" not in how, decay=decay),
        *SHAPES,
        method="ldadam",
        rank=rank,
        mode=mode,
        clip_weight_norm=how.get("clip"),
        scale=how.get("scale"),
    )
    expected = [weight.detach().clone() for weight in model.parameters()]
    plain = [LDAdam(rank=rank, lr=LR, betas=BETAS, rho=0.908, **how) for _ in SHAPES]  # type: ignore[arg-type]
    for step in range(STEPS):
        for rule, weight in zip(plain, expected, strict=True):
            rule.apply_(weight, gradient(step, weight))
        advance(model, optimizer, [step])
        assert furthest(model.parameters(), expected) < 1e-6, step
        for rule, weight in zip(plain, model.parameters(), strict=True):
            error = rule.e if weight.shape[0] < weight.shape[1] else rule.e.T
            assert furthest([optimizer.state[weight][ERROR]], [error]) < 1e-6
            assert_orthonormal(optimizer.state[weight][BASIS])
    assert all(int(optimizer.state[weight]["galore_refreshes"]) == STEPS for weight in model.parameters())


def test_the_preset_is_the_papers_rho_and_can_be_named_over() -> None:
    (_, optimizer), (_, other) = ldadam(*SHAPES), ldadam(*SHAPES, tracking_rho=0.5, scale=2.0)
    assert (optimizer.config.tracking_rho, optimizer.config.scale) == (0.908, 1.0)
    assert (other.config.tracking_rho, other.config.scale) == (0.5, 2.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_what_is_left_over_survives_every_zero_grad(mode: Any, set_to_none: bool) -> None:
    """LD-2, LD-3: it does not live in ``p.grad``."""
    model, optimizer = ldadam(*SHAPES, mode=mode)
    other, twin = ldadam(*SHAPES, mode=mode)
    for step in range(6):
        for one, wrapped in ((model, optimizer), (other, twin)):
            backward(one, step)
            wrapped.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        model.zero_grad(set_to_none=not set_to_none)
        for weight in model.parameters():
            assert bool(optimizer.state[weight][ERROR].any())
        twin.zero_grad()
    assert same_bits(model.parameters(), other.parameters())


def test_the_user_sees_the_gradient_of_the_loss_alone() -> None:
    """LD-2: what is left over is neither in ``p.grad`` nor in the norm that clipping goes by."""
    model, optimizer = ldadam(*SHAPES)
    advance(model, optimizer, range(3))
    optimizer.zero_grad()
    backward(model, 3)
    grads = [gradient(3, weight) for weight in model.parameters()]
    assert furthest((weight.grad for weight in model.parameters()), grads) < 1e-12  # type: ignore[misc]
    norm = sum(float(grad.norm()) ** 2 for grad in grads) ** 0.5
    assert float(optimizer.grad_norm()) == pytest.approx(norm, rel=1e-12)
    before = [weight.grad.clone() for weight in model.parameters()]
    optimizer.step()
    assert same_bits((weight.grad for weight in model.parameters()), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_exact(mode: Any, dtype: torch.dtype) -> None:
    """LD-1: the steps and what is left over are in the state dict."""
    whole, optimizer = ldadam(*SHAPES, mode=mode, dtype=dtype)
    advance(whole, optimizer, range(20))
    first, before = ldadam(*SHAPES, mode=mode, dtype=dtype)
    advance(first, before, range(9))
    saved = saved_and_loaded({"model": first.state_dict(), "optimizer": before.state_dict()})
    again, resumed = ldadam(*SHAPES, mode=mode, dtype=dtype)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    advance(again, resumed, range(9, 20))
    assert same_bits(again.parameters(), whole.parameters())
    errors = ([one.state[weight][ERROR] for weight in one.targets] for one in (resumed, optimizer))
    assert same_bits(*errors)


def test_learning_rates_and_sides_are_those_of_each_group() -> None:
    """LD-4, LD-5, LD-6: the rate is read at each step, nothing leaks between groups, and none needs a key of ours."""

    def run(order: tuple[int, int]) -> list[torch.Tensor]:
        weights = [nn.Parameter(torch.ones(20, 12, dtype=torch.float64) * (i + 1)) for i in range(2)]
        groups: list[dict[str, Any]] = [
            {"params": [weights[0]], "rank": 4, "proj_type": "left"},
            {"params": [weights[1]], "rank": 2, "lr": 3 * LR},
        ]
        optimizer = GaLoreOptimizer(adam([groups[i] for i in order]), method="ldadam", rank=4)
        for step in range(6):
            for weight in weights:
                weight.grad = gradient(step, weight)
            for group in optimizer.param_groups:
                group["lr"] *= 0.9
            optimizer.step()
        assert [optimizer.targets[weight].projection.side for weight in weights] == ["left", "right"]
        return [weight.detach() for weight in weights]

    one, other = run((0, 1)), run((1, 0))
    assert same_bits(one, other)
    rule = LDAdam(rank=2, lr=3 * LR, betas=BETAS, rho=0.908)
    expected = 2 * torch.ones(20, 12, dtype=torch.float64)
    for step in range(6):
        rule.lr *= 0.9
        rule.apply_(expected, gradient(step, expected))
    assert furthest([one[1]], [expected]) < 1e-10


def test_everything_arrives_in_the_end() -> None:
    """What a rank of one leaves out of a constant gradient is made up for later: the update is not of rank one."""
    torch.manual_seed(0)
    grad = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:, :4] @ torch.randn(4, 16, dtype=torch.float64)
    totals = {}
    for lift in ("error_feedback", "project_back"):
        weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.float64))
        group = {"params": [weight], "rank": 1}
        optimizer = GaLoreOptimizer(torch.optim.SGD([group], lr=1.0), method="ldadam", rank=1, lift=lift)
        for _ in range(200):
            weight.grad = grad.clone()
            optimizer.step()
        totals[lift] = float((-weight.detach() / 200 - grad).norm() / grad.norm())
    assert totals["error_feedback"] < 0.2
    assert totals["project_back"] > 0.5


@pytest.mark.parametrize(
    ("base", "share"),
    [
        (lambda p: torch.optim.AdamW(p, betas=(0.9, 0.99)), 9.0),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), 0.9),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, dampening=0.5), 1.8),
        (lambda p: torch.optim.SGD(p, lr=1.0), 0.0),
    ],
)
def test_a_moment_counts_as_the_gradient_that_would_make_up_for_it(base: Any, share: float) -> None:
    weight = nn.Parameter(torch.zeros(3, 2))
    optimizer = base([weight])
    for _ in range(3):
        weight.grad = torch.ones(3, 2)
        optimizer.step()
    assert taken_over(optimizer, optimizer.state[weight], optimizer.param_groups[0]) == pytest.approx(share)


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
def test_a_moment_that_is_lost_in_a_turn_comes_back(moments: Any) -> None:
    """``sum of updates + what is left over`` of SGD with momentum, two steps by hand; reset ones are forgotten."""
    weight = nn.Parameter(torch.zeros(6, 10, dtype=torch.float64))
    base = torch.optim.SGD([{"params": [weight], "rank": 2}], lr=1.0, momentum=0.9)
    optimizer = GaLoreOptimizer(base, method="ldadam", moments=moments, rank=2)
    bases, lows = [], []
    for step in range(2):
        weight.grad = gradient(step, weight.detach() * 0)
        error = optimizer.state[weight].get(ERROR, torch.zeros(6, 10)).clone()
        optimizer.step()
        basis = optimizer.state[weight][BASIS]
        bases.append(basis)
        full = weight.grad + error
        lows.append(basis.mT @ full)
    left = full - bases[1] @ lows[1]
    after = {"keep": lows[0], "rotate": bases[1].mT @ bases[0] @ lows[0], "reset": None}[moments]
    if after is not None:
        left += 0.9 * (bases[0] @ lows[0] - bases[1] @ after)
    torch.testing.assert_close(optimizer.state[weight][ERROR], left, rtol=0, atol=1e-10)


def test_no_temporary_beyond_one_weight() -> None:
    """The left-over of a step is made in its buffer: at most one matrix of the weight's size is allocated at a time."""
    model, optimizer = ldadam((256, 128), (256, 128), (256, 128), dtype=torch.float32)
    advance(model, optimizer, range(2))
    optimizer.zero_grad()
    backward(model, 2)
    whole = 256 * 128 * 4
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    held = highest = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and abs(event.nbytes()) >= whole // 2:
            held += event.nbytes()
            highest = max(highest, held)
    assert highest == whole  # the sum of gradient and left-over, where the basis is found


def test_a_gradient_that_is_missing_or_not_finite_leaves_the_error_alone() -> None:
    model, optimizer = ldadam(*SHAPES)
    advance(model, optimizer, range(3))
    first, second, third = model.parameters()
    before = [optimizer.state[weight][ERROR].clone() for weight in (first, second, third)]
    optimizer.zero_grad()
    backward(model, 3)
    first.grad = None
    second.grad[0, 0] = torch.nan
    optimizer.step()
    assert same_bits([optimizer.state[first][ERROR], optimizer.state[second][ERROR]], before[:2])
    assert not torch.equal(optimizer.state[third][ERROR], before[2])
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())
    advance(model, optimizer, [4])
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


def test_mode_project_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=re.escape("lift='error_feedback' with mode='project'") + ".*mode='layerwise'"):
        ldadam(*SHAPES, mode="project")


@pytest.mark.parametrize("paged", [False, True])
def test_moments_in_8_bits_are_followed_too(paged: bool) -> None:
    """What is left over is that of moments in fp32, but for the rounding of their codes."""
    if paged and not torch.cuda.is_available():
        pytest.skip("paged memory needs a GPU")
    bnb = pytest.importorskip("bitsandbytes")
    errors = []
    for bits in (32, 8):
        model = Matrices((320, 256), dtype=torch.float32)
        base = bnb.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, optim_bits=bits, is_paged=paged)
        optimizer = GaLoreOptimizer(base, model, method="ldadam", rank=16)
        advance(model, optimizer, range(4))
        (weight,) = model.parameters()
        assert (optimizer.state[weight]["state1"].dtype == torch.uint8) == (bits == 8)
        errors.append(optimizer.state[weight][ERROR])
    assert 0 < float((errors[1] - errors[0]).norm() / errors[0].norm()) < 0.05
