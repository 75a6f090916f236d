# SPDX-License-Identifier: Apache-2.0
"""The self-check: a shadow of the optimizer steps a made-up parameter, and the user's object notices nothing."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from typing_extensions import override

from lightning_galore import GaLoreOptimizer
from lightning_galore.base_probe import LARGE, SMALL, check_moment_bits, check_moves, probe_state, stepped
from tests.helpers import Matrices
from tests.test_optimizer_bases import BASES, VARIANTS, build, variants

BNB_8BIT = ["AdamW8bit", "Adam8bit", "Lion8bit", "RMSprop8bit", "Adagrad8bit", "SGD8bit", "AdEMAMix8bit"]
BNB_32BIT = ["AdamW", "Adam", "Lion", "RMSprop", "Adagrad", "SGD", "AdEMAMix"]
BNB = [*BNB_8BIT, *BNB_32BIT, "PagedAdamW8bit", "PagedAdamW", "PagedLion8bit", "PagedAdEMAMix8bit"]
AO = ["AdamW8bit", "AdamW4bit", "AdamWFp8", "Adam8bit", "Adam4bit", "AdamFp8"]


class Unheard(Optimizer):
    """An optimizer that nobody knows; it does nothing in its first steps."""

    def __init__(self, params: Any, *, idle: int = 0, update: Callable[[Tensor], Tensor] = torch.sign) -> None:
        super().__init__(params, {"lr": 0.1})
        self.idle, self.update, self.steps, self.clock = idle, update, 0, torch.zeros(())
        self.seen: dict[str, int] = {}

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        self.clock += 1
        for group in self.param_groups:
            for param in group["params"]:
                self.seen["params"] = self.seen.get("params", 0) + 1
                if self.steps > self.idle and param.grad is not None:
                    param.sub_(self.update(param.grad), alpha=group["lr"])


class Adam(Unheard):
    """Passes for one that is known."""


def weights(dtype: torch.dtype = torch.float32, count: int = 1) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(6, 4, dtype=dtype)) for _ in range(count)]


def of_bitsandbytes(name: str, params: Any, **settings: Any) -> Any:
    bnb = pytest.importorskip("bitsandbytes")
    return getattr(bnb.optim, name)(
        params, **{"lr": 0.1, **({"momentum": 0.9} if name.startswith("SGD") else {}), **settings}
    )


def half_precision_stands_still() -> bool:
    """Whether torch's fused SGD leaves half-precision parameters as they are (2.13 does, on the CPU)."""
    weight = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5, fused=True).step()
    return not bool(weight.any())


# -- it moves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "variant"), variants())
def test_every_optimizer_of_torch_passes(name: str, variant: str, dtype: torch.dtype) -> None:
    params = weights(dtype)
    base = build(name, variant, params)
    if name.startswith("sgd") and VARIANTS[variant].get("fused") and dtype.itemsize == 2:
        if half_precision_stands_still():
            with pytest.raises(ValueError, match=r"base=SGD .*128 of 128 entries do not move .* Set fused=False"):
                check_moves(base, params)
        return
    check_moves(base, params)
    assert bool((params[0] == 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BNB)
def test_every_optimizer_of_bitsandbytes_passes(name: str, dtype: torch.dtype) -> None:
    params = weights(dtype)
    check_moves(of_bitsandbytes(name, params), params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", AO)
def test_every_optimizer_of_torchao_passes_and_compiles_nothing(name: str, dtype: torch.dtype) -> None:
    torchao = pytest.importorskip("torchao.optim")
    params = weights(dtype)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    check_moves(getattr(torchao, name)(params), params)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0), 1e-12])
def test_learning_rate_at_the_start_of_a_warm_up_is_no_fault(lr: Any) -> None:
    params = weights(torch.float16)
    base = torch.optim.AdamW(params, lr=lr)
    check_moves(base, params)
    assert base.param_groups[0]["lr"] is lr
    assert float(lr) in (0.0, 1e-12)


def test_step_relative_to_the_weight_is_shown_one() -> None:
    params = weights()
    check_moves(torch.optim.Adafactor(params, eps=(None, 0.0)), params)


def test_state_that_only_a_constructor_makes_is_there() -> None:
    class Adagrad(torch.optim.Adagrad):
        """As in older torch: a step takes what the constructor has made."""

        @override
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            assert all("sum" in self.state[param] for group in self.param_groups for param in group["params"])
            super().step(closure)

    params = weights()
    base = Adagrad(params, initial_accumulator_value=0.5)
    check_moves(base, params)
    assert stepped(base, base.param_groups[0], torch.zeros(2, 2))[1]["sum"].unique().tolist() == [0.5]


