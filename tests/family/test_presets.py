# SPDX-License-Identifier: Apache-2.0
"""What must hold for every preset of the dictionary, one that is added tomorrow included: resuming, bytes."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")  # the benchmarks draw

from benchmarks.quantized import step_and_count
from lightning_galore import GaLoreOptimizer
from lightning_galore.config import METHODS
from lightning_galore.config.presets import NEEDED
from lightning_galore.lift import LIFTS

from .loops import assert_same_state, run

GAP, STOPS, END = 4, (4, 6), 12  # stopped right before a refresh, and between two
#: What a preset cannot do without, and what lets it show itself on small weights.
MORE: dict[str, dict[str, Any]] = {
    "galore-plus": {"head_size": 4},
    "adarankgrad": {"rank_energy": 0.5},
    "spam": {"spam_theta": 20.0, "reset_gap": 5, "reset_warmup": 2},
    "stable-spam": {"reset_gap": 5},
}


class Block(nn.Module):
    """Queries that have heads, a tall and a wide weight, and biases that are not projected."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.q_proj, self.up, self.down = nn.Linear(12, 16), nn.Linear(12, 30), nn.Linear(30, 12)


def settings_of(method: str) -> dict[str, Any]:
    needed = {axis: 6 for axis, choice in METHODS[method].items() if choice == NEEDED}
    rank = {} if "rank" in METHODS[method] else {"rank": 5}
    gap = {} if "update_proj_gap" in METHODS[method] else {"update_proj_gap": GAP}
    return {"method": method, **rank, **gap, **needed, **MORE.get(method, {})}


def made(method: str, mode: str, **settings: Any) -> tuple[Block, GaLoreOptimizer]:
    model = Block()
    base: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if METHODS[method].get("moment_storage") == "8bit":
        base = pytest.importorskip("bitsandbytes").optim.AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=16)
    elif METHODS[method].get("lift") == "whiten":
        base = torch.optim.SGD(model.parameters(), lr=1e-2)
    return model, GaLoreOptimizer(base, model, mode=mode, **{**settings_of(method), **settings})


def cases() -> list[tuple[str, str]]:
    needy = {method for method, row in METHODS.items() if LIFTS[row.get("lift", "project_back")].needs_grad}
    return [
        (m, mode) for m in METHODS for mode in ("step", "project", "layerwise") if m not in needy or mode != "project"
    ]


def values(model: nn.Module) -> list[Tensor]:
    return [getattr(p, "codes", p).detach() for p in model.parameters()]


@pytest.mark.parametrize(("method", "mode"), cases())
def test_a_resumed_run_ends_with_the_same_bits(method: str, mode: str) -> None:
    for stop in STOPS:
        model, optimizer = made(method, mode)
        start = [value.clone() for value in values(model)]
        run(optimizer, list(model.parameters()), range(stop))
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
        other, again = made(method, mode)
        other.load_state_dict(saved["model"])
        again.load_state_dict(saved["optimizer"])
        for one, two in ((model, optimizer), (other, again)):
            run(two, list(one.parameters()), range(stop, END))
        for before, a, b in zip(start, values(model), values(other), strict=True):
            assert torch.equal(a, b)
            assert not torch.equal(a, before), "nothing moved"
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert_same_state(dict(optimizer.state[a]), dict(again.state[b]))


@pytest.mark.parametrize(("method", "mode"), cases())
def test_predicted_bytes_are_held(method: str, mode: str) -> None:
    # All refresh at the first step; ranks that shrink are planned as wide as they may be, and all of the energy
    # leaves them there.
    more = {"rank_energy": 1.0} if METHODS[method].get("rank_rule") else {}
    _, optimizer = made(method, mode, stagger=False, **more)
    predicted = optimizer.footprint()
    assert predicted.moments > 0 or METHODS[method].get("lift") == "whiten"  # over SGD without momentum
    foreseen = sum(row.state_bytes or 0 for row in optimizer.targets_table().taken)
    assert step_and_count(optimizer) == asdict(predicted)
    assert optimizer.footprint() == predicted
    assert sum(status.state_bytes for status in optimizer.subspaces()) == foreseen
