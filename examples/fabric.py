# SPDX-License-Identifier: Apache-2.0
"""GaLore under Lightning Fabric: precision, accumulation, clipping, a schedule, and a resumed run.

    python examples/fabric.py

Fabric takes a GaLoreOptimizer like any other: wrap the optimizer first, then hand both to ``fabric.setup``.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from torch import Tensor, nn

from lightning_galore import GaLoreOptimizer

STEPS, ACCUMULATE = 24, 2


def make_model() -> nn.Module:
    """A small network, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))


def make_batches(seed: int = 1) -> list[Tensor]:
    """Inputs; the target of each is itself, in reverse."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 32, generator=generator) for _ in range(STEPS * ACCUMULATE)]


def train(
    *,
    stop_at: int = STEPS,
    save: Path | None = None,
    resume: Path | None = None,
    mode: str = "step",
    precision: Any = "32-true",
) -> Any:
    """Train up to ``stop_at`` steps, from the beginning or from a checkpoint; the trained model."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    model = make_model()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    optimizer: Any = GaLoreOptimizer(base, model, rank=8, update_proj_gap=5, scale=1.0, mode=mode)  # GaLore
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    model, optimizer = fabric.setup(model, optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}
    if resume is not None:
        fabric.load(resume, state)
    batches = make_batches()
    for step in range(state["step"], stop_at):
        for number, inputs in enumerate(batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]):
            more_to_come = number + 1 < ACCUMULATE
            marked = optimizer.accumulate() if more_to_come else nullcontext()  # for modes "project" and "layerwise"
            with fabric.no_backward_sync(model, enabled=more_to_come), marked:
                loss = nn.functional.mse_loss(model(inputs), inputs.flip(1))
                fabric.backward(loss / ACCUMULATE)
        with optimizer.exposed():  # needed in mode "project" only, where the full gradients are gone
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        state["step"] = step + 1
        if step % 8 == 7:
            fabric.print(f"step {step + 1}: loss {loss.item():.3f}")
    if save is not None:
        fabric.save(save, state)
    return model.module


def main() -> None:
    """Train without a stop, and with one in the middle."""
    whole = train()
    with tempfile.TemporaryDirectory() as folder:
        train(stop_at=STEPS // 2, save=Path(folder, "half.ckpt"))
        resumed = train(resume=Path(folder, "half.ckpt"))
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    print(f"the resumed run has the same weights, bit by bit: {same}")


if __name__ == "__main__":
    main()
