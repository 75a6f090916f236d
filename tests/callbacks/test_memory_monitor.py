# SPDX-License-Identifier: Apache-2.0
"""The measured peak under the Trainer, beside the predicted one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_galore import GaLoreStrategy, MemoryMonitor


class Net(LightningModule):
    def __init__(self, hoards: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        blocks = [layer for _ in range(3) for layer in (nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))]
        self.net = nn.Sequential(nn.Embedding(50, 64), *blocks, nn.Linear(64, 50))
        self.hoards = hoards
        self.kept: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch).flatten(0, 1), batch.flatten())
        if self.hoards and batch_idx:  # not in the first batch, which is rehearsed
            self.kept.append(torch.zeros(self.hoards))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def fit(monitor: MemoryMonitor, strategy: Any = "auto", model: Net | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        strategy=strategy, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **{"callbacks": [monitor], "max_steps": 4, "logger": False, **options},
    )  # fmt: skip
    rows = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(1))
    trainer.fit(model or Net(), DataLoader(rows, batch_size=4))
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stagger", [True, False])
@pytest.mark.parametrize("mode", [None, "step", "project", "layerwise"])
def test_measured_is_predicted(mode: Any, stagger: bool, accumulate: int) -> None:
    monitor = MemoryMonitor(track=True)
    strategy = "auto" if mode is None else GaLoreStrategy(rank=8, mode=mode, stagger=stagger)
    fit(monitor, strategy, accumulate_grad_batches=accumulate)
    assert monitor.predicted is not None
    peaks = [moment.total for moment in monitor.predicted.peaks.values()]
    # A few bytes for the numbers that Lightning keeps.
    assert 0.99 * min(peaks) < monitor.measured["peak"] < 1.001 * max(peaks)
    assert monitor.measured["peak"] == sum(size for name, size in monitor.measured.items() if name != "peak")
    assert monitor.measured["weights"] == 4 * sum(param.numel() for param in Net().parameters())
    if accumulate == 1:
        assert monitor.measured["peak"] == pytest.approx(monitor.predicted.peaks["ordinary"].total, rel=0.001)
        assert (monitor.measured["bases"] > 0) == (mode is not None)
        assert (monitor.measured["gradients"] == 0) == (mode == "layerwise")


def test_warns_of_more_than_a_tenth() -> None:
    monitor = MemoryMonitor(track=True)
    with pytest.warns(UserWarning, match=r"is \d+% above the predicted .* Something else may hold memory"):
        fit(monitor, GaLoreStrategy(rank=8), Net(hoards=500_000))
    fit(MemoryMonitor(track=True, tolerance=0.99), GaLoreStrategy(rank=8), Net(hoards=10_000))


def test_it_watches_the_first_steps_and_logs_them(tmp_path: Any) -> None:
    from lightning.pytorch.loggers import CSVLogger

    monitor = MemoryMonitor(track=True, steps=2)
    logger = CSVLogger(tmp_path)
    model = Net(hoards=100)
    fit(monitor, GaLoreStrategy(rank=8, mode="layerwise"), model, logger=logger, max_steps=6)
    (row,) = [row for row in logger.experiment.metrics if "memory/peak_bytes" in row] or [None]
    if row is not None:  # else the logger has written it already
        assert row["memory/peak_bytes"] == monitor.measured["peak"]
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert "memory/predicted_bytes" in text
    assert not any(param._post_accumulate_grad_hooks for param in model.parameters())
    assert len(model.kept) == 5  # training went on, unwatched


def test_weights_are_those_of_a_run_that_nobody_watched() -> None:
    models = [Net(), Net()]
    for model, callbacks in zip(models, ([MemoryMonitor(track=True)], []), strict=True):
        fit(MemoryMonitor(), GaLoreStrategy(rank=8, mode="project"), model, callbacks=callbacks)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_rehearsed_is_measured_all_the_same() -> None:
    monitor = MemoryMonitor(track=True)
    with pytest.warns(UserWarning, match="cannot be rehearsed \\(manual optimization"):
        fit(monitor, GaLoreStrategy(rank=8), ByHand())
    assert monitor.predicted is None
    assert monitor.measured["peak"] > monitor.measured["weights"]


def test_without_cuda_it_must_be_asked_to_track() -> None:
    monitor = MemoryMonitor()
    with pytest.warns(UserWarning, match=r"MemoryMonitor\(track=True\)"):
        fit(monitor)
    assert monitor.measured == {}


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"tolerance": 0.0}, {"tolerance": 1.5}])
def test_refusals(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MemoryMonitor(**wrong)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", [None, "step", "project", "layerwise"])
def test_the_allocator_agrees(mode: Any) -> None:
    """Large enough that the allocator's rounding does not count."""

    class Large(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Embedding(500, 1024), *[nn.Linear(1024, 1024) for _ in range(8)])

    monitor = MemoryMonitor()
    strategy = "auto" if mode is None else GaLoreStrategy(rank=64, mode=mode)
    trainer = Trainer(
        strategy=strategy, callbacks=[monitor], accelerator="gpu", devices=1, max_steps=3, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Large(), DataLoader(torch.randint(0, 500, (64, 16)), batch_size=4))
    assert monitor.predicted is not None
    assert monitor.measured["peak"] == pytest.approx(monitor.predicted.peak.total, rel=0.1)
