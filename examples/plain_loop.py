# SPDX-License-Identifier: Apache-2.0
"""GaLore in a training loop of plain PyTorch: accumulation, clipping, a schedule, and a resumed run.

    python examples/plain_loop.py

Any model and any optimizer of torch or bitsandbytes will do; what is GaLore's are the lines marked so.
Of these only the first is needed in the default mode.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
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


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """How far the outputs are from the reversed inputs."""
    return nn.functional.mse_loss(model(inputs), inputs.flip(1))


def train(*, stop_at: int = STEPS, save: Path | None = None, resume: Path | None = None, mode: str = "step") -> Any:
    """Train up to ``stop_at`` steps, from the beginning or from a checkpoint; the trained model."""
    model = make_model()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    optimizer = GaLoreOptimizer(base, model, rank=8, update_proj_gap=5, scale=1.0, mode=mode)  # GaLore
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    first = 0
    if resume is not None:
        checkpoint = torch.load(resume, weights_only=True)  # tensors and numbers: nothing in it is run
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        first = checkpoint["step"]
    batches = make_batches()
    for step in range(first, stop_at):
        for number, inputs in enumerate(batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]):
            more_to_come = number + 1 < ACCUMULATE
            # Needed where backward consumes gradients (modes "project" and "layerwise"); in "step" it does nothing.
            with optimizer.accumulate() if more_to_come else nullcontext():  # GaLore
                loss = loss_of(model, inputs)
                (loss / ACCUMULATE).backward()
        # Mode "project" has no full gradients any more; this shows what there is instead. In "step" it does nothing.
        with optimizer.exposed():  # GaLore
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 8 == 7:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if save is not None:
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        torch.save({**states, "step": stop_at}, save)
    return model


def main() -> None:
    """Train without a stop, and with one in the middle."""
    whole = train()
    with tempfile.TemporaryDirectory() as folder:
        train(stop_at=STEPS // 2, save=Path(folder, "half.pt"))
        resumed = train(resume=Path(folder, "half.pt"))
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    print(f"the resumed run has the same weights, bit by bit: {same}")


if __name__ == "__main__":
    main()