# -- it does not -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "AdamW"])
def test_shifted_arguments_of_bitsandbytes_are_found(name: str) -> None:
    """What older calls by position come to: a limit of 100 on the update's norm, relative to that of the zero proxy."""
    params = weights()
    base = of_bitsandbytes(name, params)
    base.args.max_unorm, base.args.skip_zeros = 100, True
    state = r"128 of 128 entries do not move in 3 steps with a gradient"
    message = rf"base={name} \(bitsandbytes\.optim\.\w+\) fails its self-check: .*\(8, 16\) in torch\.float32 .*{state}"
    with pytest.raises(ValueError, match=message + r".*settings by keyword.*torch\.optim\.AdamW"):
        check_moves(base, params)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (torch.zeros_like, r"128 of 128 entries do not move"),
        (lambda grad: grad.clamp(min=0), r"\d+ of 128 entries do not move"),
        (lambda grad: grad / 0, r"128 of 128 entries are not finite after step 1"),
        (lambda grad: grad if grad.numel() < 4096 else grad * 0, r"shape \(64, 128\) .*8192 of 8192 entries do not"),
        (lambda grad: {}[0], r"its step raises KeyError: 0"),
    ],
)
def test_optimizer_that_does_not_move_is_refused_or_warned_of(update: Callable[[Tensor], Tensor], message: str) -> None:
    params = weights()
    with pytest.raises(ValueError, match=rf"base=Adam \(tests\.test_base_probe\) fails its self-check.*{message}"):
        check_moves(Adam(params, update=update), params)
    with pytest.warns(UserWarning, match=rf"base=Unheard .*fails its self-check.*{message}"):
        check_moves(Unheard(params, update=update), params)


def test_optimizer_may_begin_late() -> None:
    params = weights()
    check_moves(Adam(params, idle=2), params)
    with pytest.raises(ValueError, match="do not move in 3 steps"):
        check_moves(Adam(params, idle=3), params)


# -- nothing is left behind --------------------------------------------------------------------------------------------


def snapshot(base: Optimizer) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in vars(base).items() if key not in ("mng", "page_mng", "update")}


def unchanged(base: Optimizer, before: dict[str, Any]) -> bool:
    return repr(snapshot(base)) == repr(before)


@pytest.mark.parametrize("name", BASES)
def test_the_users_object_notices_nothing(name: str) -> None:
    params = weights(count=2)
    base = build(name, "plain", params)
    calls: list[str] = []
    base.register_step_pre_hook(lambda *args: calls.append("pre"))
    base.register_step_post_hook(lambda *args: calls.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *args: calls.append("global")),
        register_optimizer_step_post_hook(lambda *args: calls.append("global")),
    ]
    torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0)
    before, random = snapshot(base), torch.get_rng_state()
    try:
        check_moves(base, params)
        with contextlib.suppress(ValueError):
            check_moment_bits(base, params)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == []
    assert unchanged(base, before)
    assert not getattr(base, "_opt_called", False)  # by which a scheduler tells that its order is right
    assert torch.equal(random, torch.get_rng_state())
    assert all(param.grad is None and bool((param == 1).all()) for param in params)


