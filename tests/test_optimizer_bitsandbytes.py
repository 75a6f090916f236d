# SPDX-License-Identifier: Apache-2.0
"""bitsandbytes' 8-bit, 32-bit and paged optimizers, on the CPU and where there is one on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_galore import GaLoreOptimizer, base_rules, base_state, storage
from lightning_galore.state_keys import BASIS, is_ours
from tests.helpers import (
    Matrices,
    TinyTransformer,
    assert_proxies_pass_for_parameters,
    assert_trains_every_parameter,
    max_difference,
    train,
)

bnb = pytest.importorskip("bitsandbytes")

BASES: dict[str, dict[str, Any]] = {
    "AdamW8bit": {},
    "Adam8bit": {},
    "Lion8bit": {},
    "AdamW": {},
    "Adam": {},
    "Lion": {},
    "SGD8bit": {"momentum": 0.9},
    "RMSprop8bit": {},
    "Adagrad8bit": {},
    "PagedAdamW8bit": {},
}
ADAPTIVE_8BIT = ["AdamW8bit", "Lion8bit", "RMSprop8bit"]
# On the CPU, "paged" is ordinary memory.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
LR = 2.0**-7
NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def give_gradients(model: Matrices, step: int) -> None:
    """Gradients that depend on nothing but ``step``, on whatever device."""
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight)


def build(name: str, params: Any, **settings: Any) -> Any:
    return getattr(bnb.optim, name)(params, **{"lr": LR, "weight_decay": 0.0, **BASES[name], **settings})


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("low_entries", ["fewer than 4096", "more than 4096"])
def test_every_weight_moves_at_every_step(name: str, low_entries: str, device: str) -> None:
    """galore-torch gave no update at all to weights that bitsandbytes keeps in 32-bit state, those of few entries."""
    rank = 4 if low_entries == "fewer than 4096" else 48
    model = Matrices((128, 96), (96, 128)).to(device)
    # Not staggered: unit vectors, which stand in until the first refresh, move a few columns only.
    optimizer = GaLoreOptimizer(build(name, model.parameters()), model, rank=rank, update_proj_gap=2, stagger=False)
    for step in range(4):
        before = [weight.detach().clone() for weight in model.parameters()]
        give_gradients(model, step)
        optimizer.step()
        for weight, old in zip(model.parameters(), before, strict=True):
            assert bool(torch.isfinite(weight).all())
            assert float((weight != old).float().mean()) > 0.9
    kept = {optimizer.state[weight]["state1"].dtype for weight in model.parameters()}
    assert kept == {torch.uint8 if "8bit" in name and rank == 48 else torch.float32}


@pytest.mark.parametrize("name", BASES)
def test_trains_a_transformer(name: str) -> None:
    assert_trains_every_parameter(lambda params: build(name, params, lr=3e-3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_equals_the_same_optimizer_over_persistent_low_rank_parameters(
    name: str, dtype: torch.dtype, device: str
) -> None:
    model = Matrices((128, 96), (96, 128), dtype=dtype).to(device)
    assert_proxies_pass_for_parameters(
        model, lambda params: build(name, params), lambda step: give_gradients(model, step)
    )


def probe(name: str) -> Tensor:
    """A weight of one that had a zero gradient, with weight decay."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = build(name, [weight], weight_decay=0.25)
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", BASES)
def test_kind_of_decay_is_what_a_probe_sees(name: str) -> None:
    expected = (1 - LR * 0.25) ** 2
    shrunk = bool(((probe(name) - expected).abs() < 1e-6).all())
    base = build(name, [torch.nn.Parameter(torch.ones(4, 4))], weight_decay=0.25)
    assert base_rules.decay_kind(base, base.param_groups[0]) == ("decoupled" if shrunk else "coupled")


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "SGD8bit", "RMSprop8bit"])
def test_decay_reaches_projected_weights(name: str) -> None:
    """Outside the subspace a weight does nothing but decay, and with a penalty not even that."""
    model = Matrices((6, 4))
    (weight,) = model.parameters()
    start = weight.detach().clone()
    base = build(name, [weight], weight_decay=0.25)
    optimizer = GaLoreOptimizer(base, model, rank=1, subspace="svd")
    weight.grad = torch.zeros_like(weight)
    weight.grad[2, 1] = 1.0
    optimizer.step()
    decoupled = base_rules.decay_kind(base, base.param_groups[0]) == "decoupled"
    factor = 1 - LR * 0.25 if decoupled else 1.0
    torch.testing.assert_close(weight[:, [0, 2, 3]], start[:, [0, 2, 3]] * factor)
    assert bool((weight[:2, 1] != start[:2, 1]).all())


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW", "Lion8bit", "PagedAdamW8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_the_unbroken_one(name: str, dtype: torch.dtype, tmp_path: Any, device: str) -> None:
    def start() -> tuple[Matrices, GaLoreOptimizer]:
        model = Matrices((128, 96), (96, 128), dtype=dtype).to(device)
        base = build(name, model.parameters(), weight_decay=0.25)
        return model, GaLoreOptimizer(base, model, rank=48, update_proj_gap=3, basis_storage="fp32")

    def run(model: Matrices, optimizer: GaLoreOptimizer, steps: range) -> None:
        for step in steps:
            give_gradients(model, step)
            optimizer.step()

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
        dtypes = {key: value.dtype for key, value in resumed.state[weight].items() if isinstance(value, Tensor)}
        assert dtypes == {k: v.dtype for k, v in optimizer.state[old].items() if isinstance(v, Tensor)}
        assert dtypes[BASIS] == torch.float32
        assert dtypes["state1"] == (torch.uint8 if "8bit" in name else torch.float32)
    run(second, resumed, range(5, 10))
    assert max_difference(second.parameters(), whole.parameters()) == 0.0


