# SPDX-License-Identifier: Apache-2.0
"""Linear layers that make low-rank gradients themselves: what they keep, odd uses of them, the norms, a GradScaler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_galore import GaLoreConfig, GaLoreOptimizer
from tests.helpers import max_difference

from .common import BACKWARD_MODES, run
from .test_fused import WIDE, Net, train
from .test_scaler import OVERFLOWS, Overflowing, mixed, plain_loop
from .tracker import LiveBytes

COMPRESSED: dict[str, Any] = {"mode": "project", "fused_backward": True, "compress_activations": True}


# -- what is kept for backward -----------------------------------------------------------------------------------------


def test_compressed_inputs_are_the_right_side_everywhere() -> None:
    def settings(**more: Any) -> dict[str, Any]:
        return {"fused": True, "steps": 12, **more}

    compressed, optimizer, _ = train("project", **settings(compress_activations=True))
    right, _, _ = train("project", **settings(proj_type="right"))
    std, _, _ = train("project", **settings())
    assert max_difference(compressed.parameters(), right.parameters()) == 0
    assert max_difference(compressed.parameters(), std.parameters()) > 1e-3
    assert {target.projection.side for target in optimizer.targets.values()} == {"right"}
    said = [line for line in str(optimizer.targets_table()).splitlines() if "compress_activations" in line]
    assert len(said) == 1, "a side that is not that of proj_type is said"
    assert said[0].startswith("last.weight")


@pytest.mark.parametrize(
    ("proj_type", "sides"), [("std", {"right"}), ("right", {"right"}), ("full", {"full"})], ids=str
)
def test_compressed_inputs_with_each_side(proj_type: Any, sides: set[str]) -> None:
    _, optimizer, _ = train("layerwise", fused=True, steps=2, proj_type=proj_type, compress_activations=True)
    assert {target.projection.side for target in optimizer.targets.values()} == sides


def test_only_linear_layers_change_their_side() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 16))

    model = nn.Sequential(Wide(), nn.Linear(16, 4))
    optimizer = GaLoreOptimizer(torch.optim.SGD(model.parameters()), model, rank=2, target_modules=r"\d", **COMPRESSED)
    assert [target.projection.side for target in optimizer.targets.values()] == ["left", "right"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "project"}, r"compress_activations=True with fused_backward=False.*Set fused_backward=True"),
        ({**COMPRESSED, "proj_type": "left"}, r"compress_activations=True with proj_type='left'.*'std'.*'right'"),
        ({**COMPRESSED, "proj_type": "reverse_std"}, r"with proj_type='reverse_std'"),
        ({**COMPRESSED, "mode": "step"}, r"fused_backward=True with mode='step'"),
    ],
    ids=str,
)
def test_compressed_inputs_are_refused_where_whole_ones_are_needed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreConfig(**{"compress_activations": True, **settings})


class Attention(nn.Module):
    """Three layers with one input, which nothing else keeps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDE, WIDE, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(512, WIDE).contiguous()  # stands for a norm's output
        return self.q(x) + self.k(x) + self.v(x)


@pytest.mark.parametrize("fused", [True, False])
def test_an_input_that_several_layers_share_is_released(fused: bool) -> None:
    model = Attention()
    base = torch.optim.AdamW(model.parameters())
    settings = {"rank": 4, "update_proj_gap": 1000, "stagger": False, "mode": "project", "fused_backward": fused}
    optimizer = GaLoreOptimizer(base, model, target_modules=[nn.Linear], **settings)
    x = torch.randn(1, WIDE, requires_grad=True)
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with LiveBytes() as tracker:
        output = model(x)
    whole, low = 4 * 512 * WIDE, 4 * 512 * 4
    leaves = 3 * 4  # what stands for the weights in the graph, an entry each
    assert tracker.current == output.untyped_storage().nbytes() + (3 * low + leaves if fused else whole)


def test_weights_without_a_basis_are_fused_from_the_first_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(8)))
    base = torch.optim.AdamW(model.parameters())
    optimizer = GaLoreOptimizer(
        base, model, rank=4, mode="project", fused_backward=True, update_proj_gap=8, refresh_share=0.01
    )
    due = {param for param in optimizer.targets if optimizer.is_due(param)}
    assert len(due) < len(optimizer.targets) == 8
    model(torch.randn(2, WIDE)).square().mean().backward()
    seen = {param for param in optimizer.targets if optimizer.hooks.norms.is_exact(param)}
    assert seen == due, "only these have had a full gradient"
    optimizer.step()
    assert all(param in optimizer.state for param in optimizer.targets)


# -- odd uses ----------------------------------------------------------------------------------------------------------


def steps_of(
    make: Callable[[], nn.Module], mode: str, *, fused: bool, between: Callable[[nn.Module, int], None]
) -> Any:
    """Twelve fp64 steps; ``between`` changes the model before each."""
    torch.manual_seed(0)
    model = make().double()
    optimizer = GaLoreOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, rank=4, scale=1.0, mode=mode, fused_backward=fused,
        target_modules=[nn.Linear], update_proj_gap=5,
    )  # fmt: skip
    for step in range(12):
        between(model, step)
        x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def nothing(model: nn.Module, step: int) -> None:
    pass


def freeze_and_unfreeze(model: nn.Module, step: int) -> None:
    model.get_submodule("middle").requires_grad_(step >= 6)


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_frozen_layers_that_train_later(mode: str) -> None:
    fused, ordinary = (steps_of(Net, mode, fused=one, between=freeze_and_unfreeze) for one in (True, False))
    assert max_difference(fused.parameters(), ordinary.parameters()) <= 1e-12
    assert max_difference(fused.middle.parameters(), Net().double().middle.parameters()) > 1e-3


