# SPDX-License-Identifier: Apache-2.0
"""torchao's optimizers with states in 8 bits, 4 bits and float8: tensor classes that decode themselves.

They compile their step for each shape, which takes seconds; here it runs uncompiled but where that is what is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer, base_rules, storage
from lightning_galore.state_keys import BASIS, is_ours
from tests.helpers import (
    Matrices,
    TinyTransformer,
    assert_proxies_pass_for_parameters,
    assert_trains_every_parameter,
    max_difference,
    quadratic_loss,
    same_bits,
    train,
)

ao = pytest.importorskip("torchao.optim")

# Name: bytes of state for each low-rank entry, two moments together.
BASES: dict[str, float] = {
    "AdamW8bit": 2.0,
    "AdamW4bit": 1.0,
    "AdamWFp8": 2.0,
    "Adam8bit": 2.0,
    "Adam4bit": 1.0,
    "AdamFp8": 2.0,
}
ADAMW = ["AdamW8bit", "AdamW4bit", "AdamWFp8"]
SHAPES = ((128, 96), (96, 128))
LR = 2.0**-7


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def build(name: str, params: Any, **settings: Any) -> Any:
    return getattr(ao, name)(params, **{"lr": LR, "weight_decay": 0.0, **settings})


def run(model: Matrices, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.give_gradients(step)
        optimizer.step()


def is_class(value: Tensor) -> bool:
    return type(value).__name__.startswith("OptimState")


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rank", [4, 33, 48])
def test_every_weight_moves_at_every_step(name: str, rank: int) -> None:
    """Small states stay plain, and so do those that the blocks do not divide (128 x 33)."""
    model = Matrices(*SHAPES)
    optimizer = GaLoreOptimizer(build(name, model.parameters()), model, rank=rank, update_proj_gap=2, stagger=False)
    for step in range(5):
        before = [weight.detach().clone() for weight in model.parameters()]
        run(model, optimizer, range(step, step + 1))
        for weight, old in zip(model.parameters(), before, strict=True):
            assert bool(torch.isfinite(weight).all())
            assert float((weight != old).float().mean()) > 0.9
    whole_blocks = rank == 48 or (rank == 33 and "4bit" in name)  # of 128 there, not 256
    for weight in model.parameters():
        assert is_class(optimizer.state[weight]["exp_avg"]) is whole_blocks


@pytest.mark.parametrize("name", BASES)
def test_trains_a_transformer(name: str) -> None:
    assert_trains_every_parameter(lambda params: build(name, params, lr=3e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [None, 512, 640])
@pytest.mark.parametrize("name", BASES)
def test_equals_the_same_optimizer_over_persistent_low_rank_parameters(
    name: str, block_size: int | None, dtype: torch.dtype
) -> None:
    """6,144 entries are whole blocks of the defaults and of 512, and none of 640."""
    options: dict[str, Any] = {} if block_size is None else {"block_size": block_size}
    model = Matrices(*SHAPES, dtype=dtype)
    assert_proxies_pass_for_parameters(model, lambda params: build(name, params, **options), model.give_gradients)


@pytest.mark.parametrize("name", BASES)
def test_kind_of_decay_is_what_a_probe_sees(name: str) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    base = build(name, [weight], weight_decay=0.25)
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        base.step()
    shrunk = bool(((weight - (1 - LR * 0.25) ** 2).abs() < 1e-6).all())
    assert base_rules.decay_kind(base, base.param_groups[0]) == ("decoupled" if shrunk else "coupled")
    assert shrunk is name.startswith("AdamW")


@pytest.mark.parametrize("name", ["AdamW8bit", "Adam8bit"])
def test_decay_reaches_projected_weights(name: str) -> None:
    """Outside the subspace a weight does nothing but decay, and with a penalty not even that."""
    model = Matrices((6, 4))
    (weight,) = model.parameters()
    start = weight.detach().clone()
    optimizer = GaLoreOptimizer(build(name, [weight], weight_decay=0.25), model, rank=1, subspace="svd")
    weight.grad = torch.zeros_like(weight)
    weight.grad[2, 1] = 1.0
    optimizer.step()
    factor = 1 - LR * 0.25 if name == "AdamW8bit" else 1.0
    torch.testing.assert_close(weight[:, [0, 2, 3]], start[:, [0, 2, 3]] * factor)
    assert bool((weight[:2, 1] != start[:2, 1]).all())


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_the_unbroken_one(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """Its tensor classes are registered as safe to load when torchao is imported."""

    def start() -> tuple[Matrices, GaLoreOptimizer]:
        model = Matrices(*SHAPES, dtype=dtype)
        base = build(name, model.parameters(), weight_decay=0.25)
        return model, GaLoreOptimizer(base, model, rank=48, update_proj_gap=3, basis_storage="fp32")

    whole, optimizer = start()
    run(whole, optimizer, range(10))
    first, optimizer = start()
    run(first, optimizer, range(5))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second, resumed = start()
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for weight, old in zip(second.parameters(), first.parameters(), strict=True):
        mine, its = resumed.state[weight], optimizer.state[old]
        for key in ("exp_avg", "exp_avg_sq"):
            assert type(mine[key]) is type(its[key])
            assert is_class(mine[key])
            assert (mine[key].dtype, mine[key].block_size) == (its[key].dtype, its[key].block_size)
            assert torch.equal(mine[key].codes, its[key].codes)
            assert torch.equal(mine[key].scale, its[key].scale)
        assert mine[BASIS].dtype == torch.float32
    run(second, resumed, range(5, 10))
    assert max_difference(second.parameters(), whole.parameters()) == 0.0


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("rank", [33, 48])
def test_planned_bytes_are_those_held(name: str, rank: int) -> None:
    model = Matrices(*SHAPES)
    optimizer = GaLoreOptimizer(build(name, model.parameters()), model, rank=rank)
    planned = {row.name: row.state_bytes for row in optimizer.targets_table().taken}
    assert not optimizer.state
    run(model, optimizer, range(1))
    held = {optimizer.targets[weight].name: storage.nbytes(optimizer.state[weight]) for weight in model.parameters()}
    assert planned == held


@pytest.mark.parametrize("name", BASES)
def test_bytes_are_those_of_the_codes(name: str) -> None:
    """Not those of the dtype that the tensor class says it has."""
    model = Matrices((1024, 256))
    optimizer = GaLoreOptimizer(build(name, model.parameters()), model, rank=128)
    run(model, optimizer, range(1))
    (weight,) = model.parameters()
    own = {key: value for key, value in optimizer.state[weight].items() if not is_ours(key)}
    entries = 1024 * 128
    codes_and_scales = entries * BASES[name] + 2 * 4 * entries / (128 if "4bit" in name else 256)
    assert codes_and_scales <= storage.nbytes(own) <= codes_and_scales + 4096  # tables of 256 values, and the step


@pytest.mark.parametrize("name", ADAMW)
@pytest.mark.parametrize("mode", ["project", "layerwise"])
def test_modes_give_the_same_weights(name: str, mode: str) -> None:
    def trained(mode: str) -> tuple[nn.Module, GaLoreOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(96, 128, bias=False), nn.Tanh(), nn.Linear(128, 96))
        base = build(name, model.parameters(), weight_decay=0.25)
        optimizer = GaLoreOptimizer(base, model, rank=48, update_proj_gap=2, mode=mode)
        for step in range(5):
            optimizer.zero_grad()
            inputs = torch.randn(16, 96, generator=torch.Generator().manual_seed(step))
            model(inputs).square().sum().backward()
            optimizer.step()
        return model, optimizer

    (plain, reference), (model, optimizer) = trained("step"), trained(mode)
    assert same_bits(model.parameters(), plain.parameters())
    assert is_class(optimizer.state[model[0].weight]["exp_avg"])  # type: ignore[index]
    assert len(optimizer.targets) == len(reference.targets) == 2


@pytest.mark.parametrize("name", ADAMW)
@pytest.mark.parametrize("moments", ["keep", "rotate_first", "rotate", "reset"])
def test_moments_pass_refreshes(name: str, moments: str) -> None:
    """The loss falls about as far as with AdamW's plain states, and the states stay what they are."""

    def trained(base: Any, model: Matrices) -> tuple[float, GaLoreOptimizer]:
        optimizer = GaLoreOptimizer(base, model, rank=48, update_proj_gap=3, moments=moments, scale=1.0)
        losses = []
        for _ in range(24):
            optimizer.zero_grad()
            loss = quadratic_loss(model.parameters())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses[0] - losses[-1], optimizer

    model, other = Matrices(*SHAPES), Matrices(*SHAPES)
    drop, optimizer = trained(build(name, model.parameters(), lr=2e-2), model)
    plain, _ = trained(torch.optim.AdamW(other.parameters(), lr=2e-2, weight_decay=0.0), other)
    assert plain > 0
    assert drop == pytest.approx(plain, rel=0.4 if "4bit" in name else 0.1)
    for weight in model.parameters():
        assert is_class(optimizer.state[weight]["exp_avg"])
        assert is_class(optimizer.state[weight]["exp_avg_sq"])