@pytest.mark.parametrize("name", BASES)
def test_planned_bytes_are_those_held(name: str) -> None:
    model = Matrices((128, 96), (96, 128))
    optimizer = GaLoreOptimizer(build(name, model.parameters()), model, rank=48)
    planned = {row.name: row.state_bytes for row in optimizer.targets_table().taken}
    assert not optimizer.state
    model.give_gradients(0)
    optimizer.step()
    held = {optimizer.targets[weight].name: storage.nbytes(optimizer.state[weight]) for weight in model.parameters()}
    assert planned == held
    own = [v for k, v in optimizer.state[model.layers[0].weight].items() if not is_ours(k) and isinstance(v, Tensor)]
    assert all(value.numel() <= 128 * 48 for value in own)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: elsewhere nothing is paged")
@pytest.mark.parametrize("name", ["PagedAdamW8bit", "PagedAdamW"])
def test_paged_state_is_paged_and_does_not_pile_up(name: str) -> None:
    """From 100,000 entries on bitsandbytes pages a buffer, and it never frees one."""
    model = Matrices((1024, 512)).to("cuda")
    base = build(name, model.parameters())
    pages = len(base.page_mng.paged_tensors)
    optimizer = GaLoreOptimizer(base, model, rank=256, update_proj_gap=2, stagger=False)
    (weight,) = model.parameters()
    planned = optimizer.targets_table().taken[0].state_bytes
    for step in range(5):
        before = weight.detach().clone()
        give_gradients(model, step)
        optimizer.step()
        assert bool(torch.isfinite(weight).all())
        assert float((weight != before).float().mean()) > 0.9
        assert base_state.is_paged(optimizer.state[weight]["state1"])
    assert len(base.page_mng.paged_tensors) == pages + 2
    assert storage.nbytes(optimizer.state[weight]) == planned


def test_settings_of_one_parameter_are_found_by_position() -> None:
    """Parameters without a gradient, projected or not, do not shift those behind them."""
    model = TinyTransformer()
    bare = TinyTransformer()
    for one in (model, bare):
        one.embedding.weight.requires_grad_(False)
        one.blocks[0].query.weight.requires_grad_(False)  # type: ignore[union-attr]
    manager = bnb.optim.GlobalOptimManager.get_instance()
    index = [id(p) for p in model.parameters()].index(id(model.lm_head.weight))
    manager.index2config[(0, index)] = {"lr": 0.5}
    try:
        optimizer = GaLoreOptimizer(build("AdamW", model.parameters()), model, rank=4)
        train(model, optimizer, range(1))
        train(bare, build("AdamW", bare.parameters()), range(1))
    finally:
        del manager.index2config[(0, index)]
    assert max_difference([model.lm_head.weight], [bare.lm_head.weight]) == 0.0
    assert max_difference([model.lm_head.bias], [bare.lm_head.bias]) == 0.0


def test_weight_that_sits_a_step_out_keeps_its_place() -> None:
    model, bare = TinyTransformer(), TinyTransformer()
    manager = bnb.optim.GlobalOptimManager.get_instance()
    index = [id(p) for p in model.parameters()].index(id(model.lm_head.weight))
    manager.index2config[(0, index)] = {"lr": 0.5}
    try:
        optimizer = GaLoreOptimizer(build("AdamW", model.parameters()), model, rank=4, stagger=False)
        query = model.blocks[0].query.weight  # type: ignore[union-attr]
        before = query.detach().clone()
        train(model, optimizer, range(1), before_step=lambda step: query.grad.fill_(float("nan")))  # type: ignore[union-attr]
        train(bare, build("AdamW", bare.parameters()), range(1))
    finally:
        del manager.index2config[(0, index)]
    assert torch.equal(query, before)
    assert max_difference([model.lm_head.weight], [bare.lm_head.weight]) == 0.0
    assert max_difference([model.lm_head.bias], [bare.lm_head.bias]) == 0.0
