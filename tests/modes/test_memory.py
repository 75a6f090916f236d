# SPDX-License-Identifier: Apache-2.0
"""No gradient piles up in backward: how many are alive after it, and how many bytes are at its worst moment."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer
from tests.helpers import Matrices
from tests.strategies.modules import PROJECTED, Make, Tiny, adamw, galore, loader, make_trainer

from .common import BACKWARD_MODES, MODES, full_gradients, projected, run
from .tracker import LiveBytes

pytestmark = pytest.mark.filterwarnings("ignore:mode=.(project|layerwise).. in on_after_backward:UserWarning")

WIDTH, LAYERS, RANK = 256, 6, 4
ONE = WIDTH * WIDTH * 4  # bytes of a layer's gradient
LOW = WIDTH * RANK * 4  # of its low-rank gradient, or of its basis


class Watched(Tiny):
    """Notes after every backward which parameters hold a gradient, and before it which are due for a refresh."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.alive: list[set[str]] = []
        self.due: list[set[str]] = []

    def on_before_backward(self, loss: Tensor) -> None:
        (optimizer,) = self.trainer.optimizers
        self.due.append({name for name in PROJECTED if optimizer.is_due(self.get_parameter(name))})  # type: ignore[attr-defined]

    def on_after_backward(self) -> None:
        self.alive.append(set(full_gradients(self)))


class WatchedByHand(Watched):
    """The same in manual optimization."""

    def __init__(self, make: Make = adamw) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(self.loss(batch))
        optimizer.step()  # type: ignore[union-attr]


# Gap 4 over 12 batches: three of them refresh.
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_alive_after_backward(mode: str, precision: Any) -> None:
    model, trainer = run(mode, model=Watched, max_epochs=2, precision=precision)
    everything = {name for name, _ in model.named_parameters()}
    assert projected(trainer.optimizers[0], model) == set(PROJECTED)  # type: ignore[arg-type]
    expected = {"step": everything, "project": everything - set(PROJECTED), "layerwise": set()}[mode]
    assert model.alive == [expected] * 12


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_gradients_alive_inside_a_window(mode: str) -> None:
    """Only a weight that is due keeps its gradient, and the small ones that are not projected."""
    model, _ = run(mode, model=Watched, max_epochs=8, accumulate_grad_batches=3)
    everything = {name for name, _ in model.named_parameters()}
    rest = everything - set(PROJECTED)
    assert len(model.alive) == 8 * 6
    for i, alive in enumerate(model.alive):
        if i % 3 == 2:
            assert alive == (rest if mode == "project" else set())
        else:
            assert alive == rest | model.due[i]
    # Gap 4 over 16 windows, and two weights that take turns.
    assert {name: sum(name in due for due in model.due[::3]) for name in PROJECTED} == dict.fromkeys(PROJECTED, 4)
    assert not any(due == set(PROJECTED) for due in model.due)


def test_gradients_alive_in_manual_optimization() -> None:
    by_hand, _ = run("layerwise", model=WatchedByHand, max_epochs=2)
    assert by_hand.alive == [set()] * 12
    by_hand, _ = run("project", model=WatchedByHand, max_epochs=2)
    rest = {name for name, _ in by_hand.named_parameters()} - set(PROJECTED)
    # Nobody can know whether another backward follows, so a weight that is due waits for step().
    assert by_hand.alive == [rest | due for due in by_hand.due]
    assert [i for i, due in enumerate(by_hand.due) if PROJECTED[0] in due] == [0, 4, 8]


