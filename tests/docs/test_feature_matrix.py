# SPDX-License-Identifier: Apache-2.0
"""The table of methods in ``docs/feature-matrix.md`` says what happens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from lightning_galore import GaLoreOptimizer
from lightning_galore.config import METHODS
from lightning_galore.named_optimizers import named_optimizer
from lightning_galore.sharding import shard_placement

PAGE = Path(__file__).parents[2] / "docs" / "feature-matrix.md"
COLUMNS: dict[str, dict[str, Any]] = {
    "`step`": {"mode": "step"},
    "`project`": {"mode": "project"},
    "`layerwise`": {"mode": "layerwise"},
    "`fused_backward`": {"mode": "layerwise", "fused_backward": True},
    "int8 weights": {"weight_storage": "int8"},
    "FSDP2": {},
}


def table() -> tuple[list[str], dict[str, list[str]]]:
    """The names of the columns, and the cells of each method."""
    lines = [line.strip("|").split("|") for line in PAGE.read_text("utf8").splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    start = next(i for i, row in enumerate(rows) if row[0] == "method")
    found = {row[0].strip("`"): row[1:] for row in rows[start + 2 :] if row[0].strip("`") in METHODS}
    return rows[start][1:], found


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of this process alone."""
    place = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def take_two_steps(method: str, settings: dict[str, Any], mesh: Any = None) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    if mesh is not None:
        fully_shard(model, mesh=mesh, shard_placement_fn=shard_placement(1))
    if method == "swan":
        base: Any = SGD(model.parameters(), lr=1e-2)
    else:
        base = named_optimizer("adamw8bit" if METHODS[method].get("moment_storage") else "adamw", lr=1e-2)(
            model.parameters()
        )
    needed = {"random_after": 5} if method == "golore" else {}
    rank = METHODS[method].get("rank", 4)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = GaLoreOptimizer(base, model, method=method, rank=rank, **needed, **settings)
    for _ in range(2):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [p.detach() for p in model.parameters()]
    assert mesh is not None or all(not torch.equal(a, torch.as_tensor(b)) for a, b in zip(before, after, strict=True))


def test_every_method_has_its_row() -> None:
    columns, rows = table()
    assert columns == list(COLUMNS)
    assert list(rows) == list(METHODS)
    assert all(cell in ("yes", "refused") for row in rows.values() for cell in row)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_every_cell_is_true(method: str, mesh: Any) -> None:
    if METHODS[method].get("moment_storage"):
        pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    for column, cell in zip(COLUMNS, table()[1][method], strict=True):
        sharded = mesh if column == "FSDP2" else None
        if cell == "refused":
            with pytest.raises(ValueError, match=r"\w+=.*(Use|Set)"):
                take_two_steps(method, COLUMNS[column], sharded)
        else:
            take_two_steps(method, COLUMNS[column], sharded)