class Apart(Net):
    """The square weight is used in two regions that are computed again one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=True)
        return self.last(x)


def test_reentrant_checkpointing_of_a_weight_used_twice_is_added_up_in_mode_project() -> None:
    torch.manual_seed(0)
    x, gradients = torch.randn(4, 24, dtype=torch.float64), []
    for fused in (True, False):
        model, optimizer, _ = train("project", fused=fused, steps=3, update_proj_gap=1000, stagger=False)
        model.__class__ = Apart
        optimizer.zero_grad()
        model(x).square().mean().backward()
        gradients.append([low_grad.grad for low_grad in optimizer.hooks.waiting.values()])
    assert len(gradients[0]) == 3
    for one, other in zip(*(sorted(some, key=lambda low: low.shape) for some in gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_second_gradients_are_refused_in_mode_layerwise() -> None:
    settings = {"update_proj_gap": 1000, "stagger": False}
    model, held, _ = train("layerwise", fused=True, steps=3, **settings)
    model.__class__ = Apart
    x = torch.randn(4, 24, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"got a second gradient after it was updated.*use_reentrant=False"):
        model(x).sum().backward()
    assert held.targets  # without its optimizer a layer is as ever

    class Outside(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.first.weight.sum()  # whose input needs no gradient

    model, held, _ = train("layerwise", fused=True, steps=3, **settings)
    model.__class__ = Outside
    with pytest.raises(RuntimeError, match=r"a weight that is used outside its nn\.Linear too"):
        model(x).sum().backward()
    assert held.targets


def test_a_backward_that_shall_be_differentiated_is_refused() -> None:
    model, held, _ = train("project", fused=True, steps=2, update_proj_gap=1000, stagger=False)
    x = torch.randn(4, 24, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"create_graph=True.*Set fused_backward=False, or name.*ignore_modules"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    assert torch.autograd.grad(model(x).sum(), x)[0].shape == x.shape
    assert held.targets


def test_dtypes_that_do_not_fit_are_refused_as_ever() -> None:
    model, held, _ = train("project", fused=True, steps=2, update_proj_gap=1000, stagger=False)
    with pytest.raises(RuntimeError, match="same dtype"):
        model(torch.randn(4, 24, dtype=torch.float32))
    assert held.targets


class InPlace(nn.Sequential):
    """What its first layer gives is changed in place; that sees single rows, a matrix or a batch of sequences."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(nn.Linear(24, 16), nn.ReLU(inplace=True), nn.Linear(16, 24))
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(InPlace, self).forward(part) for part in x.view(-1, *self.shape, 24)])


@pytest.mark.parametrize("shape", [(), (4,), (2, 2)], ids=str)
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_outputs_that_are_changed_in_place(mode: str, shape: tuple[int, ...]) -> None:
    fused, ordinary = (steps_of(lambda: InPlace(shape), mode, fused=one, between=nothing) for one in (True, False))
    assert max_difference(fused.parameters(), ordinary.parameters()) <= 1e-12


def test_other_weights_in_place_of_the_layers_own_get_gradients_as_ever() -> None:
    model, held, _ = train("project", fused=True, steps=2, update_proj_gap=1000, stagger=False)
    others = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    torch.func.functional_call(model, others, (torch.randn(4, 24, dtype=torch.float64),)).sum().backward()
    assert all(param.grad is not None and bool(param.grad.any()) for param in others.values())
    assert not held.hooks.waiting


# -- norms, and who scales them ----------------------------------------------------------------------------------------


def test_the_norm_is_that_of_what_is_kept() -> None:
    norms = {}
    for fused in (True, False):
        model, optimizer, _ = train("project", fused=fused, steps=3, update_proj_gap=1000, stagger=False)
        optimizer.zero_grad()
        x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model(x).square().mean().backward()
        low = [low_grad.grad for low_grad in optimizer.hooks.waiting.values()]
        dense = [param.grad for param in model.parameters() if param.grad is not None]
        kept = torch.cat([one.flatten() for one in (*low, *dense)]).norm()
        norms[fused] = float(optimizer.grad_norm()), float(kept)
        shown: list[Tensor] = []
        with optimizer.exposed():
            shown = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            assert float(torch.cat([one.flatten() for one in shown]).norm()) == pytest.approx(norms[fused][0])
    assert norms[True][0] == pytest.approx(norms[True][1])
    assert norms[False][1] == pytest.approx(norms[True][1])
    assert norms[False][0] > norms[False][1] * 1.001, "without fused layers it is the full norm"


def test_clipping_says_which_norm_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    run("project", settings={"fused_backward": True}, gradient_clip_val=0.5, max_epochs=1)
    said = [record.message for record in caplog.records if "fused_backward has no full" in record.message]
    assert len(said) == 1
    assert "the norm of what is kept" in said[0]


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_grad_scaler_that_skips_steps(clip: float | None) -> None:
    ours, reference = (plain_loop("project", clip=clip, fused_backward=fused) for fused in (True, False))
    assert ours[2] == reference[2]
    if clip is None:  # else the norms differ
        assert max_difference(ours[0].parameters(), reference[0].parameters()) <= 2e-6
    steps = [state["galore_step"] for state in ours[1].state.values() if "galore_step" in state]
    assert steps == [24 - len(OVERFLOWS)] * 2


def test_fp16_under_the_trainer() -> None:
    runs = [run("project", model=Overflowing, plugins=[mixed()], settings={"fused_backward": one})[0]
            for one in (True, False)]  # fmt: skip
    assert max_difference(runs[0].parameters(), runs[1].parameters()) <= 2e-3