class Stack(LightningModule):
    """Layers whose weights are far larger than their inputs, and a peak for every backward."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)))
        self.peaks: list[int] = []
        self.left: list[int] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        rows = batch[0][:2].repeat(1, WIDTH // 8).to(self.layers[0].weight.dtype)
        return self.layers(rows).square().mean()  # type: ignore[no-any-return]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        with LiveBytes() as tracker:
            super().backward(loss, *args, **kwargs)
        self.peaks.append(tracker.peak)
        self.left.append(tracker.current)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def peaks(mode: str, *, gap: int, **settings: Any) -> Stack:
    """One backward to begin with, in which the state is made and all weights refresh, and five more."""
    model = Stack()
    strategy = galore(mode=mode, rank=RANK, update_proj_gap=gap, target_modules=".*", stagger=False)
    make_trainer(strategy, max_epochs=1, **settings).fit(model, loader())
    assert len(model.peaks) == 6
    return model


SLACK = ONE // 8  # the layers' inputs and their gradients
BLOCKS = 8 * WIDTH * (RANK + 8) * 4  # what a range finder works with: a few tall blocks of rank + 8 columns


@pytest.mark.parametrize("gap", [1, 100], ids=["refresh", "no refresh"])
@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_peak_of_backward_drops_by_all_gradients_but_one(mode: str, gap: int) -> None:
    step, ours = peaks("step", gap=gap), peaks(mode, gap=gap)
    for i, (theirs, peak) in enumerate(zip(step.peaks, ours.peaks, strict=True)):
        refresh = gap == 1 or i == 0
        # The state that is made in the first backward, and what waits for the step: a proxy, its gradient, a new basis.
        low = LAYERS * LOW * ((2 if i == 0 else int(refresh)) if mode == "layerwise" else (2 + refresh))
        assert theirs >= LAYERS * ONE
        assert theirs - peak >= (LAYERS - 1) * ONE - low - refresh * BLOCKS - SLACK
        # Nothing of a gradient's size besides the one that is being consumed.
        assert peak <= ONE + low + refresh * BLOCKS + SLACK


def test_what_is_left_after_backward() -> None:
    left = {mode: peaks(mode, gap=100).left[1:] for mode in MODES}
    assert min(left["step"]) >= LAYERS * ONE
    # Two low-rank tensors a weight: the proxy and its gradient; and the squared norms.
    assert max(left["project"]) <= LAYERS * 2 * LOW + 1024
    assert max(left["layerwise"]) <= 1024


@pytest.mark.parametrize("mode", BACKWARD_MODES)
def test_accumulation_adds_up_in_low_rank(mode: str) -> None:
    model = peaks(mode, gap=100, accumulate_grad_batches=3)
    first, second = model.peaks[:3], model.peaks[3:]
    assert min(first[1:]) >= ONE  # all are due in the first window: each new gradient is added to one that is kept
    assert max(second) <= ONE + LAYERS * 2 * LOW + SLACK


@pytest.mark.parametrize("mode", BACKWARD_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_loop_peaks_at_one_gradient(mode: str, dtype: torch.dtype) -> None:
    """Also where the norm is taken in fp32: it needs no copy of the gradient."""
    model = Stack(dtype)
    optimizer = GaLoreOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, foreach=False),
        model, mode=mode, rank=RANK, target_modules=".*", update_proj_gap=100, stagger=False,
    )  # fmt: skip
    one = ONE * dtype.itemsize // 4
    for step in range(3):
        rows = torch.randn(2, WIDTH, dtype=dtype)
        loss = model.layers(rows).square().mean()
        with LiveBytes() as tracker:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:
            assert one <= tracker.peak <= one * 1.5


def test_weights_that_are_not_projected_are_freed_too() -> None:
    """In layerwise mode, where a dense weight is stepped alone; AdamW's own work space is a few times its size."""
    found = {}
    for mode in MODES:
        model = Stack()
        optimizer = GaLoreOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-3), model, mode=mode, rank=RANK, target_modules=r"layers\.0"
        )
        for _ in range(2):
            loss = model.layers(torch.randn(2, WIDTH)).square().mean()
            with LiveBytes() as tracker:
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found[mode] = tracker.peak
    assert found["step"] >= LAYERS * ONE
    assert found["project"] >= (LAYERS - 1) * ONE
    assert found["layerwise"] <= ONE + SLACK


def test_hooks_do_not_keep_an_optimizer_alive() -> None:
    model = Matrices((16, 8))
    optimizer = GaLoreOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, mode="layerwise", rank=2)
    before = model.layers[0].weight.detach().clone()
    del optimizer
    gc.collect()
    model.layers[0](torch.ones(1, 8)).sum().backward()
    assert model.layers[0].weight.grad is not None
    assert torch.equal(model.layers[0].weight, before)


# -- the tracker itself ------------------------------------------------------------------------------------------------


def test_tracker_counts_storages_once_and_until_they_are_freed() -> None:
    before = torch.zeros(100)
    with LiveBytes() as tracker:
        before.add_(1)
        assert tracker.current == 0
        one = torch.zeros(100)
        view = one[10:].view(9, 10)
        assert (tracker.current, tracker.peak) == (400, 400)
        two = one + before
        assert (tracker.current, tracker.peak) == (800, 800)
        del one
        assert tracker.current == 800  # the view holds it
        del view, two
        assert (tracker.current, tracker.peak, tracker.largest) == (0, 800, 400)


def test_tracker_sees_backward() -> None:
    weights = [nn.Parameter(torch.randn(64, 64)) for _ in range(3)]
    rows = torch.ones(1, 64)
    for weight in weights:
        rows = rows @ weight
    loss = rows.sum()
    with LiveBytes() as tracker:
        loss.backward()
    gradients = 3 * 64 * 64 * 4
    assert gradients <= tracker.current <= tracker.peak <= gradients + 8 * 64 * 4
    for weight in weights:
        weight.grad = None
    assert tracker.current < 64 * 64