def test_learning_rate_that_is_a_tensor_follows_its_schedule() -> None:
    """A number is refused by torchao: so neither a scheduler nor the factor for the other weights may put one there."""
    model = TinyTransformer()
    optimizer = GaLoreOptimizer(build("AdamW8bit", model.parameters()), model, rank=4, dense_lr_factor=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)
    before = [param.detach().clone() for param in model.parameters()]
    train(model, optimizer, range(1))
    assert same_bits(model.parameters(), before)
    schedule.step()
    train(model, optimizer, range(1))
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor)
    assert float(optimizer.param_groups[0]["lr"]) == LR / 2
    assert all(not torch.equal(param, old) for param, old in zip(model.parameters(), before, strict=True))


def test_proxies_compile_once_for_each_shape() -> None:
    """Each step brings new tensors; their shapes are what the compiled step looks at."""
    counters = torch._dynamo.utils.counters
    model = Matrices(*SHAPES)
    optimizer = GaLoreOptimizer(build("AdamW8bit", model.parameters()), model, rank=48, update_proj_gap=2)
    torch._dynamo.reset()
    with torch.compiler.set_stance("default", force_backend="eager"):
        run(model, optimizer, range(1))
        first = counters["stats"]["unique_graphs"]
        run(model, optimizer, range(1, 6))
    assert first >= 2  # one of each shape
    assert counters["stats"]["unique_graphs"] == first
