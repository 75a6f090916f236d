# SPDX-License-Identifier: Apache-2.0
"""Linear layers that make low-rank gradients themselves: the same weights, and no full gradient at any time."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_galore import GaLoreOptimizer
from tests.helpers import max_difference

from .common import BACKWARD_MODES, run
from .tracker import LiveBytes

WIDE = 64


class Net(nn.Module):
    """Tall, square and wide weights; the square one may be used twice, or in a part that is computed again."""

    def __init__(self, *, twice: bool = False, recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(24, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, 16, bias=False)
        self.twice, self.recompute = twice, recompute

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        reentrant = self.recompute == "reentrant"
        return self.last(checkpoint(self.inner, x, use_reentrant=reentrant) if self.recompute else self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        x = self.middle(x).tanh()
        return self.middle(x).tanh() if self.twice else x


def train(
    mode: str,
    *,
    fused: bool,
    dtype: torch.dtype = torch.float64,
    accumulate: int = 1,
    steps: int = 50,
    autocast: bool = False,
    compiled: bool = False,
    net: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Net, GaLoreOptimizer, list[float]]:
    """Steps on data of their own; refreshes are staggered over a gap of ten."""
    model = Net(**(net or {})).to(dtype)
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    chosen = {"rank": 4, "update_proj_gap": 10, "scale": 1.0, "target_modules": [nn.Linear], **settings}
    optimizer = GaLoreOptimizer(base, model, mode=mode, fused_backward=fused, **chosen)
    network = torch.compile(model, backend="aot_eager") if compiled else model
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            x = torch.randn(4, 6, 24, generator=generator).to(dtype)
            with optimizer.accumulate() if micro < accumulate - 1 else nullcontext():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    output = network(x)
                loss = nn.functional.mse_loss(output.to(dtype), x[..., :16].sin()) / accumulate
                loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return model, optimizer, losses


def difference(mode: str, **settings: Any) -> float:
    """Largest difference of weights between a run with fused layers and one without."""
    fused, ordinary = (train(mode, fused=fused, **settings)[0] for fused in (True, False))
    moved = max_difference(ordinary.parameters(), Net(**(settings.get("net") or {})).parameters())
    assert moved > 0.01
    return max_difference(fused.parameters(), ordinary.parameters())


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"proj_type": "full"},
        {"proj_type": "reverse_std"},
        {"proj_type": "right"},
        {"rank": 1},
        {"moments": "keep", "stagger": False},
        {"rank_rule": "energy", "rank_energy": 0.7},
        {"schedule": "energy", "min_gap": 2, "refresh_below": 0.95},
        {"clip_weight_norm": 100.0},
    ],
    ids=str,
)
def test_weights_are_those_of_the_ordinary_path(mode: str, accumulate: int, settings: dict[str, Any]) -> None:
    assert difference(mode, accumulate=accumulate, **settings) <= 1e-12


DRAWN = {"subspace": "random_orthonormal", "moments": "keep"}


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("proj_type", ["std", "full"])
@pytest.mark.parametrize("kept", ["param", "bf16", "int8", "int4", "seed"])
def test_however_bases_are_kept(kept: str, proj_type: str, mode: str) -> None:
    settings: dict[str, Any] = {"basis_storage": kept, "proj_type": proj_type, "steps": 25}
    assert difference(mode, **settings, **(DRAWN if kept == "seed" else {})) <= 1e-12


@pytest.mark.parametrize("subspace", ["svd", "random_orthonormal", "gaussian"])
def test_only_what_is_kept_tells_one_refresh_from_the_next(subspace: str) -> None:
    kept = {"svd": "int4", "gaussian": "seed"}.get(subspace, "param")
    _, optimizer, _ = train("project", fused=True, steps=12, subspace=subspace, basis_storage=kept, stagger=False)
    before = {param: optimizer.coordinates(param).stored for param in optimizer.targets}
    assert all(optimizer.coordinates(param).stored.is_same(bases) for param, bases in before.items())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    drawn = kept == "seed"  # a number is the same wherever it was read
    assert all(optimizer.coordinates(param).stored.is_same(bases) is drawn for param, bases in before.items())
    first, second = list(before.values())[:2]
    assert not first.is_same(second)


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("kept", ["int8", "seed"])
def test_decoded_bases_are_held_of_no_layer(kept: str, mode: str) -> None:
    """Nothing but inputs, or what is left of them, waits for backward."""
    settings: dict[str, Any] = {"basis_storage": kept, "update_proj_gap": 1000, "stagger": False}
    model, optimizer, _ = train(mode, fused=True, steps=2, **settings, **(DRAWN if kept == "seed" else {}))
    x = torch.randn(3, WIDE, dtype=torch.float64)
    with LiveBytes() as tracker:
        output = model.last(x)  # wide: projected on the left
    assert tracker.current == output.untyped_storage().nbytes()


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_in_fp32_sums_round_elsewhere(mode: str, accumulate: int) -> None:
    assert difference(mode, accumulate=accumulate, dtype=torch.float32) <= 1e-5


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize(
    "net", [{"twice": True}, {"recompute": "other"}, {"twice": True, "recompute": "other"}], ids=str
)
def test_a_weight_used_twice_and_activation_checkpointing(mode: str, net: dict[str, Any]) -> None:
    assert difference(mode, net=net) <= 1e-10


def test_reentrant_checkpointing_in_mode_project() -> None:
    assert difference("project", net={"recompute": "reentrant"}) <= 1e-10


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, at graph breaks
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_torch_compile(mode: str) -> None:
    assert difference(mode, compiled=True, steps=25) <= 1e-10


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("how", [{"autocast": True, "dtype": torch.float32}, {"dtype": torch.bfloat16}], ids=str)
def test_half_precision_learns_alike(mode: str, how: dict[str, Any]) -> None:
    (_, _, fused), (_, _, ordinary) = (train(mode, fused=fused, **how) for fused in (True, False))
    assert abs(fused[-1] - ordinary[-1]) <= 0.02 * ordinary[-1]
    assert fused[-1] < 0.9 * fused[0]


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_int8_weights(mode: str) -> None:
    settings: dict[str, Any] = {"weight_storage": "int8", "dtype": torch.float32, "stochastic_round": False}
    (_, _, fused), (_, _, ordinary) = (train(mode, fused=fused, **settings) for fused in (True, False))
    assert abs(fused[-1] - ordinary[-1]) <= 0.05 * ordinary[-1]


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_no_full_gradient_is_ever_there_between_refreshes(mode: str) -> None:
    settings: dict[str, Any] = {"update_proj_gap": 1000, "stagger": False, "dtype": torch.float32}
    full = WIDE * WIDE * 4
    for fused in (True, False):
        model, optimizer, _ = train(mode, fused=fused, steps=2, **settings)
        inputs = torch.randn(2, 24)  # activations are small beside a weight
        optimizer.zero_grad()
        with LiveBytes() as tracker:
            model(inputs).square().mean().backward()
        assert (tracker.largest < full) is fused
        optimizer.step()


def kept_entries(fused: bool) -> int:
    """Entries of the largest tensor that a layer of 512 tokens keeps for backward."""
    settings: dict[str, Any] = {"proj_type": "right", "update_proj_gap": 1000, "stagger": False}
    model, optimizer, _ = train("project", fused=fused, steps=2, **settings)
    assert optimizer.targets
    sizes: list[int] = []

    def pack(one: Tensor) -> Tensor:
        sizes.append(one.numel())
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        model.middle(torch.randn(512, WIDE, dtype=torch.float64))
    return max(sizes)


def test_only_the_projected_input_is_kept_on_the_right() -> None:
    assert kept_entries(fused=True) == 512 * 4
    assert kept_entries(fused=False) == 512 * WIDE


def test_a_copy_is_a_module_of_its_own_and_pickles() -> None:
    model, optimizer, _ = train("project", fused=True, steps=3)
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = model(x)
    copied = copy.deepcopy(model)
    assert list(copied.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(copied(x), expected)
    with torch.no_grad():
        copied.first.weight.zero_()
    assert not torch.equal(copied(x), expected)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    optimizer.detach()
    assert all("forward" not in vars(module) for module in model.modules())
    torch.testing.assert_close(model(x), expected)


def is_fused(model: nn.Module, optimizer: GaLoreOptimizer) -> bool:
    """Whether no weight of the optimizer has had a full gradient in a step between refreshes."""
    optimizer.zero_grad()
    model(torch.randn(5, 24, dtype=torch.float64)).square().sum().backward()
    return not any(optimizer.hooks.norms.is_exact(param) for param in optimizer.targets)


@pytest.mark.parametrize("how", ["copied", "pickled", "the next optimizer", "the next optimizer, copied"])
def test_layers_that_were_fused_before_are_fused_again(how: str) -> None:
    settings: dict[str, Any] = {"rank": 4, "mode": "project", "fused_backward": True, "stagger": False}
    model, optimizer, _ = train("project", fused=True, steps=3)
    if how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    elif "copied" in how:
        model = copy.deepcopy(model)
    for _ in range(2 if "next" in how else 1):  # while there is the last one, as in a notebook
        optimizer = GaLoreOptimizer(torch.optim.AdamW(model.parameters()), model, **settings)
        optimizer.zero_grad()
        model(torch.randn(5, 24, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert is_fused(model, optimizer)
    optimizer.detach()
    assert all("forward" not in vars(module) for module in model.modules())


def test_layers_do_not_keep_an_optimizer_alive() -> None:
    model, optimizer, _ = train("project", fused=True, steps=2)
    alive = weakref.ref(optimizer.hooks)
    del optimizer
    gc.collect()
    assert alive() is None
    model(torch.randn(2, 24, dtype=torch.float64)).sum().backward()
    assert model.first.weight.grad is not None


def test_a_weight_used_outside_its_layer_counts_whole() -> None:
    class Outside(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + nn.functional.linear(x[..., :16], self.middle.weight[:16, :16])

    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Outside().double()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = GaLoreOptimizer(
            base, model, rank=4, scale=1.0, mode="project", fused_backward=fused, target_modules=[nn.Linear]
        )
        for step in range(12):
            x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        weights.append([param.detach().clone() for param in model.parameters()])
    assert max_difference(*weights) <= 1e-10


def test_a_backward_after_a_refresh_is_refused() -> None:
    model = nn.Linear(24, WIDE)  # its input needs no gradient, so that autograd does not miss the weight
    base = torch.optim.AdamW(model.parameters())
    settings: dict[str, Any] = {"rank": 4, "mode": "project", "update_proj_gap": 2, "stagger": False}
    optimizer = GaLoreOptimizer(base, model, fused_backward=True, target_modules=[nn.Linear], **settings)
    x = torch.randn(4, 24)
    for step in range(3):
        optimizer.zero_grad()
        if step == 1:
            late = model(x).square().mean()
        model(x).square().mean().backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"refreshed between a forward pass and its backward.*fused_backward=False"):
        late.backward()


def test_what_cannot_be_is_refused() -> None:
    model = Net()
    base = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"fused_backward=True with mode='step'.*mode='project'"):
        GaLoreOptimizer(base, model, rank=4, fused_backward=True)
    clip = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    with pytest.raises(MisconfigurationException, match="fused_backward=True: full gradients"):
        run("layerwise", settings={"fused_backward": True}, max_epochs=1, **clip)


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_through_the_trainer(mode: str, trainer: dict[str, Any]) -> None:
    fused, _ = run(mode, settings={"fused_backward": True}, **trainer)
    ordinary, _ = run(mode, **trainer)
    limit = 0.02 if trainer.get("precision") else 1e-5
    assert max_difference(fused.parameters(), ordinary.parameters()) <= limit
    assert all("forward" not in vars(module) for module in fused.modules()), "teardown gives forward back"


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_resumes_bit_for_bit(mode: str, tmp_path: Any) -> None:
    settings = {"fused_backward": True}
    whole, trainer = run(mode, settings=settings)
    _, half = run(mode, settings=settings, max_epochs=2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(mode, settings=settings, ckpt_path=str(tmp_path / "half.ckpt"))
    assert trainer.global_step == 24
    assert max_difference(whole.parameters(), resumed.parameters()) == 0