def test_counters_of_an_optimizer_of_ones_own_are_not_its_shadows() -> None:
    params = weights()
    base = Unheard(params)
    check_moves(base, params)
    assert (base.steps, float(base.clock), base.seen) == (0, 0.0, {})


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_bitsandbytes_notices_nothing(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    params = weights()
    base = of_bitsandbytes(name, params)
    module = nn.Linear(2, 2)
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.register_module_override(module, "weight", {"lr": 0.5})
    manager.index2config[(0, 0)] = {"lr": 0.0}  # of another parameter: the proxy must move
    pages, maps = len(base.page_mng.paged_tensors), dict(base.name2qmap)
    configs = dict(manager.index2config), dict(manager.pid2config)
    try:
        check_moves(base, params)
        assert (manager.index2config, manager.pid2config) == configs
        assert len(manager.module_weight_config_triple) == 1
    finally:
        manager.module_weight_config_triple.clear()
        manager.index2config.clear()
    assert base.initialized is False
    assert base.is_paged is name.startswith("Paged")
    assert len(base.page_mng.paged_tensors) == pages
    assert base.name2qmap == maps
    assert not base.state


def test_random_numbers_of_a_stochastic_rounding_are_put_back() -> None:
    torchao = pytest.importorskip("torchao.optim")
    params = weights(torch.bfloat16)
    before = torch.get_rng_state()
    check_moves(torchao.AdamW8bit(params, bf16_stochastic_round=True), params)
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_grad_scaler_left_is_not_taken_for_this_step() -> None:
    params = weights()
    base: Any = torch.optim.AdamW(params, fused=True)
    base.grad_scale, base.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    check_moves(base, params)
    assert (float(base.grad_scale), float(base.found_inf)) == (2.0, 1.0)


# -- how often ---------------------------------------------------------------------------------------------------------


def test_each_kind_is_checked_once_and_only_among_the_targets() -> None:
    shapes: list[tuple[Any, torch.dtype]] = []

    def update(grad: Tensor) -> Tensor:
        shapes.append((tuple(grad.shape), grad.dtype))
        return grad

    full, half, other = weights(count=3), weights(torch.bfloat16, 2), weights(torch.float64)
    meta = nn.Parameter(torch.empty(6, 4, device="meta"))
    base = Adam([{"params": full}, {"params": [*half, *other, meta]}], update=update)
    check_moves(base, [*full, *half, meta])
    assert shapes == [(shape, dtype) for dtype in (torch.float32, torch.bfloat16) for shape in (SMALL, LARGE)]


def test_shadow_steps_from_where_it_is_told() -> None:
    params = weights()
    base = torch.optim.SGD(params, lr=0.5, momentum=0.5)
    value, state = stepped(base, base.param_groups[0], torch.full((2, 3), 4.0), torch.ones(2, 3), steps=2)
    assert torch.equal(value, torch.full((2, 3), 4.0 - 0.5 - 0.75))
    assert torch.equal(state["momentum_buffer"], torch.full((2, 3), 1.5))
    assert probe_state(base, base.param_groups[0], (2, 3), params[0]) == 24


# -- 8-bit moments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*BNB_8BIT, "PagedAdamW8bit"])
def test_8_bit_optimizers_of_bitsandbytes_keep_8_bits(name: str, dtype: torch.dtype) -> None:
    params = weights(dtype)
    check_moment_bits(of_bitsandbytes(name, params), params)


@pytest.mark.parametrize("name", AO)
def test_optimizers_of_torchao_keep_8_bits_or_less(name: str) -> None:
    torchao = pytest.importorskip("torchao.optim")
    params = weights()
    check_moment_bits(getattr(torchao, name)(params), params)


def test_optimizers_without_moments_of_that_size_have_nothing_to_shrink() -> None:
    params = weights()
    check_moment_bits(torch.optim.SGD(params, lr=0.1), params)
    check_moment_bits(torch.optim.Adafactor(params), params)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: torch.optim.AdamW(p), r"base=AdamW: .*'exp_avg' takes 4\.0 bytes.*bitsandbytes\.optim\.AdamW8bit\("),
        (lambda p: torch.optim.AdamW(p), r"with the same arguments \('adamw8bit' where .* set moment_storage='base'"),
        (lambda p: torch.optim.Adam(p), r"bitsandbytes\.optim\.Adam8bit\("),
        (lambda p: torch.optim.SGD(p, momentum=0.9), r"'momentum_buffer' takes 4\.0 .*bitsandbytes\.optim\.SGD8bit\("),
        (lambda p: torch.optim.RMSprop(p), r"bitsandbytes\.optim\.RMSprop8bit\("),
        (lambda p: torch.optim.Adagrad(p), r"'sum' takes .*bitsandbytes\.optim\.Adagrad8bit\("),
        (lambda p: torch.optim.Muon(p), r"No 8-bit form of it is known: wrap bitsandbytes\.optim\.AdamW8bit"),
        (lambda p: of_bitsandbytes("Lion", p), r"base=Lion: .*'state1' takes 4\.0 .*bitsandbytes\.optim\.Lion8bit\("),
    ],
)
def test_wider_moments_are_refused_where_8_bits_were_asked_for(build: Any, message: str) -> None:
    params = weights()
    with pytest.raises(ValueError, match=r"moment_storage='8bit' with base=.*") as caught:
        check_moment_bits(build(params), params)
    assert caught.match(message)


def test_half_precision_moments_are_too_wide() -> None:
    params = weights(torch.bfloat16)
    with pytest.raises(ValueError, match=r"'exp_avg' takes 2\.0 bytes an entry"):
        check_moment_bits(torch.optim.AdamW(params), params)


# -- through the optimizer ---------------------------------------------------------------------------------------------


def test_wrapping_an_optimizer_that_does_not_move_is_refused() -> None:
    model = Matrices((12, 8))
    with pytest.raises(ValueError, match=r"base=Adam .*fails its self-check"):
        GaLoreOptimizer(Adam(model.parameters(), update=torch.zeros_like), model, rank=2)


def test_wrapping_wide_moments_with_8_bit_storage_is_refused() -> None:
    model = Matrices((12, 8))
    with pytest.raises(ValueError, match=r"moment_storage='8bit' with base=AdamW: .*AdamW8bit"):
        GaLoreOptimizer(torch.optim.AdamW(model.parameters()), model, rank=2, moment_storage="8bit")
    base = of_bitsandbytes("AdamW8bit", model.parameters())
    GaLoreOptimizer(base, model, rank=2, moment_storage="8bit")
